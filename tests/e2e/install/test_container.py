"""The Containerfile: linted, built and run by podman, with the commands of docs/install.md."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forms
from tests.debian import surroundings, tree
from tests.e2e.install import mail
from tests.e2e.install.conftest import BUILDER
from tests.peers import program
from tests.program import ROOT
from tests.waiting import wait_for

pytestmark = [pytest.mark.either_form("it is the package that is asked which form it has"), pytest.mark.timeout(900)]
BASE = "docker.io/library/debian:13-slim"
#: In front of podman: how it gets along here, without a word of it in the commands that are typed.
PODMAN = """\
#!/bin/sh
if [ "$1" = build ]; then
    shift
    exec {podman} build --pull=never --network=host {more} "$@"
fi
exec {podman} "$@"
"""


class Podman:
    """Podman with a storage of its own; what it makes is gone with the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = {
            "storage.conf": f'[storage]\ndriver = "overlay"\nrunroot = "{directory}/run"\n'
            f'graphroot = "{directory}/storage"\n',
            # Limits no higher than ours, which not every root may raise; a runtime that knows every kind of cgroups.
            "containers.conf": f'[containers]\ndefault_ulimits = ["nofile={descriptors}:{descriptors}", '
            '"nproc=4096:4096"]\n[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n',
        }
        for name, text in files.items():
            (directory / name).write_text(text)
        authorities = {value for name, value in surroundings().items() if "CERT" in name and Path(value).is_file()}
        environ = surroundings() | forms.A_FEW
        more = [f"--env={name}={value}" for name, value in environ.items() if name != "PIP_FIND_LINKS"]
        more += [f"--volume={file}:{file}:ro" for file in sorted(authorities)]
        wrapper = directory / "bin" / "podman"
        wrapper.parent.mkdir()
        wrapper.write_text(PODMAN.format(podman=program("podman"), more=" ".join(f"'{word}'" for word in more)))
        wrapper.chmod(0o755)
        self.environ = os.environ | {
            "PATH": f"{wrapper.parent}:{os.environ['PATH']}",
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "DISABLE_HC_SYSTEMD": "true",  # its timer would be systemd's; the check is made by hand
            "BUILDAH_RUNTIME": program("runc"),
        }

    def sh(self, script: str, cwd: Path, fails: bool = False) -> str:
        done = subprocess.run(
            ["bash", "-euc", script],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=cwd,
            env=self.environ,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """With Debian's base image, made here from its packages: no registry is asked."""
    program("runc")
    base = tree("trixie", *BUILDER)
    directory = tmp_path_factory.mktemp("podman")
    podman = Podman(directory)
    podman.sh(f"tar -C {base} -c . | podman import --quiet - {BASE}", directory)
    try:
        yield podman
    finally:
        podman.sh("podman rm --all --force --time=0; podman rmi --all --force", directory)
        shutil.rmtree(directory, ignore_errors=True)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "Containerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_three_commands_and_mail_of_two_mtas(podman: Podman, checkout: Path) -> None:
    """PID 1 and not root; its log, reload, health, control and stop, as the page says."""
    place = mail.place()
    text = place.fill_in(mail.commands("Container image"))
    status = f"{place.door}:1809"
    for old, new in (("127.0.0.1:1809", status), ("@greenarrow_proxy", f"@{podman.directory.parent.name}-proxy")):
        assert old in text
        text = text.replace(old, new)
    podman.sh(text, checkout)
    configuration = podman.sh("cat greenarrow_proxy.conf", checkout)
    wait_for(lambda: "listening on" in podman.sh("podman logs greenarrow_proxy", checkout), 120, "it listens")
    mail.by_two_mtas(place, mail.secret_of(configuration), native_port=1807)

    (state,) = json.loads(podman.sh("podman inspect greenarrow_proxy", checkout))
    inside = Path(f"/proc/{state['State']['Pid']}/status").read_text()
    assert re.search(r"^Uid:\t10001\t", inside, re.MULTILINE)
    assert re.search(r"^NSpid:.*\t1$", inside, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", inside, re.MULTILINE)
    said = podman.sh("podman exec greenarrow_proxy greenarrow_proxy --version", checkout)
    assert "(relay: compiled, core: compiled)" in said

    podman.sh("podman healthcheck run greenarrow_proxy", checkout)
    podman.sh("podman kill --signal=STOP greenarrow_proxy", checkout)
    podman.sh("podman healthcheck run greenarrow_proxy", checkout, fails=True)  # it does not answer
    podman.sh("podman kill --signal=CONT greenarrow_proxy", checkout)
    for command in re.findall(r"^\| [^|]+ \| `(podman (?:kill|exec)[^`]*)` \|$", mail.PAGE.read_text(), re.MULTILINE):
        podman.sh(command, checkout)
    wait_for(lambda: "reload: the new" in podman.sh("podman logs greenarrow_proxy", checkout), 60, "it has reloaded")
    podman.sh("podman stop --time=75 greenarrow_proxy", checkout)
    assert "stop: stopped" in podman.sh("podman logs greenarrow_proxy", checkout)
    (state,) = json.loads(podman.sh("podman inspect greenarrow_proxy", checkout))
    assert state["State"]["ExitCode"] == 0

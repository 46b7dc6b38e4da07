"""`make pex`: the program as one file, at any place, under any name, for any user; and on a fresh Debian."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian import Machine, tree
from tests.e2e.install import mail
from tests.e2e.install.conftest import FRESH, made
from tests.program import SECRET
from tests.waiting import wait_for

pytestmark = [pytest.mark.either_form("it is the package that is asked which form it has"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def pex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For Debian's own Python."""
    out = tmp_path_factory.mktemp("pex")
    made("pex", out, "PYTHON=/usr/bin/python3")
    (pex,) = out.glob("greenarrow_proxy-*-py3*.pex")
    return pex


@pytest.fixture(scope="module")
def elsewhere(pex: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Under another name in a directory that everybody can look into and nobody but its user can change."""
    with mail.peers.directory("nobody" if os.geteuid() == 0 else None) as directory:
        shutil.copy(pex, directory / "a proxy")
        (directory / "a proxy").chmod(0o555)
        yield directory


def command(directory: Path, *arguments: str) -> list[str]:
    """As a user without rights, where we can become one; of the environment it has nothing but a place to unpack."""
    other = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"] if os.geteuid() == 0 else []
    environ = ["env", "-i", "PATH=/usr/bin:/bin", f"PEX_ROOT={directory}/unpacked"]
    return [*other, *environ, str(directory / "a proxy"), *arguments]


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, *arguments), capture_output=True, text=True, timeout=120, cwd="/", check=False
    )


def test_it_has_the_compiled_relay(elsewhere: Path) -> None:
    done = run(elsewhere, "--version")
    assert re.fullmatch(r"greenarrow_proxy \S+ \(relay: compiled, core: compiled\)\n", done.stdout), done.stderr


def test_signals_reload_and_control(elsewhere: Path) -> None:
    config = elsewhere / "proxy.conf"
    name = f"@{elsewhere.name}"
    text = f"listen_socks5 127.0.0.1:0\nallow_from 127.0.0.1\nauth_shared_secret {SECRET}\ncontrol_socket {name}\n"
    config.write_text(text)
    config.chmod(0o644)
    log = elsewhere / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command(elsewhere, f"--config-filename={config}"), stdout=file, stderr=file, cwd="/")

    def wait_line(pattern: str) -> str:
        return wait_for(
            lambda: (match := re.search(pattern, log.read_text())) and match[0], 60, f"{pattern} in {log.read_text()}"
        )

    try:
        port = int(wait_line(r"listening on 127\.0\.0\.1:\d+ ").rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), 30).close()
        done = run(elsewhere, "ctl", "--socket", name, "show", "listeners")
        assert f"127.0.0.1:{port}" in done.stdout, done.stderr
        config.write_text(text + "connect_timeout 7s\n")
        process.send_signal(signal.SIGHUP)
        wait_line(r"reload: the new configuration is in force")
        done = run(elsewhere, "ctl", "--socket", name, "show", "config", "connect_timeout")
        assert "7s" in done.stdout, done.stderr
        process.send_signal(signal.SIGUSR1)
        wait_line(r"direct_remote_smtp: connections=0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "stop: stopped" in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_fresh_debian_three_commands_and_mail_of_two_mtas(pex: Path) -> None:
    place = mail.place()
    text = place.fill_in(mail.commands("One file (pex)")).replace("greenarrow_proxy-0.1.0-py311.pex", pex.name)
    assert pex.name in text
    with Machine(tree("bookworm", *FRESH)) as machine:
        machine.put(pex)
        with machine.typed(text) as shell:
            configuration = mail.wait_for_service(place, machine.root / "opt/greenarrow/greenarrow_proxy.conf", shell)
            mail.by_two_mtas(place, mail.secret_of(configuration))
        assert "stop: stopped" in machine.said


def test_a_python_that_it_is_not_for_is_told(pex: Path) -> None:
    """Not a traceback of some module that is missing."""
    other = "trixie" if "py311" in pex.name else "bookworm"
    with Machine(tree(other, *FRESH)) as machine:
        done = machine.run(machine.put(pex), "--version", fails=True)
        assert "Traceback" not in done.stderr
        assert re.search(r"CPython==3\.\d+\.\*", done.stderr)

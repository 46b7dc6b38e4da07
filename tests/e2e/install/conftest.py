"""What is installed: packages made by `make`, once for each file of tests, from what git knows of this checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import forms
from tests.program import ROOT

#: Some moment, so that everything made here is equal byte by byte.
EPOCH = "1764000000"
#: What a Debian has that is no more than bootable, and what the documented commands install: apt finds it there.
FRESH = ("systemd-sysv", "python3", "python3-venv", "adduser", "ca-certificates", "apt-utils")
#: What builds the package, and is the base of the image's two stages.
BUILDER = ("debhelper", "gcc", "libc6-dev", "python3-dev", "python3-venv", "ca-certificates")


def made(target: str, out: Path, *variables: str) -> str:
    """`make TARGET`, into a directory, with a few modules of the core; what it said."""
    done = subprocess.run(
        ["make", target, f"DIST={out}", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=forms.build_environ(SOURCE_DATE_EPOCH=EPOCH, **forms.A_FEW),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, and nothing that lies about here."""
    target = tmp_path_factory.mktemp("checkout") / "greenarrow_proxy"
    target.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    there = b"\0".join(name for name in listed.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file())
    archive = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=there, capture_output=True, check=True, timeout=60
    ).stdout
    subprocess.run(["tar", "-x", "-C", target], input=archive, check=True, timeout=60)
    return target

"""Compiles what is written in C and Rust into bench/build/, when its source is newer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from harness.machine import BENCH, BUILD

GENERATOR = BUILD / "loadgen"
TOKIO_RELAY = BUILD / "tokio_relay" / "target" / "release" / "tokio_relay"
DEBIAN_CRATES = Path("/usr/share/cargo/registry")
_CARGO_CONFIG = f"""\
[source.crates-io]
replace-with = "debian"

[source.debian]
directory = "{DEBIAN_CRATES}"
"""


class BuildError(Exception):
    """A program could not be built; the text says what to install or what the compiler said."""


def _fresh(product: Path, sources: list[Path]) -> bool:
    return product.exists() and all(source.stat().st_mtime <= product.stat().st_mtime for source in sources)


def _run(command: list[str], where: Path, environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=where, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def build_generator() -> None:
    sources = sorted((BENCH / "loadgen").glob("*.[ch]"))
    if _fresh(GENERATOR, sources):
        return
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise BuildError("no C compiler: apt-get install gcc libc6-dev libssl-dev")
    BUILD.mkdir(exist_ok=True)
    files = [str(source) for source in sources if source.suffix == ".c"]
    _run(
        [compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", str(GENERATOR), *files, "-lm", "-lssl", "-lcrypto"],
        BENCH,
    )


def find_cargo() -> str | None:
    return shutil.which("cargo") or shutil.which("cargo", path=os.path.expanduser("~/.cargo/bin"))


def build_tokio_relay() -> None:
    """Builds offline from Debian's packaged crates, so nothing is fetched."""
    here, there = BENCH / "peers" / "tokio_relay", BUILD / "tokio_relay"
    sources = [here / "Cargo.toml", here / "src" / "main.rs"]
    if _fresh(TOKIO_RELAY, sources):
        return
    cargo = find_cargo()
    if not cargo or not list(DEBIAN_CRATES.glob("tokio-1*")):
        raise BuildError("apt-get install cargo librust-tokio-dev")
    shutil.copytree(here, there, dirs_exist_ok=True)
    (there / ".cargo").mkdir(exist_ok=True)
    (there / ".cargo" / "config.toml").write_text(_CARGO_CONFIG)
    tools = os.environ | {"PATH": f"{Path(cargo).parent}:{os.environ['PATH']}"}
    _run([cargo, "build", "--quiet", "--offline", "--release"], there, tools)
    TOKIO_RELAY.touch()

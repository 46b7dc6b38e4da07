"""The machine under the benchmark: cores, limits and kernel settings. Starts nothing, measures nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
ROOT = BENCH.parent
BUILD = BENCH / "build"
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
WANTED_PORT_RANGE = (10240, 65000)
WANTED_FILES = 20000


class Cores:
    """The proxy has one core for itself; generator, sink and log readers share another one."""

    def __init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise SystemExit("bench: two cores are needed, one for the proxy and one for load and sink")
        self.load, self.proxy = cores[0], cores[-1]


def pinned(core: int, command: list[str]) -> list[str]:
    """taskset replaces itself by the command, so the process id is the command's."""
    return ["taskset", "-c", str(core), *command]


def raise_file_limit() -> int:
    """Raises the soft limit to the hard one, for us and all that we start; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextlib.contextmanager
def wide_port_range() -> Iterator[list[str]]:
    """Widens the range of ephemeral ports for the run and puts it back. Yields what the reader must be told."""
    before = PORT_RANGE.read_text()
    low, high = map(int, before.split())
    if (low, high) == WANTED_PORT_RANGE or high - low >= WANTED_PORT_RANGE[1] - WANTED_PORT_RANGE[0]:
        yield []
        return
    wanted = "{} {}".format(*WANTED_PORT_RANGE)
    try:
        PORT_RANGE.write_text(wanted)
    except OSError:
        yield [f"ports {low}-{high} may run out; as root: sysctl -w net.ipv4.ip_local_port_range='{wanted}'"]
        return
    try:
        yield []
    finally:
        PORT_RANGE.write_text(before)


def _read(path: str, default: str = "unknown") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The project's revision, with a mark when proxy/ has changes that are not committed."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "proxy", "greenarrow_proxy.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


#: What has our program run as Python code, whatever is compiled.
PURE = {"GREENARROW_PROXY_PURE": "1"}


@functools.cache
def form(pure: bool = False) -> str:
    """What of our program is compiled, in its own words, as the interpreter of the benchmark runs it."""
    environ = os.environ | (PURE if pure else {})
    python = ROOT / ".venv" / "bin" / "python"
    command = [str(python) if python.exists() else sys.executable, str(ROOT / "greenarrow_proxy.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    words = done.stdout.strip()
    return words[words.find("(") + 1 : -1] if words.endswith(")") else words or "unknown"


def facts() -> dict[str, object]:
    """What a reader needs to know to believe the figures, or to doubt them."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "form": form(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "port_range": _read(str(PORT_RANGE)).replace("\t", "-"),
        "somaxconn": _read("/proc/sys/net/core/somaxconn"),
        "conntrack_entries": _read("/proc/sys/net/netfilter/nf_conntrack_count", "not loaded"),
    }


def complaints() -> list[str]:
    """What makes this machine a poor place to measure right now."""
    found = []
    if os.getloadavg()[0] > 0.5:
        found.append(f"the machine is not quiet (load average {os.getloadavg()[0]:.2f}): ratios will scatter")
    if form() == form(pure=True):
        found.append(f"the columns compiled and pure Python are the same program ({form()}): build it first")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < WANTED_FILES:
        found.append(f"only {files} open files: idle9k and active4k need {WANTED_FILES} (ulimit -n, LimitNOFILE)")
    backlog = int(_read("/proc/sys/net/core/somaxconn", "0"))
    if backlog < 1024:
        found.append(f"somaxconn is {backlog}: connection bursts will be dropped; 4096 is usual")
    return found

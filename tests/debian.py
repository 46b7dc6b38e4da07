"""Whole Debian systems for the tests of installation: trees as debootstrap makes them, used without being changed, and
booted with their own systemd (systemd-nspawn).

    with Machine(tree("bookworm", "systemd-sysv", "python3")) as machine:
        machine.put(package, "/root")
        machine.run("apt-get", "install", "-y", "./greenarrow-proxy.deb")

A machine has its own files, processes, users and cgroups; the network is the caller's, so that MTAs and receivers of
the test reach it on loopback addresses. It needs root, and leaves nothing behind but the trees, which are kept a week.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import pytest

from tests.peers import missing, program
from tests.waiting import wait_for

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "greenarrow_proxy-trees"
#: Packages that are older are not what a fresh machine has.
_KEEP = 7 * 24 * 3600.0
_BOOT = 120.0
#: What pip and apt need of the surroundings to reach their indexes, also in a tree.
_SURROUNDINGS = ("PIP_", "SSL_CERT_", "REQUESTS_CA_", "http_proxy", "https_proxy", "no_proxy")


def tree(suite: str, *packages: str) -> Path:
    """A Debian of this suite with these packages and what they need, nothing else; made once a week, by root."""
    if os.geteuid():
        pytest.skip("only root can make a Debian tree")
    name = f"{suite}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = CACHE / name
        if made.exists() and time.time() - made.stat().st_mtime > _KEEP:
            shutil.rmtree(made)
        if not made.exists():
            _debootstrap(suite, packages, made)
    return made


def _debootstrap(suite: str, packages: tuple[str, ...], made: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        target = Path(scratch) / "tree"
        command = [
            program("mmdebstrap"),
            "--quiet",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(packages)}",
        ]
        done = subprocess.run([*command, suite, target], capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            missing(f"no tree of {suite}: {done.stderr[-2000:]}")
        target.chmod(0o755)
        os.utime(target)
        target.rename(made)


@contextlib.contextmanager
def copy_of(tree: Path) -> Iterator[Path]:
    """The tree with a layer above it that takes all changes (overlayfs)."""
    with tempfile.TemporaryDirectory(prefix="proxy-debian-", ignore_cleanup_errors=True) as scratch:
        place = Path(scratch)
        place.chmod(0o755)  # services of the machine look through it
        for name in ("above", "work", "root"):
            (place / name).mkdir()
        layers = f"lowerdir={tree},upperdir={place / 'above'},workdir={place / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, place / "root"], check=True, timeout=30)
        try:
            yield place / "root"
        finally:
            subprocess.run(["umount", place / "root"], check=True, timeout=30)


def surroundings() -> dict[str, str]:
    """Of our own environment what a package index may need."""
    return {name: value for name, value in os.environ.items() if name.startswith(_SURROUNDINGS)}


def _authorities() -> list[str]:
    """The same file of authorities as here, where the environment names one."""
    files = {value for name, value in surroundings().items() if name.endswith(("CERT", "CERT_FILE", "CA_BUNDLE"))}
    return [f"--bind-ro={file}" for file in sorted(files) if Path(file).is_file()]


def _nspawn(root: Path) -> list[str]:
    words = [program("systemd-nspawn"), "--quiet", "--register=no", "--keep-unit", f"--directory={root}"]
    return [*words, "--resolv-conf=copy-host", "--timezone=off", *_authorities()]


def run_in(root: Path, *command: str, binds: Mapping[Path, str] | None = None, timeout: float = 300) -> str:
    """One command in a tree that is not booted; what it printed. `binds`: our directory → its place there."""
    binding = [f"--bind={here}:{there}" for here, there in (binds or {}).items()]
    setting = [f"--setenv={name}={value}" for name, value in (surroundings() | _plain()).items()]
    with _own_cgroup() as enter:
        words = [*_nspawn(root), "--pipe", *binding, *setting, "--", *command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, preexec_fn=enter, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def _plain() -> dict[str, str]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


class Machine:
    """A booted Debian; a context manager.

    Attributes:
        root: its files, seen from here.
        said: see `typed`.
    """

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self.root: Path
        self.said = ""

    def __enter__(self) -> Machine:
        with contextlib.ExitStack() as stack:
            self.root = stack.enter_context(copy_of(self._tree))
            enter = stack.enter_context(_own_cgroup())
            log = stack.enter_context((self.root.parent / "console").open("wb"))
            self._spawner = subprocess.Popen(
                [*_nspawn(self.root), "--boot"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=enter,
                env=os.environ | {"UNIFIED_CGROUP_HIERARCHY": "1"},
            )
            stack.callback(self._kill)
            self._init = self._find_init()
            wait_for(self._is_up, _BOOT, "its multi-user.target")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(
        self, *command: str, fails: bool = False, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """A command as root of that machine; it must succeed, or fail where `fails` says so."""
        done = self._run(*command, env=env, timeout=timeout)
        assert (done.returncode != 0) == fails, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def sh(self, script: str, timeout: float = 300) -> str:
        """Lines as one types them into a root shell; what was printed."""
        return self.run("bash", "-euc", script, env=surroundings() | {"PWD": "/root"}, timeout=timeout).stdout

    @contextlib.contextmanager
    def typed(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """Lines of which the last stays in the foreground; the block runs beside it, and ends it by Ctrl-C (SIGINT).

        Afterwards `said` has what it printed.
        """
        # A session of its own, as a terminal's foreground has: the signal goes to all of it.
        with subprocess.Popen(
            [*self._enter(), "bash", "-euc", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_plain() | surroundings(),
            start_new_session=True,
        ) as shell:
            try:
                yield shell
            finally:
                os.killpg(shell.pid, signal.SIGINT)
                assert shell.stdout
                self.said = shell.stdout.read()

    def put(self, file: Path, directory: str = "/root") -> str:
        """Copy a file there; its path on the machine."""
        target = self.root / directory.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        return f"{directory}/{file.name}"

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").stdout

    # -- inside

    def _run(
        self, *command: str, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._enter(), *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=_plain() | dict(env or {}),
            check=False,
        )

    def _enter(self) -> list[str]:
        """What stands before a command that shall run there, at root's home."""
        spaces = ("--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd=/proc/self/cwd")
        return ["nsenter", f"--target={self._init}", *spaces, "env", "--chdir=/root"]

    def _find_init(self) -> int:
        """The process beneath nspawn that is number 1 there; those before it only prepare the place."""
        return wait_for(self._look_for_init, _BOOT, "systemd-nspawn has an init")

    def _look_for_init(self) -> int:
        self._must_run()
        children = Path(f"/proc/{self._spawner.pid}/task/{self._spawner.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if re.search(r"^NSpid:.*\t1$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE):
                    return child
        return 0

    def _must_run(self) -> None:
        assert self._spawner.poll() is None, (self.root.parent / "console").read_text(errors="replace")[-3000:]

    def _is_up(self) -> bool:
        self._must_run()
        done = self._run("systemctl", "is-active", "multi-user.target")
        return done.stdout.strip() == "active"

    def _kill(self) -> None:
        """At once: nothing in it is to be kept. With its PID 1 ends all that runs there."""
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.kill(self._init, signal.SIGKILL)
        try:
            self._spawner.wait(20)
        except subprocess.TimeoutExpired:
            self._spawner.kill()
            self._spawner.wait()


@contextlib.contextmanager
def _own_cgroup():  # type: ignore[no-untyped-def]
    """A cgroup for one systemd-nspawn, since there need be no systemd here that gives it one.

    Yields:
        What its process does first: enter it.
    """
    with tempfile.NamedTemporaryFile(prefix="proxy-debian-") as unique:
        name = Path(unique.name).name
        groups = [Path(mount) / name for mount in _cgroup_mounts()]
    for group in groups:
        group.mkdir()

    def enter() -> None:
        for group in groups:
            (group / "cgroup.procs").write_text("0")

    try:
        yield enter
    finally:
        for group in groups:
            for path, _, _ in os.walk(group, topdown=False):
                wait_for(lambda path=path: _removed(Path(path)), 20, f"{path} is empty")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def _cgroup_mounts() -> list[str]:
    """The unified hierarchy, and systemd's own where there is one."""
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    named = [row[1] for row in rows if row[2] == "cgroup" and "name=systemd" in row[3].split(",")]
    return [row[1] for row in rows if row[2] == "cgroup2"] + named

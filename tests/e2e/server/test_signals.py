"""Signals that come when they are least welcome: during the start, and when there is no memory left."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import proxied
from tests.program import BASE, ROOT, SECRET, Proxy
from tests.sinks import Raw, echo
from tests.waiting import wait_for


class SlowFile:
    """The file of a secret that the program cannot read at its first try until we let it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "secret"
        self.base = BASE.replace(f'auth_shared_secret "{SECRET}"\n', f"auth_shared_secret_file {self.path}\n")
        os.mkfifo(self.path, 0o600)

    def let_read(self, while_it_waits: Callable[[], object]) -> None:
        """Wait until the program reads the file, do something, and let it have the secret."""
        with open(self.path, "w") as fifo:  # returns when the program has opened its end
            self.path.unlink()
            self.path.write_text(SECRET + "\n")
            self.path.chmod(0o600)
            while_it_waits()
            fifo.write(SECRET + "\n")


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGHUP, "^reload: the new configuration"), (signal.SIGUSR1, "^direct_remote_smtp: ")]
)
def test_a_signal_during_the_start_is_not_lost_and_kills_nobody(tmp_path, number, line):
    file = SlowFile(tmp_path)
    with Proxy(base=file.base, ready=False) as proxy:
        file.let_read(lambda: proxy.signal(number))
        proxy.wait_line(line)


def test_a_signal_ends_what_does_not_serve(tmp_path):
    """Only the program that serves keeps signals for later."""
    file = SlowFile(tmp_path)
    with (
        Proxy(base=file.base, ready=False, flags=("--check-config",), exit_code=-signal.SIGHUP) as proxy,
        contextlib.suppress(BrokenPipeError),
    ):
        file.let_read(lambda: (proxy.signal(signal.SIGHUP), proxy.wait_exit()))


def test_as_the_first_process_of_a_container(tmp_path):
    """To PID 1 the kernel brings no signal that it has not asked for: a stop would be the kill of its time-out."""
    unshare = shutil.which("unshare")
    if os.geteuid() or unshare is None:
        pytest.skip("a namespace of process numbers needs root and unshare")
    path = tmp_path / "greenarrow_proxy.conf"
    path.write_text(BASE)
    path.chmod(0o600)
    command = [sys.executable, str(ROOT / "greenarrow_proxy.py"), f"--config-filename={path}"]
    outside = [unshare, "--pid", "--fork", "--mount-proc", "--kill-child", *command]
    with subprocess.Popen(outside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            next(line for line in lines if "listening on" in line)
            (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert Path(f"/proc/{number}/status").read_text().partition("NSpid:")[2].split()[1] == "1"
            os.kill(int(number), signal.SIGHUP)
            next(line for line in lines if "the new configuration is in force" in line)
            os.kill(int(number), signal.SIGTERM)
            next(line for line in lines if "stopped" in line)
            assert process.wait(30) == 0
        finally:
            process.kill()


# -- no memory


def size(proxy: Proxy) -> int:
    """The address space that it uses, in bytes."""
    return int(Path(f"/proc/{proxy.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


#: A throttle under which all clients but the first one wait, each in a greenlet of its own.
NARROW = "throttle narrow {\n    destination 127.0.0.0/8\n    max_concurrent_connections 1\n    wait 50s\n}\n"


@pytest.fixture
def starved():
    """A program that may have no more memory than it has now, and has noticed."""
    with Proxy(NARROW) as proxy, Raw(echo) as receiver:
        limit = resource.prlimit(proxy.pid, resource.RLIMIT_AS)
        proxy.status()  # its start is over
        resource.prlimit(proxy.pid, resource.RLIMIT_AS, (size(proxy), limit[1]))
        waiting = []
        try:
            while not proxy.matching("^ERROR accept: .*Cannot allocate memory"):
                waiting.append(proxied(proxy.proxy_protocol, receiver.endpoint))
                assert len(waiting) < 15000, "it never needed memory"
            yield proxy
        finally:
            resource.prlimit(proxy.pid, resource.RLIMIT_AS, limit)
            for sock in waiting:
                sock.close()


def test_without_memory_it_still_tells_its_status(starved):
    assert starved.status()


def test_without_memory_it_still_ends(starved):
    starved.term()
    starved.wait_line("^drain: ")


def test_without_memory_it_still_looks_at_its_configuration(starved):
    """Whether there is memory for a new one or not, it says what became of it, and the next one finds it at work."""
    for _ in range(2):
        mark = len(starved.lines)
        starved.signal(signal.SIGHUP)
        starved.wait_line(r"^reload: |^ERROR reload_failed: the old configuration is still in force", since=mark)


def test_memory_that_is_back_is_used(starved):
    resource.prlimit(starved.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    wait_for(lambda: starved.open_connections() > 0, what="it serves again")
    starved.hup()

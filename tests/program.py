"""The real program under test: started from a file, watched through its log, ended by a signal, checked at the end.

    with Proxy("max_connections 3\\n") as proxy:
        sock = socket.create_connection(proxy.socks5)
        ...
        proxy.wait_line(r"^connection .*outcome=client_closed")

Whatever a test does, no traceback, no `internal` line and no secret may have been written, and the exit code is as
expected. How to speak to the doors is in `clients`, who answers behind them in `sinks` and `mx`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests import forms
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
SECRET = "an-0pen-secret-of-32-characters-for-tests"

#: What a test's own text does not say. Each door has an address of its own, since each listens on port 0.
BASE = f"""\
listen 127.0.1.1:0
listen_socks5 127.0.1.2:0
listen_proxy_protocol 127.0.1.3:0
allow_from 127.0.0.0/8, ::1/128
source_ip 127.0.0.0/8, ::1/128
allow_destination 127.0.0.0/8, ::1/128
destination_port 1-65535
auth_shared_secret "{SECRET}"
drain_timeout 2s
stats_interval 1h
"""

_DOORS = (
    *("listen", "listen_socks5", "listen_proxy_protocol", "listen_redirect", "listen_status"),
    *("listen_socks5_tls", "listen_proxy_protocol_tls"),
)
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
_LISTENING = re.compile(r"listen: listening on (?:\[(.*)\]|([\d.]+)):(\d+) protocol=(\S+)")
Address = tuple[str, int]


def config(more: str = "", base: str = BASE) -> str:
    """`base` with `more` behind it; a directive that `more` names is taken out of `base`. Indent blocks."""
    named = {line.split()[0] for line in more.splitlines() if line[:1].isalpha()}  # what stands in a block is indented
    return "".join(line for line in base.splitlines(True) if line.split()[0] not in named) + more


class Proxy:
    """One run of the program; a context manager.

    Args:
        more, base: see `config`.
        flags: further arguments.
        environ: further environment variables.
        before: bash commands that the process runs before it becomes the program, e.g. "ulimit -n 80".
        pass_fds: descriptors that it inherits, under their numbers.
        stdout: a descriptor to write to instead of a pipe that is read here (then no line of stdout is seen).
        ready: wait for the listeners; False when they are not expected to come.
        exit_code: what it must end with.
        clean: whether it must end without an internal error.
        shared: let every user read the file (for a program that `before` makes unprivileged).
        program: what is started instead of the program itself.

    Attributes:
        lines: what it wrote on both outputs, without line ends and timestamps, in the order in which it was read.
        stdout_lines, stderr_lines: the same, each output by itself and as it was written.
        path: the configuration file.
    """

    def __init__(
        self,
        more: str = "",
        base: str = BASE,
        *,
        flags: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
        before: str = "",
        pass_fds: tuple[int, ...] = (),
        stdout: int | None = None,
        ready: bool = True,
        exit_code: int = 0,
        clean: bool = True,
        shared: bool = False,
        program: Path = ROOT / "greenarrow_proxy.py",
    ) -> None:
        self.lines: list[str] = []
        self.stdout_lines: list[str] = []
        self.stderr_lines: list[str] = []
        self.exit_code = exit_code
        self._directory = Path(tempfile.mkdtemp(prefix="proxy-test-"))
        self.path = self._directory / "greenarrow_proxy.conf"
        self._text = config(more, base)
        self._base = base
        self._flags = flags
        self._environ = environ or {}
        self._before = before
        self._pass_fds = pass_fds
        self._stdout = stdout
        self._program = program
        self._ready = ready
        self._clean = clean
        self._mode = 0o644 if shared else 0o600
        if shared:
            self._directory.chmod(0o755)
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._heirs: list[int] = []  # processes that have taken over, one from the other
        self._told_to_stop = False  # a second time would end it at once
        self._process: subprocess.Popen[bytes]

    # -- life

    def __enter__(self) -> Proxy:
        self._write(self._text)
        command = [sys.executable, str(self._program), f"--config-filename={self.path}", *self._flags]
        if self._before:
            command = ["bash", "-c", f'{self._before}; exec "$@"', "bash", *command]
        environ = forms.environ()
        if "PROXY_TEST_WORKERS" in os.environ:  # run any test with several processes
            environ["GREENARROW_PROXY_WORKERS"] = os.environ["PROXY_TEST_WORKERS"]
        for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "JOURNAL_STREAM"):
            environ.pop(name, None)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._stdout is None else self._stdout,
            stderr=subprocess.PIPE,
            env=environ | self._environ,
            pass_fds=self._pass_fds,
        )
        for stream, lines in ((self._process.stdout, self.stdout_lines), (self._process.stderr, self.stderr_lines)):
            if stream is not None:
                self._threads.append(threading.Thread(target=self._read, args=(stream, lines), daemon=True))
                self._threads[-1].start()
        try:
            if self._ready and self._stdout is None:
                expected = len(re.findall(r"[^\s,]+", " ".join(self._values_of(_DOORS))))
                self._wait(lambda: len(self._listening()) >= expected, 60.0, f"{expected} listeners")
                workers = [int(value) for value in self._values_of(("workers",)) if value.strip().isdigit()]
                for number in range(1, workers[-1] + 1) if workers and workers[-1] > 1 else ():
                    self.wait_line(rf"""a worker serves.*worker"?[=:]{number}\b""", 60.0)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not self._told_to_stop and self.running:
                    self.term()
                self.wait_exit()
                self.check()
        finally:
            self._end()

    def check(self) -> None:
        """What must hold after every run."""
        written = "\n".join(self.stdout_lines + self.stderr_lines)
        assert "Traceback" not in written, written
        assert SECRET not in written
        assert not self._clean or not [line for line in self.lines if re.match(r"(ERROR )?internal", line)], written
        assert self._process.returncode == self.exit_code, written

    def wait_exit(self, timeout: float = 60.0) -> int:
        """Wait until it has ended and all its output is read; the exit code."""
        code = self._process.wait(timeout)
        for each in self._heirs:
            wait_for(lambda each=each: not _lives(each), timeout, f"process {each} ends")  # type: ignore[misc]
        for thread in self._threads:
            thread.join(30)
        return code

    def _end(self) -> None:
        for each in self._heirs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(30)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- acting on it

    @property
    def pid(self) -> int:
        return self._heirs[-1] if self._heirs else self._process.pid

    @property
    def running(self) -> bool:
        return _lives(self._heirs[-1]) if self._heirs else self._process.poll() is None

    def upgrade(self) -> int:
        """SIGUSR2, until the new process has taken over; the number of the old one."""
        old, mark = self.pid, len(self.lines)
        self.signal(signal.SIGUSR2)
        match = self.wait_line(r"upgrade: the new program has taken over: finishing what is open pid=(\d+)", 60.0, mark)
        self._heirs.append(int(match[1]))
        return old

    def term(self) -> None:
        self.signal(signal.SIGTERM)

    def hup(
        self, more: str | None = None, base: str | None = None, outcome: str = r"^reload: ", going_on: bool = False
    ) -> None:
        """Write a new configuration (None: leave the file), send SIGHUP, and wait for the line that ends the reload.

        Args:
            going_on: the program was stopped (SIGSTOP); it finds the SIGHUP when it goes on.
        """
        if more is not None:
            self._write(config(more, self._base if base is None else base))
        mark = len(self.lines)
        self.signal(signal.SIGHUP)
        if going_on:
            self.signal(signal.SIGCONT)
        self.wait_line(outcome, since=mark)

    def bad_hup(self, more: str | None = None, base: str | None = None) -> list[str]:
        """A reload that must fail; the lines that say why."""
        mark = len(self.lines)
        self.hup(more, base, r"^ERROR reload_failed: the old configuration is still in force")
        return [line for line in self.lines[mark:] if line.startswith("ERROR reload_failed")]

    def signal(self, number: int) -> None:
        self._told_to_stop |= number in (signal.SIGTERM, signal.SIGINT)
        if self._heirs:
            os.kill(self._heirs[-1], number)
        else:
            self._process.send_signal(number)

    def status(self) -> list[str]:
        """The status lines of this moment."""
        mark = len(self.lines)
        self.signal(signal.SIGUSR1)
        self.wait_line(r"^direct_remote_smtp: ", since=mark)
        return [line for line in self.lines[mark:] if re.match(r"listener\(|throttle: |direct_remote_smtp: ", line)]

    def page(self) -> dict[str, Any]:
        """The status page of this moment; needs `listen_status`."""
        host, port = self.door("status")
        with urllib.request.urlopen(f"http://{host}:{port}/status.json", timeout=30) as answer:
            page: dict[str, Any] = json.load(answer)
        return page

    def throttles(self) -> list[dict[str, Any]]:
        """The rows of all throttles on that page."""
        rows: list[dict[str, Any]] = self.page()["throttles"]
        return rows

    def _write(self, text: str) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(text)
        temporary.chmod(self._mode)
        temporary.replace(self.path)

    # -- looking at it

    @property
    def socks5(self) -> Address:
        return self.door("socks5")

    @property
    def proxy_protocol(self) -> Address:
        return self.door("proxy_protocol")

    @property
    def native(self) -> Address:
        return self.door("native")

    def door(self, protocol: str, host: str | None = None) -> Address:
        """The address of the listener that was opened last for this protocol (and on this host)."""
        return [(at, port) for name, at, port in self._listening() if name == protocol and host in (None, at)][-1]

    def _listening(self) -> list[tuple[str, str, int]]:
        found = [match for line in list(self.lines) if (match := _LISTENING.match(line))]
        if not found:  # log_format json
            found = [match for line in list(self.lines) if (match := _LISTENING.match(_flat(line)))]
        return [(match[4], match[1] or match[2], int(match[3])) for match in found]

    def wait_line(self, pattern: str, timeout: float = 30.0, since: int = 0) -> re.Match[str]:
        """The first line (from number `since`) in which the pattern is found, waited for."""
        compiled = re.compile(pattern)
        found: list[re.Match[str]] = []
        at = since

        def look() -> bool:
            nonlocal at
            while not found and at < len(self.lines):
                match = compiled.search(self.lines[at])
                at += 1
                if match:
                    found.append(match)
            return bool(found)

        self._wait(look, timeout, f"a line like {pattern}")
        return found[0]

    def matching(self, pattern: str, since: int = 0) -> list[str]:
        """The lines so far in which the pattern is found."""
        return [line for line in self.lines[since:] if re.search(pattern, line)]

    def fds(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def worked(self) -> float:
        """Seconds of processor time that its main thread has used, to the nanosecond: what a busy machine does not
        change."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_connections(self, protocol: str = "") -> int:
        """Clients that it says are connected, to one door or to all."""
        host, port = self.door(protocol) if protocol else ("", 0)
        wanted = f"listener({f'[{host}]' if ':' in host else host}:{port})" if protocol else "listener("
        return sum(int(line.rpartition("=")[2]) for line in self.status() if line.startswith(wanted))

    def wait_idle(self, timeout: float = 30.0) -> None:
        """Until no client is connected and nothing goes out."""
        wait_for(
            lambda: not self.open_connections() and self.status()[-1].endswith("connections=0(active=0 cached=0)"),
            timeout,
            "the proxy is idle",
        )

    # -- inside

    def _values_of(self, names: tuple[str, ...]) -> list[str]:
        lines = [line.split(None, 1) for line in self._text.splitlines() if line.split()]
        return [line[1] for line in lines if line[0] in names]

    def _read(self, stream: IO[bytes], lines: list[str]) -> None:
        with contextlib.suppress(ValueError):  # closed by _end
            for raw in stream:
                text = raw.decode("utf-8", "backslashreplace").rstrip("\n")
                with self._news:
                    lines.append(text)
                    self.lines.append(_TIME.sub("", text))
                    self._news.notify_all()

    def _wait(self, condition, timeout: float, what: str) -> None:  # type: ignore[no-untyped-def]
        """Wait for a condition on the output; fails at once when the program has ended and all of it is read."""
        with self._news:
            done = self._news.wait_for(lambda: condition() or self._ended(), timeout)
        if done and not condition():
            for thread in self._threads:
                thread.join(30)
            done = condition()
        assert done, f"not within {timeout} s: {what}; it wrote:\n" + "\n".join(self.lines[-20:])

    def _ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)


def _lives(pid: int) -> bool:
    """Whether a process that is not our child is still there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _flat(line: str) -> str:
    """A JSON line about a listener as the text line would be."""
    match = re.search(r'"event":"listen","message":"(.*?)","protocol":"(.*?)"', line)
    return f"listen: {match[1]} protocol={match[2]}" if match else ""

"""The proxy of the demonstration: the program itself, in a process of its own, watched through its log."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECRET = "only-for-this-demonstration-0123456789"
PATIENCE = 20.0  # seconds that any single step may take
Address = tuple[str, int]

CONFIGURATION = """\
listen_socks5 127.0.0.3:0
listen_proxy_protocol 127.0.0.4:0
listen 127.0.0.5:0
allow_from 127.0.0.0/8
auth_shared_secret "{secret}"
source_ip 127.0.0.11, 127.0.0.12, 127.0.0.13, 127.0.0.14, 127.0.0.15
default_source_ip 127.0.0.13
destination_port {port}
allow_destination {mx}
stats_interval 1h
"""


def say(text: str = "") -> None:
    """Progress, at once."""
    print(text, flush=True)


class Failure(Exception):
    """Something is not as it should be; the text says what."""


class Proxy:
    """The program itself, in a process of its own; its log is kept."""

    def __init__(self, program: list[str], configuration: str, directory: Path) -> None:
        file = directory / "greenarrow_proxy.conf"
        file.touch(mode=0o600)
        file.write_text(configuration)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [*program, f"--config-filename={file}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def wait_for(self, pattern: str, count: int = 1) -> re.Match[str]:
        """The first log line that matches, or the `count`th; waits for it."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while True:
                found = [match for line in self.lines if (match := re.search(pattern, line))]
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                if left <= 0 or self._process.poll() is not None:
                    log = "\n".join(self.lines) or "(nothing)"
                    raise Failure(
                        f"the proxy did not say {pattern!r}; exit code {self._process.poll()}; it said:\n{log}"
                    )
                self._changed.wait(min(left, 0.1))

    def address(self, protocol: str) -> Address:
        """Where it listens for `protocol`."""
        match = self.wait_for(rf"listening on (\S+):(\d+) protocol={protocol}\b")
        return match[1], int(match[2])

    def stop(self) -> int:
        """Ask for a clean stop; the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._reader.join(PATIENCE)
            if self._process.stdout is not None:
                self._process.stdout.close()

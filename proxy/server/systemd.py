"""What systemd is told, and the listening sockets that it hands over. Without systemd all of it does nothing.

A notification is one datagram of `KEY=value` lines (sd_notify(3)); socket activation is a count of descriptors from 3
upwards (sd_listen_fds(3)). Both are small enough to need no library, and ours must not block. When to say what does not
belong here.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from proxy.model import Endpoint, canonical_ip

_FIRST_FD = 3


class Notifier:
    """Messages to the service manager.

    Args:
        environ: NOTIFY_SOCKET (absent: nothing is ever sent), WATCHDOG_USEC and WATCHDOG_PID are looked up here.
        pid: our process number; a watchdog that is meant for another process is not ours.
    """

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the NUL byte of an abstract socket; other forms (vsock:) are for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address[:1] in ("@", "/"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.watchdog_interval = _watchdog_interval(environ, pid) if self._socket else 0.0

    def ready(self, status: str) -> bool:
        """The start, or a reload, is complete."""
        return self._send("READY=1", _status(status))

    def succeeded(self, pid: int, status: str) -> bool:
        """This process, of that number, has taken over from the one that systemd has started."""
        return self._send(f"MAINPID={pid}", "READY=1", _status(status))

    def reloading(self) -> bool:
        """A reload begins; `ready` ends it. systemd wants the time to tell our reload from an earlier one."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, seconds: float) -> bool:
        """A stop begins, and systemd shall give us this many seconds before it loses patience."""
        return self._send("STOPPING=1", _status(status), f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def extend(self, seconds: float) -> bool:
        """The start, reload or stop in progress goes on: this many seconds more, from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def watchdog(self) -> bool:
        """We are alive; to be said every `watchdog_interval` seconds (0: never)."""
        return self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> bool:
        """Whether the datagram was taken. A manager that does not listen is no reason to fail or to wait."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address)
        except OSError:
            return False
        return True


def _status(text: str) -> str:
    return "STATUS=" + text.replace("\n", " ")


def _watchdog_interval(environ: Mapping[str, str], pid: int) -> float:
    """Half of what systemd allows, in seconds, as sd_watchdog_enabled(3) advises; 0 when there is no watchdog."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    return int(microseconds) / 2e6


class Inherited:
    """Listening sockets that were open before we started, to be taken by address instead of binding anew.

    Args:
        environ: LISTEN_FDS and LISTEN_PID are looked up here.
        pid: our process number; sockets that are meant for another process are left alone.
    """

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        self._sockets: dict[Endpoint, socket.socket] = {}
        #: Descriptors that are no TCP listeners (a Unix socket, a pipe); closed, to be complained about.
        self.unusable: list[int] = []
        count = environ.get("LISTEN_FDS", "")
        if not count.isdecimal() or environ.get("LISTEN_PID") != str(pid):
            return
        for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
            self._adopt(fd)

    def take(self, endpoint: Endpoint, count: int) -> list[socket.socket]:
        """The inherited listener bound to exactly this address, non-blocking, so many times; none when there is none
        (left)."""
        found = self._sockets.pop(endpoint, None)
        return [] if found is None else [found, *(found.dup() for _ in range(count - 1))]

    def left(self) -> list[Endpoint]:
        """What nobody has taken: the unit and the configuration disagree."""
        return sorted(self._sockets)

    def close(self) -> None:
        """Close what nobody has taken, so that clients are refused instead of hanging in a backlog for ever."""
        for listener in self._sockets.values():
            listener.close()
        self._sockets.clear()

    def _adopt(self, fd: int) -> None:
        try:
            os.set_inheritable(fd, False)
            listener = socket.socket(fileno=fd)
        except OSError:
            self.unusable.append(fd)
            return
        if listener.family not in (socket.AF_INET, socket.AF_INET6) or not _is_listening(listener):
            self.unusable.append(fd)
            listener.close()
            return
        listener.setblocking(False)
        host, port = listener.getsockname()[:2]
        self._sockets[Endpoint(canonical_ip(host), port)] = listener


def _is_listening(sock: socket.socket) -> bool:
    return sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1

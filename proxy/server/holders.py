"""Who listens on an address already: `--check-config` beside a running proxy asks whether it is that proxy itself.

systemd says in MAINPID whose reload it is for. Everything is read from /proc, of processes that are our own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from proxy.model import Endpoint, canonical_ip

PROC = Path("/proc")
#: In the fourth column of /proc/net/tcp (net/tcp_states.h).
_LISTEN = "0A"


def main_pid(environ: Mapping[str, str]) -> int | None:
    """The proxy that shall reload; None: nobody has said so."""
    text = environ.get("MAINPID", "")
    return int(text) if text.isdecimal() else None


def listening(pid: int, proc: Path = PROC) -> frozenset[Endpoint] | None:
    """Where this process and its children listen.

    Returns:
        None where it cannot be seen: it is another user's, or has ended.
    """
    try:
        inodes = _sockets(pid, proc)
    except OSError:
        return None
    for child in _children(pid, proc):
        with contextlib.suppress(OSError):
            inodes |= _sockets(child, proc)
    return frozenset(endpoint for endpoint, inode in _listeners(pid, proc) if inode in inodes)


def _children(pid: int, proc: Path) -> list[int]:
    try:
        return [int(word) for word in (proc / f"{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _sockets(pid: int, proc: Path) -> set[str]:
    """Inodes.

    Raises:
        OSError: they cannot be seen.
    """
    found = set()
    for name in os.listdir(proc / f"{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(proc / f"{pid}/fd/{name}")
            if target.startswith("socket:["):
                found.add(target[len("socket:[") : -1])
    return found


def _listeners(pid: int, proc: Path) -> list[tuple[Endpoint, str]]:
    """All listening TCP sockets of its network, with their inodes."""
    lines: list[str] = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines += (proc / f"{pid}/net/{table}").read_text().splitlines()[1:]
    return [(_endpoint(fields[1]), fields[9]) for fields in map(str.split, lines) if fields[3] == _LISTEN]


def _endpoint(text: str) -> Endpoint:
    """`0100007F:0327`: the address in words of this machine's order, the port as a number."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return Endpoint(canonical_ip(socket.inet_ntop(family, packed)), int(port, 16))

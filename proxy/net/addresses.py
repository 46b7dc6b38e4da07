"""The addresses of this machine, kept current by the kernel's own word (rtnetlink(7)).

Whether bind() succeeds does not tell: with `net.ipv4.ip_nonlocal_bind` (usual beside keepalived) it takes any address,
and what is sent from there gets no answer. So an address is ours if it is on an interface, which is known without
asking; else the routing table is asked whether it delivers it here (127.0.0.0/8, `ip route add local`). What follows
from an address that went away is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from time import monotonic
from typing import Any, Final

from gevent import get_hub

_NLMSG: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_IFADDRMSG: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # family, two lengths, tos, table, protocol, scope, type, flags
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_NLMSG_ERROR, _NLMSG_DONE, _RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR, _RTM_NEWROUTE, _RTM_GETROUTE = (
    2,
    3,
    20,
    21,
    22,
    24,
    26,
)
_NLM_F_REQUEST, _NLM_F_DUMP = 0x001, 0x300
_RTMGRP_ADDRESSES: Final = 0x10 | 0x100  # IPv4, IPv6
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST: Final = 1
_RTN_LOCAL: Final = 2
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_BUFFER: Final = 1 << 16
_READ: Final = 1


class Addresses:
    """Which addresses are here.

    Without netlink (a sandbox may forbid it) everything that can be bound is held to be here.
    """

    def __init__(self) -> None:
        self._interfaces: dict[str, set[int]] = {}  # address → the interfaces that have it
        self._gone: Callable[[str], object] = lambda host: None
        self._came: Callable[[str], object] = lambda host: None
        self._news = _netlink(_RTMGRP_ADDRESSES)
        self._questions = _netlink(0)
        self._watcher: Any = None
        self._routed = lru_cache(1024)(self._ask_route)
        self._read_all()

    def __contains__(self, host: object) -> bool:
        """Whether what is sent from this address can be answered."""
        assert isinstance(host, str)
        if self._watcher is None:
            self._read_news()
        return host in self._interfaces or self._questions is None or self._routed(host, int(monotonic()))

    def watch(self, gone: Callable[[str], object], came: Callable[[str], object]) -> None:
        """Call these in the hub, for each address that went away or came, from now on. They must not wait."""
        self._gone, self._came = gone, came
        if self._news is not None and self._watcher is None:
            self._watcher = get_hub().loop.io(self._news.fileno(), _READ)
            self._watcher.start(self._read_news)

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None
        for sock in (self._news, self._questions):
            if sock is not None:
                sock.close()

    # ---------------------------------------------------------------- what the kernel says

    def _read_news(self) -> None:
        """Take in what has changed. When there was more than the kernel kept for us, all is read anew."""
        while self._news is not None:
            try:
                data = self._news.recv(_BUFFER)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: news were lost
                self._read_all()
                return
            for kind, body in _messages(data):
                self._note(kind, body)

    def _note(self, kind: int, body: bytes) -> None:
        if kind not in (_RTM_NEWADDR, _RTM_DELADDR):
            return
        host, interface = _address(body)
        if not host:
            return
        known = self._interfaces.get(host)
        if kind == _RTM_NEWADDR:
            if known is None:
                self._interfaces[host] = {interface}
                self._came(host)
            else:
                known.add(interface)
        elif known is not None:
            known.discard(interface)
            if not known:
                del self._interfaces[host]
                self._gone(host)

    def _read_all(self) -> None:
        """The whole list; tells what it differs in."""
        found: dict[str, set[int]] = {}
        for family in _FAMILIES:
            request = struct.pack("=BBBBI", family, 0, 0, 0, 0)
            for kind, body in self._ask(_RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, request):
                if kind == _RTM_NEWADDR:
                    host, interface = _address(body)
                    found.setdefault(host, set()).add(interface)
        found.pop("", None)
        before, self._interfaces = self._interfaces, found
        for host in before.keys() - found.keys():
            self._gone(host)
        for host in found.keys() - before.keys():
            self._came(host)

    def _ask_route(self, host: str, _second: int) -> bool:
        """Whether the routing table delivers the address to this machine; remembered for a second."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        packed = socket.inet_pton(family, host)
        request = _RTMSG.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
        request += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
        for kind, body in self._ask(_RTM_GETROUTE, _NLM_F_REQUEST, request):
            if kind == _RTM_NEWROUTE:
                return bool(_RTMSG.unpack_from(body)[7] == _RTN_LOCAL)
        return False

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """The kernel's answer: it is there when the question is sent, so nothing waits."""
        if self._questions is None:
            return
        with contextlib.suppress(OSError):
            self._questions.send(_NLMSG.pack(_NLMSG.size + len(body), kind, flags, 0, 0) + body)
            while True:
                for answer, content in _messages(self._questions.recv(_BUFFER)):
                    if answer in (_NLMSG_DONE, _NLMSG_ERROR):
                        return
                    yield answer, content
                if not flags & _NLM_F_DUMP:
                    return


def _netlink(groups: int) -> socket.socket | None:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    except OSError:
        return None
    try:
        sock.bind((0, groups))
    except OSError:
        sock.close()
        return None
    return sock


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message in one datagram."""
    while len(data) >= _NLMSG.size:
        length, kind, *_ = _NLMSG.unpack_from(data)
        if not _NLMSG.size <= length <= len(data):
            return
        yield kind, data[_NLMSG.size : length]
        data = data[length + 3 & ~3 :]


def _address(body: bytes) -> tuple[str, int]:
    """The address, or "", and the interface that a message is about."""
    family, _, _, _, interface = _IFADDRMSG.unpack_from(body)
    found: dict[int, bytes] = {}
    rest = body[_IFADDRMSG.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[length + 3 & ~3 :]
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS, b"")  # of a point-to-point link the second is the peer's
    if family not in _FAMILIES or len(packed) not in (4, 16):
        return "", interface
    return socket.inet_ntop(family, packed), interface


def own_addresses() -> Addresses:
    """Those of this machine, as this thread's hub knows them."""
    hub: Any = get_hub()
    found: Addresses | None = getattr(hub, "proxy_addresses", None)
    if found is None:
        found = hub.proxy_addresses = Addresses()
    return found

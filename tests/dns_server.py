"""A small authoritative DNS server on loopback, on UDP and TCP of one port, in a thread of its own.

What it says is a table that a test may change at any time. A datagram holds 512 bytes here at the most, whatever the
client offers: what is longer is truncated, so that it asks by TCP. A name under `SILENT` is never answered.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections import Counter

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from proxy.model import Endpoint

#: In `codes`: no answer at all.
SILENT = -1
_DATAGRAM = 512


class DnsServer:
    """Args:
        records: name → kind → texts (`"10 mx.example."`). Names end with a dot.

    Attributes:
        secure: names whose answers have the AD bit, as a server that checks DNSSEC sets it (all names of a chain).
        codes: name → an rcode instead of an answer, or SILENT. ttl: of all records.
        asked: how often, by (name, kind). by_tcp: questions that came by TCP.
    """

    def __init__(self, records: dict[str, dict[str, list[str]]] | None = None) -> None:
        self.records = records or {}
        self.secure: set[str] = set()
        self.codes: dict[str, int] = {}
        self.ttl = 300
        self.asked: Counter[tuple[str, str]] = Counter()
        self.by_tcp = 0

    def __enter__(self) -> DnsServer:
        self._udp, self._tcp = _pair()
        self.endpoint = Endpoint(*self._udp.getsockname())
        self._wake, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._thread.join()
        for sock in (self._udp, self._tcp, self._wake):
            sock.close()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._udp, self._tcp, self._wake], [], [])
            if self._wake in ready:
                return
            if self._udp in ready:
                data, peer = self._udp.recvfrom(4096)
                if (answer := self._answer(data)) is not None:
                    self._udp.sendto(_datagram(answer), peer)
            if self._tcp in ready:
                self._serve_tcp()

    def _serve_tcp(self) -> None:
        sock, _ = self._tcp.accept()
        with sock:
            sock.settimeout(30)
            with sock.makefile("rb") as file:
                (length,) = struct.unpack("!H", file.read(2))
                answer = self._answer(file.read(length))
            self.by_tcp += 1
            if answer is not None:
                wire = answer.to_wire()
                sock.sendall(struct.pack("!H", len(wire)) + wire)

    def _answer(self, data: bytes) -> dns.message.Message | None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = question.name.to_text().lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked[name, kind] += 1
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA
        code = self.codes.get(name)
        if code == SILENT:
            return None
        if code is not None:
            answer.set_rcode(dns.rcode.Rcode(code))
            return answer
        proven = True
        for _ in range(20):  # a chain of aliases
            proven &= name in self.secure
            here = self.records.get(name)
            if here is None:
                answer.set_rcode(dns.rcode.NXDOMAIN)
            elif "CNAME" in here:
                answer.answer.append(dns.rrset.from_text(name, self.ttl, "IN", "CNAME", *here["CNAME"]))
                name = here["CNAME"][0]
                continue
            elif kind in here:
                answer.answer.append(dns.rrset.from_text(name, self.ttl, "IN", kind, *here[kind]))
            break
        if proven and query.flags & dns.flags.AD:
            answer.flags |= dns.flags.AD
        return answer


def _datagram(answer: dns.message.Message) -> bytes:
    wire = answer.to_wire()
    if len(wire) <= _DATAGRAM:
        return wire
    answer.answer.clear()
    answer.flags |= dns.flags.TC
    return answer.to_wire()


def _pair() -> tuple[socket.socket, socket.socket]:
    """A port that is free for both."""
    while True:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        tcp = socket.socket()
        try:
            tcp.bind(udp.getsockname())
        except OSError:
            udp.close()
            tcp.close()
            continue
        tcp.listen()
        return udp, tcp

"""The TLSA records of one MX host (RFC 7672 section 2.2), as a course of questions: pure, `egress.tlsa` asks.

DNSSEC must prove all of it, or there are none: first the host's address (a server of an unsigned zone may fail at
kinds that it does not know), then the records under the name that the host is an alias of, then under its own. What
cannot be had is no answer: an attacker who keeps it from us must not get a session that proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import NamedTuple

from proxy.policy.certificates import Tlsa
from proxy.policy.directory import LONGEST, Kind, Question, Reply

#: Records of one host that are looked at.
MOST_RECORDS = 32
_ADDRESSES: tuple[Kind, ...] = ("A", "AAAA")
_RECORD = re.compile(r"(\d{1,3}) (\d{1,3}) (\d{1,3}) ([0-9a-f]*)")


class Found(NamedTuple):
    """What a look-up came to.

    Args:
        records: proven ones; empty: there are none.
        base: the name that they stand under, and that the certificate has to carry for usage 2.
        ttl: seconds.
        failure: why there is no answer; then nothing may be sent (section 2.1.1).
        why: why there are no records, for people.
    """

    records: tuple[Tlsa, ...] = ()
    base: str = ""
    ttl: float = LONGEST
    failure: str = ""
    why: str = ""


def look_up(host: str, port: int) -> Generator[Question, Reply, Found]:
    """A or AAAA, then TLSA under the host's real name and its own."""
    for kind in _ADDRESSES:
        reply = yield Question(host, kind)
        if reply.failure and not reply.nxdomain:
            return Found(failure=reply.failure)
        if reply.records:
            break
    if not reply.records or not reply.secure:
        why = "not signed" if reply.records else "unknown"
        return Found(ttl=reply.ttl, why=f"the address of {host} is {why}")
    ttl = reply.ttl
    for base in dict.fromkeys((reply.name or host, host)):
        reply = yield Question(f"_{port}._tcp.{base}", "TLSA")
        if reply.failure and not reply.nxdomain:
            return Found(failure=reply.failure)
        ttl = min(ttl, reply.ttl)
        if reply.secure and (records := _parsed(reply.records)):
            return Found(records, base, ttl)
    return Found(ttl=ttl, why=f"{host} has no signed TLSA record")


def _parsed(texts: Iterable[str]) -> tuple[Tlsa, ...]:
    matches = [match for match in map(_RECORD.fullmatch, texts) if match]
    return tuple([Tlsa(int(m[1]), int(m[2]), int(m[3]), bytes.fromhex(m[4])) for m in matches[:MOST_RECORDS]])

"""The messages of a session, typed as in `native_messages`: ping, certificates, and the throttle dialogue.

All of them begin with the manager's incarnation; what they mean is docs/protocol.md and docs/throttling.md. Times are
relative, in the unit that the name ends with, since the clocks of two machines are never compared.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.model import TlsMode
from proxy.protocols.native.messages import (
    U32,
    U63,
    Address,
    HostName,
    Incarnation,
    LongName,
    Message,
    Name,
    Part,
    PathId,
    Sentence,
    canonical_host,
)


class Mode(enum.StrEnum):
    """How the limits of several instances for one throttle are reconciled."""

    SUM = "sum"
    AVERAGE = "average"


class Scope(enum.StrEnum):
    """Over which proxies a throttle counts: this one, or all that use one throttle store."""

    PROXY = "proxy"
    CLUSTER = "cluster"


class Ping(Message, frozen=True):
    """Both: `t` is the sender's own clock in microseconds, of use to nobody else."""

    TYPE = 0x20
    incarnation: Incarnation
    t: U63


class Pong(Message, frozen=True):
    """Both: the `t` of the PING, and for how many microseconds the answer was held."""

    TYPE = 0x21
    incarnation: Incarnation
    t: U63
    hold_us: U32


class Cert(Message, frozen=True):
    """Proxy: SHA-256 of the leaf certificates that a channel of this proxy may show."""

    TYPE = 0x22
    incarnation: Incarnation
    hashes: Annotated[list[Annotated[bytes, Meta(min_length=32, max_length=32)]], Meta(max_length=16)]


class Rate(Part, frozen=True):
    """`amount` messages per `seconds`; amount 0: no limit; burst 0: the proxy's default."""

    amount: U32
    seconds: Annotated[int, Meta(ge=1, le=31 * 86400)]
    burst: U32 = 0


class Backoff(Part, frozen=True):
    """What a throttle slows down to: `percent` of its limit, or `rate` if given; and when.

    `threshold`: percent of failed attempts in the reports that starts it, 0: only an instance's word does.
    """

    percent: Annotated[int, Meta(ge=1, le=100)]
    rate: Rate | None
    return_after_s: Annotated[int, Meta(ge=1, le=31 * 86400)]
    threshold: Annotated[int, Meta(ge=0, le=100)] = 0


class Throttle(Part, frozen=True):
    """One throttle as an instance has it configured; zero means no limit."""

    name: LongName
    rates: Annotated[list[Rate], Meta(max_length=4)]
    max_connections: U32 = 0
    mode: Mode = Mode.AVERAGE
    paused: bool = False
    backoff: Backoff | None = None
    scope: Scope = Scope.PROXY


class Path(Part, frozen=True):
    """The throttles that one kind of message passes, all of one source: an address, or the name of a `source` block.

    `mx`, `domain`: of the receivers that OPENs of this path go to, where these say nothing themselves.
    """

    id: PathId
    source_ip: Annotated[str, Meta(max_length=45)] | None
    throttles: Annotated[list[Throttle], Meta(min_length=1, max_length=8)]
    source: Name | None = None
    mx: LongName | None = None
    domain: LongName | None = None

    def __post_init__(self) -> None:
        if (self.source_ip is None) == (self.source is None):
            raise ValueError("source_ip and source: one of them names it")
        if self.source_ip is not None:
            msgspec.structs.force_setattr(self, "source_ip", canonical_host(self.source_ip))


class Reg(Message, frozen=True):
    """Client: these numbers name these paths."""

    TYPE = 0x23
    incarnation: Incarnation
    paths: Annotated[list[Path], Meta(min_length=1, max_length=1024)]


class Want(Part, frozen=True):
    """Demand of a path: messages ready now without a permit, permits got so far (modulo 2**32), backlog by kind.

    `lapsed_cum`: how many of the permits came too late or grew too old (modulo 2**32).
    """

    id: PathId
    want: U32
    got_cum: U32
    ram: U32 = 0
    bounce: U32 = 0
    disk: U32 = 0
    lapsed_cum: U32 = 0


class Demand(Message, frozen=True):
    """Client: what waits."""

    TYPE = 0x24
    incarnation: Incarnation
    records: Annotated[list[Want], Meta(min_length=1, max_length=4096)]


class SlotRun(Part, frozen=True):
    """`n` granted slots of a path, from the `first`th on (counted from 0 in order of grant, modulo 2**32)."""

    id: PathId
    first: U32
    n: Annotated[int, Meta(ge=1, le=2**32 - 1)]


class Return(Message, frozen=True):
    """Client: slots that will not be used."""

    TYPE = 0x25
    incarnation: Incarnation
    records: Annotated[list[SlotRun], Meta(min_length=1, max_length=4096)]


class Tally(Part, frozen=True):
    """Outcomes on a path since the last report; `backoff`: the instance's word that the throttle shall slow down."""

    id: PathId
    ok: U32
    deferred: U32
    failed: U32
    backoff: bool = False


class Outcome(Message, frozen=True):
    """Client: how attempts ended."""

    TYPE = 0x26
    incarnation: Incarnation
    records: Annotated[list[Tally], Meta(min_length=1, max_length=4096)]


class Bye(Message, frozen=True):
    """Client: this run ends in good order; nothing of it is outstanding."""

    TYPE = 0x27
    incarnation: Incarnation


class SlotGrant(Part, frozen=True):
    """`n` slots of a path: the first `first_offset_us` after receipt (or before: negative), then each `step_us`.

    `use_by`: until when the first may be used, in µs of the client's own clock, that of `ping_t`; 0: not said.
    """

    id: PathId
    n: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    first_offset_us: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
    step_us: U32
    use_by: U63 = 0


class Grant(Message, frozen=True):
    """Proxy: permits. `ping_t`: the `t` of the client's last PING; `hold_us`: how long ago that came."""

    TYPE = 0x28
    incarnation: Incarnation
    ping_t: U63
    hold_us: U32
    records: Annotated[list[SlotGrant], Meta(min_length=1, max_length=4096)]


class Share(Part, frozen=True):
    """Advice: the number of connections that is this session's fair share on a path now."""

    id: PathId
    cap: U32


class Cap(Message, frozen=True):
    """Proxy: advice on connections."""

    TYPE = 0x29
    incarnation: Incarnation
    records: Annotated[list[Share], Meta(min_length=1, max_length=4096)]


class Effective(Part, frozen=True):
    """A throttle's limits in force, after reconciling and backoff."""

    rates: Annotated[list[Rate], Meta(max_length=4)]
    max_connections: U32 = 0


class PathLimit(Part, frozen=True):
    """Limits in force on a path, throttles in the order of REG. `slack_us` is d: a slot s may be used in [s, s+d]."""

    id: PathId
    throttles: Annotated[list[Effective], Meta(max_length=8)]
    slack_us: U32 = 0
    backoff_ms: U32 = 0
    paused: bool = False
    warning: Sentence = ""


class Limit(Message, frozen=True):
    """Proxy: the answer to REG, and sent again whenever something changes."""

    TYPE = 0x2A
    incarnation: Incarnation
    records: Annotated[list[PathLimit], Meta(min_length=1, max_length=1024)]


class List(Message, frozen=True):
    """Client: which cached connections could I take over?"""

    TYPE = 0x2B
    incarnation: Incarnation
    source_ip: Annotated[str, Meta(max_length=45)] | None = None

    def __post_init__(self) -> None:
        if self.source_ip is not None:
            msgspec.structs.force_setattr(self, "source_ip", canonical_host(self.source_ip))


class CachedEntry(Part, frozen=True):
    """`count` cached connections that are alike."""

    source_ip: Annotated[str, Meta(max_length=45)]
    destination: Address
    ehlo_name: HostName
    tls: TlsMode
    count: U32


class Cached(Message, frozen=True):
    """Proxy: the answer to LIST; `more`: there are others, which did not fit."""

    TYPE = 0x2C
    incarnation: Incarnation
    entries: Annotated[list[CachedEntry], Meta(max_length=256)]
    more: bool = False

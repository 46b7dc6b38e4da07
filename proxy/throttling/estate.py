"""What a throttle manager leaves to the one that goes on in its place, as records, and these as bytes.

A *chunk* is a MessagePack array of records, each an array that begins with its kind; none is longer than `LARGEST`
bytes and `MOST_RECORDS` records, so that writing or reading one stops nobody. The first record is a `Head`, the last an
`End`, which says what there must have been. Records name throttles, paths and whatever else came before them by number,
in the order they came. Times are nanoseconds of CLOCK_BOOTTIME: two processes of one machine have the same.

**Versions.** What `MAJOR` is said to be must be what is read. A later minor version appends fields to records (they are
ignored here, and have defaults where an earlier one did not have them) and brings kinds of records (passed over). So
both directions of an upgrade work within a major version. Outside of it, or if anything is missing or was changed on
the way, the whole is refused by an `Unreadable` that says why. Nothing here knows a manager: `gathering` writes,
`adopting` reads.
"""

from __future__ import annotations

from binascii import crc32
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, Struct

MAGIC = "greenarrow throttles"
MAJOR, MINOR = 1, 0
#: Bytes of a chunk, and records in it.
LARGEST = 65_536
MOST_RECORDS = 500
#: A record may be so long; what may have more is more than one record.
_ROOM = 16_384
_ARRAY = b"\xdd"

Count = Annotated[int, Meta(ge=0)]
Whole = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(max_length=1024)]
Sentence = Annotated[str, Meta(max_length=4096)]


class Unreadable(Exception):
    """What was left cannot be taken over; the sentence says why, and nothing has changed."""


class Part(Struct, array_like=True, frozen=True, gc=False):
    """Base of what stands in records."""


class Rate(Part, frozen=True):
    amount: Whole
    seconds: Whole
    burst: Whole = 1


class Gcra(Part, frozen=True):
    """A `throttle.Window`. `interval`: as its slots were spaced by who gave them out."""

    rate: Rate
    slack: Count
    interval: Whole
    tat: int
    filled_at: int


class Slowing(Part, frozen=True):
    """A `limits.BackoffRule` of an instance."""

    percent: Count
    rate: Rate | None
    return_after: Count
    threshold: Count


class Strictness(Part, frozen=True):
    """A `backoff.Rule`, as far as it matters once it is on. `return_after` in seconds."""

    over: Rate | None
    percent: Count
    rate: Rate | None
    pause: bool
    return_after: float
    on: list[Sentence] = []


class Record(Struct, array_like=True, frozen=True, gc=False):
    """Base of all records."""


class Head(Record, frozen=True, tag=0):
    """The first one. `at`: when it was written. `start`: since when what was given out is known."""

    magic: str
    major: Whole
    minor: Count
    at: int
    incarnation: Count
    start: int
    known_from: int
    unpermitted: Count
    late: Count
    begun: Count
    day: Count
    next_override: Count


class End(Record, frozen=True, tag=1):
    """The last one: so many records of each kind came before it, and the checksum of all chunks before its own."""

    counts: dict[int, int]
    checksum: Count


class PartOf(Record, frozen=True, tag=2):
    """A `limits.Part`, which many instances have of many throttles."""

    limits: list[Rate]
    places: Count
    mode: Literal["sum", "average"]
    paused: bool
    backoff: Slowing | None


class ThrottleOf(Record, frozen=True, tag=3):
    """A `flows.Throttle`. `kind`: of instances (0), the proxy's own (1), or the meter of its connection rate (2).

    `leased`: of all proxies together.
    """

    kind: Annotated[int, Meta(ge=0, le=2)]
    source: Name
    name: Name
    receiver: Name
    windows: list[Gcra]
    dormant: list[Gcra]
    slack: Count
    opens: int
    taken: Count
    cap: Count
    closed_until: int
    closed_by: Sentence
    mixed: bool
    backoff: Slowing | None
    backoff_until: int
    outcomes: tuple[Count, Count, int]
    shadow: tuple[Count, Count, Count] | None
    carried: tuple[Count, Count, Count] | None
    leased: bool = False


class StakeOf(Record, frozen=True, tag=4):
    """One instance's part in a throttle, which stays until then, or until the instance is back."""

    throttle: Count
    name: Name
    part: Count
    until: int


class TurnOf(Record, frozen=True, tag=5):
    """A throttle where somebody waits for slots: the virtual time of one of the names, and of the last slot."""

    throttle: Count
    clock: Count
    name: Name
    time: Count


class LineOf(Record, frozen=True, tag=6):
    """A throttle where somebody waits for places: since when, and how many have got in."""

    throttle: Count
    began: int
    passed: Count


class StandingOf(Record, frozen=True, tag=7):
    """An owner in a line, in the order in which they were served. `due`: turns until it must be served; None: it has
    places."""

    line: Count
    owner: Name
    due: float | None


class PathOf(Record, frozen=True, tag=8):
    """Throttles that are passed together, by number."""

    throttles: list[Count]


class ReturnedOf(Record, frozen=True, tag=9):
    """Slots of a path that nobody will use who was given them: they may be given out again, as they are."""

    path: Count
    slots: Annotated[list[int], Meta(max_length=1000)]


class AccountOf(Record, frozen=True, tag=10):
    """Permits of one instance on one path, as an `audit.Account` keeps them; what it holds follows."""

    owner: Name
    path: Count
    free_until: int
    lapsed: Count
    lapsed_until: int


class HoldingOf(Record, frozen=True, tag=11):
    """`n` permits of an account, neither used nor returned."""

    account: Count
    slot: int
    last: int
    n: Whole
    step: Count


class FineOf(Record, frozen=True, tag=12):
    """Messages without a permit that are to be paid for."""

    owner: Name
    path: Count
    messages: Whole


class SlowdownOf(Record, frozen=True, tag=13):
    """What replies have done to one key of the proxy's own throttles."""

    source: Name
    name: Name
    receiver: Name
    ended: Sentence


class CauseOf(Record, frozen=True, tag=14):
    """A back-off that is on."""

    slowdown: Count
    rule: Strictness
    until: int
    reply: Sentence
    instance: Name


class StruckOf(Record, frozen=True, tag=15):
    """When replies came that fit a rule which lets some pass."""

    slowdown: Count
    rule: Strictness
    times: Annotated[list[int], Meta(max_length=1000)]


class OverrideOf(Record, frozen=True, tag=16):
    """What was set by hand."""

    number: Whole
    name: Name
    source: Name
    pause: bool
    places: Count
    limits: list[Rate]
    until: int
    because: Sentence


class LookAtOf(Record, frozen=True, tag=22):
    """Something was set by hand, or is over, that has not reached all throttles of this name and source yet."""

    name: Name
    source: Name


class FlowOf(Part, frozen=True):
    """A path that a connection was opened for, by the session of `owner`."""

    owner: Name
    weight: float
    id: Count
    path: Count


class PlacesOf(Record, frozen=True, tag=17):
    """The places of one socket, which its process goes on to hold; `path`: -1: none."""

    number: Count
    owner: Name
    weight: float
    path: Annotated[int, Meta(ge=-1)]
    flows: list[FlowOf]


class LeftOf(Record, frozen=True, tag=18):
    """Meanwhile: a socket was closed."""

    number: Count


class RepliedOf(Record, frozen=True, tag=19):
    """Meanwhile: a receiver refused something on the connection with these places."""

    number: Count
    reply: str


class SpentOf(Record, frozen=True, tag=20):
    """Meanwhile: a permit was used, or (`back`) was not after all. `last` None: it had lapsed.

    `keys`: the throttles of its path, each with its kind.
    """

    owner: Name
    keys: list[tuple[int, str, str, str]]
    slot: int
    last: int | None
    back: bool


class OwedOf(Record, frozen=True, tag=21):
    """Meanwhile: a message without a permit, to be paid for."""

    owner: Name
    keys: list[tuple[int, str, str, str]]


#: All that follow the head.
AnyRecord = (
    End
    | PartOf
    | ThrottleOf
    | StakeOf
    | TurnOf
    | LineOf
    | StandingOf
    | PathOf
    | ReturnedOf
    | AccountOf
    | HoldingOf
    | FineOf
    | SlowdownOf
    | CauseOf
    | StruckOf
    | OverrideOf
    | PlacesOf
    | LeftOf
    | RepliedOf
    | SpentOf
    | OwedOf
    | LookAtOf
)
_KINDS = 23
_END = 1
_PART, _THROTTLE, _LINE, _PATH, _ACCOUNT, _SLOWDOWN = 2, 3, 6, 8, 10, 13

_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(Head)
_fields = msgspec.msgpack.Decoder(list[object])
_records: msgspec.msgpack.Decoder[list[AnyRecord]] = msgspec.msgpack.Decoder(list[AnyRecord])
_raws = msgspec.msgpack.Decoder(list[msgspec.Raw])
_record: msgspec.msgpack.Decoder[AnyRecord] = msgspec.msgpack.Decoder(AnyRecord)


class Writer:
    """Packs records into chunks.

    Attributes:
        ready: a chunk is full: `take` it.
    """

    def __init__(self) -> None:
        self.ready = False
        self._body = bytearray()
        self._records = 0
        self._counts: dict[int, int] = {}
        self._checksum = 0

    def add(self, record: Record) -> None:
        kind = _TAGS.get(type(record), 0)  # (of the head)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._records += 1
        _encoder.encode_into(record, self._body, -1)
        self.ready = self._records >= MOST_RECORDS or len(self._body) > LARGEST - _ROOM

    def take(self) -> bytes:
        chunk = _ARRAY + self._records.to_bytes(4, "big") + self._body
        self._body.clear()
        self._records, self.ready = 0, False
        self._checksum = crc32(chunk, self._checksum)
        return chunk

    def rest(self) -> Iterator[bytes]:
        """What is not taken yet, if anything."""
        if self._records:
            yield self.take()

    def end(self) -> Iterator[bytes]:
        """The last chunks."""
        yield from self.rest()
        self.add(End(dict(self._counts), self._checksum))
        yield self.take()


class Estate(NamedTuple):
    """All that was left, in order, and complete."""

    head: Head
    records: list[Record]


class Reader:
    """Takes in the chunks, one after another; `finish` says whether these were all.

    Args:
        keep: all records, for `finish`; else each call of `feed` gives its own, and that is that.

    Attributes:
        head: the first record, once it has come.

    Raises:
        Unreadable: by each call; there is no way on after it.
    """

    def __init__(self, keep: bool = True) -> None:
        self.head: Head | None = None
        self._keep = keep
        self._end: End | None = None
        self._records: list[Record] = []
        self._counts: dict[int, int] = {0: 1}
        self._known = [0] * _KINDS
        self._checksum = 0

    def feed(self, chunk: bytes) -> list[Record]:
        """The records of this one, without head and end."""
        if self._end is not None:
            raise Unreadable("there is more after its end")
        before, self._checksum = self._checksum, crc32(chunk, self._checksum)
        if self.head is None:
            self.head, raws = _opened(chunk)
            records = _some_known(raws[1:], self.head.minor > MINOR, self._counts)
        else:
            records = _decoded(chunk, self.head.minor > MINOR, self._counts)
        for record in records:
            if isinstance(record, End):
                self._end = record
                if record.counts != self._counts or record.checksum != before or record is not records[-1]:
                    raise Unreadable(
                        "its end does not fit what came before it: something was lost or changed on the way"
                    )
            elif not _fits(record, self._known):
                raise Unreadable(f"{type(record).__name__} names something that did not come before it")
        if self._end is not None:
            records.pop()
        if self._keep:
            self._records += records
        return records

    def finish(self) -> Estate:
        if self.head is None or self._end is None:
            raise Unreadable("its end is missing")
        return Estate(self.head, self._records)


def chunks_of(records: Iterable[Record]) -> Iterator[bytes]:
    """What happened meanwhile: chunks that stand for themselves."""
    writer = Writer()
    for record in records:
        writer.add(record)
        if writer.ready:
            yield writer.take()
    yield from writer.rest()


def records_of(chunk: bytes) -> list[Record]:
    """The other way round, of one of them; kinds that a later minor version has are passed over.

    Raises:
        Unreadable: it is nothing of the kind.
    """
    return _decoded(chunk, True, {})


def _opened(chunk: bytes) -> tuple[Head, list[msgspec.Raw]]:
    """The head, whose first fields are looked at before it is known what the others are."""
    try:
        raws = _raws.decode(chunk)
        first = _fields.decode(raws[0])
    except (msgspec.DecodeError, IndexError):
        raise Unreadable("it is no state of throttles") from None
    if first[:2] != [0, MAGIC] or len(first) < 4:
        raise Unreadable("it is no state of throttles")
    if first[2] != MAJOR:
        raise Unreadable(f"its format is {first[2]}.{first[3]}, and this program knows {MAJOR}.{MINOR}")
    try:
        return _head.decode(raws[0]), raws
    except msgspec.DecodeError as error:
        raise Unreadable(f"its head is damaged: {error}") from None


def _decoded(chunk: bytes, newer: bool, counts: dict[int, int]) -> list[Record]:
    try:
        if newer:
            return _some_known(_raws.decode(chunk), newer, counts)
        records = _records.decode(chunk)
    except msgspec.DecodeError as error:
        raise Unreadable(f"it is damaged: {error}") from None
    for record in records:
        _count(_TAGS[type(record)], counts)
    return list(records)


def _some_known(raws: list[msgspec.Raw], newer: bool, counts: dict[int, int]) -> list[Record]:
    """The records among these; what a later minor version has beside them is counted only."""
    records: list[Record] = []
    try:
        for raw in raws:
            if newer:
                kind = _fields.decode(raw)[0]
                if isinstance(kind, int) and kind >= _KINDS:
                    _count(kind, counts)
                    continue
            record = _record.decode(raw)
            _count(_TAGS.get(type(record), 0), counts)
            records.append(record)
    except (msgspec.DecodeError, IndexError) as error:
        raise Unreadable(f"it is damaged: {error}") from None
    return records


def _fits(record: Record, known: list[int]) -> bool:
    """Whether all that it names by number came before it."""
    kind = type(record)
    names = _NAMES.get(kind)
    if names is not None:
        for what, number in names(record):
            if number >= known[what]:
                return False
    known[_TAGS[kind]] += 1
    return True


#: What records name by number: pairs of a kind and the number.
_NAMES: dict[type[Record], Callable[[Any], Iterable[tuple[int, int]]]] = {
    StakeOf: lambda record: ((_THROTTLE, record.throttle), (_PART, record.part)),
    TurnOf: lambda record: ((_THROTTLE, record.throttle),),
    LineOf: lambda record: ((_THROTTLE, record.throttle),),
    StandingOf: lambda record: ((_LINE, record.line),),
    PathOf: lambda record: [(_THROTTLE, each) for each in record.throttles],
    ReturnedOf: lambda record: ((_PATH, record.path),),
    AccountOf: lambda record: ((_PATH, record.path),),
    FineOf: lambda record: ((_PATH, record.path),),
    HoldingOf: lambda record: ((_ACCOUNT, record.account),),
    CauseOf: lambda record: ((_SLOWDOWN, record.slowdown),),
    StruckOf: lambda record: ((_SLOWDOWN, record.slowdown),),
    PlacesOf: lambda record: [(_PATH, record.path), *[(_PATH, flow.path) for flow in record.flows]],
}
_TAGS: dict[type[Record], int] = {each: each.__struct_config__.tag for each in get_args(AnyRecord)}


def _count(kind: int, counts: dict[int, int]) -> None:
    if kind != _END:
        counts[kind] = counts.get(kind, 0) + 1

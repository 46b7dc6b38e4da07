"""What the processes of one proxy say to each other: the records of their link, and their bytes.

A process whose throttle manager is another one's is a *worker* there, whatever else it does; the other is its *master*.
A datagram of the link carries several records. Requests are numbered by who asks; places by the master, for as long as
they are held. Versions may differ between the two after an upgrade: fields are added at the end, with a default, and
`VERSION` changes when that is not enough.

Waiting, sockets and descriptors are `net.seam`'s, what a record leads to is for `egress.remote` and `server.clerk`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec
from msgspec import Struct

from proxy.errors import PeerError
from proxy.model import Endpoint

VERSION = 1
#: Bytes of a datagram that carries several records. A record that is longer travels by itself, in a file of memory.
DATAGRAM = 32_768

#: A throttle, named to a worker: source, name, receiver.
ThrottleName: TypeAlias = tuple[str, str, str]
#: What is asked for: owner, weight, source, destination, and what the client says: mx and domain.
Who: TypeAlias = tuple[str, float, str, str, str, str]


# ---------------------------------------------------------------- a worker says


class Enter(Struct, array_like=True, tag=1):
    """A place, within `seconds`. `key`: of the cached connection that would do; `rated`: see `Office.enter`."""

    id: int
    who: Who
    seconds: float
    key: bytes
    rated: bool


class Cancel(Struct, array_like=True, tag=2):
    """Nobody waits for this place any more; what has been given under this id meanwhile is free again."""

    id: int


class Swap(Struct, array_like=True, tag=3):
    """Another user for the places `number` (0: there were none)."""

    id: int
    number: int
    who: Who
    rated: bool


class Leave(Struct, array_like=True, tag=4):
    """The socket that had these places is closed."""

    number: int


class PassOn(Struct, array_like=True, tag=5):
    """May these places go to who is next, if that one asks for `key`?"""

    id: int
    number: int
    key: bytes


class Ask(Struct, array_like=True, tag=6):
    """The slot of a message, within `seconds`."""

    id: int
    who: Who
    seconds: float


class CancelMessage(Struct, array_like=True, tag=7):
    """Nobody waits for this slot any more."""

    id: int


class PutOff(Struct, array_like=True, tag=8):
    """The message of this slot, which was told, goes late: may it?"""

    id: int


class Replied(Struct, array_like=True, tag=9):
    """A receiver refused something on the connection with these places."""

    number: int
    reply: str


class Carried(Struct, array_like=True, tag=10):
    """What became of messages on the connection with these places."""

    number: int
    accepted: int
    deferred: int
    rejected: int


class MadeWay(Struct, array_like=True, tag=11):
    """How many cached connections have given way under this throttle; their places follow when they are free."""

    throttle: ThrottleName
    count: int


class Tell(Struct, array_like=True, tag=12):
    """A word of the worker about itself: `what`, and what there is to say."""

    what: str
    body: bytes = b""


class Reply(Struct, array_like=True, tag=13):
    """The answer to `Question` of this id."""

    id: int
    body: bytes
    more: bool = False


class Mail(Struct, array_like=True, tag=14):
    """A MAIL of an instance's session goes on the connection with these places: it is held against its permit, and
    answered as `Ask`."""

    id: int
    number: int
    seconds: float


# ---------------------------------------------------------------- a master says


class Placed(Struct, array_like=True, tag=64):
    """The answer to `Enter`: `number` of the places (0: no throttle applies), their throttles, and which are wanted by
    others."""

    id: int
    number: int
    throttles: list[ThrottleName] = []
    wanted: list[int] = []


class Refused(Struct, array_like=True, tag=65):
    """The answer to `Enter` or `Ask`: not in time. `throttle`: its name; `retry_after`: seconds."""

    id: int
    message: str
    throttle: str
    retry_after: float


class Swapped(Struct, array_like=True, tag=66):
    """The answer to `Swap`: whether it may, and the new places as in `Placed`."""

    id: int
    may: bool
    number: int = 0
    throttles: list[ThrottleName] = []
    wanted: list[int] = []


class Yes(Struct, array_like=True, tag=67):
    """The answer to `PassOn` or `PutOff`; to that one, `last` as in `Granted`."""

    id: int
    may: bool
    last: int = 0


class Granted(Struct, array_like=True, tag=68):
    """The answer to `Ask`: the slot has come; `last`: its last moment, in nanoseconds of CLOCK_BOOTTIME, or 0: nothing
    limits the message."""

    id: int
    last: int


class Wanted(Struct, array_like=True, tag=69):
    """Whether anybody waits under this throttle."""

    throttle: ThrottleName
    wanted: bool


class MakeWay(Struct, array_like=True, tag=70):
    """So many wait under this throttle: cached connections should give way. Answered by `MadeWay`."""

    throttle: ThrottleName
    count: int


class Order(Struct, array_like=True, tag=71):
    """The worker is to do something: `what`, and with what."""

    what: str
    body: bytes = b""


class Question(Struct, array_like=True, tag=72):
    """The worker is to say something: answered by `Reply`."""

    id: int
    what: str
    body: bytes


# ---------------------------------------------------------------- a worker says to another one


class Passed(Struct, array_like=True):
    """What was decided about a client that is passed on; see `doors.passing`.

    Args:
        door: where it came in, as configured. number, started: of its lines in the log.
        requested: of the handshake in which the answer is still to be said; what came behind it is in there.
    """

    door: Endpoint
    client: Endpoint
    number: int
    started: float
    instance: str
    source_name: str | None
    source: str
    destination: Endpoint
    protocol: str
    requested: bytes


FromWorker: TypeAlias = (
    Enter
    | Cancel
    | Swap
    | Leave
    | PassOn
    | Ask
    | CancelMessage
    | PutOff
    | Replied
    | Carried
    | MadeWay
    | Tell
    | Reply
    | Mail
)
FromMaster: TypeAlias = Placed | Refused | Swapped | Yes | Granted | Wanted | MakeWay | Order | Question
Record: TypeAlias = FromWorker | FromMaster

_encoder = msgspec.msgpack.Encoder()
_of_workers = msgspec.msgpack.Decoder(list[FromWorker])
_of_masters = msgspec.msgpack.Decoder(list[FromMaster])
_of_neighbours = msgspec.msgpack.Decoder(Passed)


def encode(records: Sequence[Record]) -> Iterator[bytes]:
    """Datagrams of these records, in their order; one that is longer than `DATAGRAM` has one record."""
    whole = _encoder.encode(records)
    if len(whole) <= DATAGRAM or len(records) == 1:
        yield whole
        return
    half = len(records) // 2
    yield from encode(records[:half])
    yield from encode(records[half:])


def encode_one(records: Sequence[Record]) -> bytes | None:
    """All of them in one datagram; None: they are too long for one."""
    whole = _encoder.encode(records)
    return whole if len(whole) <= DATAGRAM else None


def decode(data: bytes | memoryview, from_worker: bool) -> list[FromWorker] | list[FromMaster]:
    """The records of one datagram.

    Raises:
        PeerError: they are none of this version.
    """
    try:
        return _of_workers.decode(data) if from_worker else _of_masters.decode(data)
    except msgspec.DecodeError as error:
        raise PeerError(f"a record between two processes of the proxy is not of this version: {error}") from None


def decode_passed(data: bytes) -> Passed:
    """A client that another worker has passed on.

    Raises:
        MsgspecError: it is none.
    """
    return _of_neighbours.decode(data)

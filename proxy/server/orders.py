"""What a master tells its workers to do, and what they say of themselves: the words in `Order` and `Tell`.

A worker begins with `Begin`, gets the sockets of its doors with `SOCKETS`, and settings with `PREPARE`; when all are
`PREPARED`, with `COMMIT` they are in force everywhere. Both ends are the same program of the same version: bodies are
Python objects, and nobody else can write to the link.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

from msgspec import Struct

from proxy.config.load import Loaded
from proxy.config.origins import Given, Origins
from proxy.model import Endpoint
from proxy.settings import Settings

#: Orders. `SOCKETS`: configured addresses, in the order of the descriptors; `NEIGHBOURS`: the ways to the others.
BEGIN, SOCKETS, NEIGHBOURS, PREPARE, COMMIT, ABORT = "begin", "sockets", "neighbours", "prepare", "commit", "abort"
DRAIN, FOLLOW, FOLLOW_NO_MORE = "drain", "follow", "follow no more"
#: An address has failed to prove who it is, at another process; told by workers, too.
FAILED = "failed"
#: Seats for clients, see `policy.seats`: so many more (or fewer); half of those that are free are to come back.
SEATS, SEATS_BACK = "seats", "seats back"
#: What a worker tells: its figures, whether it is prepared (or why not), that it serves, what it was asked to follow,
#: and how many connections it had to reset when it has drained.
PART, PREPARED, SERVING, FOLLOWED, DRAINED = "part", "prepared", "serving", "followed", "drained"
#: So many seats are needed; so many come back.
SEATS_WANTED, SEATS_RETURNED = "seats wanted", "seats returned"


#: Of an upgrade, from the new process to the old one, which is its worker: it is ready to take over, and it has.
READY, TAKEN = "ready", "taken"
#: And back: the first words, listening sockets, that these were all, the throttle manager's estate and its end, and
#: what has happened since to what is in it.
HELLO, HANDED, ALL_HANDED = "hello", "handed", "all handed"
ESTATE, ESTATE_END, MEANWHILE = "estate", "the end of the estate", "meanwhile"


class Hello(Struct):
    """The first words of a process that is to be replaced.

    Args:
        seam: the version of the link's records. version: of the program.
        incarnation: of its throttle manager. highest: number of a connection. identity: certificate and key that were
            made in memory, if any.
    """

    seam: int
    version: str
    pid: int
    incarnation: int
    highest: int
    identity: bytes


class Handed(Struct):
    """What a socket is: `door`, of a configured address, one of several; or `control`, with its path."""

    kind: str
    host: str = ""
    port: int = 0
    index: int = 0
    path: str = ""


class Begin(NamedTuple):
    """What a worker needs to know first.

    Args:
        number: its own, from 1. workers: how many there are. step, above: see `numbering`.
        incarnation: the master's.
    """

    number: int
    workers: int
    step: int
    above: int
    incarnation: int


class Plan(NamedTuple):
    """Settings and what belongs to them.

    Args:
        own: where the program listens. max_connections: how many clients a worker may have; 0: as many as it is lent.
        identity: certificate and key that were made in memory, if any.
    """

    settings: Settings
    own: tuple[Endpoint, ...]
    max_connections: int
    identity: bytes

    def loaded(self) -> Loaded:
        """As if this process had read them; mistakes have no place but the master's."""
        return Loaded(self.settings, Origins({}, {}, Given("", self.settings.config_filename or "command line")), ())


def pack(what: object) -> bytes:
    return pickle.dumps(what, pickle.HIGHEST_PROTOCOL)


def unpack(body: bytes) -> Any:
    return pickle.loads(body)

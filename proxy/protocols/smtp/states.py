"""Where a mediated dialogue is, and what it wants: the words that `course`, its parts and its caller share."""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where the dialogue is."""

    __hash__ = object.__hash__  # Enum's own is a function in Python, called five times for each event

    GREET = "greet"  # the receiver's greeting is awaited
    HELLO = "hello"  # no name of the client's was accepted yet
    READY = "ready"  # nothing in progress; a connection is there
    DETACHED = "detached"  # nothing in progress; the connection was given away, or died
    HELD = "held"  # a command waits: for a slot, a connection, or both
    SWALLOW = "swallow"  # its MAIL was refused by us: what was pipelined behind it is, too
    TRANSACTION = "transaction"
    DATA_ASKED = "data_asked"  # DATA was sent: what follows depends on the reply
    DATA = "data"
    AUTH = "auth"  # the receiver asks for the next line of an AUTH exchange
    RAW = "raw"  # the receiver says what nobody understands: bytes pass, both ways
    OVER = "over"


class Want(enum.Enum):
    """What the caller is to do next, and what to tell then."""

    GREETING = "greeting"  # read it: `greeted` or `failed`
    HELLO = "hello"  # bring the session up under `name`: `attached_to` or `failed`
    SLOT = "slot"  # wait for a message's slot: `slot_granted` or `failed`
    LINE = "line"  # a session under `name`, `fresh` or not: `attached_to` or `failed`
    LEAVE = "leave"  # the receiver is not needed any more, see `verdict` and `death`: `left`
    START_TLS = "start_tls"  # with the client: `tls_started`
    END = "end"  # close the client; the receiver, if one is `attached`, as for LEAVE

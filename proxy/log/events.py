"""The closed vocabulary of what is logged; docs/operations.md describes each event.

When an event happens is for those who log it, how its line looks for `formats`.
"""

from __future__ import annotations

import enum


class Event(enum.StrEnum):
    """The closed vocabulary: the first word of a text line, the field `event` of a JSON line."""

    START = "start"
    LISTEN = "listen"
    RELOAD = "reload"
    RELOAD_FAILED = "reload_failed"
    CONFIG = "config"
    ADDRESS = "address"
    DNS = "dns"
    DRAIN = "drain"
    STOP = "stop"
    CONTROL = "control"
    STATUS = "status"
    STEP = "step"
    CONNECTION = "connection"
    MESSAGE = "message"
    REFUSED = "refused"
    FAILED = "failed"
    SUPPRESSED = "suppressed"
    ACCEPT = "accept"
    SESSION = "session"
    THROTTLE = "throttle"
    STORE = "store"
    WORKER = "worker"
    UPGRADE = "upgrade"
    TLS = "tls"
    SYSTEMD = "systemd"
    LOST = "lost"
    LIBRARY = "library"
    INTERNAL = "internal"


#: What comes with each connection, or every few seconds: not remembered for who asks.
OFTEN = frozenset((Event.STATUS, Event.STEP, Event.CONNECTION, Event.MESSAGE, Event.REFUSED, Event.FAILED))
#: Lines that look like the closing line, with the message last.
ABOUT_CONNECTIONS = frozenset((Event.REFUSED, Event.FAILED, Event.MESSAGE, Event.STEP))

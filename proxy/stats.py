"""What happened, as numbers, and the documented text forms of those numbers.

`Counters` only ever grow; `Snapshot` is what the server sees at one moment and renders as the status lines. Their shape
is an interface (docs/operations.md): operators parse them. Collecting the figures, writing them and serving metrics
do not belong here.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from proxy.errors import ProxyError, UpstreamError
from proxy.model import Ending, Endpoint, TlsSeen
from proxy.spans import SPANS

#: A table of named counters never holds more names than this; what comes later is counted under OTHER.
MAX_NAMES: Final = 64
OTHER: Final = "other"
#: Listeners, and sessions, that have a status line of their own every `stats_interval`.
MOST_LINES = 100

_Item = TypeVar("_Item")


class Standing(NamedTuple):
    """One client's connection, or one SMTP session of a native channel, as it stands.

    Args:
        number: as in the log. protocol: of its door. source: "" and destination: None until it has said them.
        state: what it waits for or is in the middle of. started: on the monotonic clock.
    """

    number: int
    instance: str
    protocol: str
    client: Endpoint
    source: str
    destination: Endpoint | None
    state: str
    started: float


class Backlog(NamedTuple):
    """Messages that are ready for an attempt now and wait: first attempts, bounces' first attempts, later attempts."""

    ram: int = 0
    bounce: int = 0
    disk: int = 0

    def __str__(self) -> str:
        return f"backlog(ram={self.ram} bounce={self.bounce} disk={self.disk})"


class Flow(NamedTuple):
    """One direction between MTA and manager: frames queued to enter a stage, queued to leave it, records parked."""

    entering: int = 0
    leaving: int = 0
    parked: int = 0
    depth: int = 16

    def __str__(self) -> str:
        return f"(in={self.entering}/{self.depth} out={self.leaving}/{self.depth} buf={self.parked})"


def sum_flows(flows: Iterable[Flow]) -> Flow:
    """The manager's figure: that of all its sessions; the depth is that of one queue."""
    parts = list(flows)
    return Flow(sum(f.entering for f in parts), sum(f.leaving for f in parts), sum(f.parked for f in parts))


class SessionFigures(NamedTuple):
    """One instance's throttle session; times in seconds, `ping` is the last round trip (0: none yet)."""

    name: str
    connected: float
    ping: float
    ping_age: float
    backlog: Backlog = Backlog()
    forward: Flow = Flow()
    back: Flow = Flow()


class ManagerFigures(NamedTuple):
    """The throttle manager of this run; `incarnation` is its 8 hex digits."""

    incarnation: str
    throttles: int
    sessions: tuple[SessionFigures, ...] = ()
    forward: Flow = Flow()
    back: Flow = Flow()

    @property
    def backlog(self) -> Backlog:
        """The sum of the sessions' backlogs, by construction."""
        parts = [session.backlog for session in self.sessions]
        return Backlog(sum(b.ram for b in parts), sum(b.bounce for b in parts), sum(b.disk for b in parts))


class LeasedFigures(NamedTuple):
    """One throttle whose limits hold for several proxies together, as this one has it.

    Args:
        name, source, receiver: its key. limits: amounts, seconds and bursts in force, of all proxies together.
        share: those that we go on with while the store does not answer; an amount of 0: nothing goes then.
        places: connections of all proxies together; 0: unlimited. cap: those of them that are ours now. places_share:
            those that are ours while the store does not answer.
        leased: slots that the store has granted us. unused: those of them that lapsed here or were given up.
        users: proxies that use it, by the store's last word; 0: not known.
        local: no other proxy uses it, so it costs the store nothing.
        alone: the store does not answer for it, and we go on with our share.
    """

    name: str
    source: str = ""
    receiver: str = ""
    limits: tuple[tuple[int, int, int], ...] = ()
    share: tuple[tuple[int, int, int], ...] = ()
    places: int = 0
    cap: int = 0
    places_share: int = 0
    leased: int = 0
    unused: int = 0
    users: int = 0
    local: bool = False
    alone: bool = False


class StoreFigures(NamedTuple):
    """The store of throttles that several proxies share (`throttle_store`), as this one sees it.

    Args:
        address: as configured, without a password. form: `single`, `sentinel` or `cluster`.
        engine, version: what answers there, or did so last, as it says itself, and master: at which address (of a
            cluster: all of them, with commas); "": nothing has answered yet.
        members: `throttle_store_members`. seen: proxies that call it, by its last word; 0: not known.
        connected: it answers; else we are degraded: each throttle goes on with our share of its limits.
        since: seconds in this state. why: the last failure, in words; "": there was none.
        calls: how often it was asked. keys: for so many throttles. slots: granted by it.
        lost: calls without a reply in time: what they may have been granted counts as used. refused: answered with an
            error. discarded: replies whose clock could not be trusted.
        epochs: how often its memory was found to be another one, so that each limit began anew. degraded: how often it
            was lost.
        p50, p99: seconds of a call, of the last few hundred; None: there was none.
        leased_count: throttles in `leased`, which is gone through once.
    """

    address: str
    form: str = "single"
    engine: str = ""
    version: str = ""
    master: str = ""
    members: int = 1
    seen: int = 0
    connected: bool = False
    since: float = 0.0
    why: str = ""
    calls: int = 0
    keys: int = 0
    slots: int = 0
    lost: int = 0
    refused: int = 0
    discarded: int = 0
    epochs: int = 0
    degraded: int = 0
    p50: float | None = None
    p99: float | None = None
    leased_count: int = 0
    leased: Iterable[LeasedFigures] = ()


def duration(seconds: float) -> str:
    """A time span as the status lines spell it: `1h5m19s`, `0s`, and below one second `0.250ms`.

    A negative span (it cannot be, but clocks are read in two places) is shown as 0s.
    """
    if seconds >= 1:
        minutes, rest = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours}h{minutes}m{rest}s"
        return f"{minutes}m{rest}s" if minutes else f"{rest}s"
    return f"{seconds * 1000:.3f}ms" if seconds >= 0.0000005 else "0s"


def whole_seconds(seconds: float) -> str:
    """An age or uptime: like `duration`, but never finer than a second."""
    return duration(int(seconds))


_BARE: Final = re.compile(r"[A-Za-z0-9._:/@\[\]+,-]+")
_LONGEST_NAME: Final = 200


def bare(name: str) -> str:
    """A name that an instance gave itself, as one word: what could end it, or pass for a figure, is escaped.

    `x): backlog(ram=9` becomes `x\\x29:\\x20backlog\\x28ram\\x3d9`.
    """
    cut = name[:_LONGEST_NAME]
    if _BARE.fullmatch(cut):
        return cut
    return "".join(c if _BARE.fullmatch(c) else _escaped(ord(c)) for c in cut)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class StatusLine(NamedTuple):
    """One of the documented status lines. `fields`: the same figures by name, for a log that is read by machines; times
    are seconds."""

    text: str
    fields: dict[str, object]


def listener_line(address: str, open_connections: int) -> StatusLine:
    text = f"listener({address}): open_connections={open_connections}"
    return StatusLine(text, {"listener": address, "open_connections": open_connections})


def manager_line(manager: ManagerFigures) -> StatusLine:
    text = (
        f"throttle: manager({manager.incarnation}): throttles={manager.throttles} sessions={len(manager.sessions)} "
        f"{manager.backlog} forward{manager.forward} back{manager.back}"
    )
    fields: dict[str, object] = {"manager": manager.incarnation, "throttles": manager.throttles}
    fields["sessions"] = len(manager.sessions)
    return StatusLine(text, fields | _queues(manager.backlog, manager.forward, manager.back))


def session_line(session: SessionFigures) -> StatusLine:
    text = (
        f"throttle: session({bare(session.name)}): timeconnected={whole_seconds(session.connected)} "
        f"ping={duration(session.ping)}({whole_seconds(session.ping_age)} ago) "
        f"{session.backlog} forward{session.forward} back{session.back}"
    )
    fields: dict[str, object] = {"session": session.name, "timeconnected": round(session.connected, 3)}
    fields |= {"ping": round(session.ping, 6), "ping_age": round(session.ping_age, 3)}
    return StatusLine(text, fields | _queues(session.backlog, session.forward, session.back))


def remote_line(active: int, cached: int) -> StatusLine:
    """`connections` counts every outgoing socket, so it is the sum of the two by construction."""
    text = f"direct_remote_smtp: connections={active + cached}(active={active} cached={cached})"
    return StatusLine(text, {"connections": active + cached, "active": active, "cached": cached})


def _queues(backlog: Backlog, forward: Flow, back: Flow) -> dict[str, object]:
    named: dict[str, object] = {f"backlog_{name}": count for name, count in backlog._asdict().items()}
    for way, flow in (("forward", forward), ("back", back)):
        named |= {f"{way}_{name}": count for name, count in flow._asdict().items()}
    return named


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the program at one moment, for the log, the status page and the metrics alike.

    Args:
        listeners: each listener with its open client connections.
        manager: the throttle manager; None when there is no native listener, and then no `throttle:` line either.
        active: outgoing connections in use or being set up.
        cached: outgoing connections that are held open for the next user.
    """

    listeners: tuple[tuple[str, int], ...]
    manager: ManagerFigures | None
    active: int
    cached: int

    def lines(self, most: int | None = None) -> list[StatusLine]:
        """The documented status lines, in their documented order.

        Args:
            most: of listeners, and of sessions; those with most to show are told, and one line sums the others up.
                None: all of them.
        """
        listeners, others = _first(self.listeners, most, lambda listener: listener[1])
        lines = [listener_line(address, count) for address, count in listeners]
        if others:
            total = sum(count for _, count in others)
            text = f"listeners({len(others)} more): open_connections={total}"
            lines.append(StatusLine(text, {"listeners": len(others), "open_connections": total}))
        if self.manager is not None:
            lines.append(manager_line(self.manager))
            sessions, rest = _first(self.manager.sessions, most, lambda session: sum(session.backlog))
            lines += [session_line(session) for session in sessions]
            if rest:
                backlog = Backlog(*(sum(column) for column in zip(*(each.backlog for each in rest), strict=True)))
                fields: dict[str, object] = {f"backlog_{name}": count for name, count in backlog._asdict().items()}
                fields["sessions"] = len(rest)
                lines.append(StatusLine(f"throttle: sessions({len(rest)} more): {backlog}", fields))
        lines.append(remote_line(self.active, self.cached))
        return lines


def _first(
    items: tuple[_Item, ...], most: int | None, weight: Callable[[_Item], int]
) -> tuple[list[_Item], list[_Item]]:
    """The `most` heaviest in their order, and the others."""
    if most is None or len(items) <= most:
        return list(items), []
    heaviest = set(heapq.nlargest(most, range(len(items)), key=lambda index: (weight(items[index]), -index)))
    chosen = [item for index, item in enumerate(items) if index in heaviest]
    return chosen, [item for index, item in enumerate(items) if index not in heaviest]


class Table(dict[str, int]):
    """Counters by name, bounded: names may come from places that we do not control.

    `table.count(name)` adds one. A name beyond the first MAX_NAMES is counted under `other`.
    """

    __slots__ = ()

    def count(self, name: str, amount: int = 1) -> None:
        try:
            self[name] += amount
            return
        except KeyError:
            pass
        if len(self) < MAX_NAMES:
            self[name] = amount
        else:
            self[OTHER] = self.get(OTHER, 0) + amount


class Outcomes:
    """What became of a client's messages where the dialogue is seen; `waited`: seconds for slots."""

    __slots__ = ("accepted", "deferred", "messages", "rejected", "waited")

    def __init__(self) -> None:
        self.messages = 0
        self.accepted = 0
        self.deferred = 0
        self.rejected = 0
        self.waited = 0.0

    def add(self, messages: int, accepted: int, deferred: int, rejected: int) -> None:
        """What one connection has seen, as `Tracker` counts."""
        self.messages += messages
        self.accepted += accepted
        self.deferred += deferred
        self.rejected += rejected


class Fate(NamedTuple):
    """One message.

    Args:
        sender: the domain in MAIL, "" for bounces. recipients: the domains in RCPT, each once, the first ones.
        rcpts: how many RCPT commands there were, refused ones included.
        size: bytes between DATA and the end, as on the wire.
        reply: the receiver's last line about it: to the end, or to the MAIL or DATA that it refused.
        carried: a receiver has heard of it; else the reply is the proxy's.
    """

    sender: str
    recipients: tuple[str, ...]
    rcpts: int
    size: int
    reply: str
    carried: bool = True


#: What there is in `Counters`.
COUNTED = (
    "accept_errors",
    "accepted",
    "bytes_down",
    "bytes_up",
    "discarded",
    "ended",
    "failed",
    "fresh",
    "in_clear",
    "instances_ended",
    "instances_failed",
    "internal_errors",
    "messages",
    "messages_accepted",
    "messages_deferred",
    "messages_rejected",
    "probes",
    "refused",
    "reloads",
    "reloads_failed",
    "reused",
    "sources_accepted",
    "sources_deferred",
    "sources_ended",
    "sources_failed",
    "sources_rejected",
    "tls_failures",
    "tls_resumed",
    "tls_sessions",
)


class Counters:
    """Everything that is counted since the start. Plain integers: the hot path adds to them directly.

    accepted: client connections, by protocol. refused: by the outcome's `code`. failed: outgoing connections that
    did not come to be, by step. ended: relayed connections, by `model.Ending`. discarded: cached connections, by
    reason. in_clear: SMTP sessions that are in clear although the receiver offered TLS and the client would have
    liked it, by cause: `handshake` failed, `starttls` was refused, `remembered`: not tried. tls_sessions: new
    sessions with TLS, by `model.TlsSeen.certificate`; tls_resumed: those of them in which an earlier one went on;
    tls_failures: what kept others from having one, by result of RFC 8460. reused and fresh: how often a request was
    served from the cache or by a new connection. messages: MAIL commands seen where the dialogue is; `audit` counts
    those without a permit. messages_accepted, messages_deferred and messages_rejected: replies to them by class, by
    instance; with sources_ in front, by source address. instances_ended and instances_failed: relayed connections that
    have ended, and outgoing ones that did not come to be, by instance (and behind a blank by step); with sources_ in
    front by source address.
    probes: connections that closed without a byte, and health checks.
    """

    __slots__ = COUNTED

    def __init__(self) -> None:
        self.accepted = Table()
        self.refused = Table()
        self.failed = Table()
        self.ended = Table()
        self.discarded = Table()
        self.in_clear = Table()
        self.tls_failures = Table()
        self.tls_sessions = Table()
        self.tls_resumed = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.reused = 0
        self.fresh = 0
        self.messages = 0
        self.messages_accepted = Table()
        self.messages_deferred = Table()
        self.messages_rejected = Table()
        self.sources_accepted = Table()
        self.sources_deferred = Table()
        self.sources_rejected = Table()
        self.probes = 0
        self.accept_errors = 0
        self.instances_ended = Table()
        self.instances_failed = Table()
        self.sources_ended = Table()
        self.sources_failed = Table()
        self.internal_errors = 0
        self.reloads = 0
        self.reloads_failed = 0

    def tls(self, seen: TlsSeen) -> None:
        """A new session over TLS."""
        self.tls_sessions.count(seen.certificate)
        self.tls_resumed += seen.resumed

    def over(
        self,
        ending: Ending,
        instance: str,
        source: str,
        up: int,
        down: int,
        seconds: float,
        messages: int | None = None,
    ) -> None:
        """A relayed connection has ended; `messages`: MAIL commands, None: the dialogue was not seen."""
        self.bytes_up += up
        self.bytes_down += down
        self.ended.count(ending)
        self.instances_ended.count(instance or "-")
        self.sources_ended.count(source)
        SPANS.session.observe(seconds)
        SPANS.bytes.observe(up)
        if messages is not None:
            SPANS.messages.observe(messages)

    def note(self, error: ProxyError) -> None:
        """A request that was refused, or an outgoing connection that did not come to be."""
        if isinstance(error, UpstreamError):
            self.failed.count(error.step)
            if error.tls_result:
                self.tls_failures.count(error.tls_result)
        else:
            self.refused.count(error.code)

    def count_outcomes(self, instance: str, source: str, outcomes: Outcomes) -> None:
        """What became of messages of this instance ("": unknown) that left from this address."""
        name = instance or "-"
        if outcomes.accepted:
            self.messages_accepted.count(name, outcomes.accepted)
            self.sources_accepted.count(source, outcomes.accepted)
        if outcomes.deferred:
            self.messages_deferred.count(name, outcomes.deferred)
            self.sources_deferred.count(source, outcomes.deferred)
        if outcomes.rejected:
            self.messages_rejected.count(name, outcomes.rejected)
            self.sources_rejected.count(source, outcomes.rejected)

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """All counters by name, as `status.json` shows them; tables are copied."""
        return {name: dict(value) if isinstance(value := getattr(self, name), Table) else value for name in COUNTED}


class Limiter:
    """At most `lines` lines a `window` for each key, and a bounded number of keys; what is left out is counted.

    Pure: time in seconds is an argument. Keys beyond `keys` share one budget.
    """

    def __init__(self, lines: int = 10, window: float = 60.0, keys: int = 1024) -> None:
        self._lines = lines
        self._window = window
        self._keys = keys
        self._entries: dict[str, list[float]] = {}
        self._next_sweep = 0.0

    def admit(self, key: str, now: float) -> bool:
        """Whether a line about `key` may be written now; a no is counted."""
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= self._keys and key != "others":
                return self.admit("others", now)
            entry = self._entries[key] = [now, 0, 0]
        if entry[1] >= self._lines:
            entry[2] += 1
            return False
        entry[1] += 1
        return True

    def expired(self, now: float) -> list[tuple[str, int]]:
        """Forget the windows that are over; returns (key, lines left out) of those that left something out.

        Looks at the table six times in a `window` at most, however often it is called.
        """
        if now < self._next_sweep:
            return []
        self._next_sweep = now + self._window / 6
        over = [(key, int(e[2])) for key, e in self._entries.items() if now - e[0] >= self._window]
        for key, _ in over:
            del self._entries[key]
        return [(key, count) for key, count in over if count]

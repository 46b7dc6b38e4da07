"""The operator's view as plain data: what `/status.json` holds, the page shows and `--status` reads back.

Only shapes; how a figure is spelled is in `spelled`. Times are seconds; `None` stands for "no limit", "unknown" or
"does not apply", as each field says. New fields are added with a default, so that an older client reads a newer proxy.
"""

from __future__ import annotations

from msgspec import Struct

_UNITS = {1: "s", 60: "min", 3600: "hr", 86400: "day"}


class Program(Struct):
    """This run of the program. `incarnation` names it to its native clients; `relay` and `core`: compiled or
    python. `old_configuration`: seconds since reloads have been refused, for `reload_mistake`; None: the last one was
    not. `configuration`: twelve hex digits that tell configurations apart; `configured`: when it was put in force, UTC,
    RFC 3339."""

    version: str
    incarnation: str
    uptime: float
    relay: str
    core: str
    draining: bool = False
    enforce: bool = False
    old_configuration: float | None = None
    reload_mistake: str = ""
    configuration: str = ""
    configured: str = ""


class ListenerRow(Struct):
    """One listener; `closing`: a reload took it away, and connections are still open."""

    address: str
    protocol: str
    open_connections: int
    closing: bool = False


class Connections(Struct):
    """Clients' connections and those to receivers. `newcomers`: clients that have not said yet who they are.
    `dialogues`: clients of mode smtp, whether a receiver is theirs at the moment or not."""

    open: int
    limit: int
    newcomers: int
    newcomers_dropped: int
    channels: int
    active: int
    cached: int
    dialogues: int = 0


class Rate(Struct):
    """At most `amount` in `seconds`, `burst` of them at once."""

    amount: int
    seconds: int
    burst: int = 1

    def __str__(self) -> str:
        unit = _UNITS.get(self.seconds, f"{self.seconds}s")
        return f"{self.amount}/{unit}" + (f" (burst {self.burst})" if self.burst > 1 else "")


class InstanceRow(Struct):
    """One instance under one throttle.

    Args:
        limits, places: what it said (no limits: none; places None: none). mode: how they are to be added up; "" where
            it said nothing.
        connected: it has a session; with a part and without a session, the part is remembered for a while.
        used, waiting: places it has, and requests for connections that wait. share: places it should have; None: any.
        demand: messages that wait for a permit.
    """

    name: str
    limits: list[Rate] = []
    places: int | None = None
    mode: str = ""
    paused: bool = False
    connected: bool = False
    used: int = 0
    waiting: int = 0
    share: int | None = None
    demand: int = 0


class ThrottleRow(Struct):
    """One throttle: a rule for one source address, one receiver, or both; "": all of them together.

    Args:
        warmup_day: of so many days of its warm-up; 0: none, or it is over.
        shadow: it holds nothing back; would_wait, would_refuse: requests that it would have held back, and refused.
        kind: "instances" when instances named it, "proxy" for a `throttle` block.
        limits, places: in force now; none and None: unlimited. reconciled: how they came about.
        state: "", "paused", "backoff" (for `backoff` seconds; a pause, too, where a reply has caused it) or "rising"
            (after a backoff).
        used: places taken. waiting: requests for connections. demand: messages that wait for a permit.
        next_slot: seconds until the next one; None: no rate. taken: slots given out since the throttle is known.
        place_use, rate_use: 0 to 1, None: unknown or unlimited. rate_use is that of the last minute or two.
        source_name: that a `source` block gives its source.
        messages_accepted, messages_deferred, messages_rejected: since the throttle is known, on connections whose use
            is over, where the dialogue is seen.
    """

    source: str
    name: str
    kind: str
    reconciled: str
    limits: list[Rate] = []
    places: int | None = None
    state: str = ""
    backoff: float = 0.0
    used: int = 0
    waiting: int = 0
    demand: int = 0
    next_slot: float | None = None
    taken: int = 0
    place_use: float | None = None
    rate_use: float | None = None
    instances: list[InstanceRow] = []
    instances_left_out: int = 0
    receiver: str = ""
    shadow: bool = False
    would_wait: int = 0
    would_refuse: int = 0
    warmup_day: int = 0
    warmup_days: int = 0
    source_name: str = ""
    messages_accepted: int = 0
    messages_deferred: int = 0
    messages_rejected: int = 0


class BackoffRow(Struct):
    """A throttle of a block that backs off, by one of its rules.

    Args:
        state: `backoff` or `paused`, for `seconds` more, or `rising`: its limits come back.
        to: what is left of them, in words. reply: what a receiver said last that did it, to `instance`.
    """

    name: str
    source: str = ""
    receiver: str = ""
    state: str = ""
    seconds: float = 0.0
    to: str = ""
    reply: str = ""
    instance: str = ""


class BlockRow(Struct):
    """A `throttle` block as it is configured, and what the names in it mean at the moment, as DNS says.

    Args:
        limits: of messages, where these are seen, else of connections. connection_limits: of new connections. places:
            connections at a time; None: unlimited. warmup_days, backoff_rules: how many it has.
        per: what counts by itself. sources, instances, receivers: whom it holds for, as written; none: any. Of long
            lists the first, and how many more. shadow: it holds nothing back.
        hosts: MX hosts; addresses: theirs, with those left out. failures: what of it cannot be looked up, in words;
            what was known of it stays in force. asking: domains that have had no answer yet. named: it has names.
    """

    name: str
    limits: list[Rate] = []
    connection_limits: list[Rate] = []
    places: int | None = None
    warmup_days: int = 0
    backoff_rules: int = 0
    per: list[str] = []
    sources: list[str] = []
    instances: list[str] = []
    receivers: list[str] = []
    shadow: bool = False
    named: bool = False
    hosts: int = 0
    addresses: list[str] = []
    addresses_left_out: int = 0
    failures: list[str] = []
    failures_left_out: int = 0
    asking: int = 0


class LeasedRow(Struct):
    """One throttle whose limits hold for several proxies together.

    Args:
        name, source, receiver, source_name: as of its throttle. limits, places: of all proxies together; places None:
            unlimited. share, share_places: what this proxy goes on with while the store does not answer; an amount of
            0: nothing goes then. places_here: those that are this proxy's now.
        leased: slots that the store has granted to this proxy. unused: those of them that lapsed here.
        users: proxies that use it; 0: not known.
        state: `leased`; `local`: no other proxy uses it; `alone`: the store does not answer, and the share holds.
    """

    name: str
    source: str = ""
    receiver: str = ""
    source_name: str = ""
    limits: list[Rate] = []
    places: int | None = None
    share: list[Rate] = []
    share_places: int | None = None
    places_here: int | None = None
    leased: int = 0
    unused: int = 0
    users: int = 0
    state: str = "leased"


class StoreRow(Struct):
    """The store of the throttles that several proxies share, as this one sees it; see `stats.StoreFigures`.

    Args:
        state: `connected`, or `degraded`: it does not answer, and this proxy goes on with its share of each limit.
        since: seconds in this state. why: the last failure in words, also when it is over.
        members: as configured. seen: proxies that the store hears of; 0: not known.
        calls_a_second: since the last look or the one before; None: not known yet. p50, p99: seconds of a call.
        lost, refused, discarded: calls without a reply in time, answered with an error, with a clock that cannot be
            trusted. epochs: times that its memory was found to be another one. degraded: times that it was lost.
        keys_left_out: of `keys`.
    """

    address: str
    state: str
    since: float
    engine: str = ""
    version: str = ""
    form: str = "single"
    master: str = ""
    why: str = ""
    members: int = 1
    seen: int = 0
    throttles: int = 0
    calls: int = 0
    calls_a_second: float | None = None
    throttles_asked: int = 0
    slots: int = 0
    lost: int = 0
    refused: int = 0
    discarded: int = 0
    epochs: int = 0
    degraded: int = 0
    p50: float | None = None
    p99: float | None = None
    keys: list[LeasedRow] = []
    keys_left_out: int = 0


class Queues(Struct):
    """Frames that wait to enter a stage, to leave it, and parked records; see docs/operations.md."""

    entering: int = 0
    leaving: int = 0
    parked: int = 0


class SessionRow(Struct):
    """One instance's session; `ping` 0: no round trip yet."""

    name: str
    address: str
    connected: float
    ping: float
    ping_age: float
    ram: int
    bounce: int
    disk: int
    forward: Queues
    back: Queues
    paths: int = 0
    weight: float = 1.0
    without_permit: int = 0


class ManagerRow(Struct):
    """The throttle manager. `throttles`: those in use now, as in the log. `known`: all that are remembered.
    `backing_off`: those of blocks that a reply has slowed down."""

    throttles: int
    known: int
    sessions: int
    ram: int
    bounce: int
    disk: int
    without_permit: int
    backing_off: int = 0


class CachedRow(Struct):
    """Held-open connections that can stand in for each other. `messages`: carried so far."""

    source: str
    destination: str
    ehlo_name: str
    tls: str
    tls_server_name: str
    tenant: bool
    connections: int
    messages: int
    oldest: float
    idle: float


class PoolView(Struct):
    """The keepalive pool. `reuse_ratio`: requests served from it, of all that were served; None: there was none.

    `hits`, `misses`: look-ups, of which a request that waits for its place makes two. `oldest`, `mean_age` since the
    connect, `longest_idle`: seconds, 0 when nothing is held.
    """

    held: int
    offered: int
    hits: int
    misses: int
    reuse_ratio: float | None
    discards: dict[str, int]
    oldest: float
    mean_age: float
    longest_idle: float
    keys: list[CachedRow] = []
    keys_left_out: int = 0
    sources: dict[str, int] = {}


class PeerRow(Struct):
    """A receiver, or a source address, with which something has gone wrong since the program started.

    Args:
        failing: seconds since the first of the failures behind which nothing has gone well; None: something has.
        in_a_row: how many have come since then.
        recent: failures and refusals of the last five minutes. opened: connections that have ended, failed: that did
            not come to be, by step; both since the row began. deferred, rejected: replies 4xx and 5xx.
        last, last_ago: the last failure or refusal in words, and seconds since then.
    """

    name: str
    failing: float | None = None
    in_a_row: int = 0
    recent: int = 0
    opened: int = 0
    failed: dict[str, int] = {}
    deferred: int = 0
    rejected: int = 0
    last: str = ""
    last_ago: float = 0.0


class SourceRow(PeerRow):
    """A source address. `present`: on this machine; `absent`: seconds since it went away; None: it did not, or was
    never here. `messages_`: what became of messages, where that is seen. `source_name`: of its `source` block."""

    present: bool = True
    absent: float | None = None
    messages_accepted: int = 0
    messages_deferred: int = 0
    messages_rejected: int = 0
    source_name: str = ""


class TroubleRow(Struct):
    """Something that an operator should know first. `kind` is a word of a closed list (docs/operations.md); `recent`:
    how often in the last five minutes; `since`: seconds, None: not known."""

    kind: str
    text: str
    recent: int = 0
    since: float | None = None


class ConnectionRow(Struct):
    """A client's connection, or the SMTP session that a native channel has now. `id`: as in the log; `state`: what it
    waits for or is in the middle of (docs/operations.md); `age`: seconds since it was accepted."""

    id: int
    state: str
    age: float
    instance: str
    protocol: str
    client: str
    source: str
    destination: str


class LoginRow(Struct):
    """Who has proven a name with which secret. `secret`: its number among those that prove this name now, or `gone`;
    `latest`: this client has come with no other one since; `logins`: how often; `ago`: seconds, the last time."""

    instance: str
    client: str
    secret: str
    latest: bool
    logins: int
    ago: float


class EventRow(Struct):
    """A line of the log. `ago`: seconds; `text`: message and fields."""

    time: str
    ago: float
    level: str
    event: str
    text: str


class OverrideRow(Struct):
    """Something set by hand. `id`: for `end override`; `ends`: seconds until it ends by itself."""

    id: str
    what: str
    ends: float
    because: str = ""


class ConfigRow(Struct):
    """One value of a directive in force. `block`: kind and name, "" outside of blocks; `place`: where it is written."""

    block: str
    directive: str
    value: str
    place: str


class WorkerRow(Struct):
    """A process of the program.

    Args:
        number: 0: the master, or the only one. role: `master`, `worker`, or `leaving`: takes nothing new, and ends when
            it has nothing left. pid: 0: it died, and another one will take its place.
        up: seconds since it was started. open_connections: of clients. cpu: seconds; memory: bytes that are resident.
        descriptors: open; most_descriptors: that may be.
        restarts: how many of this number have died. died: of what the last one did, and died_ago: seconds since then;
            None: none has. died_lately: how many in the last five minutes.
        silent: seconds since it said anything; a process that works does so each second.
    """

    number: int
    role: str
    pid: int
    version: str
    up: float
    open_connections: int = 0
    cpu: float = 0.0
    memory: int = 0
    descriptors: int = 0
    most_descriptors: int = 0
    restarts: int = 0
    died: str = ""
    died_ago: float | None = None
    died_lately: int = 0
    silent: float = 0.0


class MinuteRow(Struct):
    """One minute of the last hour. `ended`, `failed`: connections to receivers, a second; `turn`: so long was the
    longest turn of the program at most, seconds, by the classes of its histogram in the metrics; 5: or longer."""

    ended: float
    failed: float
    turn: float


class Overview(Struct):
    """All but the single throttles. `generated_at`: UTC, RFC 3339; `trouble`: the worst first; `source_names`: of the
    addresses in `counters` and `sources` that have one."""

    program: Program
    listeners: list[ListenerRow]
    connections: Connections
    counters: dict[str, int | dict[str, int]]
    manager: ManagerRow
    pool: PoolView
    sessions: list[SessionRow]
    sessions_left_out: int
    host: str = ""
    generated_at: str = ""
    trouble: list[TroubleRow] = []
    receivers: list[PeerRow] = []
    receivers_left_out: int = 0
    sources: list[SourceRow] = []
    sources_left_out: int = 0
    source_names: dict[str, str] = {}
    active_instances: dict[str, int] = {}
    active_sources: dict[str, int] = {}
    workers: list[WorkerRow] = []
    store: StoreRow | None = None


class Status(Overview, kw_only=True):
    """The whole view; those throttles come first that somebody waits for, then the busiest. `minutes`: of the last
    hour, the latest last."""

    throttles: list[ThrottleRow]
    throttles_left_out: int
    blocks: list[BlockRow] = []
    blocks_left_out: int = 0
    backoffs: list[BackoffRow] = []
    backoffs_left_out: int = 0
    minutes: list[MinuteRow] = []

"""What a connection needs to be served, in one frozen bundle.

A reload makes a new bundle and leaves the old one to the connections that began with it. The parts that live as long as
the program (engine, counters, gauges, crew) are the same object in each; those that follow from the settings are new.
`note_failure` is how every door counts and logs what did not come to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from ssl import SSLContext
from time import monotonic
from typing import NamedTuple, Protocol

from proxy.egress.acquaintances import Acquaintances
from proxy.egress.admission import Admission
from proxy.egress.broken_tls import BrokenTls
from proxy.egress.demands import Demands
from proxy.egress.keeper import Keeper
from proxy.egress.office import Office
from proxy.egress.resumption import Sessions
from proxy.egress.via import Via
from proxy.errors import ProxyError, UpstreamError
from proxy.log import lines as log
from proxy.model import Ending, Endpoint
from proxy.net.crew import Crew
from proxy.net.identities import ServerIdentity
from proxy.net.newcomers import Newcomers
from proxy.net.relay import Engine
from proxy.policy.access import Access
from proxy.policy.budget import FailureBudget
from proxy.policy.logins import Logins
from proxy.policy.modes import Modes
from proxy.policy.trouble import Troubles
from proxy.protocols.native.auth import ChannelKey, Fences
from proxy.settings import Settings
from proxy.stats import Counters, SessionFigures, Standing


class Door:
    """One listener as its connections see it.

    Args:
        endpoint: where it listens. configured: the same as it was configured, perhaps with port 0.
        secure: clients begin with TLS, and then the protocol.
    """

    __slots__ = ("configured", "endpoint", "open_connections", "protocol", "secure")

    def __init__(
        self, protocol: str, endpoint: Endpoint, configured: Endpoint | None = None, secure: bool = False
    ) -> None:
        self.protocol = protocol
        self.secure = secure
        self.endpoint = endpoint
        self.configured = configured or endpoint
        self.open_connections = 0


class Gauges:
    """What goes up and down.

    Attributes:
        outgoing: sockets towards receivers that serve a client, or are set up for one.
        ends: local ends of the standard doors' outgoing connections, while there is a redirect door: a rule of the
            kernel that redirects these, too, would have us connect to ourselves for ever. None without one.
    """

    __slots__ = ("ends", "outgoing")

    def __init__(self) -> None:
        self.outgoing = 0
        self.ends: set[Endpoint] | None = None


class Leaving(NamedTuple):
    """That all have to go: `until` when (monotonic), and why, in words. `replaced`: another process takes what is new,
    so that dialogues need not be told."""

    until: float
    reason: str
    replaced: bool = False

    def left(self, now: float) -> float:
        """Seconds."""
        return max(0.0, self.until - now)


class Instances:
    """What the native doors know of the instances that are connected now.

    Args:
        channel_keys: key id → what a live session handed out for its channels.
        fences: which run of each name holds the name.
        channels: the open channels. sessions: the open sessions. dialogues: the clients of mode smtp.
        connections: whatever has a client, of all doors.
        logins: which secret each was proven with, of those who come with a password, too.
        leaving: set when the program stops, for those who come in afterwards, since they had dialled before.
    """

    __slots__ = ("channel_keys", "channels", "connections", "dialogues", "fences", "leaving", "logins", "sessions")

    def __init__(self) -> None:
        self.channel_keys: dict[bytes, ChannelKey] = {}
        self.fences = Fences()
        self.logins = Logins()
        self.channels: dict[HostedChannel, None] = {}
        self.dialogues: dict[HostedDialogue, None] = {}
        self.sessions: dict[HostedSession, None] = {}
        self.connections: dict[HostedConnection, None] = {}
        self.leaving: Leaving | None = None


class Neighbours(Protocol):
    """Other workers."""

    def pass_on(self, source: str, destination: Endpoint, passed: object, fd: int) -> bool:
        """Give a client to the worker where connections between these two are held open, with the descriptor of its
        socket, which is copied; False: that is here, or it cannot take anybody now. Does not wait.

        Args:
            passed: what that worker is to know, in whose `doors.front` it comes out again.
        """


class HostedConnection(Protocol):
    """What an operator can look at and end. None of these calls waits."""

    def standing(self) -> Standing | None:
        """How it stands; None: nothing is in progress."""

    def cut(self, ending: Ending) -> None:
        """End it now, whatever is in progress."""


class HostedChannel(Protocol):
    """A channel, as the program's housekeeping sees it. None of these calls waits."""

    @property
    def instance(self) -> str: ...
    @property
    def run_id(self) -> bytes: ...

    def goaway(self, seconds: float, reason: str, ending: Ending) -> None:
        """Tell the client to finish within `seconds`; what is in progress then is cut, with this ending."""

    def cut(self, ending: Ending) -> None:
        """End it now, whatever is in progress."""

    def sweep(self, now: float) -> None:
        """Look whether it has been idle for too long."""


class HostedDialogue(Protocol):
    """A client of mode smtp, as the program's housekeeping sees it. None of these calls waits.

    Attributes:
        doing: what it wants from us now, or else how far the dialogue is: a word.
    """

    @property
    def doing(self) -> str: ...

    def goaway(self) -> None:
        """Tell the client between two messages that the proxy stops."""

    def reloaded(self, services: Services) -> None:
        """The settings are new: they decide about connections that are made from now on."""

    def cut(self, ending: Ending) -> None:
        """End it now, whatever is in progress."""

    def sweep(self, now: float) -> None:
        """Look whether it has been idle for too long."""


class HostedSession(Protocol):
    """A session, as the program's housekeeping sees it. None of these calls waits."""

    def goaway(self, seconds: float, reason: str) -> None:
        """Tell the client that the proxy will be gone in `seconds`; it gets no more permits."""

    def cut(self, error: ProxyError | None = None) -> None:
        """Close the connection, with a reason or without a word."""

    def reloaded(self) -> None:
        """The settings are new."""

    def figures(self) -> SessionFigures | None:
        """For the status lines."""


@dataclass(frozen=True, slots=True)
class Services:
    """Wired by `server`, read by everything that serves a connection.

    Args:
        via: the way out through another proxy; None: we connect ourselves.
        office: places and slots. admission: the same with the sessions of native clients; only their doors use it.
        neighbours: None: this process has all connections that are held open.
        newcomers: who has not said yet who it is.
        slowed: who gave a wrong secret once too often, and waits for the answer.
        identity: what the native listener shows as TLS server; None: it speaks in clear.
        mta_context: for TLS with clients of mode smtp; None: STARTTLS is not offered.
        door_context: for the standard doors with TLS; None: there is none.
        incarnation: 32 random bits that name this run of the program to its native clients.
        host_name: this proxy's name in what it says as an SMTP server.
    """

    settings: Settings
    access: Access
    modes: Modes
    engine: Engine
    counters: Counters
    troubles: Troubles
    gauges: Gauges
    crew: Crew
    newcomers: Newcomers
    slowed: Newcomers
    budget: FailureBudget
    instances: Instances
    keeper: Keeper
    broken_tls: BrokenTls
    demands: Demands
    tls_sessions: Sessions
    acquaintances: Acquaintances
    office: Office
    admission: Admission
    via: Via | None
    neighbours: Neighbours | None
    identity: ServerIdentity | None
    mta_context: SSLContext | None
    door_context: SSLContext | None
    incarnation: int
    host_name: str


def note_failure(
    services: Services,
    door: Door,
    number: int,
    instance: str,
    client: Endpoint,
    source: str,
    destination: Endpoint | None,
    started: float,
    error: ProxyError,
) -> None:
    """Count and log one outcome that is not a relay.

    Args:
        number: of its log lines. started: on the monotonic clock.
        source, destination: as far as they are known.
    """
    now = monotonic()
    services.counters.note(error)
    if isinstance(error, UpstreamError):
        services.counters.instances_failed.count(f"{instance or '-'} {error.step}")
        services.counters.sources_failed.count(f"{source or '-'} {error.step}")
        services.troubles.failed(source, destination, error, now)
    else:
        services.troubles.refuse(error, now)
    log.refused(number, instance, door.protocol, client, source, destination, now - started, error)

"""The throttle store as the rest of the program sees it: scripts are called, and nobody waits for longer than 100 ms.

A call goes out once. What had not left, and what the server refused before the script began (its script unknown, the
key elsewhere), may go out again within the same 100 ms; nothing else ever does. While a server owes an answer for
longer than that, it gets no further calls: whatever hangs, no more is lost than what was under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from proxy.log import lines as log
from proxy.net.identities import StoreTls
from proxy.net.relay import Engine
from proxy.settings import StoreSettings
from proxy.store.calling import BEGINNING, ROUNDS, Calling
from proxy.store.calls import Call, Fate, Reply, Script
from proxy.store.cluster import Cluster
from proxy.store.dial import dialler_of, name_of, towards_sentinels
from proxy.store.finding import LOOK, Sentinels, usable
from proxy.store.node import Node
from proxy.store.servers import Server, Trouble
from proxy.store.slots import Redirect

#: Seconds for a call, whatever is in the way.
CALL_WITHIN = 0.1


@dataclass(slots=True)
class Counts:
    """Since the start. seconds: of all answered calls together, each from sending to answer."""

    answered: int = 0
    refused: int = 0
    unsent: int = 0
    lost: int = 0
    seconds: float = 0.0
    connects: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """How it stands.

    Args:
        degraded_ns: since when it cannot be used (CLOCK_BOOTTIME); None: it can.
        trouble: why, or what was the matter last; None: nothing ever.
        trouble_ns: when that was.
        servers: those that we are connected to now.
    """

    degraded_ns: int | None
    trouble: Trouble | None
    trouble_ns: int
    servers: dict[str, Server] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    @property
    def connected(self) -> bool:
        return bool(self.servers)


def of_settings(
    engine: Engine,
    settings: StoreSettings | None,
    tls: StoreTls | None,
    clock: Callable[[], int],
    old: Store | None,
) -> Store | None:
    """The store that the settings ask for; the old one, with its connections, if nothing has changed."""
    if settings is None:
        return None
    return old if old is not None and old.is_of(settings, tls) else Store(engine, settings, clock, tls)


class Store:
    """One for each configured store; another address is another one.

    Args:
        clock: nanoseconds of CLOCK_BOOTTIME.
        tls: for `rediss://`.
    """

    def __init__(
        self,
        engine: Engine,
        settings: StoreSettings,
        clock: Callable[[], int],
        tls: StoreTls | None = None,
    ) -> None:
        self.settings = settings
        self._tls = tls
        self.counts = Counts()
        self._clock = clock
        self._degraded_ns: int | None = clock()
        self._trouble: Trouble | None = None
        self._trouble_ns = 0
        dialler = dialler_of(engine, settings, tls, clock)
        self._sentinels: Sentinels | None = None
        self._cluster: Cluster | None = None
        self._node: Node | None = None
        if settings.kind == "cluster":
            self._cluster = Cluster(dialler, settings.servers, self._changed)
        elif settings.kind == "sentinel":
            towards = towards_sentinels(dialler, settings)
            self._sentinels = Sentinels(towards, dialler, settings.servers, settings.service)
            self._node = Node(self._sentinels.find, self._changed, self._sentinels.still, LOOK)
        else:
            server = settings.path or settings.servers[0]
            self._node = Node(lambda: usable(dialler.connect(server)), self._changed)

    def is_of(self, settings: StoreSettings, tls: StoreTls | None) -> bool:
        """Whether these ask for just this one."""
        return (self.settings, self._tls) == (settings, tls)

    def start(self) -> None:
        """Connect, and stay so; waits for nothing."""
        if self._node is not None:
            self._node.start()
        if self._cluster is not None:
            self._cluster.start()

    def stop(self) -> None:
        """Let all connections go; calls after it are never sent."""
        for part in (self._node, self._cluster, self._sentinels):
            if part is not None:
                part.stop()

    @property
    def is_cluster(self) -> bool:
        """Whether all keys of one call must have one hash tag."""
        return self._cluster is not None

    def identity(self, key: bytes) -> str:
        """Of the server that has this key; "" while it is not connected.

        Another text than before: the server was started anew, or another one is master, or it was demoted meanwhile.
        What is there may be older than what was said before.
        """
        node = self._node_for(key)
        live = node.live if isinstance(node, Node) else None
        return live[1].identity if live is not None else ""

    def view(self) -> View:
        """How it stands now."""
        nodes = self._nodes()
        servers = {link.where: server for link, server in filter(None, (node.live for node in nodes))}
        self.counts.connects = sum(node.connects for node in nodes)
        return View(self._degraded_ns, self._trouble, self._trouble_ns, servers, self.counts)

    def call(self, script: Script, calls: Sequence[Call]) -> list[Reply]:
        """Run the script for each of these, all of them under way at once; waits, for `CALL_WITHIN` at the most.

        Returns:
            What became of each, in their order.
        """
        ends = monotonic() + CALL_WITHIN
        calling = Calling(script, calls, self._clock, self._node_for, self._redirected)
        for _ in range(ROUNDS):
            batches = calling.send()
            for batch in batches:
                batch.wait(ends - monotonic())
            calling.take()
            if not calling.left or monotonic() >= ends:
                break
        replies = calling.replies()
        self._count(replies)
        return replies

    # ---------------------------------------------------------------- which server

    def _nodes(self) -> list[Node]:
        if self._cluster is not None:
            return list(self._cluster.nodes.values())
        return [self._node] if self._node is not None else []

    def _node_for(self, key: bytes) -> Node | Trouble:
        """Who has this key, or why nobody can be asked."""
        if self._cluster is not None:
            node = self._cluster.node_for(key)
            return node or self._cluster.trouble or self._nowhere()
        assert self._node is not None
        return self._node

    def _nowhere(self) -> Trouble:
        """No server has a slot, as far as we know."""
        known = self._cluster is not None and self._cluster.known
        return (
            Trouble("cluster", "-", "no server has this key") if known else Trouble(BEGINNING, "-", "not connected yet")
        )

    def _redirected(self, redirect: Redirect) -> Node | Trouble:
        """Who is to be asked instead."""
        if self._cluster is None:
            return Trouble("cluster", name_of(redirect.server), "a cluster: write it as redis+cluster://")
        if redirect.for_good:
            self._cluster.moved(redirect.slot, redirect.server)
        return self._cluster.node_at(redirect.server)

    # ---------------------------------------------------------------- how it stands

    def _changed(self, node: Node) -> None:
        """A connection has come or gone, or the server says something else of itself."""
        _warn_of_eviction(node)
        if node.link is None and node.trouble is not None:
            self._bad(node.trouble)
        elif all(each.link is not None for each in self._nodes()):
            self._good()

    def _count(self, replies: Sequence[Reply]) -> None:
        counts = self.counts
        for reply in replies:
            if reply.fate is Fate.ANSWERED:
                counts.answered += 1
                counts.seconds += (reply.received_ns - reply.sent_ns) / 1e9
            elif reply.fate is Fate.REFUSED:
                counts.refused += 1
            elif reply.fate is Fate.UNSENT:
                counts.unsent += 1
            else:
                counts.lost += 1
        bad = next((reply for reply in replies if reply.trouble is not None), None)
        if bad is not None and bad.trouble is not None:
            self._bad(bad.trouble)
        elif replies and all(each.link is not None for each in self._nodes()):
            self._good()

    def _bad(self, trouble: Trouble) -> None:
        now = self._clock()
        if trouble.step != BEGINNING:
            self._trouble, self._trouble_ns = trouble, now
        if self._degraded_ns is None:
            self._degraded_ns = now

    def _good(self) -> None:
        self._degraded_ns = None


def _warn_of_eviction(node: Node) -> None:
    """It would be as if what was forgotten had never been sent."""
    if node.live is not None and node.live[1].evicting:
        link, server = node.live
        text = "the throttle store forgets limits when its memory is full: its maxmemory-policy has to be noeviction"
        log.note(log.Event.STORE, log.WARNING, text, store=link.where, policy=server.evicting)

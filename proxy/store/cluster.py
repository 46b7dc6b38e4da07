"""A cluster: a connection to each server that keys of ours are on, and the map of which slot is where.

The map comes from CLUSTER SLOTS, of whichever server answers, and is asked for anew after MOVED and after a server was
lost. A server is connected to when the first call goes there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gevent
from gevent.event import Event

from proxy.errors import PeerError
from proxy.store.dial import Dialler
from proxy.store.finding import usable
from proxy.store.link import Link
from proxy.store.node import ANSWER, FIRST_PAUSE, LONGEST_PAUSE, Node
from proxy.store.servers import Server, Trouble
from proxy.store.slots import Map, slot_of
from proxy.store.wire import ErrorReply, command

#: Seconds after which the map is looked at again, though nothing seems to have changed.
REFRESH = 30.0


class Cluster:
    """All servers of a cluster that keys of ours are on.

    Args:
        seeds: servers to begin with.
        changed: called when a connection comes and goes.

    Attributes:
        trouble: why the map could not be had the last time it was asked for; None: it could.
    """

    def __init__(self, dialler: Dialler, seeds: Sequence[tuple[str, int]], changed: Callable[[Node], object]) -> None:
        self.nodes: dict[tuple[str, int], Node] = {}
        self.trouble: Trouble | None = None
        self._dialler, self._seeds, self._changed = dialler, tuple(seeds), changed
        self._map: Map | None = None
        self._look = Event()
        self._running: gevent.Greenlet[Any] | None = None

    @property
    def known(self) -> bool:
        """Whether there is a map."""
        return self._map is not None

    def start(self) -> None:
        self._running = gevent.spawn(self._run)

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill(block=False)
        for node in self.nodes.values():
            node.stop()
        self.nodes.clear()

    def node_for(self, key: bytes) -> Node | None:
        """Who has this key; None: nobody that we know of."""
        server = self._map[slot_of(key)] if self._map is not None else None
        return self.node_at(server) if server is not None else None

    def node_at(self, server: tuple[str, int]) -> Node:
        """The same by its address; it is being connected to from now on."""
        node = self.nodes.get(server)
        if node is None:
            node = self.nodes[server] = Node(lambda: self._find(server), self._node_changed)
            node.start()
        return node

    def moved(self, slot: int, server: tuple[str, int]) -> None:
        """A server says that another one has this slot now."""
        if self._map is not None:
            self._map.move(slot, server)
        self._look.set()

    def _find(self, server: tuple[str, int]) -> tuple[Link, Server]:
        return usable(self._dialler.connect(server))

    def _node_changed(self, node: Node) -> None:
        if node.link is None:
            self._look.set()
        self._changed(node)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._look.clear()
            try:
                self._take(self._ask())
                pause = FIRST_PAUSE
            except Trouble as trouble:
                self.trouble = trouble
                pause = min(pause * 2, LONGEST_PAUSE)
            gevent.sleep(pause)
            self._look.wait(REFRESH if self._map is not None and pause == FIRST_PAUSE else 0)

    def _take(self, found: Map) -> None:
        """The new map; whoever has no slot any more is let go."""
        self._map, self.trouble = found, None
        servers = set(found.servers)
        for server in [each for each in self.nodes if each not in servers]:
            self.nodes.pop(server).stop()

    def _ask(self) -> Map:
        """From whoever is connected, then from whoever was named.

        Raises:
            Trouble: the first reason why nobody has one.
        """
        troubles: list[Trouble] = []
        for node in list(self.nodes.values()):
            if node.link is not None:
                try:
                    return map_of(node.link)
                except Trouble as trouble:
                    troubles.append(trouble)
        known = self._map.servers if self._map is not None else []
        for server in dict.fromkeys([*self._seeds, *known]):
            try:
                link, _ = self._dialler.connect(server)
                try:
                    return map_of(link)
                finally:
                    link.close(Trouble("cluster", link.where, "not wanted any more"))
            except Trouble as trouble:
                troubles.append(trouble)
        raise troubles[0]


def map_of(link: Link) -> Map:
    """The map, by this server's word.

    Raises:
        Trouble: step `cluster`; it has none.
    """
    (reply,) = link.ask([command(b"CLUSTER", b"SLOTS")], ANSWER, "cluster")
    if isinstance(reply, ErrorReply):
        raise link.refusal("cluster", reply)
    host = link.where.rpartition(":")[0].strip("[]")
    try:
        return Map.of(reply, host)
    except PeerError as error:
        raise Trouble("cluster", link.where, str(error)) from None

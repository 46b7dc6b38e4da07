"""The leases of the throttle manager: asks the store for them, some ten times a second, and hands over what it says.

What is asked for and what a reply means is decided by `throttling.cluster`; how the store is reached is `store`'s. Here
is the greenlet between them, with the clock, and what is told of it: two log lines, and the figures of the status.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent

import proxy.store
from proxy.egress.admission import Admission
from proxy.egress.clock import clock_ns
from proxy.log import lines as log
from proxy.settings import Settings
from proxy.spans import SPANS
from proxy.stats import LeasedFigures, StoreFigures
from proxy.store.calls import Call, Fate, Reply, Script
from proxy.store.servers import Server
from proxy.store.store import Store
from proxy.throttling.cluster import Answer, Ask, Cluster
from proxy.throttling.leasing import Leased
from proxy.throttling.throttle import MILLISECOND, SECOND, Limit

#: Whether something is wanted is looked at so often while it is not yet time to ask.
_LOOK = 20 * MILLISECOND
#: Calls whose time is remembered for the figures.
_REMEMBERED = 500


def make_cluster(settings: Settings, host: str) -> Cluster:
    """This proxy as the store is to know it: the same after a restart, so by the machine and where it listens."""
    first = next((each for each in (*settings.listen, *settings.listen_socks5, *settings.listen_proxy_protocol)), None)
    where = f"{first.host or '*'}:{first.port}" if first is not None and first.port else settings.control_socket or "-"
    name = f"{host}/{where}".replace(" ", "_")
    members = settings.throttle_store_members or 1
    return Cluster(name, secrets.token_hex(8), members, lambda: secrets.token_hex(8), clock_ns())


class Leases:
    """The one that asks.

    Args:
        admission: whose manager has the cluster.
    """

    def __init__(self, admission: Admission) -> None:
        cluster = admission.manager.cluster
        assert cluster is not None, "a program has one, with or without a store"
        self._admission, self._cluster = admission, cluster
        self._script = Script.of((Path(proxy.store.__file__).parent / "lease.lua").read_bytes())
        self._store: Store | None = None
        self._address = ""
        self._greenlet: Any = None
        self._alone = False
        self._alone_at = 0
        self._lost_before = 0
        self._fates = dict.fromkeys(Fate, 0)
        self._calls = self._keys = 0
        self._servers: dict[str, Server] = {}  # that answered last
        self._times: deque[int] = deque(maxlen=_REMEMBERED)

    def use(self, store: Store | None, settings: Settings) -> None:
        """This store from now on; None: none any more, and what is leased goes on with our share."""
        self._store = store
        self._cluster.store = store is not None
        if settings.throttle_store_members is not None:
            self._cluster.members = settings.throttle_store_members
        if settings.throttle_store is not None:
            self._address = settings.throttle_store.address
        if store is not None and self._greenlet is None:
            self._greenlet = gevent.spawn(self._ask_forever)

    def stop(self) -> None:
        """Tell the others that we go, if that can be done at once."""
        if self._greenlet is None:
            return
        self._greenlet.kill()
        self._greenlet = None
        if self._store is not None:
            self._cluster.leave()
            self._ask(self._store)

    # --- asking ---

    def _ask_forever(self) -> None:
        while True:
            now = clock_ns()
            due = self._cluster.due(now)
            if due > now:
                gevent.sleep(min(due - now, _LOOK) / SECOND)
                continue
            self._ask(self._store)
            self._tell()

    def _ask(self, store: Store | None) -> None:
        admission, manager, sent = self._admission, self._admission.manager, clock_ns()
        asks = manager.ask_store(sent, store.identity if store is not None else lambda key: "")
        admission.settle()
        if not asks:
            return
        replies = store.call(self._script, [Call(ask.keys, ask.arguments) for ask in asks]) if store is not None else []
        answers = [
            Answer(each.value if each.fate is Fate.ANSWERED else None, each.received_ns, each.identity)
            for each in replies
        ] or [Answer(None)] * len(asks)
        manager.store_answered(asks, answers, sent, clock_ns())
        admission.settle()
        self._count(asks, replies)

    def _count(self, asks: Sequence[Ask], replies: Sequence[Reply]) -> None:
        self._calls += 1
        self._keys += len(asks) - 1
        for reply in replies:
            self._fates[reply.fate] += 1
            if reply.fate is Fate.ANSWERED:
                span = reply.received_ns - reply.sent_ns
                self._times.append(span)
                SPANS.store.observe(span / SECOND)

    def _tell(self) -> None:
        """One line when the store is lost, and one when it is back."""
        cluster = self._cluster
        if cluster.alone == self._alone:
            return
        self._alone = cluster.alone
        if self._alone:
            self._alone_at, self._lost_before = cluster.since, self._fates[Fate.LOST]
            log.store_lost(self._address, self._why() or "no answer in 0.5 s", cluster.members)
        else:
            seconds = (clock_ns() - self._alone_at) / SECOND
            log.store_back(self._address, seconds, self._fates[Fate.LOST] - self._lost_before)

    def _why(self) -> str:
        if self._cluster.trouble or self._store is None:
            return self._cluster.trouble
        trouble = self._store.view().trouble
        return str(trouble) if trouble is not None else ""

    # --- what is shown of it ---

    def figures(self) -> StoreFigures | None:
        """As the status shows it; None: there is no store."""
        store, cluster = self._store, self._cluster
        if store is None:
            return None
        self._servers = servers = store.view().servers or self._servers
        first = next(iter(servers.values()), None)
        times = sorted(self._times)
        return StoreFigures(
            address=self._address,
            form=store.settings.kind,
            engine=first.kind if first is not None else "",
            version=first.version if first is not None else "",
            master=", ".join(servers),
            members=cluster.members,
            seen=len(cluster.view),
            connected=not cluster.alone,
            since=max(0, clock_ns() - cluster.since) / SECOND,
            why=self._why(),
            calls=self._calls,
            keys=self._keys,
            slots=cluster.granted,
            lost=self._fates[Fate.LOST],
            refused=self._fates[Fate.REFUSED],
            discarded=cluster.discarded,
            epochs=cluster.epochs,
            degraded=cluster.degraded,
            p50=times[len(times) // 2] / SECOND if times else None,
            p99=times[len(times) * 99 // 100] / SECOND if times else None,
            leased_count=len(cluster.throttles),
            leased=self._leased(),
        )

    def _leased(self) -> Iterator[LeasedFigures]:
        cluster = self._cluster
        for throttle in list(cluster.throttles):
            share = cluster.share_of(throttle)
            yield LeasedFigures(
                name=throttle.key.name,
                source=throttle.key.source,
                receiver=throttle.key.receiver,
                limits=tuple(map(_figures, throttle.limits)),
                share=tuple(map(_figures, share.limits)),
                places=throttle.places,
                cap=throttle.cap_here,
                places_share=share.places,
                leased=throttle.granted,
                unused=throttle.lapsed,
                users=throttle.users + 1,
                local=not throttle.users and not cluster.alone and _free(throttle),
                alone=throttle.alone is not None,
            )


def _figures(limit: Limit) -> tuple[int, int, int]:
    return limit.amount, limit.seconds, limit.burst


def _free(throttle: Leased) -> bool:
    """Whether nothing is asked of the store for it at the moment."""
    return not throttle.waited_for() and not throttle.used_here

"""Two proxies' admissions and a real server between them: the script as Redis and Valkey run it, and what is told."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

import gevent
import pytest

from proxy.config.store import parse_store
from proxy.egress.admission import Admission
from proxy.egress.asking import wait_for_place, wait_for_slot
from proxy.egress.clock import clock_ns
from proxy.egress.leases import Leases
from proxy.egress.office import Applicant
from proxy.net.relay import make_engine
from proxy.policy.limits import Limits
from proxy.settings import Rate, ThrottleSettings
from proxy.store.store import Store
from proxy.throttling.cluster import Cluster
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND
from tests import waiting
from tests.engines import KINDS, VALKEY_8, Engine, engine
from tests.unit.feeding import settings


def wait_for(predicate) -> bool:
    return bool(waiting.wait_for(predicate, 30, pause=gevent.sleep))


LEAVING, RECEIVER = "192.0.2.1", "198.51.100.1"


def block(*rates: Rate, places: int = 0) -> ThrottleSettings:
    return ThrottleSettings(
        name="yahoo",
        source=(),
        destination=(),
        max_concurrent_connections=places,
        max_delivery_rate=rates,
        wait=None,
        scope="cluster",
    )


class Proxy:
    """What a program has of it: a manager, its admission, a connection to the store, and who asks there."""

    def __init__(self, name: str, server: Engine, *blocks: ThrottleSettings, members: int = 2) -> None:
        self.name = name
        self.words = iter(range(1, 1_000_000))
        self.cluster = Cluster(name, name, members, lambda: f"{name}{next(self.words):015x}", clock_ns())
        manager = Manager(1, clock_ns(), blocks=Limits(blocks), cluster=self.cluster)
        self.admission = Admission(manager, lambda throttle, missing: False)
        self.settings = settings(throttle_store=parse_store(server.url()), throttle_store_members=members)
        assert self.settings.throttle_store is not None
        self.engine = make_engine()
        self.store = Store(self.engine, self.settings.throttle_store, clock_ns)
        self.leases = Leases(self.admission)
        self.sent: list[int] = []
        self.senders: list[gevent.Greenlet] = []
        self.store.start()
        self.leases.use(self.store, self.settings)

    def send(self, senders: int) -> None:
        """So many that always have another message."""
        self.senders = [gevent.spawn(self._send) for _ in range(senders)]

    def _send(self) -> None:
        while True:
            wait_for_slot(self.admission, Applicant(self.name, 1.0, LEAVING, RECEIVER), 3600.0, lambda: None)
            self.sent.append(clock_ns())

    def close(self) -> None:
        gevent.killall(self.senders)
        self.leases.stop()
        self.store.stop()
        self.admission.stop()
        self.engine.stop()


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest):
    with engine(request.param) as started:
        yield started


@pytest.fixture
def proxies():
    """Closed at the end, whatever happens."""
    made: list[Proxy] = []
    yield made
    for proxy in made:
        proxy.close()


def most_within(times: list[int], span: int) -> int:
    ordered = sorted(times)
    return max(bisect_left(ordered, at + span) - number for number, at in enumerate(ordered))


def test_two_share_a_limit_on_each_real_server(server, proxies):
    """40 a second: each window of a second has what one proxy alone would let through in it, whoever sent it."""
    for name in ("a", "b"):
        proxies.append(Proxy(name, server, block(Rate(40, 1))))
    for proxy in proxies:
        proxy.send(30)
    assert wait_for(lambda: all(len(proxy.sent) >= 40 for proxy in proxies))
    counts = Counter({proxy.name: len(proxy.sent) for proxy in proxies})
    sent = [at for proxy in proxies for at in proxy.sent]
    # Leased slots are used up to LATENESS and a call's time late, the clocks are the same: docs/throttling.md.
    assert most_within(sent, SECOND) <= 40 * 1.12 + 1
    assert abs(counts["a"] - counts["b"]) <= 12
    assert all(proxy.leases.figures().connected and proxy.leases.figures().seen == 2 for proxy in proxies)


def test_places_go_where_they_are_wanted(server, proxies):
    proxies += [Proxy(name, server, block(places=8)) for name in ("a", "b")]
    a, b = proxies
    open_a: list[object] = []
    open_b: list[object] = []

    def opens(proxy, into):
        while True:
            into.append(wait_for_place(proxy.admission, Applicant("mta", 1.0, LEAVING, RECEIVER), 3600.0))

    a.senders = [gevent.spawn(opens, a, open_a)]
    assert wait_for(lambda: len(open_a) >= 7)  # one is kept for the other
    b.senders = [gevent.spawn(opens, b, open_b)]
    assert wait_for(lambda: len(open_b) == 1)
    while len(open_a) > 4:
        assert len(open_a) + len(open_b) <= 8
        a.admission.leave(open_a.pop(0))
        gevent.sleep(0.3)
    assert wait_for(lambda: len(open_b) == 4)
    assert len(open_a) == 4


def test_without_the_store_each_goes_on_with_its_share_and_comes_back(proxies):
    with engine(VALKEY_8) as server:
        proxies += [Proxy(name, server, block(Rate(60, 1))) for name in ("a", "b")]
        for proxy in proxies:
            proxy.send(30)
        assert wait_for(lambda: all(len(proxy.sent) >= 10 for proxy in proxies))
        server.kill()
        assert wait_for(lambda: all(proxy.cluster.alone for proxy in proxies))
        before = [len(proxy.sent) for proxy in proxies]
        assert wait_for(lambda: all(len(p.sent) >= n + 20 for p, n in zip(proxies, before, strict=True)))
        assert all(p.leases.figures().degraded == 1 and not p.leases.figures().connected for p in proxies)
        server.start()
        assert wait_for(lambda: not any(proxy.cluster.alone for proxy in proxies))
        granted = [proxy.cluster.granted for proxy in proxies]
        assert wait_for(lambda: all(p.cluster.granted > n for p, n in zip(proxies, granted, strict=True)))
        sent = [at for proxy in proxies for at in proxy.sent]
        assert most_within(sent, SECOND) <= 60 * 1.12 + 2


def test_who_ends_says_so(proxies):
    with engine(VALKEY_8) as server:
        proxies += [Proxy(name, server, block(Rate(60, 1))) for name in ("a", "b")]
        a, b = proxies
        assert wait_for(lambda: len(a.cluster.view) == 2)
        b.close()
        proxies.remove(b)
        assert wait_for(lambda: [member.name for member in a.cluster.view] == ["a"])

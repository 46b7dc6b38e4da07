"""What these tests start with: an engine of ours, servers of others that a whole file shares, stores that are ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import gevent
import pytest

from proxy.config.store import parse_store
from proxy.net.identities import StoreTls
from proxy.net.relay import Engine, make_engine
from proxy.store.calls import Call, Fate, Reply, Script
from proxy.store.store import Store
from tests import engines
from tests.waiting import wait_for

#: Leaves a trace of each run: who ran is in the list, in order.
TRACE = Script.of(b"redis.call('RPUSH', KEYS[1], ARGV[1]) return {redis.call('TIME'), ARGV[1]}")


def clock_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Caller:
    """A store, and the traces of calls.

    Attributes:
        fates: trace → what became of its call.
    """

    def __init__(self, store: Store, key: bytes) -> None:
        self.store, self.key = store, key
        self.fates: dict[int, Fate] = {}

    def call(self) -> Reply:
        """One call, whatever becomes of it."""
        return self.calls(1)[0]

    def calls(self, number: int) -> list[Reply]:
        """So many at once."""
        traces = range(len(self.fates), len(self.fates) + number)
        replies = self.store.call(TRACE, [Call((self.key,), (trace,)) for trace in traces])
        self.fates.update(zip(traces, (reply.fate for reply in replies), strict=True))
        return replies

    def until(self, fate: Fate) -> Reply:
        """Call again and again until that becomes of it."""

        def tried() -> Reply | None:
            reply = self.call()
            return reply if reply.fate is fate else None

        found = wait_for(tried, 30, f"a call is {fate.value}", gevent.sleep)
        assert found is not None
        return found

    def check_what_is_left(self, ran: list[bytes]) -> None:
        """The same where a server may have forgotten some of them."""
        for trace in map(int, ran):
            assert self.fates[trace] in (Fate.ANSWERED, Fate.LOST), f"{trace} has run"
        assert len(set(ran)) == len(ran), "one has run twice"

    def check(self, ran: list[bytes]) -> None:
        """Hold what became of the calls against the list of those that ran."""
        traces = [int(trace) for trace in ran]
        assert len(set(traces)) == len(traces), "one has run twice"
        for trace, fate in self.fates.items():
            assert trace in traces or fate is not Fate.ANSWERED, f"{trace} was answered, and has not run"
            assert trace not in traces or fate in (Fate.ANSWERED, Fate.LOST), f"{trace} was {fate.value}, and has run"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of this test is answered, and none is given up because this machine had something else to do."""
    monkeypatch.setattr("proxy.store.store.CALL_WITHIN", 30.0)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    engine.stop()


Connect = Callable[..., Store]


@pytest.fixture
def connect(engine: Engine) -> Iterator[Connect]:
    """A started store of a URL; it need not be connected yet."""
    stores: list[Store] = []

    def connect(url: str, tls: StoreTls | None = None, **more: str) -> Store:
        settings = parse_store(url)
        assert settings is not None
        stores.append(Store(engine, dataclasses.replace(settings, **more), clock_ns, tls))
        stores[-1].start()
        return stores[-1]

    yield connect
    for store in stores:
        store.stop()
    gevent.sleep(0)


def connected(store: Store) -> Store:
    """The same, when it is."""
    wait_for(lambda: store.view().degraded_ns is None, 30, "the store is connected", gevent.sleep)
    return store


@pytest.fixture(scope="module", params=engines.KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """One of each kind, for all tests of a file."""
    with engines.engine(request.param, password="se cret:") as server:
        yield server

"""An agent's way to its proxies: which of several is asked, and what one that is frozen, gone or back again costs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import gevent
import pytest

from proxy.egress import via as module
from proxy.egress.via import CalledOff, Via
from proxy.errors import ViaUnavailable
from proxy.model import Endpoint
from proxy.net.relay import Engine
from proxy.protocols.native import messages as m
from tests.program import SECRET, Proxy
from tests.sinks import Raw, closed_port, deaf_port, greet


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.stop()


@pytest.fixture
def mx() -> Iterator[Raw]:
    with Raw(greet) as mx:
        yield mx


@pytest.fixture(scope="module")
def proxies() -> Iterator[tuple[Proxy, Proxy]]:
    with Proxy("listen_tls no\n") as first, Proxy("listen_tls no\n") as second:
        yield first, second


@contextlib.contextmanager
def ways(engine: Engine, *proxies: Endpoint | tuple[str, int]) -> Iterator[Via]:
    via = Via(engine, [Endpoint(*proxy) for proxy in proxies], SECRET.encode(), "box-1", False)
    try:
        yield via
    finally:
        via.stop()


def ask(via: Via, mx: Raw, deadline_ms: int = 20_000) -> Endpoint:
    """One SMTP session; which proxy it went through."""
    channel, _ = via.open(m.Open("127.0.0.14", [m.Address(*mx.endpoint)], deadline_ms=deadline_ms))
    if channel.end():
        via.give(channel)
    else:
        via.close(channel)
    return channel.proxy


@contextlib.contextmanager
def frozen(proxy: Proxy) -> Iterator[None]:
    proxy.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        proxy.signal(signal.SIGCONT)


@pytest.mark.parametrize("warm", [0, 3])
def test_a_frozen_proxy_leaves_time_for_the_next_and_is_left_alone(
    engine: Engine, mx: Raw, proxies: tuple[Proxy, Proxy], monkeypatch: pytest.MonkeyPatch, warm: int
) -> None:
    """Its idle channels are not asked one after the other, each until the deadline."""
    monkeypatch.setattr(module, "_GRACE", 2.0)
    first, second = proxies
    with ways(engine, first.native, second.native) as via:
        request = m.Open("127.0.0.14", [m.Address(*mx.endpoint)], deadline_ms=20_000)
        for channel, _ in [via.open(request) for _ in range(warm)]:
            assert channel.end()
            via.give(channel)
        assert len(via._idle) == warm
        with frozen(first):
            assert ask(via, mx, 2000) == second.native
            assert [channel.proxy for channel in via._idle] == [second.native]
            assert ask(via, mx, 2000) == second.native


@pytest.mark.only_python("a count of how often it asks")
def test_no_proxy_answers_and_the_deadline_holds_for_all_of_them(
    engine: Engine, mx: Raw, proxies: tuple[Proxy, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAST", 0.1)
    monkeypatch.setattr(module, "_GRACE", 0.1)
    proxy, _ = proxies
    with ways(engine, proxy.native) as via:
        request = m.Open("127.0.0.14", [m.Address(*mx.endpoint)], deadline_ms=20_000)
        for channel, _ in [via.open(request) for _ in range(20)]:
            assert channel.end()
            via.give(channel)
        asked = []
        open_on = via._open_on
        monkeypatch.setattr(via, "_open_on", lambda *arguments: asked.append(1) or open_on(*arguments))
        with frozen(proxy), pytest.raises(ViaUnavailable, match="no answer to OPEN in time"):
            ask(via, mx, 200)
        assert len(asked) == 1
        assert not via._idle


def test_the_first_is_taken_again_when_it_is_back(engine: Engine, mx: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although there are idle channels to the second: limits live in the one proxy."""
    monkeypatch.setattr(module, "_AVOIDED", 0.0)
    with Proxy("listen_tls no\n") as second, closed_port() as here, ways(engine, here, second.native) as via:
        assert ask(via, mx) == second.native
        with Proxy("listen_tls no\n") as first:
            via._proxies = (Endpoint(*first.native), via._proxies[1])
            assert ask(via, mx) == first.native
            assert ask(via, mx) == first.native
        assert ask(via, mx) == second.native


@pytest.mark.parametrize("state", ["connecting", "opening"])
def test_who_is_called_off_blames_no_proxy_and_asks_no_other(engine: Engine, mx: Raw, state: str) -> None:
    with deaf_port() as deaf, Proxy("listen_tls no\n") as good, contextlib.ExitStack() as stack:
        if state == "opening":
            deaf_receiver = stack.enter_context(deaf_port())
            proxies = [good.native, good.native]
        else:
            deaf_receiver = mx.endpoint
            proxies = [deaf, good.native]
        via = stack.enter_context(ways(engine, *proxies))
        request = m.Open("127.0.0.14", [m.Address(*deaf_receiver)], deadline_ms=20_000)
        if state == "opening":
            ask(via, mx)
        asker = gevent.spawn(via.open, request)
        gevent.sleep(0)
        if state == "opening":
            with gevent.Timeout(30):
                while not good.status()[-1].startswith("direct_remote_smtp") or "active=1" not in good.status()[-1]:
                    gevent.sleep(0.01)
        asker.kill(CalledOff())
        assert isinstance(asker.exception, CalledOff)
        assert not via._avoided
        assert not via._idle

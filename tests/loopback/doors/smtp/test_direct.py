"""What a connection to a receiver leaves behind when it fails."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from proxy.doors.smtp.direct import Direct
from proxy.errors import UpstreamError
from proxy.model import Endpoint, TlsMode
from proxy.net.relay import Engine
from proxy.policy.modes import Terms


def direct(ends: set[Endpoint], destination: Endpoint, engine: Engine) -> Direct:
    settings = SimpleNamespace(idle_timeout=10.0)
    services = SimpleNamespace(engine=engine, settings=settings, gauges=SimpleNamespace(ends=ends))
    terms = Terms("", "127.0.0.5", destination, None, TlsMode.NONE, "", offer_starttls=False, show_auth=False)
    return Direct(services, terms, "a", 1.0, None, 10.0)  # type: ignore[arg-type]


def test_the_end_of_a_connect_that_failed_is_forgotten():
    """It is kept so that a redirected connection of our own is known; the next one with its port is somebody's else."""
    ends: set[Endpoint] = {Endpoint("127.0.0.9", 9)}
    with socket.socket() as free:
        free.bind(("127.0.0.3", 0))
        nobody = Endpoint(*free.getsockname())
    engine = Engine()
    try:
        with pytest.raises(UpstreamError):
            direct(ends, nobody, engine)._connected(5.0, None)
    finally:
        engine.stop()
    assert ends == {Endpoint("127.0.0.9", 9)}


@pytest.mark.only_python("methods put in the place of others")
def test_slot_place_and_connection_of_a_mail_are_in_time_together(monkeypatch):
    """An MTA waits five minutes for the reply to MAIL, however they were spent."""
    now, asked = 1000.0, []
    monkeypatch.setattr("proxy.doors.smtp.direct.monotonic", lambda: now)

    def later(seconds):
        nonlocal now
        now += seconds

    def ask_slot(who, seconds, answer):
        asked.append(seconds)
        later(200.0)

    def enter(self, seconds, name):
        asked.append(seconds)
        later(seconds)

    def fresh(self, name, places, tls, ends_at, in_clear=None):
        asked.append(ends_at - now)

    one = direct(set(), Endpoint("192.0.2.1", 25), None)
    services = one._services
    services.settings.reuse_connections = False
    services.access = SimpleNamespace(check_route=lambda *_: None)
    services.office = SimpleNamespace(ask_slot=ask_slot)
    monkeypatch.setattr(Direct, "_settle", lambda self, seconds: None)
    monkeypatch.setattr(Direct, "_enter", enter)
    monkeypatch.setattr(Direct, "_fresh", fresh)
    monkeypatch.setattr(Direct, "_tls", None)
    for _ in range(2):
        one.slot(lambda: None)
        one.renew("mta.example", False)
        assert asked == [240.0, 40.0, 50.0]
        assert sum((200.0, 40.0, 50.0)) < 300.0
        asked.clear()
    one.renew("mta.example", False)  # of no message
    assert asked[0] == 240.0

"""What a connection to a receiver leaves behind when it fails."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from proxy.doors.smtp.direct import Direct
from proxy.errors import UpstreamError
from proxy.model import Endpoint, TlsMode
from proxy.net.relay import Engine


def direct(ends: set[Endpoint], destination: Endpoint, engine: Engine) -> Direct:
    settings = SimpleNamespace(idle_timeout=10.0)
    services = SimpleNamespace(engine=engine, settings=settings, gauges=SimpleNamespace(ends=ends))
    terms = SimpleNamespace(source="127.0.0.5", destination=destination, tls=TlsMode.NONE)
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

"""What the tests with real peers share: the proxy, a receiver, and how the sources of etc/clients are called here."""

import pytest

from tests.program import SECRET, Proxy
from tests.sinks import Sink

DEFAULT_SOURCE = "127.0.0.77"
#: The documented secret of etc/clients, and the one of the tests.
DOCUMENTED_SECRET = "PUT-THE-SECRET-OF-THE-PROXY-HERE"
SECRETS = {DOCUMENTED_SECRET: SECRET}


@pytest.fixture(scope="module")
def proxy():
    """Leaves from DEFAULT_SOURCE where the client names no address; IPv6 from ::1."""
    with Proxy(f"default_source_ip {DEFAULT_SOURCE}, ::1\n") as proxy:
        yield proxy
        proxy.wait_idle()


@pytest.fixture
def sink():
    with Sink() as sink:
        yield sink

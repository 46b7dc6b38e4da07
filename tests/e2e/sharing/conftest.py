"""What the tests of sharing start with: a proxy for each file, and for each test two instances and a receiver."""

import pytest

from tests.mx import Mx
from tests.program import Proxy
from tests.sharing import PLAIN, drop_cached, instances


@pytest.fixture(scope="module")
def proxy():
    with Proxy(PLAIN) as proxy:
        yield proxy


@pytest.fixture
def pair(proxy):
    """Both senders."""
    with instances(proxy, "server-a", "server-b") as pair:
        yield pair


@pytest.fixture
def mx():
    with Mx(starttls=True) as mx:
        yield mx


@pytest.fixture(autouse=True)
def _empty(request):
    """A test finds no connection that another one left."""
    yield
    if "proxy" in request.fixturenames:
        drop_cached(request.getfixturevalue("proxy"))

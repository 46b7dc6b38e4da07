"""Mode smtp on the real program: real sockets, misbehaving receivers, and the books."""

from __future__ import annotations

import pytest

from tests.clients import DOORS, send
from tests.mx import Mx
from tests.program import Proxy
from tests.sharing import cached

NAME = "client.example"  # what tests.clients.Smtp says
SMTP = f"""\
mode smtp
source here {{
    ip 127.0.0.5
    ehlo {NAME}
}}
"""


@pytest.fixture
def proxy():
    with Proxy(SMTP) as proxy:
        yield proxy


@pytest.fixture
def mx():
    with Mx(starttls=True) as mx:
        yield mx


@pytest.mark.parametrize("door", DOORS)
def test_a_message_through_each_door_and_a_connection_for_the_next(proxy, mx, door):
    sock = DOORS[door](proxy, mx.endpoint, "127.0.0.5")
    assert send(sock, b"Subject: one\r\n\r\n.dot\r\n")[0] == 250
    cached(proxy, 1, mx)
    sock = DOORS[door](proxy, mx.endpoint, "127.0.0.5")
    assert send(sock, b"Subject: two\r\n\r\n")[0] == 250
    assert (mx.connects, mx.handshakes) == (1, 1)
    assert [message.content for message in mx.messages] == [b"Subject: one\r\n\r\n.dot\r\n", b"Subject: two\r\n\r\n"]
    assert all(message.encrypted and message.peer[0] == "127.0.0.5" for message in mx.messages)
    line = proxy.wait_line(r"^connection .*reused=yes.*").string
    assert "tls=TLSv1.3" in line
    assert "outcome=kept messages=1 accepted=1 deferred=0 rejected=0 waited=0.0" in line

"""Mode smtp: clients that end in the middle, at the moment at which it is hardest to see."""

from __future__ import annotations

import socket

import pytest

from tests import clients
from tests.clients import DOORS
from tests.mx import Mx
from tests.program import Proxy
from tests.waiting import wait_for


@pytest.mark.parametrize("door", DOORS)
def test_a_fin_that_comes_in_one_segment_with_half_a_message(door: str) -> None:
    """One event tells of both; nothing of the message may be taken for a whole one, and nothing stays."""
    with Proxy("mode smtp\n") as proxy, Mx() as mx:
        sock = DOORS[door](proxy, mx.endpoint, "127.0.0.5")
        smtp = clients.Smtp(sock)
        smtp.ehlo()
        smtp.mail("a@example.com")
        smtp.rcpt("b@example.net")
        assert smtp.docmd("DATA")[0] == 354
        sock.send(b"Subject: half\r\n\r\nof a mess", socket.MSG_MORE)
        smtp.file.close()
        sock.close()
        proxy.wait_line(r"^connection .*outcome=client_")
        wait_for(lambda: "active=0" in proxy.status()[-1])
        assert mx.messages == []

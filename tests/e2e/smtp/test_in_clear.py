"""Mode smtp and TLS that does not come about: in clear for this one client, tried anew for the next, and told."""

from __future__ import annotations

import pytest

from tests.clients import proxied, send
from tests.e2e.smtp.test_mode import SMTP
from tests.mx import Mx, close, garbage, say
from tests.program import Proxy
from tests.sharing import cached


def no_tls(session, reply):
    """An answer to the client's first record that is none."""
    session.receive()
    garbage(session, reply)


@pytest.mark.parametrize(
    ("script", "connects"),
    [({"starttls": say(b"454 4.7.0 not now\r\n")}, 1), ({"tls": no_tls}, 2), ({"tls": close}, 2)],
    ids=["refused", "no TLS", "closed"],
)
def test_a_session_in_clear_is_not_for_the_next_who_would_like_tls(script, connects):
    """One failure of a moment must not send everybody's mail in clear for minutes."""
    with Mx(lambda number: script if number == 0 else {}, starttls=True) as mx, Proxy(SMTP) as proxy:
        assert send(proxied(proxy.proxy_protocol, mx.endpoint, "127.0.0.5"), b"Subject: one\r\n\r\n")[0] == 250
        cached(proxy, 1)
        assert "tls=failed" in proxy.wait_line(r"^connection id=1 .*").string
        assert send(proxied(proxy.proxy_protocol, mx.endpoint, "127.0.0.5"), b"Subject: two\r\n\r\n")[0] == 250
        cached(proxy, 2)
        assert [message.encrypted for message in mx.messages] == [False, True]
        assert mx.connects == connects + 1
        assert "tls=TLSv1.3" in proxy.wait_line(r"^connection id=2 .*reused=no.*").string


def test_a_receiver_whose_tls_is_broken_is_greeted_in_clear_after_two_failures():
    with Mx({"tls": no_tls}, starttls=True) as mx, Proxy(SMTP) as proxy:
        for number in range(4):
            assert send(proxied(proxy.proxy_protocol, mx.endpoint, "127.0.0.5"), b"Subject: x\r\n\r\n")[0] == 250
            cached(proxy, min(number + 1, 2))
        assert mx.connects == 4, "two of them for each of the first two, and then none: what these left is shared"
        assert len(proxy.matching(r"^connection .*tls=failed")) == 4

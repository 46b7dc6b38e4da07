"""TLS in mode smtp, with the client and with the receiver, is computed beside the hub: nobody else waits for it."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tests.clients import DOORS, Smtp
from tests.mx import Mx
from tests.onlooker import Onlooker
from tests.program import Proxy


def anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.parametrize(
    ("client", "receiver"), [(True, False), (False, True), (True, True)], ids=["client", "receiver", "both"]
)
def test_no_step_of_a_handshake_is_computed_in_the_hub(client: bool, receiver: bool, tmp_path: Path) -> None:
    onlooker = Onlooker(tmp_path)
    settings = f"mode smtp\nmode_smtp_starttls {'yes' if client else 'no'}\n"
    settings += f"smtp_tls {'required' if receiver else 'none'}\n"
    with Mx(starttls=True) as mx, Proxy(settings, environ=onlooker.environ) as proxy:
        before = onlooker.seen
        with DOORS["proxy_v2"](proxy, mx.endpoint, "127.0.0.5") as sock:
            smtp = Smtp(sock)
            smtp._host = "proxy.example"
            smtp.ehlo()
            if client:
                assert smtp.starttls(context=anybody())[0] == 220
            assert smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: x\r\n\r\nx\r\n") == {}
            smtp.quit()
        assert mx.sessions[0].encrypted is receiver
        seen = onlooker.seen
    assert seen.handshakes_in_hub == before.handshakes_in_hub
    steps = 2 * (client + receiver)  # at least: each side says something in two of them
    assert seen.handshakes_apart - before.handshakes_apart >= steps

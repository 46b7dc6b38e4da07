"""What a stolen secret, a stolen MTA and a stranger in allow_from can do, and what not: docs/security.md, in deeds.

What other tests show already is not shown again here; the document names them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

import pytest

from greenarrow_proxy_client import Limits, ProxyRefused, ProxyRejected, ProxyUnavailable, Session
from tests import clients
from tests.loopback.client.fake_proxy import SECRET as FAKE_SECRET
from tests.loopback.client.fake_proxy import FakeProxy, Receiver
from tests.program import SECRET, Proxy
from tests.sinks import GREETING, Raw, greet
from tests.waiting import wait_for

OWN = "a secret of one instance alone, which is long enough"
FAR = 60.0


@pytest.fixture
def mx():
    with Raw(greet) as it:
        yield it


def stolen(proxy: Proxy, name: str, secret: str = SECRET) -> Session:
    return Session(proxy.native, secret, name)


def effective(throttle) -> list:
    return [rates for rates, _ in throttle.effective]


# -- a stolen secret


def test_the_global_secret_sends_under_any_name_from_any_source(mx):
    with Proxy("source_ip 127.0.0.41-127.0.0.44\n") as proxy:
        for name, source in (("server-a", "127.0.0.41"), ("anything at all", "127.0.0.44")):
            with stolen(proxy, name) as session, session.connect([mx.endpoint], source_ip=source) as stream:
                assert stream.recv(100) == GREETING
            with clients.socks5(proxy.socks5, mx.endpoint, source, user="whoever") as sock:
                assert clients.exactly(sock, len(GREETING)) == GREETING
        assert {peer[0] for peer in mx.peers} == {"127.0.0.41", "127.0.0.44"}
        with stolen(proxy, "server-a") as session:
            for options, code in (
                ({"source_ip": "127.0.0.45"}, "source_not_allowed"),
                ({"source_ip": "127.0.0.41", "destinations": [("10.1.2.3", 25)]}, "destination_not_allowed"),
            ):
                with pytest.raises(ProxyRefused) as caught:
                    session.connect(**({"destinations": [mx.endpoint]} | options))
                assert caught.value.code == code


def test_as_many_names_as_many_shares(mx):
    """Places are shared by names: three stolen ones beside one honest get three quarters of them."""
    with Proxy() as proxy, contextlib.ExitStack() as stack:
        limits = Limits("one", max_connections=4)
        throttles = []
        for name in ("honest", "x1", "x2", "x3"):
            session = stack.enter_context(stolen(proxy, name))
            throttle = session.throttle("127.0.0.41", limits)
            assert throttle.wait_until_registered(FAR)
            throttles.append((session, throttle))
        held = [
            stack.enter_context(session.connect([mx.endpoint], throttles=[throttle])) for session, throttle in throttles
        ]
        assert len(held) == 4
        session, throttle = throttles[0]
        with pytest.raises(ProxyRefused) as caught:
            session.connect([mx.endpoint], throttles=[throttle], deadline=0.2)
        assert caught.value.code == "throttled"


def test_it_can_lower_the_limits_that_instances_name():
    """The mean of what all say holds; and a word about back-off is believed."""
    with Proxy() as proxy, stolen(proxy, "honest") as honest, stolen(proxy, "x") as thief:
        good = honest.throttle("127.0.0.41", Limits("yahoo", rates=[(3600, 3600)]))
        assert good.wait_until_registered(FAR)
        assert effective(good) == [[(3600, 3600)]]
        bad = thief.throttle("127.0.0.41", Limits("yahoo", rates=[(2, 3600)]))
        assert bad.wait_until_registered(FAR)
        wait_for(lambda: effective(good) == [[(1801, 3600)]], FAR, "the mean of both")
        bad.report(backoff=True)
        wait_for(lambda: effective(good)[0][0][0] < 1801, FAR, "slowed down")


def test_it_cannot_change_a_limit_of_the_proxys_own(mx):
    """A throttle block is the operator's alone, whatever an instance of that name says."""
    block = "throttle yahoo {\n    max_concurrent_connections 1\n    wait 0.1s\n}\n"
    with Proxy(block) as proxy, stolen(proxy, "x") as thief:
        mine = thief.throttle("127.0.0.41", Limits("yahoo", max_connections=1000))
        mine.report(backoff=True)
        with thief.connect([mx.endpoint], throttles=[mine]), pytest.raises(ProxyRefused) as caught:
            thief.connect([mx.endpoint], throttles=[mine])
        assert caught.value.code == "throttled"


def test_on_the_way_it_can_pose_as_the_proxy():
    """The secret is what proves the proxy, too: one who has it and stands in between reads the mail."""
    with FakeProxy() as impostor:  # knows nothing but the secret, and has a certificate of its own
        reads = Receiver()
        impostor.receivers.append(reads)
        with (
            Session(impostor.address, FAKE_SECRET, "server-a") as session,
            session.smtp([("198.51.100.7", 25)], "mta.example.com") as smtp,
        ):
            smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: a secret\r\n\r\n")
        assert reads.messages == [b"Subject: a secret\r\n\r\n"]


def test_an_instances_own_secret_opens_nothing_else(mx):
    block = f'instance one {{\n    auth_shared_secret "{OWN}"\n    source_ip 127.0.0.41\n}}\n'
    with Proxy(block) as proxy:
        with stolen(proxy, "one", OWN) as session:
            with session.connect([mx.endpoint]) as stream:
                assert stream.opened.local.host == "127.0.0.41"
            with pytest.raises(ProxyRefused) as caught:
                session.connect([mx.endpoint], source_ip="127.0.0.42")
            assert caught.value.code == "source_not_allowed"
        for name, secret in (("two", OWN), ("one", SECRET)):
            with stolen(proxy, name, secret) as session, pytest.raises(ProxyRejected) as rejected:
                session.connect([mx.endpoint])
            assert rejected.value.code == "bad_credentials"
        with pytest.raises(clients.Refused):
            clients.socks5(proxy.socks5, mx.endpoint, user="two", password=OWN)


# -- a stranger in allow_from


def test_without_a_secret_the_doors_without_a_password_are_open_and_no_others(mx):
    with Proxy(
        "source_ip 127.0.0.41, 127.0.0.42\nlisten_status 127.0.0.1:0\nlisten_status_allow_from 127.0.0.200\n"
    ) as proxy:
        for source in ("127.0.0.41", "127.0.0.42"):
            with clients.dial(proxy.proxy_protocol) as sock:
                sock.sendall(clients.v2(source, mx.endpoint))
                assert clients.exactly(sock, len(GREETING)) == GREETING
        assert {peer[0] for peer in mx.peers} == {"127.0.0.41", "127.0.0.42"}
        with pytest.raises(clients.Refused):
            clients.socks5(proxy.socks5, mx.endpoint, user=None)
        with Session(proxy.native, "no secret of this proxy's, though it is long", "x") as session:
            with pytest.raises(ProxyRejected) as caught:
                session.connect([mx.endpoint])
            assert caught.value.code == "bad_credentials"
        with socket.create_connection(proxy.door("status"), 30) as sock, contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b"", "closed before it has said anything"


def test_elsewhere_a_secret_is_of_no_use(mx):
    with Proxy("allow_from 127.0.0.200\n") as proxy, stolen(proxy, "x") as session:
        with pytest.raises(ProxyUnavailable):
            session.connect([mx.endpoint])
        with pytest.raises((OSError, ssl.SSLError, clients.Refused)):
            clients.socks5(proxy.socks5, mx.endpoint)
        assert mx.peers == []

"""The SOCKS5 door of the running program: each byte that KumoMTA, Exim and curl depend on, and each refusal."""

import contextlib
import socket

import pytest

from tests import clients
from tests.clients import Refused, bind_request, connect_request, dial, exactly, login, read_all, socks5
from tests.program import SECRET, Proxy
from tests.sinks import Raw, closed_port, deaf_port, greet
from tests.waiting import wait_for

OTHER_SECRET = "another-open-secret-of-32-characters-0"
NOT_OURS = "192.0.2.9"  # TEST-NET-1: allowed below, and no address of this machine
CONFIG = f"""\
source_ip 127.0.0.0/16, ::1, {NOT_OURS}
deny_destination 127.0.9.0/24, 10.0.0.0/8
allow_destination 127.0.0.0/8, ::1/128
destination_port 1024-65535
connect_timeout 500ms
instance own {{
    auth_shared_secret "{OTHER_SECRET}"
    source_ip 127.0.0.44
}}
"""
NOTHING_V4, NOTHING_V6 = bytes(6), bytes(18)


@pytest.fixture(scope="module")
def proxy():
    with Proxy(CONFIG) as proxy:
        yield proxy


def start(proxy):
    """A client that is logged in."""
    sock = dial(proxy.socks5)
    sock.sendall(clients.WITH_PASSWORD)
    assert sock.recv(10) == b"\x05\x02"
    sock.sendall(login())
    assert sock.recv(10) == b"\x01\x00"
    return sock


def ask(sock, request):
    """The reply, read as Exim does: by one `recv` of the request's length."""
    sock.sendall(request)
    return sock.recv(len(request))


def is_over(sock):
    return sock.recv(100) == b""


def test_kumomta_with_password_bind_and_connect(proxy, mx):
    with dial(proxy.socks5) as sock:
        assert ask(sock, bytes.fromhex("05020002")) == bytes.fromhex("0502")
        assert ask(sock, b"\x01\x05mta-1" + bytes([len(SECRET)]) + SECRET.encode()) == b"\x01\x00"
        assert ask(sock, bytes.fromhex("05020001 7f00004d 0000")) == bytes.fromhex("05000001 7f00004d 0000")
        request = bytes.fromhex("05010001 7f000002") + mx.endpoint[1].to_bytes(2, "big")
        reply = ask(sock, request)
        assert exactly(sock, 8) == b"220 mx\r\n"
        assert mx.peers == [("127.0.0.77", int.from_bytes(reply[8:], "big"))]
        assert reply[:8] == bytes.fromhex("05000001 7f00004d")
    line = proxy.wait_line(r"^connection .* source=127\.0\.0\.77 .*")[0]
    assert " instance=mta-1 protocol=socks5 client=127.0.0.1:" in line
    assert f" destination=127.0.0.2:{mx.endpoint[1]} reused=no tls=- up=0 down=8 " in line


def test_kumomta_over_ipv6(proxy):
    with Raw(greet, host="::1") as mx, start(proxy) as sock:
        loopback = bytes(15) + b"\x01"
        assert ask(sock, b"\x05\x02\x00\x04" + loopback + bytes(2)) == b"\x05\x00\x00\x04" + loopback + bytes(2)
        reply = ask(sock, b"\x05\x01\x00\x04" + loopback + mx.endpoint[1].to_bytes(2, "big"))
        assert exactly(sock, 8) == b"220 mx\r\n"
        assert reply == b"\x05\x00\x00\x04" + loopback + mx.peers[0][1].to_bytes(2, "big")


def test_without_bind_the_proxy_chooses(proxy, mx):
    with start(proxy) as sock:
        reply = ask(sock, connect_request(mx.endpoint))
        assert exactly(sock, 8) == b"220 mx\r\n"
        assert reply == b"\x05\x00\x00" + clients.address(*mx.peers[0])


def test_everything_in_one_segment_and_the_payload_behind_it(proxy):
    """Exim may put data into the SYN; nothing that came early is lost."""
    got = []
    with Raw(lambda sock: got.append(exactly(sock, 6))) as mx, dial(proxy.socks5) as sock:
        sock.sendall(clients.WITH_PASSWORD + login() + connect_request(mx.endpoint) + b"QUIT\r\n")
        assert exactly(sock, 14)[:8] == b"\x05\x02\x01\x00\x05\x00\x00\x01"
        wait_for(lambda: got, what="the payload")
    assert got == [b"QUIT\r\n"]


def test_byte_by_byte(proxy, mx):
    with dial(proxy.socks5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for message, size in (
            (clients.WITH_PASSWORD, 2),
            (login(), 2),
            (bind_request("127.0.0.78"), 10),
            (connect_request(mx.endpoint), 10),
        ):
            for at in range(len(message)):
                sock.send(message[at : at + 1])
            assert exactly(sock, size)[1] in (0, 2)
        assert exactly(sock, 8) == b"220 mx\r\n"
    assert mx.peers[0][0] == "127.0.0.78"


# -- logging in


@pytest.mark.parametrize("offer", [b"\x05\x01\x00", b"\x05\x00", b"\x05\x02\x01\x80"])
def test_no_acceptable_method(proxy, offer):
    with dial(proxy.socks5) as sock:
        sock.sendall(offer)
        assert read_all(sock) == b"\x05\xff"


@pytest.mark.parametrize(
    "who",
    [("mta-1", SECRET[:-1]), ("mta-1", SECRET + "x"), ("mta-1", ""), ("own", SECRET), ("mta-1", OTHER_SECRET)],
)
def test_a_wrong_secret(proxy, who):
    with dial(proxy.socks5) as sock:
        sock.sendall(clients.WITH_PASSWORD + login(*who))
        assert read_all(sock) == b"\x05\x02\x01\x01"


def test_a_refused_login_is_logged_with_the_name_that_was_claimed(proxy):
    """Escaped, for it is a stranger's text; an unknown name and a wrong secret look the same to the client."""
    mark = len(proxy.lines)
    for name in ("nobody-we-know", 'x" instance="mta-1'):
        with dial(proxy.socks5) as sock:
            sock.sendall(clients.WITH_PASSWORD + login(name, SECRET[:-1]))
            assert read_all(sock) == b"\x05\x02\x01\x01"
    proxy.wait_line(r"^WARNING refused id=\d+ instance=nobody-we-know .*reason=bad_credentials", since=mark)
    proxy.wait_line(r'^WARNING refused id=\d+ instance="x\\" instance=\\"mta-1" .*reason=bad_creden', since=mark)


def test_a_login_with_control_characters(proxy):
    with dial(proxy.socks5) as sock:
        sock.sendall(clients.WITH_PASSWORD + login("a\nb"))
        assert read_all(sock) == b"\x05\x02\x01\x01"


def test_an_instance_with_its_own_secret_and_source(proxy, mx):
    with socks5(proxy.socks5, mx.endpoint, user="own", password=OTHER_SECRET) as sock:
        assert exactly(sock, 8) == b"220 mx\r\n"
    assert mx.peers[0][0] == "127.0.0.44"
    with pytest.raises(Refused, match=r"x05\\x02"):
        socks5(proxy.socks5, mx.endpoint, "127.0.0.45", "own", OTHER_SECRET)
    assert mx.connects == 1


# -- BIND: only what is wrong with the source


@pytest.mark.parametrize(
    ("source", "reply"),
    [
        ("127.1.0.1", 2),  # not in source_ip
        ("198.51.100.1", 2),  # neither that nor on this machine: policy is looked at first
        ("0.0.0.0", 2),
        (NOT_OURS, 1),
    ],
)
def test_bind_is_refused(proxy, source, reply):
    with start(proxy) as sock:
        assert ask(sock, bind_request(source)) == bytes((5, reply, 0, 1)) + NOTHING_V4
        assert is_over(sock)


@pytest.mark.parametrize("source", ["::2", "2001:db8::1"])
def test_bind_is_refused_over_ipv6(proxy, source):
    with start(proxy) as sock:
        assert ask(sock, bind_request(source)) == b"\x05\x02\x00\x04" + NOTHING_V6
        assert is_over(sock)


def test_a_second_bind(proxy):
    with start(proxy) as sock:
        assert ask(sock, bind_request("127.0.0.5"))[:2] == b"\x05\x00"
        assert ask(sock, bind_request("127.0.0.5")) == b"\x05\x01\x00\x01" + NOTHING_V4
        assert is_over(sock)


# -- CONNECT: everything else


def refused_at_connect(proxy, request, source=None):
    """The reply to a CONNECT after a good BIND; the connection must be over then."""
    with start(proxy) as sock:
        if source:
            assert ask(sock, bind_request(source))[:2] == b"\x05\x00"
        sock.sendall(request)
        return read_all(sock)


def test_connection_refused(proxy):
    with closed_port() as endpoint:
        assert refused_at_connect(proxy, connect_request(endpoint), "127.0.0.5") == b"\x05\x05\x00\x01" + NOTHING_V4
    line = proxy.wait_line(rf"^failed .* destination=127\.0\.0\.2:{endpoint[1]} .*")[0]
    assert f'step=connect errno=ECONNREFUSED message="connect 127.0.0.5 -> 127.0.0.2:{endpoint[1]}: ' in line


def test_connection_refused_over_ipv6(proxy):
    with closed_port("::1") as endpoint:
        assert refused_at_connect(proxy, connect_request(endpoint), "::1") == b"\x05\x05\x00\x04" + NOTHING_V6


def test_a_receiver_that_does_not_answer(proxy):
    with deaf_port() as endpoint:
        assert refused_at_connect(proxy, connect_request(endpoint)) == b"\x05\x06\x00\x01" + NOTHING_V4
    proxy.wait_line(rf"^failed .* destination=127\.0\.0\.3:{endpoint[1]} .*errno=ETIMEDOUT")


@pytest.mark.parametrize(
    "destination",
    [
        ("127.0.9.1", 2525),  # deny_destination
        ("10.1.2.3", 2525),
        ("127.0.0.2", 25),  # destination_port
        ("127.0.0.2", 0),
    ],
)
def test_a_destination_that_is_not_allowed(proxy, destination):
    assert refused_at_connect(proxy, connect_request(destination)) == b"\x05\x02\x00\x01" + NOTHING_V4


@pytest.mark.parametrize("host", ["::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "2002:a01:203::1"])
def test_a_denied_address_in_disguise(proxy, host):
    assert refused_at_connect(proxy, connect_request((host, 2525)))[:2] == b"\x05\x02"


@pytest.mark.parametrize("protocol", ["socks5", "proxy_protocol", "native"])
@pytest.mark.parametrize("disguise", ["", "::ffff:"])
def test_our_own_listeners_are_no_destination(proxy, protocol, disguise):
    host, port = proxy.door(protocol)
    assert refused_at_connect(proxy, connect_request((disguise + host, port)))[:2] == b"\x05\x02"


def test_source_and_destination_of_different_families(proxy):
    request = connect_request(("::1", 2525))
    assert refused_at_connect(proxy, request, "127.0.0.5") == b"\x05\x08\x00\x04" + NOTHING_V6


def test_a_domain_name(proxy):
    """curl --socks5-hostname: the reply carries ATYP 01."""
    request = b"\x05\x01\x00\x03\x0bmx.test.net\x00\x19"
    assert refused_at_connect(proxy, request) == b"\x05\x08\x00\x01" + NOTHING_V4


def test_a_domain_name_that_is_an_address(proxy, mx):
    """msmtp and Nodemailer send every host as a name, an address in text form, too."""
    host, port = mx.endpoint
    for source, text in (("127.0.0.5", host.encode()), (None, b"::ffff:" + host.encode())):
        with start(proxy) as sock:
            if source:
                named = source.encode()
                assert ask(sock, b"\x05\x02\x00\x03" + bytes((len(named),)) + named + b"\0\0")[:4] == b"\x05\0\0\x01"
            sock.sendall(b"\x05\x01\x00\x03" + bytes((len(text),)) + text + port.to_bytes(2, "big"))
            assert exactly(sock, 10)[:4] == b"\x05\0\0\x01", "as long as the address's own type, not as the request"
            assert exactly(sock, 8) == b"220 mx\r\n"


def test_a_denied_address_as_a_name(proxy):
    request = b"\x05\x01\x00\x03\x08" + b"10.1.2.3" + b"\x00\x19"
    assert refused_at_connect(proxy, request)[:4] == b"\x05\x02\x00\x01"


def test_udp_associate(proxy):
    assert refused_at_connect(proxy, b"\x05\x03\x00\x01" + bytes(6)) == b"\x05\x07\x00\x01" + NOTHING_V4


def test_an_unknown_address_type(proxy):
    assert refused_at_connect(proxy, b"\x05\x01\x00\x05" + bytes(6))[:4] == b"\x05\x08\x00\x01"


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"EHLO x\r\n",
        b"\x04\x01\x00\x19\x7f\x00\x00\x01\x00",
        b"\x16\x03\x01",
        b"\xff" * 5000,
    ],
)
def test_something_else_than_socks5(proxy, junk):
    with dial(proxy.socks5) as sock:
        sock.sendall(junk)
        assert read_all(sock) == b""


def test_a_client_that_leaves_in_the_middle(proxy):
    """At each byte of the handshake, by FIN and by RST: nothing stays behind."""
    whole = clients.WITH_PASSWORD + login() + bind_request("127.0.0.5")
    for size in range(1, len(whole)):
        sock = dial(proxy.socks5)
        sock.sendall(whole[:size])
        clients.reset(sock) if size % 2 else sock.close()
    proxy.wait_idle()


# -- without a password


def test_socks5_auth_none(mx):
    with Proxy("socks5_auth none\n") as proxy:
        with dial(proxy.socks5) as sock:
            assert ask(sock, b"\x05\x01\x00") == b"\x05\x00"
            assert ask(sock, connect_request(mx.endpoint))[:2] == b"\x05\x00"
            assert exactly(sock, 8) == b"220 mx\r\n"
        with dial(proxy.socks5) as sock:  # whoever can name itself, must
            assert ask(sock, b"\x05\x02\x00\x02") == b"\x05\x02"
            sock.sendall(login(password="x" * 32))
            assert read_all(sock) == b"\x01\x01"


# -- who may come, and how long it may take


def test_a_client_that_is_not_in_allow_from(mx):
    with Proxy("allow_from 127.0.0.7\nauth_timeout 60s\n") as proxy:
        with dial(proxy.socks5) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(clients.WITH_PASSWORD)
            with contextlib.suppress(ConnectionResetError):
                assert read_all(sock) == b""
        proxy.wait_line(r"^WARNING refused .* client=127\.0\.0\.1:\d+ .*reason=client_not_allowed")
        with socks5(proxy.socks5, mx.endpoint, client="127.0.0.7") as sock:
            assert exactly(sock, 8) == b"220 mx\r\n"
        for _ in range(30):
            with dial(proxy.socks5) as sock, contextlib.suppress(ConnectionResetError):
                assert read_all(sock) == b""
    assert len(proxy.matching("client_not_allowed")) == 10  # at most so many lines a minute and address


def test_silent_and_slow_clients():
    """One deadline for all of the handshake, however busy the client looks."""
    with Proxy("auth_timeout 300ms\n") as proxy:
        with dial(proxy.socks5) as silent, dial(proxy.socks5) as halfway, dial(proxy.socks5) as undecided:
            halfway.sendall(clients.WITH_PASSWORD)
            undecided.sendall(clients.WITH_PASSWORD + login())
            assert read_all(silent) == b""
            assert read_all(halfway) == b"\x05\x02\x01\x01"
            assert read_all(undecided)[:6] == b"\x05\x02\x01\x00\x05\x01"
        wait_for(lambda: len(proxy.matching("reason=handshake_timeout")) == 3, what="three lines")
        proxy.wait_idle()

"""The PROXY door of the running program: both versions, what each failure says, and silence about a probe."""

import contextlib
import re
import socket

import pytest

from tests import clients, peers
from tests.clients import V2_SIGNATURE, dial, exactly, proxied, read_all, v1, v2
from tests.program import Proxy
from tests.sinks import GREETING, Raw, closed_port, greet
from tests.waiting import wait_for

NOT_OURS = "192.0.2.9"  # TEST-NET-1: allowed below, and no address of this machine
CONFIG = f"""\
source_ip 127.0.0.0/16, ::1, {NOT_OURS}
deny_destination 127.0.9.0/24
allow_destination 127.0.0.0/8, ::1/128
destination_port 1024-65535
log_verbose no
"""
HOST = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def proxy():
    with Proxy(CONFIG) as proxy:
        yield proxy


@pytest.mark.parametrize("header", [v1, v2])
def test_the_header_names_source_and_destination(proxy, mx, header):
    with proxied(proxy.proxy_protocol, mx.endpoint, "127.0.0.88", header) as sock:
        assert exactly(sock, 8) == GREETING
    assert mx.peers[0][0] == "127.0.0.88"
    line = proxy.wait_line(rf"^connection .* destination=127\.0\.0\.2:{mx.endpoint[1]} .*")[0]
    assert " instance=- protocol=proxy_protocol client=127.0.0.1:" in line
    assert " source=127.0.0.88 " in line


@pytest.mark.parametrize("header", [v1, v2])
def test_ipv6(proxy, header):
    with Raw(greet, "::1") as mx, proxied(proxy.proxy_protocol, mx.endpoint, "::1", header) as sock:
        assert exactly(sock, 8) == GREETING
        assert mx.peers[0][0] == "::1"


def test_the_very_bytes(proxy, mx):
    """GreenArrow's line, HAProxy's source port 0 or not, KumoMTA's 28 bytes, and TLVs."""
    port = mx.endpoint[1]
    binary = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c 7f000059 7f000002 0000") + port.to_bytes(2, "big")
    assert len(binary) == 28
    for header in (
        b"PROXY TCP4 127.0.0.89 127.0.0.2 %d %d\r\n" % (port, port),
        b"PROXY TCP4 127.0.0.89 127.0.0.2 0 %d\r\n" % port,
        binary,
        v2("127.0.0.89", mx.endpoint, tlvs=b"\x04\x00\x03abc" * 300),
    ):
        with dial(proxy.proxy_protocol) as sock:
            sock.sendall(header)
            assert exactly(sock, 8) == GREETING
    assert {peer[0] for peer in mx.peers} == {"127.0.0.89"}
    assert port not in {peer[1] for peer in mx.peers}


@pytest.mark.parametrize("header", [v1, v2])
def test_byte_by_byte_with_payload_behind(proxy, header):
    got = []
    with Raw(lambda sock: got.append(exactly(sock, 6))) as mx, dial(proxy.proxy_protocol) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in header("127.0.0.5", mx.endpoint) + b"QUIT\r\n":
            sock.send(bytes((byte,)))
        wait_for(lambda: got, what="the payload")
    assert got == [b"QUIT\r\n"]


# -- failures: 421, whatever it was


def greeting_after(proxy, data):
    """All that the door says to these bytes."""
    with dial(proxy.proxy_protocol) as sock:
        sock.sendall(data)
        return read_all(sock).decode()


HERE = ("127.0.0.2", 2525)


NO_HEADER = "the connection does not begin with a PROXY protocol header"


@pytest.mark.parametrize(
    ("header", "code", "text"),
    [
        (v1(NOT_OURS, HERE), "4.4.1", f"bind {NOT_OURS}: not an address of this machine"),
        (v2(NOT_OURS, HERE), "4.4.1", f"bind {NOT_OURS}: not an address of this machine"),
        (v1("127.1.0.1", HERE), "4.7.1", "source 127.1.0.1 is not in source_ip"),
        (v1("127.0.0.5", ("127.0.9.1", 2525)), "4.7.1", "127.0.9.1:2525 is in a denied range"),
        (v1("127.0.0.5", ("127.0.0.2", 25)), "4.7.1", "127.0.0.2:25: port 25 is not in destination_port"),
        (v2("::1", ("::ffff:127.0.0.2", 2525)), "4.7.1", "::1 and 127.0.0.2:2525 are not of the same address family"),
        (b"PROXY UNKNOWN\r\n", "4.5.0", "a PROXY header without addresses (UNKNOWN or UNSPEC)"),
        (b"PROXY UNKNOWN 1.2.3.4 5.6.7.8 1 2\r\n", "4.5.0", "a PROXY header without addresses (UNKNOWN or UNSPEC)"),
        (V2_SIGNATURE + b"\x21\x00\x00\x00", "4.5.0", "a PROXY header without addresses (UNKNOWN or UNSPEC)"),
        (b"PROXY TCP4 127.0.0.5 127.0.0.2 0 025\r\n", "4.5.0", "malformed PROXY header, version 1"),
        (b"PROXY TCP4 127.0.0.5 127.0.0.2 0 25\n", "4.5.0", "malformed PROXY header, version 1"),
        (b"PROXY TCP4 127.0.0.5\r127.0.0.2 0 25\r\n", "4.5.0", "malformed PROXY header, version 1"),
        (b"PROXY " + b"x" * 101, "4.5.0", "no CRLF in the first 107 bytes of the PROXY header"),
        (v2("127.0.0.5", HERE, command=0x22), "4.5.0", "unknown version or command in a PROXY header, version 2"),
        (v2("127.0.0.5", HERE, command=0x11), "4.5.0", "unknown version or command in a PROXY header, version 2"),
        (V2_SIGNATURE + b"\x21\x12\x00\x0c", "4.5.0", ""),  # DGRAM
        (v2("127.0.0.5", HERE, tlvs=bytes(4090)), "4.5.0", "a PROXY header of more than 4096 bytes"),
        (b"\0\0\0A", "4.5.0", NO_HEADER),
        (b"EHLO me\r\n", "4.5.0", f"{NO_HEADER}; it looks like SMTP: this is no mail server"),
        (
            b"\x16\x03\x01\x02\x00",
            "4.5.0",
            f"{NO_HEADER}; it looks like TLS, with which listen, listen_socks5_tls and listen_proxy_protocol_tls begin",
        ),
        (b"\x05\x01\x00", "4.5.0", f"{NO_HEADER}; it looks like SOCKS5, which belongs to listen_socks5"),
    ],
)
def test_each_failure_is_a_421_greeting(proxy, header, code, text):
    if not text:
        header, text = header + bytes(12), "a PROXY header for something else than TCP over IPv4 or IPv6"
    assert greeting_after(proxy, header) == f"421 {code} {socket.gethostname()} {text}\r\n"


def test_the_receiver_refuses(proxy):
    with closed_port() as (host, port):
        said = greeting_after(proxy, v1("127.0.0.5", (host, port)))
    assert re.fullmatch(
        rf"421 4\.4\.1 {HOST} connect 127\.0\.0\.5 -> 127\.0\.0\.2:{port}: Connection refused\r\n", said
    )


def test_the_421_arrives_although_the_client_has_sent_more(proxy):
    """A plain close with bytes unread would be a reset, and take the greeting away."""
    said = greeting_after(proxy, v1(NOT_OURS, HERE) + b"EHLO me\r\nMAIL FROM:<>\r\n" * 1000)
    assert said.startswith("421 4.4.1 ")
    assert said.endswith("not an address of this machine\r\n")


def test_a_silent_or_slow_client():
    with Proxy("auth_timeout 300ms\n") as proxy, dial(proxy.proxy_protocol) as sock, dial(proxy.proxy_protocol) as slow:
        slow.sendall(b"PROXY TCP4 ")
        for one, words in ((sock, "the client said nothing"), (slow, "the handshake was not finished")):
            assert re.fullmatch(rf"421 4\.4\.2 {HOST} {words} .*\r\n", read_all(one).decode())


# -- loops


@pytest.mark.parametrize("protocol", ["socks5", "proxy_protocol", "native"])
@pytest.mark.parametrize("header", [v1, v2])
def test_our_own_listeners_are_no_destination(proxy, protocol, header):
    host, port = proxy.door(protocol)
    said = greeting_after(proxy, header("127.0.0.5", (host, port)))
    assert said == f"421 4.7.1 {socket.gethostname()} {_denied(host, port)}\r\n"
    proxy.wait_idle()


def _denied(host, port):
    return f"{host}:{port} is this proxy itself"


def test_curl_must_not_loop(proxy):
    """curl --haproxy-protocol names its own address and our listener."""
    host, port = proxy.proxy_protocol
    curl = peers.program("curl"), "-v", "-sS", "--max-time", "10", "--haproxy-protocol"
    said = peers.run(*curl, f"smtp://{host}:{port}").stderr.decode()
    assert f"< 421 4.7.1 {socket.gethostname()} {_denied(host, port)}" in said


def test_a_loop_through_a_wildcard_listener():
    """A listener on 0.0.0.0 is reached through every address of this machine."""
    more = "listen_proxy_protocol 0.0.0.0:0\n"
    with Proxy(more) as proxy:
        port = proxy.door("proxy_protocol")[1]
        with dial(("127.0.0.1", port)) as sock:
            sock.sendall(v1("127.0.0.5", ("127.0.55.5", port)))
            assert read_all(sock).endswith(b"is this proxy itself\r\n")


# -- probes


def test_health_checks_are_silent(proxy):
    before = len(proxy.lines)
    with dial(proxy.proxy_protocol):
        pass
    clients.reset(dial(proxy.proxy_protocol))
    for command in (b"\x20\x00\x00\x00", b"\x20\x11\x00\x0c" + bytes(12)):
        with dial(proxy.proxy_protocol) as sock:
            sock.sendall(V2_SIGNATURE + command)
            assert read_all(sock) == b""
    with dial(proxy.socks5):
        pass
    proxy.wait_idle()
    said = [line for line in proxy.lines[before:] if not re.match(r"listener\(|throttle: |direct_remote", line)]
    assert said == []


def test_a_client_that_leaves_in_the_middle_of_its_header(proxy):
    header = v2("127.0.0.5", HERE)
    for size in range(1, len(header)):
        sock = dial(proxy.proxy_protocol)
        sock.sendall(header[:size])
        clients.reset(sock) if size % 2 else sock.close()
    proxy.wait_idle()


def test_its_own_allow_list(mx):
    with Proxy("listen_proxy_protocol_allow_from 127.0.0.7\n") as proxy:
        with dial(proxy.proxy_protocol) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(v1("127.0.0.5", mx.endpoint))
            with contextlib.suppress(ConnectionResetError):
                assert read_all(sock) == b""
        with dial(proxy.proxy_protocol, "127.0.0.7") as sock:
            sock.sendall(v1("127.0.0.5", mx.endpoint))
            assert exactly(sock, 8) == GREETING
        with clients.socks5(proxy.socks5, mx.endpoint) as sock:  # the other door's list is not touched
            assert exactly(sock, 8) == GREETING


def test_the_instance_follows_from_the_address(mx):
    """The longest matching prefix; its source_ip holds."""
    more = """\
instance wide {
    allow_from 127.0.0.0/16
}
instance narrow {
    allow_from 127.0.7.0/24
    source_ip 127.0.0.71
}
"""
    with Proxy(more) as proxy:
        with dial(proxy.proxy_protocol, "127.0.7.7") as sock:
            sock.sendall(v1("127.0.0.71", mx.endpoint))
            assert exactly(sock, 8) == GREETING
        proxy.wait_line(r"^connection .* instance=narrow ")
        with dial(proxy.proxy_protocol, "127.0.7.7") as sock:
            sock.sendall(v1("127.0.0.72", mx.endpoint))
            assert b"421 4.7.1 " in read_all(sock)
        with dial(proxy.proxy_protocol, "127.0.6.7") as sock:
            sock.sendall(v1("127.0.0.72", mx.endpoint))
            assert exactly(sock, 8) == GREETING
        proxy.wait_line(r"^connection .* instance=wide ")

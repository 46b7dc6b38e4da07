"""curl at both standard doors: each way of naming a destination, each refusal with its reason, and no loop."""

import pytest

from tests import peers
from tests.interop.conftest import DEFAULT_SOURCE
from tests.peers import MESSAGE
from tests.program import SECRET, Proxy
from tests.sinks import Sink, closed_port

#: curl's exit codes.
COULD_NOT_CONNECT, WEIRD_REPLY, PROXY_ERROR = 7, 8, 97
LOGIN = f"server-a:{SECRET}@"


def curl(*arguments, url, stdin=MESSAGE):
    """Hand in one message; nothing may take longer than curl's own limit."""
    envelope = ("--mail-from", "from@example.com", "--mail-rcpt", "to@example.net", "--upload-file", "-")
    done = peers.run(peers.program("curl"), "-sS", "--max-time", "15", *arguments, *envelope, url, stdin=stdin)
    return done.returncode, done.stderr.decode()


def at(address):
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def smtp(address):
    return f"smtp://{at(address)}/curl.example"


def test_socks5(proxy, sink):
    assert curl("--socks5", LOGIN + at(proxy.socks5), url=smtp(sink.endpoint)) == (0, "")
    (message,) = sink.messages
    assert message.content == MESSAGE
    assert message.peer[0] == DEFAULT_SOURCE
    assert (message.mail_from, message.rcpt_tos) == ("from@example.com", ("to@example.net",))


def test_socks5_to_ipv6(proxy):
    with Sink("::1") as sink:
        assert curl("--socks5", LOGIN + at(proxy.socks5), url=smtp(sink.endpoint)) == (0, "")
        assert [(message.content == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, "::1")]


def test_socks5_hostname_with_an_address(proxy, sink):
    """curl sends an address as an address even then."""
    assert curl("--socks5-hostname", LOGIN + at(proxy.socks5), url=smtp(sink.endpoint)) == (0, "")
    assert [message.content == MESSAGE for message in sink.messages] == [True]


def test_socks5_hostname_is_refused(proxy):
    """We resolve no names: SOCKS reply 8, at once."""
    status, says = curl("--socks5-hostname", LOGIN + at(proxy.socks5), url="smtp://mx.example.net:25")
    assert (status, says) == (PROXY_ERROR, "curl: (97) Can't complete SOCKS5 connection to mx.example.net. (8)\n")
    proxy.wait_line(r"refused .*reason=address_type_not_supported")


def test_a_wrong_secret(proxy, sink):
    status, says = curl("--socks5", f"server-a:{'1' * 32}@{at(proxy.socks5)}", url=smtp(sink.endpoint))
    assert (status, says) == (PROXY_ERROR, "curl: (97) User was rejected by the SOCKS5 server (1 1).\n")
    assert not sink.peers


def test_no_login_where_one_is_required(proxy, sink):
    status, says = curl("--socks5", at(proxy.socks5), url=smtp(sink.endpoint))
    assert (status, says) == (PROXY_ERROR, "curl: (97) No authentication method was acceptable.\n")
    assert not sink.peers


def test_no_login_where_none_is_required(sink):
    with Proxy("socks5_auth none\n") as proxy:
        assert curl("--socks5", at(proxy.socks5), url=smtp(sink.endpoint)) == (0, "")
    assert [message.content == MESSAGE for message in sink.messages] == [True]


def test_nobody_listens(proxy):
    with closed_port() as nobody:
        status, says = curl("--socks5", LOGIN + at(proxy.socks5), url=smtp(nobody))
    assert status == PROXY_ERROR
    assert says.endswith("(5)\n")


def test_a_denied_destination(proxy):
    with Proxy("allow_destination 127.0.9.0/24\n") as proxy, Sink() as sink:
        status, says = curl("--socks5", LOGIN + at(proxy.socks5), url=smtp(sink.endpoint))
        assert status == PROXY_ERROR
        assert says.endswith("(2)\n")
        assert not sink.peers


@pytest.mark.parametrize("door", ["native", "socks5", "proxy_protocol"])
def test_no_loop_through_socks5(proxy, door):
    status, says = curl("--socks5", LOGIN + at(proxy.socks5), url=smtp(proxy.door(door)))
    assert status == PROXY_ERROR
    assert says.endswith("(2)\n")
    proxy.wait_line(r"refused .*is this proxy itself")


def test_no_loop_through_the_proxy_protocol(proxy):
    """--haproxy-protocol names our own listener as the destination: told so in a 421 greeting, at once."""
    status, says = curl("--haproxy-protocol", url=smtp(proxy.proxy_protocol))
    assert (status, says) == (WEIRD_REPLY, "curl: (8) Got unexpected smtp-server response: 421\n")
    line = proxy.wait_line(r"refused .* protocol=proxy_protocol .*reason=destination_not_allowed.*")[0]
    assert f'message="{at(proxy.proxy_protocol)} is this proxy itself"' in line


def test_without_a_header_the_proxy_door_says_421(proxy):
    """curl that knows nothing of the door waits for a greeting; it gets one when its patience or ours ends."""
    with Proxy("auth_timeout 500ms\n") as impatient:
        status, says = curl(url=smtp(impatient.proxy_protocol))
        assert (status, says) == (WEIRD_REPLY, "curl: (8) Got unexpected smtp-server response: 421\n")


def test_other_protocols_at_the_doors_end_at_once(proxy):
    """A browser, or a scanner."""
    for door in (proxy.socks5, proxy.proxy_protocol):
        done = peers.run(peers.program("curl"), "-sS", "--http0.9", "--max-time", "15", f"http://{at(door)}/")
        assert done.returncode in (0, 1, 52, 56), done.stderr
        assert b"HTTP/" not in done.stdout


def test_no_proxy_at_all(sink):
    with closed_port("127.0.1.9") as dead:
        assert curl("--socks5", LOGIN + at(dead), url=smtp(sink.endpoint))[0] == COULD_NOT_CONNECT

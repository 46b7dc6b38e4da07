"""SOCKS5 and the PROXY protocol in TLS: the same as in clear, and who a certificate says that a client is."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.clients import Refused, dial, exactly, proxied, read_all, secured, send, socks5, v2
from tests.mx import Mx, say
from tests.program import SECRET, Proxy

SERVERS, CLIENTS, STRANGERS = trustme.CA(), trustme.CA(), trustme.CA()
SOURCE = "127.0.0.5"
Connect = Callable[..., socket.socket]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Listeners with a certificate of their own, beside the usual ones."""
    path = tmp_path_factory.mktemp("tls")
    leaf = SERVERS.issue_cert("proxy.example.net")
    leaf.cert_chain_pems[0].write_to_path(str(path / "crt"))
    leaf.private_key_pem.write_to_path(str(path / "key"))
    (path / "key").chmod(0o600)
    CLIENTS.cert_pem.write_to_path(str(path / "clients"))
    doors = "listen_socks5_tls 127.0.2.2:0\nlisten_proxy_protocol_tls 127.0.2.3:0\n"
    return f"{doors}tls_certificate_file {path}/crt\ntls_private_key_file {path}/key\n"


@pytest.fixture(scope="module")
def mutual(lines: str) -> str:
    """The same, and clients may show a certificate."""
    path = Path(lines.split()[-1]).parent / "clients"
    return f"{lines}tls_client_ca_file {path}\n"


@pytest.fixture(scope="module")
def proxy(lines: str) -> Iterator[Proxy]:
    with Proxy(lines) as proxy:
        yield proxy


def context(*names: str, signed_by: trustme.CA = CLIENTS) -> ssl.SSLContext:
    """A client's, which shows a certificate with these names, if there are any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    SERVERS.configure_trust(context)
    if names:
        signed_by.issue_cert(*names).configure_cert(context)
    return context


def by_socks5(proxy: Proxy, mx: Mx, tls: ssl.SSLContext, **more: object) -> socket.socket:
    return socks5(proxy.door("socks5", "127.0.2.2"), mx.endpoint, SOURCE, tls=tls, **more)  # type: ignore[arg-type]


def by_header(proxy: Proxy, mx: Mx, tls: ssl.SSLContext) -> socket.socket:
    return proxied(proxy.door("proxy_protocol", "127.0.2.3"), mx.endpoint, SOURCE, v2, tls)


DOORS: dict[str, Connect] = {"socks5": by_socks5, "proxy_protocol": by_header}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_mail(lines: str, door: str, mode: str) -> None:
    """In mode smtp STARTTLS is not offered again inside of TLS."""
    with Mx() as mx, Proxy(lines + f"mode {mode}\nmode_smtp_starttls yes\n") as proxy:
        text = b"x" * 300_000 + b"\r\n.\r\n" + b"y\r\n"
        with DOORS[door](proxy, mx, context()) as sock:
            assert send(sock, text)[0] == 250
        assert [(message.content, message.peer[0]) for message in mx.messages] == [(text, SOURCE)]
        proxy.wait_line(rf"^connection .* protocol={door} .*outcome=(upstream_closed|client_closed|kept)")
        proxy.wait_idle()


@pytest.mark.parametrize("door", DOORS)
def test_a_receiver_that_refuses_is_told_as_through_the_other_doors(proxy: Proxy, door: str) -> None:
    with Mx({"greeting": say(b"554 5.7.1 not you\r\n")}) as mx:
        sock = DOORS[door](proxy, mx, context())
        with sock:
            assert exactly(sock, 3) == b"554"
        mark = proxy.wait_line(rf"^connection .* protocol={door} .*outcome=greeting_5xx.*reply=")
        assert "554 5.7.1 not you" in mark.string


def test_what_comes_with_the_header_goes_to_the_receiver(proxy: Proxy) -> None:
    with Mx() as mx, secured(dial(proxy.door("proxy_protocol", "127.0.2.3")), context()) as sock:
        sock.sendall(v2(SOURCE, mx.endpoint) + b"EHLO early.example\r\n")
        assert exactly(sock, 3) == b"220"
        while b"SMTPUTF8" not in sock.recv(65536):
            pass
        assert mx.sessions[0].commands == [b"EHLO early.example"]


def test_a_refusal_is_told_in_the_client_s_own_protocol(proxy: Proxy) -> None:
    with Mx() as mx, pytest.raises(Refused) as refused:
        by_socks5(proxy, mx, context(), password="wrong" * 10)
    assert refused.value.args[0] == b"\x01\x01"
    proxy.wait_line("refused .*protocol=socks5 .*bad_credentials")


@pytest.mark.parametrize(("first", "words"), [(b"\x05\x01\x02", "SOCKS5"), (b"PROXY TCP4 ", "PROXY protocol header")])
def test_a_client_that_does_not_speak_tls(proxy: Proxy, first: bytes, words: str) -> None:
    with dial(proxy.door("socks5", "127.0.2.2")) as sock:
        sock.sendall(first)
        assert read_all(sock) == b""
    proxy.wait_line(
        rf"the client does not speak TLS, this listener does \(listen_socks5_tls\); it looks like .*{words}"
    )


def test_a_client_that_speaks_tls_where_nobody_does(proxy: Proxy) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secured(dial(proxy.door("socks5", "127.0.1.2")), context()).close()
    proxy.wait_line("it looks like TLS, with which listen, listen_socks5_tls and listen_proxy_protocol_tls begin")


@pytest.mark.parametrize("begin", [b"", b"\x16\x03\x01\x02"])
def test_one_deadline_over_tls_and_the_request(lines: str, begin: bytes) -> None:
    with Proxy(lines + "auth_timeout 300ms\n") as proxy:
        with dial(proxy.door("socks5", "127.0.2.2")) as sock:
            sock.sendall(begin)
            assert read_all(sock) == b""
        proxy.wait_line("refused .*handshake_timeout")
        with secured(dial(proxy.door("socks5", "127.0.2.2")), context()) as sock:
            proxy.wait_line("the handshake was not finished within auth_timeout")
            assert read_all(sock) == b""


def test_a_probe_is_none_of_our_business(proxy: Proxy) -> None:
    mark = len(proxy.lines)
    dial(proxy.door("socks5", "127.0.2.2")).close()
    with Mx() as mx, by_socks5(proxy, mx, context()) as sock:
        assert exactly(sock, 3) == b"220"
    proxy.wait_line("^connection ", since=mark)
    assert not proxy.matching("refused ", mark)


# --- certificates of clients ---


def test_a_certificate_instead_of_a_password(mutual: str) -> None:
    block = "instance box7.example.org {\n    source_ip 127.0.0.5\n}\n"
    with Mx() as mx, Proxy(mutual + block) as proxy:
        for names, instance in (
            (("box9.example.org", "box7.example.org"), "box7.example.org"),  # the one that has a block
            (("box9.example.org", "box8.example.org"), "box9.example.org"),
        ):
            mark = len(proxy.lines)
            with by_socks5(proxy, mx, context(*names), user=None) as sock:
                assert send(sock, b"x\r\n")[0] == 250
            proxy.wait_line(f"^connection .*instance={instance} protocol=socks5", since=mark)
        with by_header(proxy, mx, context("box7.example.org")) as sock:
            assert send(sock, b"x\r\n")[0] == 250
        proxy.wait_line("^connection .*instance=box7.example.org protocol=proxy_protocol")


def test_a_password_all_the_same_but_nothing_is_nothing(mutual: str) -> None:
    with Mx() as mx, Proxy(mutual) as proxy:
        with by_socks5(proxy, mx, context()) as sock:
            assert exactly(sock, 3) == b"220"
        with pytest.raises(Refused):
            by_socks5(proxy, mx, context(), user=None)
        with by_header(proxy, mx, context()) as sock:
            assert read_all(sock) == b""
        proxy.wait_line("refused .*protocol=proxy_protocol .*has shown no certificate")
        assert mx.connects == 1


def test_nobody_gets_in_without_either_where_socks5_auth_is_none(mutual: str) -> None:
    with Mx() as mx, Proxy(mutual + "socks5_auth none\nlisten_socks5 127.0.1.2:0\n") as proxy:
        with pytest.raises((Refused, OSError)):
            by_socks5(proxy, mx, context(), user=None)
        proxy.wait_line("has shown no certificate, which tls_client_ca_file asks for")
        with by_socks5(proxy, mx, context("box.example.org"), user=None) as sock:
            assert exactly(sock, 3) == b"220"


def test_a_stranger_s_certificate_and_one_from_the_wrong_place(mutual: str) -> None:
    block = "instance box7.example.org {\n    allow_from 127.0.0.99\n}\n"
    with Mx() as mx, Proxy(mutual + block) as proxy:
        with pytest.raises((Refused, OSError)):
            by_socks5(proxy, mx, context("box.example.org", signed_by=STRANGERS), user=None)
        proxy.wait_line("refused .*no TLS: CERTIFICATE_VERIFY_FAILED")
        with pytest.raises((Refused, OSError)):
            by_socks5(proxy, mx, context("box7.example.org"), user=None)
        proxy.wait_line("refused .*is not in allow_from of instance box7.example.org")
        with by_socks5(proxy, mx, context("box7.example.org"), user=None, client="127.0.0.99") as sock:
            assert exactly(sock, 3) == b"220"
        assert mx.connects == 1


def test_a_reload_opens_turns_and_closes_them(lines: str) -> None:
    with Mx() as mx, Proxy("") as proxy:
        proxy.hup(lines)
        with by_socks5(proxy, mx, context()) as sock:
            proxy.hup(lines.replace("listen_socks5_tls", "listen_proxy_protocol_tls"))
            assert exactly(sock, 3) == b"220", "what was there goes on"
            turned = proxied(proxy.door("socks5", "127.0.2.2"), mx.endpoint, SOURCE, v2, context())
            with turned:
                assert exactly(turned, 3) == b"220"
        proxy.hup("")
        with pytest.raises(ConnectionRefusedError):
            dial(proxy.door("socks5", "127.0.2.2"))


def test_who_is_one_too_many_is_told_inside_of_tls(lines: str) -> None:
    with Mx() as mx, Proxy(lines + "max_connections 1\n") as proxy, by_socks5(proxy, mx, context()) as sock:
        assert exactly(sock, 3) == b"220"
        with pytest.raises(Refused) as refused:
            by_socks5(proxy, mx, context())
        assert refused.value.args[0][:2] == b"\x05\x02"
        proxy.wait_line("refused .*protocol=socks5 .*reason=overloaded")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_an_agent_with_such_doors(lines: str, door: str, mode: str) -> None:
    """TLS on one side, frames in TLS on the other."""
    with Mx() as mx, Proxy("") as proxy:
        via = f'via {proxy.native[0]}:{proxy.native[1]}\nvia_secret "{SECRET}"\nlisten 127.0.2.1:0\n'
        with Proxy(f"{lines}{via}mode {mode}\n") as agent:
            text = b"x" * 300_000 + b"\r\n.\r\ny\r\n"
            with DOORS[door](agent, mx, context()) as sock:
                assert send(sock, text)[0] == 250
            assert [(message.content, message.peer[0]) for message in mx.messages] == [(text, SOURCE)]
            agent.wait_line(f"^connection .*protocol={door} ")
            agent.wait_idle()


# --- while a connection stands ---


@pytest.mark.parametrize("half", ["client", "receiver"])
def test_ends_travel_on(proxy: Proxy, half: str) -> None:
    with socket.create_server((SOURCE, 0)) as listener, Mx() as mx:
        mx.endpoint = listener.getsockname()
        made: list[socket.socket] = []
        connecting = threading.Thread(target=lambda: made.append(by_socks5(proxy, mx, context())))
        connecting.start()
        receiver = listener.accept()[0]
        connecting.join()
        with made[0] as client, receiver:
            if half == "client":
                client.sendall(b"QUIT\r\n")
                socket.socket.shutdown(client, socket.SHUT_WR)
            else:
                receiver.sendall(b"bye\r\n")
                receiver.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"bye\r\n"
                client.sendall(b"late\r\n")
                client.close()
            assert read_all(receiver) == (b"QUIT\r\n" if half == "client" else b"late\r\n")
            if half == "client":  # who has said FIN, without a word of TLS, still hears what is said
                receiver.sendall(b"221 bye\r\n")
                receiver.close()
                assert read_all(client) == b"221 bye\r\n"


def test_idle_and_drained_connections_are_cut(lines: str) -> None:
    with Mx() as mx, Proxy(lines + "idle_timeout 500ms\n") as proxy, by_socks5(proxy, mx, context()) as sock:
        assert exactly(sock, 3) == b"220"
        proxy.wait_line("^connection .*outcome=idle_timeout")
    with Mx() as mx, Proxy(lines + "drain_timeout 200ms\n") as proxy, by_socks5(proxy, mx, context()) as sock:
        assert exactly(sock, 3) == b"220"
        proxy.term()
        proxy.wait_line("^connection .*outcome=drain_timeout")

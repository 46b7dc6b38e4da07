"""HAProxy as a sender of PROXY headers (an MTA that speaks none stands behind it), and Postfix' tools at both ends.

HAProxy runs on etc/clients/haproxy.cfg. smtp-sink, the receiver, writes the address of each client into its dumps, so
the source address is proven by a program that knows nothing of the tests.
"""

import os
import re
import smtplib
import socket
from contextlib import contextmanager

import pytest
import trustme

from tests import clients, peers
from tests.clients import DOORS
from tests.interop.conftest import DEFAULT_SOURCE
from tests.peers import MESSAGE, Daemon
from tests.program import Proxy
from tests.sinks import Raw, Sink, closed_port
from tests.waiting import wait_for

SOURCE = "127.0.0.94"


@contextmanager
def haproxy(tmp_path, door, destination, source=SOURCE, version=2, more=None, behind=""):
    """The documented HAProxy in front of the door, with more sections behind it; yields where it listens."""
    host = peers.address()
    port = peers.free_port(host)
    values = {
        "127.0.0.1:2525": f"{host}:{port}",
        "ipv4(192.0.2.1)": f"ipv4({source})",
        "ipv4(198.51.100.7)": f"ipv4({destination[0]})",
        "set-dst-port int(25)": f"set-dst-port int({destination[1]})",
        "10.0.0.1:808": f"{door[0]}:{door[1]}",
    }
    if version == 1:
        values["send-proxy-v2"] = "send-proxy"
    text = peers.snippet("haproxy.cfg", values | (more or {}))
    if ":" in source:
        text = text.replace("ipv4(", "ipv6(")
    file = tmp_path / "haproxy.cfg"
    file.write_text(text + behind)
    with Daemon(peers.program("haproxy"), "-db", "-f", file, listens=(host, port)):
        yield host, port


def send(endpoint):
    """One message by smtplib, which knows nothing of any proxy."""
    with smtplib.SMTP(*endpoint, local_hostname="mta.example", timeout=clients.TIMEOUT) as smtp:
        assert smtp.sendmail("from@example.com", "to@example.net", MESSAGE) == {}


@pytest.mark.parametrize("version", [1, 2])
def test_as_the_sender(proxy, sink, tmp_path, version):
    with haproxy(tmp_path, proxy.proxy_protocol, sink.endpoint, version=version) as endpoint:
        send(endpoint)
        send(endpoint)
    assert [(message.content == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, SOURCE)] * 2
    proxy.wait_line(rf"^connection .* source={SOURCE} destination=127\.0\.0\.2:{sink.endpoint[1]} ")


@pytest.mark.parametrize("version", [1, 2])
def test_ipv6(proxy, tmp_path, version):
    """The client dials HAProxy over IPv4, the header says IPv6."""
    with Sink("::1") as sink, haproxy(tmp_path, proxy.proxy_protocol, sink.endpoint, "::1", version) as endpoint:
        send(endpoint)
        assert [(message.content == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, "::1")]


@pytest.mark.parametrize(
    ("version", "header"),
    [
        (1, rb"PROXY TCP4 127\.0\.0\.94 127\.0\.0\.2 0 (\d+)\r\n"),
        (2, rb"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00.(?s:\x7f\x00\x00\x5e\x7f\x00\x00\x02\x00\x00(..))"),
    ],
)
def test_what_haproxy_sends(tmp_path, version, header):
    """Source port 0 in both versions: the bytes that the tests above are about."""
    got = []
    with (
        Raw(lambda sock: got.append(sock.recv(4096))) as door,
        haproxy(tmp_path, door.endpoint, ("127.0.0.2", 2525), version=version) as endpoint,
        socket.create_connection(endpoint, clients.TIMEOUT),
    ):
        wait_for(lambda: got, what="the header")
    match = re.match(header, got[0])
    assert match, got[0]
    assert match[1] == (b"2525" if version == 1 else (2525).to_bytes(2, "big"))


def test_the_refusal_reaches_the_mta(proxy, tmp_path):
    """Through HAProxy, too, the reason comes as a 421 greeting; nothing hangs."""
    with closed_port() as nobody, haproxy(tmp_path, proxy.proxy_protocol, nobody) as endpoint:
        with pytest.raises(smtplib.SMTPConnectError) as caught:
            smtplib.SMTP(*endpoint, timeout=clients.TIMEOUT)
        assert caught.value.smtp_code == 421
        assert b"Connection refused" in caught.value.smtp_error
    with haproxy(tmp_path, proxy.proxy_protocol, nobody, source="192.0.2.9") as endpoint:
        with pytest.raises(smtplib.SMTPConnectError) as caught:
            smtplib.SMTP(*endpoint, timeout=clients.TIMEOUT)
        assert caught.value.smtp_code == 421
        assert b"192.0.2.9" in caught.value.smtp_error


CHECKED = {"send-proxy-v2": "send-proxy-v2 check inter 20ms"}


def test_its_health_checks_are_silent(sink, tmp_path):
    """With version 2 a check is a LOCAL header: no connection goes out for it, and nothing is logged."""
    control = tmp_path / "stats"
    more = CHECKED | {"maxconn 2000": f"maxconn 2000\n    stats socket {control}"}
    with (
        Proxy("log_verbose yes\n") as proxy,
        haproxy(tmp_path, proxy.proxy_protocol, sink.endpoint, more=more) as endpoint,
    ):
        wait_for(lambda: check_status(control) == "L4OK", what="a check that went well")
        send(endpoint)
        assert [message.peer[0] for message in sink.messages] == [SOURCE]
        assert len(sink.peers) == 1
        proxy.wait_line(rf"^connection .*:{sink.endpoint[1]} ")
        assert len(proxy.matching("^connection ")) == 1
        assert not proxy.matching("^(WARNING )?refused|PROXY header")
        proxy.term()
        proxy.wait_exit()
        wait_for(lambda: check_status(control) == "L4CON", what="a check that fails")


def check_status(control):
    """What HAProxy says of its server's last finished check."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(clients.TIMEOUT)
        sock.connect(str(control))
        sock.sendall(b"show stat\n")
        names, *rows = (line.split(",") for line in clients.read_all(sock).decode().splitlines() if line)
    (row,) = (row for row in rows if row[:2] == ["greenarrow_proxy", "proxy"])
    return row[names.index("check_status")].removeprefix("* ")


def test_what_a_health_check_is(tmp_path):
    """16 bytes: signature, version 2, LOCAL, no addresses."""
    got = []
    with (
        Raw(lambda sock: got.append(sock.recv(4096))) as door,
        haproxy(tmp_path, door.endpoint, ("127.0.0.2", 2525), more=CHECKED),
    ):
        wait_for(lambda: got, what="a check")
    assert got[0] == b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"


# -- Postfix' tools


@contextmanager
def smtp_sink():
    """Postfix' smtp-sink; yields its address and a function that reads its dumps."""
    host = peers.address()
    port = peers.free_port(host)
    user = peers.unprivileged()
    tool = peers.postfix("smtp-sink")
    with peers.directory(user) as dumps:
        privileges = ["-u", user, "-R", str(dumps)] if os.getuid() == 0 else []
        command = [tool, *privileges, "-d", "%H%M%S.", f"{host}:{port}", "100"]
        with Daemon(*command, listens=(host, port), cwd=dumps):
            yield (host, port), lambda: [file.read_bytes() for file in dumps.iterdir()]


def dumped(dumps, count):
    """(client address, content) of so many finished messages."""
    wait_for(lambda: len([dump for dump in dumps() if dump.endswith(b"\n\n")]) == count, what=f"{count} dumps")
    for dump in dumps():
        head, _, rest = dump.partition(b"Received: ")
        content = re.sub(rb"\A[^\n]*\n(?:[ \t][^\n]*\n)*", b"", rest)  # the rest of Received, which it adds
        yield re.search(rb"^X-Client-Addr: (\S+)$", head, re.MULTILINE)[1].decode(), content


@pytest.mark.parametrize("door", DOORS)
def test_smtp_sink_names_the_source(proxy, door):
    with smtp_sink() as (endpoint, dumps):
        for number in range(3):
            assert clients.send(DOORS[door](proxy, endpoint, f"127.0.5.{number + 1}"), MESSAGE)[0] == 250
        found = sorted(dumped(dumps, 3))
    assert [source for source, _ in found] == ["127.0.5.1", "127.0.5.2", "127.0.5.3"]
    for _, content in found:
        assert content == MESSAGE.replace(b"\r\n", b"\n") + b"\n"  # as it writes: Unix line ends, an empty line behind


@pytest.mark.parametrize("version", [1, 2])
def test_smtp_source_through_haproxy_to_smtp_sink(proxy, tmp_path, version):
    """Postfix' side: its own client cannot name a source, HAProxy does; four sessions at once, forty messages."""
    source_tool = peers.postfix("smtp-source")
    with (
        smtp_sink() as (endpoint, dumps),
        haproxy(tmp_path, proxy.proxy_protocol, endpoint, version=version) as front,
    ):
        command = (source_tool, "-s", "4", "-m", "40", "-l", "5000", "-f", "a@example.com", "-t", "b@example.net")
        done = peers.run(*command, f"{front[0]}:{front[1]}")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        found = list(dumped(dumps, 40))
    assert {source for source, _ in found} == {SOURCE}
    assert all(len(content) >= 5000 for _, content in found)


def test_smtp_source_straight_at_the_proxy_door(proxy):
    """It sends no header: it is told 421 in the end, and counted as what it is."""
    source_tool = peers.postfix("smtp-source")
    with Proxy("auth_timeout 500ms\n") as impatient:
        host, port = impatient.proxy_protocol
        done = peers.run(source_tool, "-m", "1", f"{host}:{port}")
        assert done.returncode != 0
        assert b"421" in done.stderr
        impatient.wait_line("refused .*reason=handshake_timeout")


def test_a_default_source_behind_socks5(proxy):
    with smtp_sink() as (endpoint, dumps):
        assert clients.send(clients.socks5(proxy.socks5, endpoint), MESSAGE)[0] == 250
        assert [source for source, _ in dumped(dumps, 1)] == [DEFAULT_SOURCE]


@pytest.mark.parametrize("shows", [True, False])
def test_over_tls_with_a_certificate_of_its_own(sink, tmp_path, shows):
    """As docs/tls.md has it: a second section does TLS, so that the header is inside of it."""
    servers, mtas = trustme.CA(), trustme.CA()
    ours, its = servers.issue_cert("127.0.2.3"), mtas.issue_cert("mta7.example.org")
    for path, pem in (("crt", ours.cert_chain_pems[0]), ("key", ours.private_key_pem), ("mtas", mtas.cert_pem)):
        pem.write_to_path(tmp_path / path)
    servers.cert_pem.write_to_path(tmp_path / "servers")
    its.private_key_and_cert_chain_pem.write_to_path(tmp_path / "its")
    (tmp_path / "key").chmod(0o600)
    more = f"listen_proxy_protocol_tls 127.0.2.3:0\ntls_certificate_file {tmp_path}/crt\n"
    more += f"tls_private_key_file {tmp_path}/key\ntls_client_ca_file {tmp_path}/mtas\n"
    words = f"verify required ca-file {tmp_path}/servers" + (f" crt {tmp_path}/its" if shows else "")
    inner = f"unix@{tmp_path}/tls.sock"
    with Proxy(more) as proxy:
        door = proxy.door("proxy_protocol", "127.0.2.3")
        tls = f"\nlisten tls\n    mode tcp\n    bind {inner}\n    server proxy {door[0]}:{door[1]} ssl {words}\n"
        with haproxy(tmp_path, door, sink.endpoint, more={"10.0.0.1:808": inner}, behind=tls) as endpoint:
            if not shows:
                with pytest.raises(smtplib.SMTPServerDisconnected):
                    send(endpoint)
                proxy.wait_line("has shown no certificate, which tls_client_ca_file asks for")
                return
            send(endpoint)
            proxy.wait_line(rf"^connection .*instance=mta7.example.org protocol=proxy_protocol .*source={SOURCE} ")
        assert [(message.content == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, SOURCE)]


def test_a_header_in_front_of_tls_is_refused_since_anybody_could_change_it(sink, tmp_path):
    """What HAProxy sends by `ssl send-proxy-v2` alone."""
    with Proxy("listen_proxy_protocol_tls 127.0.2.3:0\n") as proxy:
        door = proxy.door("proxy_protocol", "127.0.2.3")
        more = {"send-proxy-v2": "send-proxy-v2 ssl verify none"}
        with haproxy(tmp_path, door, sink.endpoint, more=more) as endpoint:
            with pytest.raises(smtplib.SMTPServerDisconnected):
                send(endpoint)
            proxy.wait_line(
                "does not speak TLS.*the header belongs inside of TLS.*it looks like a PROXY protocol header"
            )
        assert not sink.messages

"""Mode smtp in front of receivers that others wrote: aiosmtpd, Postfix and Exim, each with STARTTLS and all it offers.

What a client is shown, that its messages arrive byte for byte under every extension that it was shown, and that two
instances send all of them on one connection with one handshake, by the receiver's own record.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from proxy.protocols.smtp.keywords import SHOWN
from tests import clients, peers
from tests.certificates import pem
from tests.clients import socks5
from tests.interop import test_postfix as postfix
from tests.interop.test_exim import Exim, snippet, user  # noqa: F401 (a fixture)
from tests.interop.test_shared_receivers import EXIM
from tests.peers import MESSAGE, Daemon
from tests.program import Proxy
from tests.sinks import Sink
from tests.waiting import wait_for

NAME = "mail1.example.com"
SOURCE = "127.0.0.5"
INSTANCES = ("server-a", "server-b")
CONFIG = f"mode smtp\nsource mail1 {{\n    ip {SOURCE}\n    ehlo {NAME}\n}}\n" + "".join(
    f"instance {name} {{\n    share_with all\n}}\n" for name in INSTANCES
)
#: So nobody opens a second one while a receiver takes its time to answer RSET.
ONE = "throttle one {\n    max_concurrent_connections 1\n    wait 30s\n}\n"
COUNT = 6
#: Headers that nobody has a right to mend, and a body for all extensions.
HEADER, _, BODY = MESSAGE.partition(b"\r\n\r\n")


class Receiver(NamedTuple):
    """A running receiver.

    Args:
        bodies: of the messages that have arrived, with CRLF. sessions: connections with TLS that it has had.
        offers: what it says in EHLO behind TLS.
    """

    endpoint: tuple[str, int]
    bodies: Callable[[], list[bytes]]
    sessions: Callable[[], int]
    offers: frozenset[str]


@contextlib.contextmanager
def aiosmtpd(directory: Path) -> Iterator[Receiver]:
    with Sink(starttls=True) as sink:
        yield Receiver(
            sink.endpoint,
            lambda: [message.content.partition(b"\r\n\r\n")[2] for message in sink.messages],
            lambda: len(set(sink.peers)),
            frozenset({"SIZE", "8BITMIME", "SMTPUTF8"}),
        )


@contextlib.contextmanager
def postfix_smtpd(directory: Path) -> Iterator[Receiver]:
    """It passes on what it has taken, so that the bytes can be looked at."""
    postfix.needed()
    certificate = directory / "certificate.pem"
    certificate.write_bytes(pem("valid"))
    more = f"smtpd_tls_security_level = may\nsmtpd_tls_chain_files = {certificate}\nsmtpd_tls_loglevel = 1\n"
    host = peers.address()
    endpoint = host, peers.free_port(host)
    with Sink() as sink, postfix.running("[{}]:{}".format(*sink.endpoint), more, endpoint) as (_, log):
        yield Receiver(
            endpoint,
            lambda: [postfix.content(message).partition(b"\r\n\r\n")[2] for message in sink.messages],
            lambda: len(re.findall(r"TLS connection established from", log.read_text())),
            frozenset({"PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES"}),
        )


@contextlib.contextmanager
def exim(directory: Path) -> Iterator[Receiver]:
    """It keeps its queue, body by body. CHUNKING and PIPECONNECT are what the proxy has to hide."""
    host = peers.address()
    endpoint = host, peers.free_port(host)
    certificate, file = directory / "certificate.pem", directory / "exim.conf"
    certificate.write_bytes(pem("valid"))
    more = (
        "smtputf8_advertise_hosts = *\naccept_8bitmime = true\ndsn_advertise_hosts = *\nchunking_advertise_hosts = *\n"
    )
    text = EXIM.format(directory=directory, host=endpoint[0], port=endpoint[1])
    file.write_text(text.replace("begin acl", f"{more}pipelining_connect_advertise_hosts = *\nbegin acl"))
    for path in (certificate, file):
        path.chmod(0o644)
    spool, log = directory / "spool" / "input", directory / "mainlog"

    def bodies() -> list[bytes]:
        files = sorted(spool.rglob("*-D"))
        return [file.read_bytes().split(b"\n", 1)[1].replace(b"\n", b"\r\n") for file in files]

    def sessions() -> int:
        return len(set(re.findall(r" <= .*\[127\.0\.0\.5\]:(\d+) .*X=TLS", log.read_text())))

    with Daemon(peers.program("exim4"), "-C", file, "-bdf", listens=endpoint):
        offers = frozenset({"PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "DSN"})
        yield Receiver(endpoint, bodies, sessions, offers)


RECEIVERS = {make.__name__: make for make in (aiosmtpd, postfix_smtpd, exim)}


@pytest.fixture(params=RECEIVERS)
def receiver(request: pytest.FixtureRequest, user: str) -> Iterator[Receiver]:  # noqa: F811
    with (
        peers.directory(user if request.param == "exim" and os.getuid() == 0 else None) as directory,
        RECEIVERS[request.param](directory) as receiver,
    ):
        yield receiver


def body(number: int) -> bytes:
    return BODY + b"number %d\r\n" % number


def send(proxy: Proxy, receiver: Receiver, number: int) -> None:
    """One message with all that was offered, pipelined if that was."""
    smtp = clients.Smtp(socks5(proxy.socks5, receiver.endpoint, SOURCE, user=INSTANCES[number % 2]))
    smtp.ehlo(NAME)
    offers = {keyword.upper() for keyword in smtp.esmtp_features}
    assert offers == receiver.offers
    assert offers <= SHOWN
    message = HEADER + b"\r\n\r\n" + body(number)
    sender, parameters = "from@example.com", [f"SIZE={len(message)}"]
    if "8BITMIME" in offers:
        parameters.append("BODY=8BITMIME")
    if "SMTPUTF8" in offers:
        sender = "grüße@example.com"
        parameters.append("SMTPUTF8")
    group = [f"MAIL FROM:<{sender}> {' '.join(parameters)}", "RCPT TO:<to@example.net>", "DATA"]
    if "PIPELINING" in offers:
        smtp.sock.sendall("".join(f"{command}\r\n" for command in group).encode())
        codes = [smtp.getreply()[0] for _ in group]
    else:
        smtp.command_encoding = "utf-8"
        codes = [smtp.docmd(command)[0] for command in group]
    assert codes == [250, 250, 354]
    smtp.sock.sendall(clients.stuffed(message) + b".\r\n")
    assert smtp.getreply()[0] == 250
    assert smtp.docmd("BDAT", "0 LAST")[0] == 503
    assert smtp.docmd("QUIT")[0] == 221
    smtp.close()


def test_two_instances_share_one_connection(receiver: Receiver) -> None:
    with Proxy(CONFIG + ONE) as proxy:
        for number in range(COUNT):
            send(proxy, receiver, number)
        wait_for(lambda: len(receiver.bodies()) == COUNT, 20.0, "all have arrived")
        assert sorted(receiver.bodies()) == sorted(map(body, range(COUNT)))
        assert receiver.sessions() == 1


def test_two_clients_at_once_have_two(receiver: Receiver) -> None:
    """The second one is greeted while the first is connected."""
    with Proxy(CONFIG) as proxy:
        first = clients.Smtp(socks5(proxy.socks5, receiver.endpoint, SOURCE, user=INSTANCES[0]))
        first.ehlo(NAME)
        assert first.mail("from@example.com")[0] == 250
        send(proxy, receiver, 1)
        assert first.rcpt("to@example.net")[0] == 250
        assert first.docmd("DATA")[0] == 354
        first.sock.sendall(clients.stuffed(HEADER + b"\r\n\r\n" + body(2)) + b".\r\n")
        assert first.getreply()[0] == 250
        first.quit()
        wait_for(lambda: len(receiver.bodies()) == 2, 20.0, "both have arrived")
        assert sorted(receiver.bodies()) == [body(1), body(2)]
        assert receiver.sessions() == 2


def test_a_refused_recipient_and_too_large_a_message_are_the_receivers_own(receiver: Receiver) -> None:
    with Proxy(CONFIG + ONE) as proxy:
        smtp = clients.Smtp(socks5(proxy.socks5, receiver.endpoint, SOURCE, user=INSTANCES[0]))
        smtp.ehlo(NAME)
        assert smtp.docmd("MAIL", "FROM:<from@example.com> SIZE=99999999999")[0] == 552
        assert smtp.rset()[0] == 250
        assert smtp.mail("from@example.com")[0] == 250
        assert smtp.docmd("RCPT", "FROM:<to@example.net>")[0] in (500, 501)
        assert smtp.rset()[0] == 250
        smtp.quit()
        send(proxy, receiver, 1)
        wait_for(lambda: receiver.bodies() == [body(1)], 20.0, "the next message arrives on the same connection")
        assert receiver.sessions() == 1


def test_exim_to_exim(user: str) -> None:  # noqa: F811
    """It would use CHUNKING, pipelining and PIPECONNECT, and TLS of its own, if it were offered them."""
    with (
        peers.directory(user) as there,
        peers.directory(user) as here,
        exim(there) as receiver,
        Proxy(CONFIG + ONE + f"default_source_ip {SOURCE}\n") as proxy,
    ):
        more = f"  helo_data = {NAME}\n  hosts_try_fastopen =\n  hosts_try_chunking = *\n  hosts_pipe_connect = *\n"
        program = Exim(here, snippet(proxy.socks5), receiver.endpoint, more)
        for _ in range(3):
            log = program.send()
        assert log.count(" => to@example.net ") == 3, log
        assert "BDAT" not in program.said
        assert receiver.bodies() == [BODY] * 3
        assert receiver.sessions() == 1

"""Exim, the real one: as a client over SOCKS5 with the snippets of etc/clients, and as the receiver behind each door.

Exim reads each SOCKS reply with one read() and knows no BIND, so `default_source_ip` chooses where it leaves from.
"""

import os
import pwd
import re
from contextlib import contextmanager

import pytest

from tests import clients, peers
from tests.clients import DOORS
from tests.interop.conftest import DEFAULT_SOURCE, SECRETS
from tests.mx import Mx, say
from tests.peers import MESSAGE, Daemon
from tests.program import Proxy
from tests.sinks import Sink, closed_port, deaf_port
from tests.waiting import wait_for

MAIN = """\
spool_directory = {directory}/spool
log_file_path = {directory}/%slog
primary_hostname = exim.example
qualify_domain = example.com
untrusted_set_sender = *
local_from_check = false
received_header_text =
keep_environment =
"""
ROUTERS = """\
begin routers
to_the_receiver:
  driver = manualroute
  route_list = * "<+ {host}" byname
  self = send
  transport = proxied_smtp

begin transports
{transports}
  port = {port}
{more}
begin retry
* * F,2h,15m
"""


class Exim:
    """A client with a queue of its own in `directory`."""

    def __init__(self, directory, transports, destination, more=""):
        host, port = destination
        self.main_log = directory / "mainlog"
        self.spool = directory / "spool"
        self.file = directory / "exim.conf"
        text = MAIN.format(directory=directory)
        self.file.write_text(text + ROUTERS.format(host=host, port=port, transports=transports.rstrip(), more=more))
        self.file.chmod(0o644)

    def send(self, sender="from@example.com"):
        """Hand in one message and see its first delivery attempt to the end."""
        done = self("-v", "-odi", "-oi", "-f", sender, "to@example.net", stdin=MESSAGE.replace(b"\r\n", b"\n"))
        assert done.returncode == 0, done.stderr
        self.said = done.stderr.decode("utf-8", "replace")
        return self.main_log.read_text()

    def queue(self):
        """How many messages wait."""
        return len(list((self.spool / "input").glob("*-D")))

    def __call__(self, *arguments, stdin=b""):
        return peers.run(peers.program("exim4"), "-C", self.file, *arguments, stdin=stdin)


@pytest.fixture(scope="module")
def user():
    """Who an Exim with a configuration of its own is: its built-in user, or the caller where that is not root."""
    if os.getuid():
        return pwd.getpwuid(os.getuid()).pw_name
    done = peers.run(peers.program("exim4"), "-C", "/dev/null", "-bP", "exim_user")
    return re.search(rb"exim_user = (\S+)", done.stdout)[1].decode()


@pytest.fixture
def directory(user):
    with peers.directory(user) as path:
        yield path


@pytest.fixture(autouse=True)
def _exim():
    peers.program("exim4")


def snippet(door, name="exim.conf", auth=True):
    """The documented transport, to this proxy."""
    text = peers.snippet(name, {"10.0.0.1 port=1080": f"{door[0]} port={door[1]}"} | SECRETS)
    return text if auth else re.sub(r"auth=name name=\S+ pass=\S+ ", "", text)


def test_with_a_password(proxy, sink, directory):
    exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
    log = exim.send()
    (message,) = sink.messages
    assert message.content == MESSAGE
    assert message.peer[0] == DEFAULT_SOURCE
    assert re.search(r"=> to@example.net .*H=127.0.0.2 .*250 2.0.0 kept as 1", log), log
    assert f"proxy farside: [{DEFAULT_SOURCE}]:{message.peer[1]}\n" in exim.said  # as it read our reply
    line = proxy.wait_line(rf"^connection .*:{sink.endpoint[1]} .*")[0]
    assert " instance=server-a protocol=socks5 " in line
    assert f" source={DEFAULT_SOURCE} " in line


def test_without_a_password(sink, directory):
    with Proxy(f"socks5_auth none\ndefault_source_ip {DEFAULT_SOURCE}\n") as proxy:
        Exim(directory, snippet(proxy.socks5, auth=False), sink.endpoint).send()
    assert [(message.content == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, DEFAULT_SOURCE)]


def test_a_source_for_each_sending_domain(directory, sink):
    """An instance with one source_ip leaves from there: what Exim can name is the instance."""
    first, second = peers.address(), peers.address()
    instances = f"instance mail1 {{\n  source_ip {first}\n}}\ninstance mail2 {{\n  source_ip {second}\n}}\n"
    with Proxy(instances) as proxy:
        exim = Exim(directory, snippet(proxy.socks5, "exim-sources.conf"), sink.endpoint)
        exim.send("from@example.com")
        exim.send("from@example.org")
    assert [message.peer[0] for message in sink.messages] == [first, second]
    assert {message.content for message in sink.messages} == {MESSAGE}


def test_the_address_that_was_dialled(directory, sink):
    """`default_source_ip same`: one SOCKS listener on each source."""
    first, second = peers.address(), peers.address()
    with Proxy(f"listen_socks5 {first}:0, {second}:0\ndefault_source_ip same\n") as proxy:
        for host in (first, second):
            Exim(directory, snippet(proxy.door("socks5", host)), sink.endpoint).send()
    assert [message.peer[0] for message in sink.messages] == [first, second]


def test_ipv6(proxy, directory):
    """A destination of the other family than the door's: 22 bytes of reply instead of 10."""
    with Sink("::1") as sink:
        exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
        log = exim.send()
        assert [(message.content == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, "::1")], log
        assert f"proxy farside: [::1]:{sink.messages[0].peer[1]}\n" in exim.said


def test_the_proxy_at_an_ipv6_address(sink, directory):
    with Proxy(f"listen_socks5 [::1]:0\ndefault_source_ip {DEFAULT_SOURCE}\n") as proxy:
        text = snippet(proxy.socks5).replace("socks_proxy = ", "socks_proxy = <+ ")
        Exim(directory, text, sink.endpoint).send()
    assert [message.peer[0] for message in sink.messages] == [DEFAULT_SOURCE]


def test_the_next_proxy_when_one_is_dead(proxy, sink, directory):
    """Exim's own fallback: a list, separated by colons."""
    with closed_port("127.0.1.9") as dead:
        text = snippet(proxy.socks5)
        entry = re.search(r"socks_proxy = (.*)", text)[1]
        other = entry.replace(f"{proxy.socks5[0]} port={proxy.socks5[1]}", f"{dead[0]} port={dead[1]}")
        exim = Exim(directory, text.replace(entry, f"{other} pri=2 : {entry} pri=1"), sink.endpoint)
        exim.send()
    assert [message.content == MESSAGE for message in sink.messages] == [True]


def test_many_messages_at_once(proxy, sink, directory):
    exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
    for _ in range(8):
        exim("-odq", "-oi", "-f", "from@example.com", "to@example.net", stdin=MESSAGE.replace(b"\r\n", b"\n"))
    assert exim.queue() == 8
    for _ in range(2):  # two queue runners side by side
        exim("-q")
    wait_for(lambda: exim.queue() == 0, what="an empty queue")
    assert len(sink.messages) == 8
    assert {(message.content, message.peer[0]) for message in sink.messages} == {(MESSAGE, DEFAULT_SOURCE)}


# -- refusals: Exim keeps the message and tells why; it never bounces


def deferred(exim, log, reason):
    assert exim.queue() == 1, log
    assert re.search(rf"== to@example.net .* defer \(\d+\): {reason}$", log, re.MULTILINE), log
    assert "**" not in log, log  # the mark of a bounce


def test_a_wrong_password(proxy, sink, directory):
    exim = Exim(directory, snippet(proxy.socks5).replace("pass=", "pass=not"), sink.endpoint)
    log = exim.send()
    assert "socks auth failed" in log
    deferred(exim, log, "Permission denied")
    proxy.wait_line(r"refused .*instance=\S+ protocol=socks5 .*reason=bad_credentials")
    assert not sink.messages


def test_no_password_where_one_is_required(proxy, sink, directory):
    exim = Exim(directory, snippet(proxy.socks5, auth=False), sink.endpoint)
    deferred(exim, exim.send(), "Protocol error")
    proxy.wait_line(r"refused .* protocol=socks5 .*no login method that this proxy accepts")


def test_a_receiver_that_refuses(proxy, directory):
    with closed_port() as nobody:
        exim = Exim(directory, snippet(proxy.socks5), nobody)
        deferred(exim, exim.send(), "Connection refused")


def test_a_receiver_that_does_not_answer(directory):
    with Proxy("connect_timeout 300ms\ndefault_source_ip 127.0.0.77\n") as proxy, deaf_port() as silent:
        exim = Exim(directory, snippet(proxy.socks5), silent)
        deferred(exim, exim.send(), "Operation canceled")


def test_a_denied_destination(directory):
    with Proxy("allow_destination 127.0.9.0/24\n") as proxy, Sink() as sink:
        exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
        deferred(exim, exim.send(), "Permission denied")
        assert not sink.peers


def test_a_source_that_is_not_on_the_machine(directory, sink):
    with Proxy("default_source_ip 192.0.2.9\nsource_ip 192.0.2.9\n") as proxy:
        exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
        deferred(exim, exim.send(), "Input/output error")
        proxy.wait_line(r"bind 192\.0\.2\.9: not an address of this machine")


def test_no_default_source_for_this_family(directory):
    """The system's choice is looked up, and must be allowed."""
    with Proxy(f"source_ip {DEFAULT_SOURCE}\ndefault_source_ip {DEFAULT_SOURCE}\n") as proxy, Sink("::1") as sink:
        exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
        deferred(exim, exim.send(), "Permission denied")


def test_a_full_proxy(directory, sink):
    with Proxy("max_connections 1\n") as proxy, clients.dial(proxy.socks5):
        wait_for(lambda: proxy.open_connections() == 1, what="the first client")
        exim = Exim(directory, snippet(proxy.socks5), sink.endpoint)
        deferred(exim, exim.send(), "Permission denied")


def test_no_proxy_at_all(directory, sink):
    with closed_port("127.0.1.9") as dead:
        exim = Exim(directory, snippet(dead), sink.endpoint)
        deferred(exim, exim.send(), "Device or resource busy")


@pytest.mark.parametrize(
    ("script", "mark"),
    [
        ({"greeting": say(b"421 4.3.2 busy\r\n")}, "=="),
        ({"rcpt": say(b"451 4.7.1 later\r\n")}, "=="),
        ({"rcpt": say(b"550 5.1.1 no such user\r\n")}, "**"),
    ],
)
def test_the_receivers_own_words_arrive(proxy, directory, script, mark):
    with Mx(script, host="127.0.0.2") as receiver:
        log = Exim(directory, snippet(proxy.socks5), receiver.endpoint).send()
        assert re.search(rf"{re.escape(mark)} to@example.net ", log), log


# -- as the receiver


@contextmanager
def receiving_exim(directory, user):
    """An Exim that accepts everything into one mailbox; yields its address, the mailbox, and its log."""
    host = peers.address()
    port = peers.free_port(host)
    mailbox = directory / "mailbox"
    config = directory / "exim.conf"
    config.write_text(
        MAIN.format(directory=directory)
        + f"""\
tls_advertise_hosts =
host_lookup =
rfc1413_query_timeout = 0s
log_selector = +incoming_interface +smtp_connection
pid_file_path =
acl_smtp_rcpt = accept_all
acl_smtp_data = accept_all
begin acl
accept_all:
  accept
begin routers
all:
  driver = accept
  transport = to_file
begin transports
to_file:
  driver = appendfile
  file = {mailbox}
  user = {user}
  message_prefix =
  message_suffix =
  use_crlf
"""
    )
    config.chmod(0o644)
    with Daemon(peers.program("exim4"), "-bdf", "-C", config, "-oX", f"{host}.{port}", "-odi", listens=(host, port)):
        yield (host, port), mailbox, directory / "mainlog"


@pytest.mark.parametrize("door", DOORS)
def test_as_the_receiver(proxy, directory, user, door):
    """Exim sees the asked source as its client, and keeps what was sent."""
    with receiving_exim(directory, user) as (endpoint, mailbox, log):
        code, text = clients.send(DOORS[door](proxy, endpoint, "127.0.0.93"), MESSAGE)
        assert code == 250, text
        wait_for(lambda: "Completed" in log.read_text(), what="the delivery")
        assert re.search(r"<= from@example.com .*\[127\.0\.0\.93\]", log.read_text())
        assert mailbox.read_bytes() == MESSAGE


def test_exim_to_exim(proxy, directory, user):
    """Both ends real: pipelining, chunking and 8 bits as the two of them negotiate."""
    with receiving_exim(directory, user) as (endpoint, mailbox, log), peers.directory(user) as other:
        exim = Exim(other, snippet(proxy.socks5), endpoint)
        exim.send()
        wait_for(lambda: "Completed" in log.read_text(), what="the delivery")
        assert exim.queue() == 0
        assert mailbox.read_bytes() == MESSAGE
        assert f"[{DEFAULT_SOURCE}]" in log.read_text()

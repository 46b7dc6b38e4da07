"""Sharing with receivers that others wrote: Postfix' smtp-sink and Exim take one connection from two instances."""

from __future__ import annotations

import os
import re

import pytest

from tests import peers
from tests.certificates import pem
from tests.peers import Daemon
from tests.program import Proxy
from tests.sharing import NAME, body, instances
from tests.waiting import wait_for

COUNT = 10
EXIM = """\
spool_directory = {directory}/spool
log_file_path = {directory}/%slog
primary_hostname = exim.example
daemon_smtp_ports = {port}
local_interfaces = {host}
pid_file_path = {directory}/pid
tls_advertise_hosts = *
tls_certificate = {directory}/certificate.pem
log_selector = +smtp_connection +incoming_port +tls_cipher
received_header_text =
keep_environment =
queue_only = true
acl_smtp_rcpt = all
begin acl
all:
  accept
"""


@pytest.fixture
def proxy():
    with Proxy("listen_tls no\n") as proxy:
        yield proxy


def send_in_turns(proxy, endpoint, tls):
    """Messages of two instances in turns; which were sent on a shared connection."""
    reused = []
    with instances(proxy, "server-a", "server-b") as pair:
        for number in range(COUNT):
            smtp = pair[number % 2].smtp([endpoint], NAME, tls=tls)
            smtp.sendmail(f"{number}@example.com", ["to@example.net"], body(number))
            reused.append(smtp.opened.reused)
            assert smtp.release(wait=True) == "kept"
            # Time for the receiver to answer RSET; one that takes longer costs a connection, no more.
            for _ in range(3):
                proxy.status()
    return reused


def test_smtp_sink(proxy):
    host = peers.address()
    endpoint = host, peers.free_port(host)
    command = (peers.postfix("smtp-sink"), "-v", "-u", peers.unprivileged(), "{}:{}".format(*endpoint), "100")
    with Daemon(*(command if os.getuid() == 0 else command[:2] + command[4:]), listens=endpoint) as sink:
        reused = send_in_turns(proxy, endpoint, "none")
        proxy.term()
        proxy.wait_exit()
        wait_for(lambda: "QUIT" in sink.output.upper(), what="QUIT at the end of the proxy")
    fresh = reused.count(False)
    assert not reused[0]
    assert fresh <= COUNT // 2
    assert sink.output.count("smtp-sink: connect (") == fresh, sink.output
    assert sink.output.count("smtp-sink: mail FROM:<") == COUNT, sink.output


def test_exim(proxy):
    """With TLS of GnuTLS, whose tickets come when it likes."""
    peers.program("exim4")
    done = peers.run(peers.program("exim4"), "-C", "/dev/null", "-bP", "exim_user")
    user = re.search(rb"exim_user = (\S+)", done.stdout)[1].decode() if os.getuid() == 0 else None
    host = peers.address()
    endpoint = host, peers.free_port(host)
    with peers.directory(user) as directory:
        certificate, file = directory / "certificate.pem", directory / "exim.conf"
        certificate.write_bytes(pem("valid"))
        certificate.chmod(0o644)
        file.write_text(EXIM.format(directory=directory, host=endpoint[0], port=endpoint[1]))
        file.chmod(0o644)
        with Daemon(peers.program("exim4"), "-C", file, "-bdf", listens=endpoint):
            reused = send_in_turns(proxy, endpoint, "required")
            proxy.term()
            proxy.wait_exit()
            main = directory / "mainlog"
            wait_for(lambda: main.read_text().count("closed by QUIT") == reused.count(False), what="QUIT, not a loss")
            log = main.read_text()
        assert reused.count(False) <= COUNT // 2
        assert log.count("SMTP connection from") == 2 * reused.count(False), log  # its begin and its end
        arrived = re.findall(r" <= (\d+)@example.com .*X=TLS1", log)
        assert sorted(map(int, arrived)) == list(range(COUNT))
        ports = set(re.findall(r" <= \d+@example.com .*\]:(\d+) ", log))
        assert len(ports) == reused.count(False), log

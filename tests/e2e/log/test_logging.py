"""What the program writes: the documented shapes, true figures, nothing that a peer could fake, and never a wait."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests import clients
from tests import independent_client as mta
from tests.clients import DOORS, Refused, Smtp, dial, exactly, login, proxied, read_all, socks5
from tests.e2e.smtp.test_mode import SMTP
from tests.mx import Mx, close, say
from tests.program import ROOT, Proxy, config
from tests.sinks import GREETING, Raw, Sink, closed_port, echo
from tests.waiting import wait_for

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
CLOSING = re.compile(
    TIME + r"connection id=(?P<id>\d+) instance=(?P<instance>\S+) protocol=(?P<protocol>\S+) client=127\.0\.0\.1:\d+ "
    r"source=(?P<source>\S+) destination=(?P<destination>\S+) reused=no tls=- up=(?P<up>\d+) down=(?P<down>\d+) "
    r"seconds=\d+\.\d{3} outcome=(?P<outcome>\w+)"
)


# -- status lines


def test_the_status_lines_have_their_documented_shape_and_true_figures():
    with Proxy("listen_socks5 127.0.1.2:0, [::1]:0\n") as proxy, Raw(echo) as receiver:
        native, socks, pp = proxy.native[1], proxy.door("socks5", "127.0.1.2")[1], proxy.proxy_protocol[1]
        ipv6 = proxy.door("socks5", "::1")[1]

        def expected(socks_open, pp_open, silent=0):
            relayed = socks_open + pp_open
            return {
                f"listener(127.0.1.1:{native}): open_connections=0",
                f"listener(127.0.1.2:{socks}): open_connections={socks_open + silent}",
                f"listener([::1]:{ipv6}): open_connections=0",
                f"listener(127.0.1.3:{pp}): open_connections={pp_open}",
                f"direct_remote_smtp: connections={relayed}(active={relayed} cached=0)",
            }

        def shown():
            lines = [line for line in proxy.status() if not line.startswith("throttle: ")]
            assert lines[-1].startswith("direct_remote_smtp: ")
            return set(lines)

        assert shown() == expected(0, 0)
        socks_ = [socks5(("127.0.1.2", socks), receiver.endpoint) for _ in range(3)]
        pps = [proxied(proxy.proxy_protocol, receiver.endpoint) for _ in range(2)]
        silent = dial(("127.0.1.2", socks))
        wait_for(lambda: shown() == expected(3, 2, 1), what="3 and 2 relayed, 1 silent")
        silent.close()
        socks_.pop().close()
        wait_for(lambda: shown() == expected(2, 2), what="2 and 2")
        for sock in socks_ + pps:
            clients.reset(sock)
        wait_for(lambda: shown() == expected(0, 0), what="none")
        lines = proxy.stdout_lines
        assert all(re.match(TIME + r"\S", line) for line in lines)


def test_failures_leave_no_traces_in_the_figures(mx):
    with Proxy("source_ip 127.0.0.0/8, 192.0.2.9\n") as proxy, closed_port() as closed:
        for destination, source in ((closed, "127.0.0.5"), (mx.endpoint, "192.0.2.9"), (mx.endpoint, "192.0.2.8")):
            with pytest.raises(Refused):
                socks5(proxy.socks5, destination, source)
            with proxied(proxy.proxy_protocol, destination, source) as sock:
                assert read_all(sock).startswith(b"421 ")
        proxy.wait_idle()


def test_stats_interval():
    with Proxy("stats_interval 100ms\n") as proxy:
        wait_for(lambda: len(proxy.matching("^direct_remote_smtp: ")) >= 3, what="three sets of status lines")


# -- the closing line


@pytest.mark.parametrize("name", DOORS)
def test_the_closing_line_tells_the_truth(name):
    with Proxy() as proxy, Sink() as sink:
        message = b"x" * 500 + b"\r\n"
        clients.send(DOORS[name](proxy, sink.endpoint, "127.0.0.31"), message)
        proxy.wait_line("^connection ")
        (line,) = [line for line in proxy.stdout_lines if " connection " in line]
        found = CLOSING.fullmatch(line)
        assert found
        assert found["protocol"] == name.replace("_v1", "_protocol").replace("_v2", "_protocol")
        assert found["instance"] == ("mta-1" if name == "socks5" else "-")
        assert (found["source"], found["destination"]) == ("127.0.0.31", f"127.0.0.2:{sink.endpoint[1]}")
        envelope = (
            b"ehlo client.example\r\nmail FROM:<from@example.com>\r\nrcpt TO:<to@example.net>\r\nDATA\r\n.\r\nQUIT\r\n"
        )
        assert int(found["up"]) == len(message) + len(envelope)
        assert int(found["down"]) > 100


def test_log_connections(mx):
    def run(setting):
        with Proxy(f"log_connections {setting}\n") as proxy, closed_port() as closed:
            with socks5(proxy.socks5, mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
            proxy.wait_idle()
            sock = socks5(proxy.socks5, mx.endpoint)
            clients.reset(sock)
            proxy.wait_idle()
            with pytest.raises(Refused):
                socks5(proxy.socks5, closed)
            proxy.wait_idle()
        return (
            len(proxy.matching("^connection .*outcome=client_closed")),
            len(proxy.matching("^connection .*outcome=client_reset")),
            len(proxy.matching("^failed ")),
        )

    assert run("all") == (1, 1, 1)
    assert run("errors") == (0, 1, 1)
    assert run("none") == (0, 0, 0)


# -- what receivers say


@pytest.mark.parametrize(
    ("setting", "first", "outcome"), [("all", b"421 4.7.0", "4xx"), ("errors", b"554 5.7.1", "5xx")]
)
def test_a_greeting_that_is_a_refusal(setting, first, outcome):
    """Mode tcp: passed on as it is, and no success."""
    said = first + b' go "away"\x1b[31m\r\n'
    with Proxy(f"log_connections {setting}\n") as proxy, Mx({"greeting": say(said, close)}) as mx:
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert read_all(sock) == said
        line = proxy.wait_line(f"^connection .*outcome=greeting_{outcome} ").string
    reply = first.decode() + r" go \"away\"\x1b[31m"
    assert line.endswith(f' reply="{reply}"')


def test_a_reply_to_a_message_is_told_in_mode_smtp():
    with Proxy(SMTP) as proxy, Mx({"rcpt": say(b"550-5.1.1 no\r\n550 5.1.1 such user\r\n")}) as mx:
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock, Smtp(sock) as smtp:
            smtp.ehlo()
            smtp.mail("from@example.com")
            assert smtp.rcpt("to@example.net")[0] == 550
        line = proxy.wait_line("^connection ").string
    assert line.endswith(' reply="550 5.1.1 such user"')


def test_a_greeting_that_is_a_refusal_in_mode_smtp():
    with Proxy(SMTP) as proxy, Mx({"greeting": say(b"554 5.7.1 blocked\r\n", close)}) as mx:
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
            assert read_all(sock) == b"554 5.7.1 blocked\r\n"
        line = proxy.wait_line("^connection .*outcome=greeting_5xx ").string
    assert line.endswith(' reply="554 5.7.1 blocked"')


def test_a_reply_that_failed_an_open():
    with Proxy("listen_tls no\n") as proxy, Mx({"greeting": say(b"421 4.7.0 too many\r\n", close)}) as busy:
        with mta.channel(proxy.native, tls=False) as peer:
            peer.failed(busy.endpoint, ehlo_name="client.example")
        line = proxy.wait_line("^failed .*step=greeting ").string
    assert ' reply="421 4.7.0 too many" message=' in line


def test_json(mx):
    """Each line on either output is one object."""
    with Proxy("log_format json\n") as proxy, closed_port() as closed:
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.32", user='a "b" \\') as sock:
            assert exactly(sock, 8) == GREETING
        with pytest.raises(Refused):
            socks5(proxy.socks5, closed)
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint, "192.0.2.8")
        proxy.wait_line('"event":"connection"')
        proxy.wait_line('"event":"failed"')
        proxy.wait_line('"event":"refused"')
        proxy.signal(signal.SIGUSR1)
        proxy.wait_line("direct_remote_smtp: ")
    entries = [json.loads(line) for line in proxy.stdout_lines + proxy.stderr_lines]
    assert all({"time", "level", "event"} <= entry.keys() for entry in entries)
    by_event = {entry["event"]: entry for entry in entries}
    closing = by_event["connection"]
    assert closing["instance"] == 'a "b" \\'
    assert (closing["source"], closing["up"], closing["down"]) == ("127.0.0.32", 0, 8)
    assert (closing["reused"], closing["outcome"]) == (False, "client_closed")
    assert (by_event["failed"]["step"], by_event["failed"]["errno"]) == ("connect", "ECONNREFUSED")
    assert (by_event["refused"]["reason"], by_event["refused"]["level"]) == ("source_not_allowed", "warning")
    assert by_event["status"]["message"].startswith("direct_remote_smtp: connections=")


# -- where it goes


def test_warnings_and_errors_go_to_stderr(mx):
    with Proxy() as proxy:
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint, "192.0.2.8")
        proxy.bad_hup("nonsense 1\n")
    assert all(re.match(TIME + "(WARNING|ERROR) ", line) for line in proxy.stderr_lines)
    assert len([line for line in proxy.stderr_lines if " WARNING config: " not in line]) == 3
    assert not [line for line in proxy.stdout_lines if re.match(TIME + "(WARNING|ERROR) ", line)]
    assert "\x1b" not in "".join(proxy.stdout_lines + proxy.stderr_lines)


def test_a_client_cannot_fake_a_line_or_a_field(mx):
    """Neither through its name nor by what it sends; nor does an escape reach a terminal."""
    names = ["a outcome=client_closed x", 'a" up=1 "', "a\\", "ü\u202e\u200b", "x" * 255, "%s%n{0}", "=", "-", "a,b"]
    with Proxy() as proxy:
        for name in names:
            try:
                with socks5(proxy.socks5, mx.endpoint, user=name) as sock:
                    assert exactly(sock, 8) == GREETING
            except Refused:
                assert not name.isprintable()
        for name in ("a\nconnection id=1", "\x1b[31m", "\x7f", "\u2028"):
            with dial(proxy.socks5) as sock:
                sock.sendall(clients.WITH_PASSWORD + login(name))
                assert read_all(sock) == b"\x05\x02\x01\x01"
        with dial(proxy.proxy_protocol) as sock:
            sock.sendall(b"PROXY TCP4 \x1b[31m\nconnection id=7 outcome=kept\r\n")
            read_all(sock)
        proxy.wait_idle()
    written = proxy.stdout_lines + proxy.stderr_lines
    assert all(re.match(TIME, line) and line.isprintable() for line in written)
    closing = [line for line in proxy.stdout_lines if " connection " in line and "id=" in line]
    field = r'(?:"(?:[^"\\]|\\.)*"|[A-Za-z0-9._:/@\[\]+,-]+)'
    good = re.compile(TIME + r"connection( \w+=" + field + ")+")
    assert closing
    for line in closing:
        assert good.fullmatch(line), line
        assert len(line) < 1000
    assert len(closing) == sum(name.isprintable() for name in names)


def test_on_a_terminal_it_is_coloured(tmp_path):
    import pty

    path = tmp_path / "f.conf"
    master, terminal = pty.openpty()
    taken = socket.create_server(("127.0.1.2", 0))
    path.write_text(config(f"listen_socks5 127.0.1.2:{taken.getsockname()[1]}\n"))
    path.chmod(0o600)
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "greenarrow_proxy.py"), f"--config-filename={path}"],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
            check=False,
            timeout=30,
        )
        written = os.read(master, 65536)
    finally:
        taken.close()
        os.close(master)
        os.close(terminal)
    assert done.returncode == 69
    assert b"\x1b[31m" in written


def test_in_the_journal_without_timestamps():
    """JOURNAL_STREAM names the very pipe that stdout is."""
    read, write = os.pipe()
    status = os.fstat(write)
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    with os.fdopen(read, "rb") as stream, Proxy(stdout=write, environ=environ) as proxy:
        os.close(write)
        assert stream.readline().startswith(b"start: greenarrow_proxy ")
        for _ in range(3):
            assert stream.readline().startswith(b"listen: listening on ")
        proxy.term()
        assert stream.readline().startswith(b"drain: ")
        assert stream.readline().startswith(b"stop: stopped ")
        assert stream.read() == b""


# -- nobody reads


def listening_ports(pid):
    """The addresses on which a process listens, from /proc: its log cannot be read in these tests."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = {}
    with open("/proc/net/tcp") as file:
        for line in list(file)[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                found[socket.inet_ntoa(bytes.fromhex(host)[::-1])] = int(port, 16)
    return found


def full_pipe():
    """A pipe of one page that holds all it can, and its read end."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    return read, write


def test_a_stdout_that_nobody_reads_stalls_nothing(mx):
    """Mail goes on, lines are dropped beyond 10,000, the loss is told, and the pipe stays a blocking one."""
    read, write = full_pipe()
    try:
        with Proxy(stdout=write) as proxy:
            ports = wait_for(lambda: len(found := listening_ports(proxy.pid)) == 3 and found, what="three listeners")
            endpoint = ("127.0.1.2", ports["127.0.1.2"])
            with Raw(echo) as receiver, socks5(endpoint, receiver.endpoint) as sock:
                for _ in range(300):
                    with socks5(endpoint, mx.endpoint) as short:
                        assert exactly(short, 8) == GREETING
                    sock.sendall(b"?")
                    assert exactly(sock, 1) == b"?"
                for _ in range(3500):  # four lines each, should two signals not become one
                    proxy.signal(signal.SIGUSR1)
                    sock.sendall(b"?")
                    assert exactly(sock, 1) == b"?"
            assert os.get_blocking(write)
            # Somebody reads again: what waited comes, and what was lost is told.
            os.set_blocking(read, False)
            got = b""

            def drain():
                nonlocal got
                with contextlib.suppress(BlockingIOError):
                    while data := os.read(read, 65536):
                        got += data
                proxy.signal(signal.SIGUSR1)  # a loss is told before the next line
                return b"lines lost" in got

            wait_for(drain, what="the loss is told")
            assert got.count(b"\n") >= 10_000
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("how", "workers"), [("closed_pipe", 1), ("full_disk", 1), ("closed", 1), ("closed_pipe", 2), ("closed", 2)]
)
def test_a_stdout_that_is_gone_stalls_nothing(mx, how, workers):
    if how == "closed_pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full" if how == "full_disk" else os.devnull, os.O_WRONLY)
    try:
        with Proxy(f"workers {workers}\n", stdout=write, before="exec >&-" if how == "closed" else "") as proxy:
            ports = wait_for(lambda: len(found := listening_ports(proxy.pid)) == 3 and found, what="three listeners")
            for _ in range(20):
                with socks5(("127.0.1.2", ports["127.0.1.2"]), mx.endpoint) as sock:
                    assert exactly(sock, 8) == GREETING
    finally:
        os.close(write)


def test_log_verbose_has_no_secret(mx):
    """Proxy itself looks for the secret and for tracebacks."""
    with Proxy("log_verbose yes\n") as proxy:
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
        with proxied(proxy.proxy_protocol, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
        with dial(proxy.native) as sock:
            sock.sendall(b"nonsense")
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                read_all(sock)
        proxy.bad_hup("auth_shared_secret tooshort\n")
        proxy.wait_idle()
    assert "tooshort" not in "".join(proxy.stderr_lines)

"""SIGHUP: all or nothing, nobody is disturbed, and what is in force afterwards is one whole configuration."""

import contextlib
import os
import re
import signal
import socket
import threading

import pytest
import trustme

from tests.clients import DOORS, Refused, dial, exactly, read_all, socks5, v1
from tests.program import BASE, SECRET, Proxy, config
from tests.sinks import GREETING, Raw, echo
from tests.waiting import wait_for

OTHER_SECRET = "another-open-secret-of-32-characters-0"
#: A change that shows at once, to tell the new configuration from the old one.
CHANGED = "source_ip 127.0.0.66\n"


@pytest.fixture
def proxy():
    with Proxy() as proxy:
        yield proxy


def works(proxy, mx, source="127.0.0.5", **more):
    """Whether a connection from this source comes about."""
    try:
        with socks5(proxy.socks5, mx.endpoint, source, **more) as sock:
            return exactly(sock, 8) == GREETING
    except Refused:
        return False


def test_a_new_configuration_is_in_force(proxy, mx):
    assert works(proxy, mx)
    proxy.hup(CHANGED)
    assert not works(proxy, mx)
    assert works(proxy, mx, "127.0.0.66")
    proxy.hup("")
    assert works(proxy, mx)


def test_secrets_are_rotated(proxy, mx):
    proxy.hup(f"auth_shared_secret {SECRET}, {OTHER_SECRET}\n")
    assert works(proxy, mx)
    assert works(proxy, mx, password=OTHER_SECRET)
    proxy.hup(f"auth_shared_secret {OTHER_SECRET}\n")
    assert not works(proxy, mx)
    assert works(proxy, mx, password=OTHER_SECRET)


def test_a_session_that_runs_keeps_what_it_began_with(proxy):
    with Raw(echo) as receiver, socks5(proxy.socks5, receiver.endpoint, "127.0.0.5") as sock:
        proxy.hup(CHANGED + "allow_from 127.0.0.99\n")
        sock.sendall(b"?")
        assert exactly(sock, 1) == b"?"
        with dial(proxy.socks5) as other, contextlib.suppress(ConnectionResetError):
            assert read_all(other) == b""


@pytest.mark.parametrize(
    "bad",
    [
        "lissten 1\n",
        "idle_timeout soon\n",
        "auth_shared_secret short\n",
        "tls_certificate_file /nowhere.crt\ntls_private_key_file /nowhere.key\n",
        "auth_shared_secret_file /nowhere/secret\n",
        "listen_socks5 127.0.1.2:0, [fe80::1]:2525\n",  # cannot be listened on
        "instance a {\n",
        "\x00",
    ],
)
def test_a_bad_file_leaves_the_old_configuration_whole(proxy, mx, bad):
    fds = proxy.fds()
    why = proxy.bad_hup(CHANGED + bad)
    assert len(why) >= 2
    assert works(proxy, mx)
    assert not proxy.matching("^reload: ")
    proxy.wait_idle()
    assert proxy.fds() == fds
    proxy.hup(CHANGED)
    assert not works(proxy, mx)


@pytest.mark.parametrize("what", ["missing", "directory", "not_utf8"])
def test_a_file_that_cannot_be_read(proxy, mx, what):
    proxy.path.unlink()
    if what == "directory":
        proxy.path.mkdir()
    elif what == "not_utf8":
        proxy.path.write_bytes(b"listen \xff\n")
    why = proxy.bad_hup()
    assert str(proxy.path) in why[0]
    assert works(proxy, mx)


def test_a_port_that_is_taken(proxy, mx):
    with socket.create_server(("127.0.1.4", 0)) as busy:
        port = busy.getsockname()[1]
        fds = proxy.fds()
        why = proxy.bad_hup(CHANGED + f"listen_socks5 127.0.1.2:0, 127.0.1.9:0, 127.0.1.4:{port}\n")
        assert f"cannot listen on 127.0.1.4:{port}: Address already in use" in why[0]
        assert works(proxy, mx)
        proxy.wait_idle()
        assert proxy.fds() == fds  # 127.0.1.9 was opened and closed again
    proxy.hup(f"listen_socks5 127.0.1.2:0, 127.0.1.4:{port}\n")
    with dial(("127.0.1.4", port)):
        pass


def test_certificates(proxy, tmp_path):
    """A missing, foreign or broken pair is refused; a good one is read anew."""
    one, other = trustme.CA().issue_cert("a.example"), trustme.CA().issue_cert("b.example")
    files = f"tls_certificate_file {tmp_path}/crt\ntls_private_key_file {tmp_path}/key\n"
    one.cert_chain_pems[0].write_to_path(tmp_path / "crt")
    other.private_key_pem.write_to_path(tmp_path / "key")
    line = len(config(files).splitlines())
    told = rf"reload_failed: {proxy.path}:{line}: tls_private_key_file: {tmp_path}/key: "
    assert re.search(told + "this key does not belong to the certificate in ", proxy.bad_hup(files)[0])
    (tmp_path / "key").write_text("nonsense")
    assert re.search(told + "there is no private key", proxy.bad_hup(files)[0])
    one.private_key_pem.write_to_path(tmp_path / "key")
    proxy.hup(files)
    (tmp_path / "crt").unlink()
    assert "tls_certificate_file" in proxy.bad_hup()[0]


# -- listeners


def test_a_listener_is_added_and_removed(proxy, mx):
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.1.9", 0))
        port = placeholder.getsockname()[1]
    proxy.hup(f"listen_socks5 127.0.1.2:0, 127.0.1.9:{port}\n")
    assert proxy.door("socks5", "127.0.1.9") == ("127.0.1.9", port)
    first = proxy.door("socks5", "127.0.1.2")
    with Raw(echo) as receiver, socks5(("127.0.1.9", port), receiver.endpoint) as sock:
        proxy.hup("")
        with pytest.raises(ConnectionRefusedError):
            dial(("127.0.1.9", port))
        # Its connection goes on, and is in the status until it ends.
        assert f"listener(127.0.1.9:{port}): open_connections=1" in proxy.status()
        sock.sendall(b"?")
        assert exactly(sock, 1) == b"?"
    proxy.wait_idle()
    assert not [line for line in proxy.status() if "127.0.1.9" in line]
    with socks5(first, mx.endpoint) as sock:  # the listener that stayed has its port still
        assert exactly(sock, 8) == GREETING
    assert len(proxy.matching("^listen: ")) == 4


def test_a_listener_changes_its_protocol(proxy, mx):
    """Its backlog is not lost: the socket stays open."""
    endpoint = proxy.door("socks5")
    with Raw(echo) as receiver, socks5(endpoint, receiver.endpoint) as old:
        proxy.hup("listen_socks5 127.0.1.3:0\nlisten_proxy_protocol 127.0.1.2:0\n")
        with dial(endpoint) as sock:
            sock.sendall(v1("127.0.0.5", mx.endpoint))
            assert exactly(sock, 8) == GREETING
        old.sendall(b"?")
        assert exactly(old, 1) == b"?"


def test_a_client_in_the_backlog_of_a_removed_listener_is_served(proxy, mx):
    proxy.hup("listen_proxy_protocol 127.0.1.3:0, 127.0.1.9:0\n")
    endpoint = proxy.door("proxy_protocol", "127.0.1.9")
    proxy.signal(signal.SIGSTOP)  # the connection waits in the kernel's queue
    with dial(endpoint) as sock:
        sock.sendall(v1("127.0.0.5", mx.endpoint))
        proxy.hup("listen_proxy_protocol 127.0.1.3:0\n", going_on=True)
        assert exactly(sock, 8) == GREETING
    with pytest.raises(ConnectionRefusedError):
        dial(endpoint)


def test_ipv6_listener(mx):
    with Proxy("listen_socks5 [::1]:0\n") as proxy:
        assert proxy.socks5[0] == "::1"
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5", client="::1") as sock:
            assert exactly(sock, 8) == GREETING
        assert f"listener([::1]:{proxy.socks5[1]}): open_connections=" in "\n".join(proxy.status())


# -- under traffic


def test_traffic_does_not_notice(proxy):
    """Old connections go on, new ones come about, through good and bad reloads of every kind."""
    stop = threading.Event()
    failures = []
    rounds = [0] * 8

    def talk(number):
        door = list(DOORS.values())[number % len(DOORS)]
        try:
            with door(proxy, receiver.endpoint, "127.0.0.5") as long:
                while not stop.is_set():
                    with door(proxy, receiver.endpoint, "127.0.0.5") as short:
                        for sock in (long, short):
                            sock.sendall(b"a line\r\n" * 50)
                            assert exactly(sock, 400) == b"a line\r\n" * 50
                        short.shutdown(socket.SHUT_WR)
                        assert read_all(short) == b""
                    rounds[number] += 1
        except BaseException as error:
            failures.append(error)
            stop.set()

    with Raw(echo) as receiver:
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(len(rounds))]
        for thread in threads:
            thread.start()
        try:
            for number in range(10):
                before = list(rounds)
                proxy.hup(f"idle_timeout {number + 60}s\nlisten 127.0.1.1:0, 127.0.1.{number + 10}:0\n")
                proxy.bad_hup("nonsense 1\n")
                wait_for(
                    lambda b=before: stop.is_set() or all(map(int.__gt__, rounds, b)), what="progress of each client"
                )
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
    assert not failures, failures
    assert not proxy.matching("^WARNING refused|^refused|^failed|_reset|_timeout ")


def test_a_storm_of_signals(proxy, mx):
    """However many come, the last file is in force at the end."""
    for number in range(30):
        proxy._write(BASE + f"idle_timeout {number + 60}s\n")
        proxy.signal(signal.SIGHUP)
    proxy.hup(CHANGED)
    wait_for(lambda: not works(proxy, mx), what="the last file is in force")
    assert works(proxy, mx, "127.0.0.66")


def test_logging_changes_by_a_reload(proxy, mx):
    proxy.hup("log_format json\n", outcome=r'"event":"reload"')
    assert works(proxy, mx)
    proxy.wait_line(r'"event":"connection".*"outcome":"client_closed"')
    proxy.hup("log_connections none\n")
    mark = len(proxy.lines)
    assert works(proxy, mx)
    wait_for(lambda: not proxy.open_connections(), what="the proxy is idle")
    assert not [line for line in proxy.lines[mark:] if line.startswith("connection")]


def test_flags_and_environment_still_win_after_a_reload(mx):
    with Proxy(flags=("--source-ip=127.0.0.67",), environ={"GREENARROW_PROXY_IDLE_TIMEOUT": "61s"}) as proxy:
        for _ in range(2):
            assert works(proxy, mx, "127.0.0.67")
            assert not works(proxy, mx, "127.0.0.5")
            proxy.hup(CHANGED)


def test_nothing_is_left_open_by_reloads(proxy):
    proxy.hup("")
    fds = proxy.fds()
    for number in range(10):
        proxy.hup(f"listen_socks5 127.0.1.{number + 20}:0\n")
        proxy.bad_hup("nonsense 1\n")
    proxy.hup("")
    assert proxy.fds() == fds
    assert os.path.exists(f"/proc/{proxy.pid}")


def test_included_files_are_read_anew(proxy, mx):
    """By a pattern, relative to the file; a mistake in one is told with its line, and all is as it was."""
    folder = proxy.path.parent / "more"
    folder.mkdir()
    proxy.hup("source_ip 127.0.0.5\ninclude more/*.conf\n")
    assert works(proxy, mx)
    assert not works(proxy, mx, "127.0.0.66")
    (folder / "a.conf").write_text(CHANGED)
    proxy.hup()
    assert works(proxy, mx, "127.0.0.66")
    (folder / "a.conf").write_text("\nidle_timeout 5\n")
    assert any(f"{folder}/a.conf:2: idle_timeout" in line for line in proxy.bad_hup())
    assert works(proxy, mx, "127.0.0.66")

"""How the program ends, and how it refuses to start: exit codes, the drain, and what open connections see."""

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import sys

import pytest

from tests import clients
from tests.clients import DOORS, dial, exactly, read_all, socks5, was_reset
from tests.peers import missing
from tests.program import ROOT, SECRET, Proxy
from tests.sinks import Raw, echo
from tests.waiting import wait_for


@pytest.fixture
def receiver():
    with Raw(echo) as receiver:
        yield receiver


def still_talks(sock):
    sock.sendall(b"?")
    return exactly(sock, 1) == b"?"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_open_ends_at_once(number):
    with Proxy("drain_timeout 60s\n") as proxy:
        proxy.signal(number)
        assert proxy.wait_exit() == 0
    said = [line for line in proxy.lines if not line.startswith("WARNING ")]  # those come on the other output
    assert said[-2].startswith("drain: ")
    assert said[-1] == "stop: stopped reset_connections=0"


def test_open_connections_finish(receiver):
    with Proxy("drain_timeout 60s\n") as proxy:
        endpoints = [proxy.socks5, proxy.proxy_protocol, proxy.native]
        socks = [door(proxy, receiver.endpoint, "127.0.0.5") for door in DOORS.values()]
        assert all(map(still_talks, socks))
        proxy.term()
        proxy.wait_line(r"^drain: .* open_connections=3 timeout=60\.000")
        for endpoint in endpoints:
            with pytest.raises(ConnectionRefusedError):
                dial(endpoint)
        assert all(map(still_talks, socks))
        for sock in socks:
            assert proxy.running
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b""
            sock.close()
        assert proxy.wait_exit() == 0
    assert len(proxy.matching("^connection .*outcome=client_closed")) == 3
    assert proxy.lines[-1] == "stop: stopped reset_connections=0"


def test_drain_timeout_resets_the_rest(receiver):
    with Proxy("drain_timeout 300ms\n") as proxy:
        socks = [door(proxy, receiver.endpoint, "127.0.0.5") for door in DOORS.values()]
        assert all(map(still_talks, socks))
        proxy.term()
        assert proxy.wait_exit() == 0
        for sock in socks:
            assert was_reset(sock)
            sock.close()
        wait_for(lambda: len(receiver.sockets) == 3, what="the receiver's connections")
    assert len(proxy.matching("^connection .*outcome=drain_timeout")) == 3
    assert proxy.lines[-1] == "stop: stopped reset_connections=3"


def test_drain_timeout_zero(receiver):
    with Proxy("drain_timeout 0s\n") as proxy, socks5(proxy.socks5, receiver.endpoint) as sock:
        assert still_talks(sock)
        proxy.term()
        assert proxy.wait_exit() == 0
        assert was_reset(sock)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(receiver, second):
    with Proxy("drain_timeout 60s\n", exit_code=1) as proxy, socks5(proxy.socks5, receiver.endpoint) as sock:
        proxy.term()
        proxy.wait_line("^drain: ")
        assert still_talks(sock)
        proxy.signal(second)
        assert proxy.wait_exit() == 1
        with contextlib.suppress(ConnectionResetError):
            assert read_all(sock) == b""
    assert proxy.lines[-1] == "WARNING stop: second signal: ending at once open_connections=1"


def test_clients_in_their_handshake_do_not_hold_it_for_long(receiver):
    """Half a handshake may be finished during the drain; one that is not ends with it."""
    with Proxy("drain_timeout 500ms\n") as proxy, dial(proxy.socks5) as one, dial(proxy.socks5) as other:
        for sock in (one, other):
            sock.sendall(clients.WITH_PASSWORD)
            assert exactly(sock, 2) == b"\x05\x02"
        proxy.term()
        proxy.wait_line("^drain: .*open_connections=2")
        one.sendall(clients.login() + clients.connect_request(receiver.endpoint))
        assert exactly(one, 12)[2:4] == b"\x05\x00"
        one.shutdown(socket.SHUT_WR)
        assert read_all(one) == b""
        assert proxy.wait_exit() == 0


def test_hup_and_usr1_while_draining(receiver):
    with Proxy("drain_timeout 60s\n") as proxy, socks5(proxy.socks5, receiver.endpoint) as sock:
        proxy.term()
        proxy.wait_line("^drain: ")
        proxy.signal(signal.SIGHUP)
        assert proxy.status()[-1] == "direct_remote_smtp: connections=1(active=1 cached=0)"
        assert still_talks(sock)
        with pytest.raises(ConnectionRefusedError):
            dial(proxy.socks5)
        sock.close()
        assert proxy.wait_exit() == 0
    assert not proxy.matching("^reload")


def test_broken_pipe_and_other_signals_do_no_harm(receiver):
    with Proxy() as proxy, socks5(proxy.socks5, receiver.endpoint) as sock:
        proxy.signal(signal.SIGPIPE)
        proxy.signal(signal.SIGCHLD)
        proxy.signal(signal.SIGWINCH)
        assert still_talks(sock)


# -- no start


def test_a_taken_port_is_exit_69():
    with socket.create_server(("127.0.1.4", 0)) as busy:
        port = busy.getsockname()[1]
        with Proxy(f"listen_socks5 127.0.1.4:{port}\n", ready=False, exit_code=69) as proxy:
            proxy.wait_exit()
    (line,) = proxy.matching("^ERROR listen: ")
    assert line.startswith(f"ERROR listen: cannot listen on 127.0.1.4:{port}: Address already in use; 'ss ")


def test_a_listeners_address_may_come_after_the_start(receiver):
    """A start that failed for it would fail for good; it is told, and served when it is there."""
    with Proxy("listen_socks5 127.0.1.2:0, 198.51.100.1:2525\n") as proxy:
        proxy.wait_line(r"^WARNING config: .* listen_socks5: 198\.51\.100\.1:2525 is not an address of this machine")
        with socks5(proxy.door("socks5", "127.0.1.2"), receiver.endpoint, "127.0.0.5"):
            pass


def test_an_address_that_cannot_be_listened_on_is_exit_69():
    with Proxy("listen_socks5 [fe80::1]:2525\n", ready=False, exit_code=69) as proxy:
        proxy.wait_exit()
    assert "cannot listen on [fe80::1]:2525: Invalid argument" in proxy.matching("^ERROR listen: ")[0]


def unprivileged():
    """What runs the rest of a command without a single capability: as nobody, or, where the program lies in a directory
    that nobody may enter, as whoever owns it."""
    if os.geteuid() != 0:
        return ""
    nobody, owner = pwd.getpwnam("nobody"), (ROOT / "proxy" / "cli.py").stat()
    for user, group in ((nobody.pw_uid, nobody.pw_gid), (owner.st_uid, owner.st_gid)):
        prefix = f"setpriv --reuid {user} --regid {group} --clear-groups --bounding-set=-all --inh-caps=-all"
        look = [*prefix.split(), sys.executable, "-c", f"import gevent, os; os.stat({str(ROOT / 'proxy/cli.py')!r})"]
        if subprocess.run(look, capture_output=True, check=False).returncode == 0:
            return f'exec {prefix} "$@"'
    return missing("neither nobody nor its owner may read the program without privileges")


def test_a_low_port_without_the_privilege_is_exit_69(tmp_path):
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) <= 807:
            pytest.skip("this machine gives low ports to everybody (ip_unprivileged_port_start)")
    before = unprivileged()
    with Proxy("listen_socks5 127.0.1.4:807\n", ready=False, exit_code=69, before=before, shared=True) as proxy:
        proxy.wait_exit()
    assert "a port below 1024 needs root or CAP_NET_BIND_SERVICE" in proxy.matching("^ERROR listen: ")[0]


def test_a_file_that_may_not_be_read_is_exit_78():
    lock = 'chmod 0 "${3#--config-filename=}"'
    with Proxy(ready=False, exit_code=78, before=f"{lock}; {unprivileged() or ':'}", shared=True) as proxy:
        proxy.wait_exit()
    assert "Permission denied" in "\n".join(proxy.stderr_lines)


def test_it_runs_unprivileged(receiver):
    with (
        Proxy(before=unprivileged(), shared=True) as proxy,
        socks5(proxy.socks5, receiver.endpoint, "127.0.0.5") as sock,
    ):
        assert still_talks(sock)


@pytest.mark.parametrize("bad", ["nonsense 1\n", "allow_from\n"])
def test_a_bad_file_is_exit_78(bad):
    with Proxy(bad, ready=False, exit_code=78) as proxy:
        proxy.wait_exit()
    assert not proxy.stdout_lines


def test_the_documented_four_lines_run_with_a_secret_of_ones_own(tmp_path):
    """From the product's documentation, but for the port, which is another's on this machine perhaps."""
    base = """\
listen "0.0.0.0:0"
allow_from 127.0.0.0/24, 10.0.0.0/8
auth_shared_secret "00000000000000000000000000000000"
log_verbose no
"""
    with Proxy("", base, ready=False, exit_code=78) as proxy:
        proxy.wait_exit()
    assert "auth_shared_secret: it stands in documents, so everybody knows it" in proxy.stderr_lines[0]
    with Proxy("", base.replace("0" * 32, SECRET)) as proxy:
        assert proxy.native[0] == "0.0.0.0"
        with dial(("127.0.0.1", proxy.native[1])):
            pass


def test_after_a_kill_the_next_start_has_the_same_port(receiver):
    """Nothing on disk to be cleaned up, and no waiting for old connections to be forgotten."""
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.1.4", 0))
        port = placeholder.getsockname()[1]
    text = f"listen_socks5 127.0.1.4:{port}\n"
    with Proxy(text, exit_code=-signal.SIGKILL) as proxy, socks5(proxy.socks5, receiver.endpoint) as sock:
        assert still_talks(sock)
        proxy.signal(signal.SIGKILL)
        proxy.wait_exit()
        with contextlib.suppress(ConnectionResetError):
            assert read_all(sock) == b""
    with Proxy(text) as proxy, socks5(proxy.socks5, receiver.endpoint) as sock:
        assert still_talks(sock)

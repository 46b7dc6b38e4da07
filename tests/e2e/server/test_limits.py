"""When there is too much of something: connections, descriptors, clients that say nothing."""

import contextlib
import json
import resource
import socket
import time
from http.client import HTTPConnection

import pytest

from greenarrow_proxy_client import Session
from tests import clients
from tests import independent_client as mta
from tests.clients import Refused, dial, exactly, proxied, read_all, socks5, v2
from tests.peers import missing
from tests.program import SECRET, Proxy
from tests.sinks import GREETING, Raw, Sink, echo
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def many_descriptors():
    """This process needs some, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        missing("a limit of 4096 descriptors, at least")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- max_connections


def test_over_the_limit_the_refusal_is_in_the_clients_protocol(mx):
    with Proxy("max_connections 2\n") as proxy:
        with socks5(proxy.socks5, mx.endpoint) as one, proxied(proxy.proxy_protocol, mx.endpoint) as other:
            assert exactly(one, 8) == exactly(other, 8) == GREETING
            with pytest.raises(Refused) as refused:
                socks5(proxy.socks5, mx.endpoint)
            assert refused.value.args[0] == b"\x05\x02\x00\x01" + bytes(6)
            for header in (clients.v1, v2):
                with proxied(proxy.proxy_protocol, mx.endpoint, "127.0.0.5", header) as sock:
                    expected = f"421 4.3.2 {socket.gethostname()} max_connections (2) are open\r\n"
                    assert read_all(sock).decode() == expected
            assert mx.connects == 2
            proxy.wait_line(r"refused .*protocol=socks5 .*reason=overloaded")
            proxy.wait_line(r"refused .*protocol=proxy_protocol .*reason=overloaded")
        proxy.wait_idle()
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING


def test_a_reload_changes_the_limit(mx):
    with Proxy("max_connections 1\n") as proxy, socks5(proxy.socks5, mx.endpoint):
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint)
        proxy.hup("max_connections 2\n")
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING


def test_few_are_told_and_the_rest_is_closed(mx):
    """Who floods a full proxy occupies a small fixed number of helpers, and nobody who is in suffers."""
    with Proxy("max_connections 1\nauth_timeout 30s\n") as proxy, Raw(echo) as receiver:
        with socks5(proxy.socks5, receiver.endpoint) as inside, contextlib.ExitStack() as stack:
            flood = [stack.enter_context(dial(proxy.socks5)) for _ in range(100)]
            # All are accepted only then: before, 32 helpers may be busy and some of the flood still wait at the door.
            wait_for(lambda: sum(map(_is_closed, flood)) == 68, what="all but those with a helper are closed")
            assert proxy.open_connections() == 33
            inside.sendall(b"?")
            assert exactly(inside, 1) == b"?"
        proxy.wait_idle()


def _is_closed(sock):
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("limit", [64, 161, 400])
def test_the_limit_follows_from_the_descriptors(mx, limit):
    """However few there are: somebody is served."""
    with Proxy(before=f"ulimit -n {limit}") as proxy:
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
        with contextlib.ExitStack() as stack:
            served = 0
            with contextlib.suppress(Refused):
                while served < 200:
                    stack.enter_context(socks5(proxy.socks5, mx.endpoint))
                    served += 1
            assert max(1, (limit - 160) // 2) - 1 <= served <= max(1, (limit - 160) // 2)
        proxy.wait_idle()
        assert not proxy.matching("^ERROR")


def test_the_soft_limit_is_raised(mx):
    with Proxy(before="ulimit -Sn 100; ulimit -Hn 1000") as proxy, contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socks5(proxy.socks5, mx.endpoint))
        assert proxy.fds() > 300


# -- no descriptors


def test_out_of_descriptors(mx):
    """Accepting backs off and resumes; what runs goes on; a reload, the status and the log work meanwhile."""
    with Proxy("max_connections 1000\nauth_timeout 60s\n", before="ulimit -n 100") as proxy, Raw(echo) as receiver:
        with socks5(proxy.socks5, receiver.endpoint) as inside, contextlib.ExitStack() as stack:
            silent = [stack.enter_context(dial(proxy.socks5)) for _ in range(150)]
            proxy.wait_line(r"^ERROR accept: accept on 127\.0\.1\.2:\d+: Too many open files; trying again soon")
            assert proxy.fds() == 100
            inside.sendall(b"?")
            assert exactly(inside, 1) == b"?"
            before = proxy.cpu()
            proxy.hup("max_connections 999\nidle_timeout 99s\nauth_timeout 60s\n")
            assert proxy.bad_hup("listen_socks5 127.0.1.2:0, 127.0.1.9:0\nnonsense 1\n")
            proxy.hup("max_connections 1000\nauth_timeout 60s\nlisten_socks5 127.0.1.2:0, 127.0.1.9:0\n")
            assert proxy.status()[-1].endswith("connections=1(active=1 cached=0)")
            errors = len(proxy.matching("^ERROR accept"))
            wait_for(lambda: len(proxy.matching("^ERROR accept")) > errors, 30, "another attempt")
            assert proxy.cpu() - before < 2.0  # seconds: it does not spin
            for sock in silent:
                sock.close()
        proxy.wait_idle(20)
        with socks5(proxy.door("socks5", "127.0.1.2"), mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
        proxy.wait_idle()


def accept_errors(proxy):
    """All that were counted."""
    http = HTTPConnection(*proxy.door("status"), timeout=30)
    with contextlib.closing(http):
        http.request("GET", "/status.json")
        return json.load(http.getresponse())["counters"]["accept_errors"]


def test_accept_errors_write_one_line_a_second_at_most():
    """With one descriptor free now and then, accepting fails many times a second."""
    text = "listen_status 127.0.0.1:0\nmax_connections 1000\nauth_timeout 60s\n"
    begin = time.monotonic()
    with Proxy(text, before="ulimit -n 100") as proxy, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(proxy.socks5)) for _ in range(250)]
        proxy.wait_line(r"^ERROR accept: ")
        while (errors := accept_errors(proxy)) < 20 + 3 * (time.monotonic() - begin):
            silent.pop(0).close()
            wait_for(
                lambda errors=errors: accept_errors(proxy) > errors, what="the next client is accepted, and no more"
            )
    # Our clock began before the program's and ends after it: on a slow machine more lines are allowed, never fewer.
    assert 1 <= len(proxy.matching("^ERROR accept: ")) <= 1 + time.monotonic() - begin < errors


def test_no_descriptor_for_the_outgoing_connection(mx):
    """The client is told so in its protocol."""
    text = "max_connections 1000\nauth_timeout 60s\n"
    with Proxy(text, before="ulimit -n 100") as proxy, contextlib.ExitStack() as stack:
        ready = []
        for _ in range(200):
            sock = stack.enter_context(dial(proxy.socks5))
            sock.sendall(clients.WITH_PASSWORD)
            sock.settimeout(1)
            try:
                assert exactly(sock, 2) == b"\x05\x02"
            except TimeoutError:
                break  # not accepted any more
            ready.append(sock)
        assert proxy.fds() == 100
        sock = ready[0]
        sock.sendall(clients.login() + clients.connect_request(mx.endpoint))
        assert read_all(sock) == b"\x01\x00\x05\x02\x00\x01" + bytes(6)
        proxy.wait_line(r"reason=overloaded .*Too many open files")


def test_kept_connections_give_way_to_clients_when_descriptors_are_short():
    text = "max_connections 1000\nauth_timeout 60s\n"
    with (
        Sink() as mx,
        Proxy(text, before="ulimit -n 100") as proxy,
        Session(proxy.native, SECRET, "a") as session,
        contextlib.ExitStack() as stack,
    ):
        session.smtp([mx.endpoint], "a.example", source_ip="127.0.0.11", tls="none").release(wait=True)
        wait_for(lambda: proxy.status()[-1].endswith("connections=1(active=0 cached=1)"))
        for _ in range(150):
            stack.enter_context(dial(proxy.socks5))
        proxy.wait_line(r"^ERROR accept: ")
        wait_for(lambda: proxy.status()[-1].endswith("connections=0(active=0 cached=0)"))


def test_a_refusal_needs_no_descriptor(mx):
    """A 421 is made with a codec of Python's that is looked for on the disk when it is used for the first time."""
    text = "max_connections 1000\nauth_timeout 60s\n"
    with Proxy(text, before="ulimit -n 100") as proxy, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(proxy.proxy_protocol)) for _ in range(100)]
        proxy.wait_line(r"^ERROR accept: ")
        silent[0].sendall(v2("127.0.0.5", mx.endpoint))
        assert read_all(silent[0]).startswith(b"421 4.3.2 ")
        proxy.wait_line(r"reason=overloaded .*Too many open files")


def test_no_core_is_dumped():
    """It would hold the secrets."""
    with Proxy(before="ulimit -Sc $(ulimit -Hc)") as proxy:
        assert resource.prlimit(proxy.pid, resource.RLIMIT_CORE)[0] == 0


# -- clients that say nothing


def test_the_oldest_newcomers_are_dropped_and_nobody_else(mx):
    limit = 1024
    with Proxy("auth_timeout 60s\n") as proxy, Raw(echo) as receiver, contextlib.ExitStack() as stack:
        inside = stack.enter_context(socks5(proxy.socks5, receiver.endpoint))
        first = [stack.enter_context(dial(proxy.socks5)) for _ in range(3)]
        first[0].sendall(clients.WITH_PASSWORD)
        assert exactly(first[0], 2) == b"\x05\x02"
        for _ in range(limit):
            stack.enter_context(dial(proxy.socks5))
        for sock in first:
            with contextlib.suppress(ConnectionResetError):
                read_all(sock)  # ends, long before auth_timeout
        inside.sendall(b"?")
        assert exactly(inside, 1) == b"?"
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
        wait_for(lambda: proxy.open_connections() <= limit + 2, what="those over the limit are gone")


def test_a_flood_of_silent_connections_pushes_out_none_of_another_address(mx):
    """However many come from one address while another one is in its handshake."""
    with Proxy("auth_timeout 60s\n") as proxy, contextlib.ExitStack() as stack:
        far = stack.enter_context(dial(proxy.socks5, "127.0.0.61"))
        tls = stack.enter_context(dial(proxy.native, "127.0.0.62"))
        for step in (clients.WITH_PASSWORD, clients.login(), clients.connect_request(mx.endpoint)):
            for number in range(1100):
                stack.enter_context(dial((proxy.socks5, proxy.native)[number % 2], "127.0.0.63"))
            far.sendall(step)
            assert exactly(far, 2) in (b"\x05\x02", b"\x01\x00", b"\x05\x00")
        tls.settimeout(0.01)
        with pytest.raises(TimeoutError):
            tls.recv(1)
        wait_for(lambda: proxy.open_connections() <= 1024 + 2, what="those over the limit are gone")


def test_silent_connections_up_to_max_connections_shut_out_nobody_else(mx):
    with Proxy("auth_timeout 60s\nmax_connections 100\n") as proxy, contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(dial(proxy.socks5, "127.0.0.63"))
        for _ in range(20):
            with socks5(proxy.socks5, mx.endpoint, client="127.0.0.61") as sock:
                assert exactly(sock, 8) == GREETING


# -- guessing secrets


def test_guessing_is_slowed_but_a_good_client_is_not(mx):
    """Some wrong secrets are answered at once; the next ones wait, while a right one from there does not."""
    guess = clients.WITH_PASSWORD + clients.login(password="x" * len(SECRET))
    with Proxy("auth_timeout 60s\n") as proxy:
        for _ in range(9):
            with dial(proxy.socks5) as sock:
                sock.sendall(guess)
                assert read_all(sock) == b"\x05\x02\x01\x01"
        with dial(proxy.socks5) as slow:
            slow.sendall(guess)
            assert exactly(slow, 2) == b"\x05\x02"
            slow.settimeout(0.1)
            for _ in range(5):
                with socks5(proxy.socks5, mx.endpoint) as sock:
                    assert exactly(sock, 8) == GREETING
                with pytest.raises(TimeoutError):
                    slow.recv(1)
            slow.settimeout(clients.TIMEOUT)
            assert read_all(slow) == b"\x01\x01"
        assert len(proxy.matching("reason=bad_credentials")) <= 10
        assert len(proxy.matching("^WARNING refused .*too many wrong secrets")) == 1


def test_wrong_secrets_at_one_door_keep_nobody_out_of_another(mx):
    """A right proof is looked at, however many wrong ones came from there; the failures are slowed, and bounded."""
    guess = clients.WITH_PASSWORD + clients.login(password="x" * len(SECRET))
    with Proxy("auth_timeout 60s\n") as proxy, contextlib.ExitStack() as stack:
        guesses = [stack.enter_context(dial(proxy.socks5)) for _ in range(400)]
        for sock in guesses:
            sock.sendall(guess)
        for _ in range(3):
            with mta.channel(proxy.native) as peer:
                assert peer.welcome
            with socks5(proxy.socks5, mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
        cut, refused = [], []
        for sock in guesses:
            try:
                (refused if read_all(sock) == b"\x05\x02\x01\x01" else cut).append(sock)
            except ConnectionResetError:
                cut.append(sock)
        assert len(refused) <= 9 + 256
        assert len(cut) >= 400 - 9 - 256
        assert len(proxy.matching("too many wrong secrets")) == 1


def test_an_instance_may_come_from_its_own_addresses_only(mx):
    """Who has the global secret cannot take any name."""
    with Proxy("instance own {\n    allow_from 127.0.0.7\n}\n") as proxy:
        with socks5(proxy.socks5, mx.endpoint, user="own", client="127.0.0.7") as sock:
            assert exactly(sock, 8) == GREETING
        with pytest.raises(Refused) as refused:
            socks5(proxy.socks5, mx.endpoint, user="own")
        assert refused.value.args[0] == b"\x01\x01"
        with socks5(proxy.socks5, mx.endpoint, user="other") as sock:
            assert exactly(sock, 8) == GREETING

"""The native listener against strangers, thieves, interceptors and mistakes; the client knows only the document.

Nobody but who knows the secret comes in; whoever is refused is told why in one line, and so is the operator.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator

import pytest

from tests import independent_client as mta
from tests.certificates import server_context
from tests.clients import TIMEOUT, read_all
from tests.independent_client import Peer, Told, channel, error_from, error_of, frame, pack, session
from tests.mx import Mx
from tests.program import SECRET, Proxy
from tests.sinks import Raw, deaf_port, greet
from tests.waiting import wait_for

OWN = "mta-own-has-a-secret-of-its-own-and-no-other"
BLOCKS = f"""\
instance mta-own {{
    auth_shared_secret "{OWN}"
}}
instance mta-here {{
    allow_from 127.0.0.9
}}
"""
UNKNOWN = ("bad_credentials", "unknown instance or wrong secret", False, 0)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(BLOCKS) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def mx() -> Iterator[Mx]:
    with Mx() as mx:
        yield mx


def refused(address: tuple[str, int], secret: str, **more) -> tuple:
    """What a client is told that does not come in."""
    with pytest.raises(Told) as told:
        channel(address, secret, **more)
    return told.value.args


def works(peer: Peer, mx: Mx) -> bool:
    peer.opened(mx.endpoint)
    return peer.finish() == [False, "not_offered"]


# -- who knows the secret ----------------------------------------------------------------------------------------------


def test_a_wrong_secret_and_an_unknown_name_get_the_same_answer(proxy: Proxy) -> None:
    wrong = "x" * 40
    assert refused(proxy.native, wrong, source="127.0.0.21") == UNKNOWN
    assert refused(proxy.native, wrong, instance="nobody", source="127.0.0.21") == UNKNOWN
    proxy.wait_line(r"refused .*instance=nobody .*client=127\.0\.0\.21.*reason=bad_credentials")


def test_an_instance_with_a_secret_of_its_own_does_not_accept_the_global_one(proxy: Proxy, mx: Mx) -> None:
    assert refused(proxy.native, SECRET, instance="mta-own", source="127.0.0.22") == UNKNOWN
    with channel(proxy.native, OWN, instance="mta-own") as peer:
        assert works(peer, mx)
    assert refused(proxy.native, OWN, instance="mta-other", source="127.0.0.22") == UNKNOWN


def test_an_instance_comes_from_its_own_addresses_only(proxy: Proxy, mx: Mx) -> None:
    assert refused(proxy.native, SECRET, instance="mta-here", source="127.0.0.23") == UNKNOWN
    with channel(proxy.native, instance="mta-here", source="127.0.0.9") as peer:
        assert works(peer, mx)


def test_a_recorded_conversation_cannot_be_replayed(proxy: Proxy) -> None:
    with Peer(proxy.native, source="127.0.0.24") as peer:
        peer.hello(mta.CHANNEL)
        hello = peer.transcript[: 5 + struct.unpack(">I", peer.transcript[:4])[0]]
        auth = peer.say(mta.AUTH, mta.mac(SECRET.encode(), "client", peer.certificate, peer.transcript))
        peer.expect(mta.WELCOME)
    with Peer(proxy.native, source="127.0.0.24") as thief:
        thief.sock.sendall(hello)
        thief.expect(mta.CHALLENGE)
        thief.sock.sendall(auth)
        assert error_from(thief) == UNKNOWN


@pytest.mark.parametrize("label", ["server", "channel"])
def test_a_proof_of_another_kind_is_none(proxy: Proxy, label: str) -> None:
    with Peer(proxy.native, source="127.0.0.25") as peer:
        peer.hello(mta.CHANNEL)
        peer.say(mta.AUTH, mta.mac(SECRET.encode(), label, peer.certificate, peer.transcript))
        assert error_of(peer) == "bad_credentials"


def test_a_hello_that_was_changed_on_the_way_is_noticed(proxy: Proxy) -> None:
    """The proxy saw versions 1..1; the client had said 1..2."""
    with Peer(proxy.native, source="127.0.0.26") as peer:
        peer.hello(mta.CHANNEL)
        sent = bytearray(peer.transcript)
        sent[10] = 2  # header, array of 6 in its long form, kind, min_version, max_version
        peer.transcript = bytes(sent)
        with pytest.raises(Told, match="bad_credentials"):
            peer.prove()


class Interceptor:
    """Somebody on the way who ends TLS with a certificate of his own and passes on what both sides say."""

    def __init__(self, proxy: Proxy) -> None:
        self._target = proxy.native
        self._context = server_context("valid")
        self._listener = socket.create_server(("127.0.0.2", 0))
        self.address = self._listener.getsockname()

    def __enter__(self) -> Interceptor:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(TIMEOUT)
        self._listener.close()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with (
            self._context.wrap_socket(sock, server_side=True) as client,
            Peer(self._target, source="127.0.0.27") as peer,
        ):
            both = threading.Thread(target=self._pump, args=(peer.sock, client), daemon=True)
            both.start()
            self._pump(client, peer.sock)
            both.join(TIMEOUT)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def test_a_man_in_the_middle_with_another_certificate_is_found_out(proxy: Proxy) -> None:
    with Interceptor(proxy) as middle:
        assert refused(middle.address, SECRET) == UNKNOWN


def test_the_middle_cannot_take_a_one_flight_channel_either(proxy: Proxy, mx: Mx) -> None:
    with session(proxy.native) as control:
        certificates = control.expect(mta.CERT)[1]
        with Interceptor(proxy) as middle, Peer(middle.address) as peer:
            assert peer.certificate not in certificates  # a good client goes no further
            peer.sock.sendall(peer.channel_auth(control.welcome, 1))
            assert error_of(peer) == "stale_key"


# -- channels in one flight --------------------------------------------------------------------------------------------


def test_a_channel_of_a_live_session_needs_one_flight(proxy: Proxy, mx: Mx) -> None:
    with session(proxy.native) as control, Peer(proxy.native) as peer:
        assert peer.certificate in control.expect(mta.CERT)[1]
        peer.sock.sendall(peer.channel_auth(control.welcome, 5))
        assert works(peer, mx)
        control.sock.close()  # the channel does not end with the session
        assert works(peer, mx)


def test_a_counter_is_good_once_and_in_any_order(proxy: Proxy, mx: Mx) -> None:
    with session(proxy.native) as control:
        for counter in (7, 3, 6):
            with Peer(proxy.native) as peer:
                peer.sock.sendall(peer.channel_auth(control.welcome, counter))
                assert works(peer, mx)
        for counter in (3, 7):
            with Peer(proxy.native) as peer:
                peer.sock.sendall(peer.channel_auth(control.welcome, counter))
                assert error_from(peer)[::2] == ("stale_key", True)


def test_a_key_ends_with_its_session(proxy: Proxy) -> None:
    with session(proxy.native, instance="short") as control:
        pass
    proxy.wait_line(r"^session: session is over .*instance=short")
    with Peer(proxy.native) as peer:
        peer.sock.sendall(peer.channel_auth(control.welcome, 1))
        assert error_of(peer) == "stale_key"


def test_channels_get_no_key(proxy: Proxy) -> None:
    with channel(proxy.native) as peer:
        assert peer.welcome[2:4] == [b"", b""]


# -- broken bytes ------------------------------------------------------------------------------------------------------


def test_versions_without_overlap(proxy: Proxy) -> None:
    for versions, older in (((2, 3), "proxy"), ((4, 4), "proxy")):
        with Peer(proxy.native) as peer, pytest.raises(Told) as told:
            peer.hello(mta.CHANNEL, versions=versions)
        low, high = versions
        assert told.value.args[:2] == (
            "version_mismatch",
            f"proxy speaks 1..1, client wants {low}..{high}: upgrade the {older} first",
        )


def test_a_newer_client_that_still_speaks_our_version(proxy: Proxy) -> None:
    with Peer(proxy.native) as peer:
        peer.hello(mta.CHANNEL, versions=(1, 9))
        peer.prove()


HEADERS = {
    "longer than before authentication": struct.pack(">IB", 4097, mta.HELLO),
    "the longest": b"\xff\xff\xff\xff\x01",
    "an unknown type": struct.pack(">IB", 1, 0x7F) + b"\x90",
    "AUTH first": mta.frame(mta.AUTH, mta.pack([bytes(32)])),
    "OPEN first": mta.frame(mta.OPEN, mta.pack([None, [["127.0.0.2", 25]]])),
    "DATA first": mta.frame(mta.DATA, b"EHLO"),
    "no MessagePack": mta.frame(mta.HELLO, b"\xc1" * 40),
    "no array": mta.frame(mta.HELLO, mta.pack("hello")),
    "bytes behind the array": mta.frame(mta.HELLO, mta.pack([1, 1, 1, "x", bytes(16), bytes(32)]) + b"\0"),
    "an empty range": mta.frame(mta.HELLO, mta.pack([1, 2, 1, "x", bytes(16), bytes(32)])),
    "a nested bomb": mta.frame(mta.HELLO, b"\x91" * 4096),
    "a name with a line break": mta.frame(mta.HELLO, mta.pack([1, 1, 1, "x\nINFO x", bytes(16), bytes(32)])),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_frames_that_are_not_allowed_first(proxy: Proxy, data: bytes) -> None:
    with Peer(proxy.native) as peer:
        peer.sock.sendall(data)
        assert error_of(peer) == "bad_protocol"


def test_hello_twice(proxy: Proxy) -> None:
    with Peer(proxy.native) as peer:
        peer.hello(mta.CHANNEL)
        peer.say(mta.HELLO, 1, 1, 1, "x", bytes(16), bytes(32))
        assert error_of(peer) == "bad_protocol"


def test_a_client_that_goes_in_the_middle_of_a_frame(proxy: Proxy) -> None:
    mark = len(proxy.lines)
    with Peer(proxy.native, source="127.0.0.29") as peer:
        peer.sock.sendall(struct.pack(">IB", 65, mta.HELLO) + b"\x96\x01")
    proxy.wait_line(r"reason=bad_protocol .*closed before it was authenticated", since=mark)


def test_tls_older_than_1_3(proxy: Proxy) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(proxy.native, TIMEOUT) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)


def test_a_client_without_tls_is_told_in_clear(proxy: Proxy) -> None:
    mark = len(proxy.lines)
    with Peer(proxy.native, tls=False, source="127.0.0.30") as peer:
        with pytest.raises(Told) as told:
            peer.hello(mta.CHANNEL)
        assert told.value.args[:2] == (
            "bad_protocol",
            "the client does not speak TLS, this listener does (listen_tls yes)",
        )
    proxy.wait_line(r"does not speak TLS", since=mark)


def test_other_protocols_and_noise(proxy: Proxy) -> None:
    for data in (b"GET / HTTP/1.0\r\n\r\n", b"\x05\x01\x00", b"\x16" + os.urandom(600), b"\x16\x03\x01\x00\x00"):
        with socket.create_connection(proxy.native, TIMEOUT) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                read_all(sock)


def test_a_health_check_is_no_line(proxy: Proxy) -> None:
    mark = len(proxy.lines)
    with socket.create_connection(proxy.native, TIMEOUT, source_address=("127.0.0.32", 0)):
        pass
    with Peer(proxy.native, tls=False, source="127.0.0.32") as peer, pytest.raises(Told):  # something to be logged
        peer.hello(mta.CHANNEL)
    proxy.wait_line(r"does not speak TLS", since=mark)
    assert len(proxy.matching(r"client=127\.0\.0\.32:.* reason=", since=mark)) == 1  # other tests' lines may come late


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_a_stranger_is_closed_before_tls() -> None:
    with Proxy("allow_from 127.0.0.1\n") as proxy:
        with socket.create_connection(proxy.native, TIMEOUT, source_address=("127.0.0.31", 0)) as sock:
            assert read_all(sock) == b""
        proxy.wait_line(r"reason=client_not_allowed .*127\.0\.0\.31 is not in allow_from")
        channel(proxy.native, source="127.0.0.1").sock.close()


def test_who_fails_too_often_is_slowed_and_a_right_secret_from_there_is_not(mx: Mx) -> None:
    with Proxy() as proxy:
        for _ in range(12):
            assert refused(proxy.native, "x" * 40, source="127.0.0.41") == UNKNOWN
        for source in ("127.0.0.41", "127.0.0.43"):
            with channel(proxy.native, source=source) as peer:
                assert works(peer, mx)
        with session(proxy.native, source="127.0.0.41") as control:
            assert control.hear()
        proxy.wait_line(r"client=127\.0\.0\.41 message=.too many wrong secrets")
        assert len(proxy.matching("too many wrong secrets")) == 1


# -- time and number ---------------------------------------------------------------------------------------------------


def test_one_deadline_for_tls_and_authentication() -> None:
    """However busy the client looks."""
    with Proxy("auth_timeout 500ms\n") as proxy:
        with (
            socket.create_connection(proxy.native, TIMEOUT) as silent,
            socket.create_connection(proxy.native, TIMEOUT) as half,
        ):
            half.sendall(b"\x16\x03\x01")
            assert read_all(silent) == read_all(half) == b""
        with Peer(proxy.native) as late:
            assert error_of(late) == "handshake_timeout"
        wait_for(lambda: len(proxy.matching("reason=handshake_timeout")) == 3)


def test_the_deadline_is_not_put_off_by_bytes() -> None:
    with Proxy("auth_timeout 500ms\nlisten_tls no\n") as proxy, Peer(proxy.native, tls=False) as peer:
        stop = threading.Event()
        hello = mta.frame(mta.HELLO, mta.pack([1, 1, 1, "x" * 60, bytes(16), bytes(32)]))

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for at in range(len(hello) - 1):
                    peer.sock.sendall(hello[at : at + 1])
                    if stop.wait(0.05):
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert error_of(peer) == "handshake_timeout"
        finally:
            stop.set()
            thread.join()


def half_open(proxy: Proxy, count: int, mx: Mx) -> None:
    """So many connections that never say who they are, in three stages; a client that works all the while."""
    silent: list[socket.socket] = []
    try:
        with channel(proxy.native) as peer:
            for number in range(count):
                sock = socket.create_connection(proxy.native, TIMEOUT, source_address=("127.0.0.51", 0))
                silent.append(sock)
                with contextlib.suppress(OSError):
                    sock.sendall((b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00")[number % 3])
                if number % 250 == 0:
                    assert works(peer, mx)
                    channel(proxy.native).sock.close()
            assert works(peer, mx)
            with channel(proxy.native) as fresh:
                assert works(fresh, mx)
            # The oldest were cut off for the newest; the cap is 1024.
            wait_for(lambda: proxy.open_connections("native") <= 1024 + 40, 30, "the newcomers are bounded")
    finally:
        for sock in silent:
            sock.close()
    proxy.wait_idle(30)


@pytest.mark.timeout(120)
def test_thousands_of_half_open_connections(mx: Mx) -> None:
    with Proxy("auth_timeout 60s\n") as proxy:
        before = proxy.rss()
        half_open(proxy, 2200, mx)
        assert proxy.rss() - before < 200 * 1024 * 1024


@pytest.mark.slow
def test_ten_thousand_half_open_connections(mx: Mx) -> None:
    with Proxy("auth_timeout 60s\n") as proxy:
        half_open(proxy, 10_000, mx)


# -- without TLS -------------------------------------------------------------------------------------------------------


def test_listen_tls_no(mx: Mx) -> None:
    with Proxy("listen_tls no\n") as proxy:
        with channel(proxy.native, tls=False) as peer:
            assert works(peer, mx)
        with session(proxy.native, tls=False) as control:
            assert control.welcome[2:4] == [b"", b""]
            assert control.hear()[0] == mta.PING  # no CERT before it
        with Peer(proxy.native, tls=False) as thief:
            thief.sock.sendall(thief.channel_auth([0, 0, bytes(8), bytes(32)], 1))
            assert error_of(thief) == "stale_key"
        mark = len(proxy.lines)
        with pytest.raises(ssl.SSLError):
            Peer(proxy.native)
        proxy.wait_line(r"the client speaks TLS, this listener does not \(listen_tls no\)", since=mark)
        assert refused(proxy.native, "x" * 40, tls=False) == UNKNOWN


def test_tls_stripped_on_the_way_is_found_out(proxy: Proxy) -> None:
    """The client believes that it speaks in clear; somebody added TLS behind it."""
    with Peer(proxy.native, source="127.0.0.28") as peer:
        peer.certificate = bytes(32)
        peer.hello(mta.CHANNEL)
        with pytest.raises(Told, match="bad_credentials"):
            peer.prove()


# -- reload ------------------------------------------------------------------------------------------------------------


NEW = "the-new-secret-of-32-characters-or-more!"


def secrets(*values: str) -> str:
    return "".join(f'auth_shared_secret "{value}"\n' for value in values)


def test_secrets_are_exchanged_without_a_gap(mx: Mx) -> None:
    with Proxy() as proxy, channel(proxy.native) as old:
        proxy.hup(secrets(SECRET, NEW))
        with channel(proxy.native, NEW) as new, channel(proxy.native, SECRET) as other:
            assert all(works(peer, mx) for peer in (old, new, other))
            old.opened(mx.endpoint)  # what is in progress may end
            proxy.hup(secrets(NEW))
            assert works(new, mx)
            old.data(b"NOOP\r\n")
            assert old.hear_until(b"ok\r\n")
            old.finish()
            for peer in (old, other):
                peer.say_open(mx.endpoint)
                assert error_from(peer)[:3] == ("refused", "the secret of this instance has changed", False)
        assert refused(proxy.native, SECRET) == UNKNOWN
        proxy.wait_line(r"reason=refused .*the secret of this instance has changed")


def test_a_one_flight_channel_ends_with_the_secret_of_its_session(mx: Mx) -> None:
    with Proxy(secrets(SECRET, NEW)) as proxy, session(proxy.native) as control, Peer(proxy.native) as peer:
        peer.sock.sendall(peer.channel_auth(control.welcome, 1))
        assert works(peer, mx)
        proxy.hup(secrets(NEW))
        assert error_from(control)[:2] == ("refused", "the secret of this instance has changed")
        peer.say_open(mx.endpoint)
        assert error_of(peer) == "refused"


def test_a_reload_that_gives_an_instance_a_secret_of_its_own(mx: Mx) -> None:
    with Proxy() as proxy, channel(proxy.native, instance="mta-own") as peer, channel(proxy.native) as other:
        proxy.hup(BLOCKS)
        peer.say_open(mx.endpoint)
        assert error_of(peer) == "refused"
        assert works(other, mx)


def test_a_reload_that_removes_an_address(mx: Mx) -> None:
    with Proxy() as proxy, channel(proxy.native, source="127.0.0.61") as peer, channel(proxy.native) as other:
        proxy.hup("allow_from 127.0.0.1\n")
        peer.say_open(mx.endpoint)
        assert error_from(peer)[:2] == ("refused", "this address is no longer allowed")
        assert works(other, mx)


def test_the_certificate_files_are_read_again(tmp_path, mx: Mx) -> None:
    import trustme

    paths = tmp_path / "cert.pem", tmp_path / "key.pem"

    def renew() -> None:
        leaf = trustme.CA().issue_cert("proxy.example.com")
        paths[0].write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        paths[1].write_bytes(leaf.private_key_pem.bytes())

    renew()
    files = f"tls_certificate_file {paths[0]}\ntls_private_key_file {paths[1]}\n"
    with Proxy(files) as proxy, channel(proxy.native) as old, session(proxy.native) as control:
        assert control.expect(mta.CERT)[1] == [old.certificate]
        renew()
        proxy.hup()
        with channel(proxy.native) as new:
            assert new.certificate != old.certificate
            assert works(new, mx)
        assert works(old, mx)
        kinds = iter(control.hear, None)
        assert next(fields for kind, fields in kinds if kind == mta.CERT)[1] == [new.certificate]
        paths[1].write_text("no key")
        lines = proxy.bad_hup()
        assert any(str(paths[1]) in line for line in lines)
        with channel(proxy.native) as again:
            assert again.certificate == new.certificate


# -- the end -----------------------------------------------------------------------------------------------------------


def test_no_new_run_of_a_name_leaves_the_old_one_in(proxy: Proxy, mx: Mx) -> None:
    twin = {"instance": "twin", "run_id": b"o" * 16}
    with session(proxy.native, **twin) as first, channel(proxy.native, **twin) as peer:
        assert works(peer, mx)
        with session(proxy.native, instance="twin", run_id=b"n" * 16):
            assert error_of(first) == "name_in_use"
            assert peer.expect(mta.GOAWAY) == [0, "name in use by 127.0.0.1", "name_in_use"]
            assert peer.closed()
            assert refused(proxy.native, SECRET, **twin)[:2] == ("name_in_use", "name in use by 127.0.0.1")


def test_what_a_fenced_run_has_in_progress_ends_with_it(proxy: Proxy) -> None:
    """Its GOAWAY says deadline 0: no message more goes out under a name that somebody else has now."""
    twin = {"instance": "twin-2", "run_id": b"o" * 16}
    with Raw(greet) as raw, session(proxy.native, **twin), channel(proxy.native, **twin) as peer:
        peer.opened(raw.endpoint)
        assert peer.hear_until(b"220 mx\r\n")
        with session(proxy.native, instance="twin-2", run_id=b"n" * 16):
            assert peer.expect(mta.GOAWAY)[0] == 0
            assert error_of(peer) == "name_in_use"
            proxy.wait_line(r"instance=twin-2 .*outcome=no_longer_allowed")


def test_an_open_of_a_fenced_run_that_waits_is_told_why(proxy: Proxy) -> None:
    """Not `draining`, which would say: come again."""
    twin = {"instance": "twin-3", "run_id": b"o" * 16}
    with deaf_port() as silent, session(proxy.native, **twin), channel(proxy.native, **twin) as peer:
        peer.sock.sendall(frame(mta.OPEN, pack([None, [list(silent)]])))
        wait_for(lambda: "active=1" in proxy.status()[-1])
        with session(proxy.native, instance="twin-3", run_id=b"n" * 16):
            assert peer.expect(mta.FAILED)[1:3] == ["name_in_use", "name in use by 127.0.0.1"]
            assert peer.expect(mta.GOAWAY)[2] == "name_in_use"


def test_reset_in_the_handshake(proxy: Proxy) -> None:
    for stage in (b"", b"\x16\x03\x01\x02\x00"):
        sock = socket.create_connection(proxy.native, TIMEOUT)
        sock.sendall(stage)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    with Peer(proxy.native) as peer:
        peer.hello(mta.CHANNEL)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    proxy.wait_idle()

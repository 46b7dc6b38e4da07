"""`--ping` against the running program: what it finds; each operator's mistake is one clear line on both sides."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import forms
from tests import independent_client as mta
from tests.program import ROOT, SECRET, Proxy
from tests.sinks import Raw, closed_port, greet

OWN = "mta-own-has-a-secret-of-its-own-and-no-other"


def ping(address: tuple[str, int] | str, *flags: str, secret: str = SECRET) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    text = address if isinstance(address, str) else "{}:{}".format(*address)
    environ = forms.environ()
    result = subprocess.run(
        [sys.executable, str(ROOT / "greenarrow_proxy.py"), f"--ping={text}", *flags],
        env=environ | ({"GREENARROW_PROXY_AUTH_SHARED_SECRET": secret} if secret else {}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert SECRET not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout.splitlines(), result.stderr.splitlines()


def complaint(address: tuple[str, int], *flags: str, secret: str = SECRET) -> tuple[int, str]:
    """Exit code and the one line of stderr, without its beginning."""
    code, _, errors = ping(address, *flags, secret=secret)
    assert len(errors) == 1, errors
    start = "greenarrow_proxy: ping {}:{}: ".format(*address)
    assert errors[0].startswith(start)
    return code, errors[0].removeprefix(start)


def test_all_is_well() -> None:
    with Proxy() as proxy:
        code, lines, errors = ping(proxy.native)
        assert (code, errors) == (0, [])
        with mta.connect(proxy.native)[0]:
            shown = mta.connect(proxy.native)
            shown[0].close()
        patterns = (
            r"tcp: connected to 127\.0\.1\.1:\d+ from 127\.0\.0\.1:\d+",
            rf"tls: TLSv1\.3 TLS_\w+, certificate sha256 {shown[1].hex()}",
            r"protocol: version 1",
            r"authentication: the proxy knows the secret, and so do we; instance ping",
            r"software: greenarrow_proxy [\d.]+, incarnation [0-9a-f]{8}",
            r"round trip: \d+\.\d{3}ms",
        )
        assert len(lines) == len(patterns)
        for line, pattern in zip(lines, patterns, strict=True):
            assert re.fullmatch(pattern, line), line
        proxy.wait_idle()


def test_it_does_not_take_a_running_mtas_name() -> None:
    with Proxy() as proxy, mta.session(proxy.native, instance="mta-1") as control:
        control.expect(mta.CERT)
        assert ping(proxy.native, "--ping-instance=mta-1")[0] == 0
        with mta.Peer(proxy.native) as peer:
            peer.sock.sendall(peer.channel_auth(control.welcome, 1))
            assert peer.failed(("10.0.0.1", 25))[1] == "destination_not_allowed"  # it is listened to


def test_without_tls() -> None:
    with Proxy("listen_tls no\n") as proxy:
        code, lines, _ = ping(proxy.native, "--listen-tls=no")
        assert code == 0
        assert lines[1] == "tls: none (listen_tls no)"


def test_the_secret_comes_from_the_configuration(tmp_path) -> None:
    with Proxy(f'instance mta-own {{\n    auth_shared_secret "{OWN}"\n}}\n') as proxy:
        path = tmp_path / "mta.conf"
        path.write_text(f'auth_shared_secret "{SECRET}"\ninstance mta-own {{\n    auth_shared_secret "{OWN}"\n}}\n')
        flag = f"--config-filename={path}"
        assert ping(proxy.native, flag, secret="")[0] == 0
        assert ping(proxy.native, flag, "--ping-instance=mta-own", secret="")[1][3].endswith("instance mta-own")
        path.write_text(f'instance mta-own {{\n    auth_shared_secret "{OWN}"\n}}\n')
        assert ping(proxy.native, flag, secret="")[1][3].endswith("instance mta-own")


def test_no_secret_and_no_address() -> None:
    code, _, errors = ping("127.0.0.1:807", secret="")
    assert code == 78
    assert "auth_shared_secret" in errors[0]
    for address in ("127.0.0.1:0", "127.0.0.1:port", ":807", ""):
        code, _, errors = ping(address)
        assert code == 64
        assert errors[0] == "greenarrow_proxy: --ping: not HOST, HOST:PORT or [IPv6]:PORT"


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    with closed_port() as nobody:
        assert complaint(nobody) == (
            69,
            "connection refused: nothing listens there, or a packet filter says so",
        )


def test_a_wrong_secret() -> None:
    with Proxy() as proxy:
        code, line = complaint(proxy.native, secret="x" * 40)
        assert code == 77
        assert line == (
            "the proxy says: unknown instance or wrong secret; auth_shared_secret differs, or this instance has "
            "another one or other addresses there (bad_credentials)"
        )
        proxy.wait_line(r"^WARNING refused .*instance=ping .*reason=bad_credentials .*unknown instance or wrong secret")


def test_an_address_that_is_not_allowed() -> None:
    with Proxy("allow_from 192.0.2.0/24\n") as proxy:
        assert complaint(proxy.native) == (
            77,
            "it closed the connection without a word: our address, 127.0.0.1 as seen here, is not in its allow_from, "
            "or it is not a native listener",
        )
        proxy.wait_line(r"^WARNING refused .*reason=client_not_allowed .*127\.0\.0\.1 is not in allow_from")
    with Proxy("allow_from 192.0.2.0/24\nlisten_tls no\n") as proxy:
        assert complaint(proxy.native, "--listen-tls=no")[0] == 77


def test_tls_on_one_side_only() -> None:
    with Proxy() as proxy:
        code, line = complaint(proxy.native, "--listen-tls=no")
        assert code == 69
        assert line == (
            "the proxy says: the client does not speak TLS, this listener does (listen_tls yes) (bad_protocol)"
        )
        proxy.wait_line(r"reason=bad_protocol .*the client does not speak TLS, this listener does \(listen_tls yes\)")
    with Proxy("listen_tls no\n") as proxy:
        code, line = complaint(proxy.native)
        assert code == 69
        assert line.startswith("it does not speak TLS: the proxy has listen_tls no")
        proxy.wait_line(r"reason=bad_protocol .*the client speaks TLS, this listener does not \(listen_tls no\)")


def test_the_wrong_door() -> None:
    with Proxy() as proxy:
        code, line = complaint(proxy.proxy_protocol)
        assert code == 69
        assert "not its native listener" in line or "without a word" in line
        for flags in ((), ("--listen-tls=no",)):
            assert complaint(proxy.socks5, *flags) == (
                69,
                "what answers is a SOCKS5 listener, not the native one (directive listen)",
            )
    with Raw(greet) as smtp:
        code, line = complaint(smtp.endpoint)
        assert (code, "not its native listener" in line) == (69, True)
        assert "not a native listener" in complaint(smtp.endpoint, "--listen-tls=no")[1]


def test_wrong_secrets_of_others_do_not_matter() -> None:
    with Proxy() as proxy:
        for _ in range(10):
            with pytest.raises(mta.Told):
                mta.channel(proxy.native, "x" * 40)
        assert ping(proxy.native)[0] == 0


def scripted(*frames: bytes) -> Callable[[socket.socket], None]:
    """A proxy, without TLS, that says these frames, one after each thing that it hears."""

    def serve(sock: socket.socket) -> None:
        for frame in frames:
            sock.recv(65536)
            sock.sendall(frame)
        sock.recv(65536)

    return serve


def error(code: str, message: str) -> bytes:
    return mta.frame(mta.ERROR, mta.pack([code, message, False, 0]))


@pytest.mark.parametrize(
    ("frames", "code", "line"),
    [
        (
            [error("version_mismatch", "proxy speaks 2..3, client wants 1..1: upgrade the client first")],
            69,
            "the proxy says: proxy speaks 2..3, client wants 1..1: upgrade the client first (version_mismatch)",
        ),
        (
            [mta.frame(mta.CHALLENGE, mta.pack([1, bytes(32)])), error("name_in_use", "name in use by 192.0.2.9")],
            77,
            "the proxy says: name in use by 192.0.2.9; two MTAs have the same name (name_in_use)",
        ),
        (
            [mta.frame(mta.CHALLENGE, mta.pack([9, bytes(32)]))],
            69,
            "proxy chose version 9, client speaks 1..1",
        ),
        (
            [mta.frame(mta.CHALLENGE, mta.pack([1, bytes(32)])), mta.frame(mta.WELCOME, mta.pack([bytes(32), 1]))],
            77,
            "the proxy does not know the secret, or somebody sits between it and us",
        ),
    ],
    ids=["versions", "name in use", "a version that nobody asked for", "a proxy without the secret"],
)
def test_what_else_a_proxy_may_say(frames: list[bytes], code: int, line: str) -> None:
    with Raw(scripted(*frames)) as proxy:
        assert complaint(proxy.endpoint, "--listen-tls=no") == (code, line)


def test_a_newer_client_is_told_on_both_sides() -> None:
    with Proxy() as proxy:
        with mta.Peer(proxy.native) as peer, pytest.raises(mta.Told, match="upgrade the proxy first"):
            peer.hello(mta.CHANNEL, versions=(2, 3))
        proxy.wait_line(r"reason=version_mismatch .*proxy speaks 1\.\.1, client wants 2\.\.3: upgrade the proxy first")


def test_a_name_in_use_is_told_on_both_sides() -> None:
    with Proxy() as proxy, mta.session(proxy.native, run_id=b"o" * 16), mta.session(proxy.native, run_id=b"n" * 16):
        with pytest.raises(mta.Told, match="name_in_use"):
            mta.session(proxy.native, run_id=b"o" * 16)
        proxy.wait_line(r"reason=name_in_use .*name in use by 127\.0\.0\.1")

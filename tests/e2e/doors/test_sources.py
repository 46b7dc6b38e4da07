"""Which address the mail leaves from when the client does not say, and which it may leave from when it does."""

import subprocess
import sys

import pytest

from tests.clients import Refused, exactly, socks5
from tests.program import BASE, ROOT, Proxy
from tests.sinks import GREETING, Raw, greet

EVERYTHING = "127.0.0.0/8, ::1/128"


def left_from(proxy, host="127.0.0.2", **more):
    """The address that the receiver sees, and the one that the reply and the log name: all three must be the same."""
    with Raw(greet, host) as mx:
        with socks5(proxy.socks5, mx.endpoint, **more) as sock:
            assert exactly(sock, 8) == GREETING
        found = proxy.wait_line(rf"^connection .* source=(\S+) (?:source_name=\S+ )?destination=\S*:{mx.endpoint[1]} ")
        assert found[1] == mx.peers[0][0]
        return found[1]


def test_the_systems_choice():
    with Proxy() as proxy:
        assert left_from(proxy) == "127.0.0.1"
        assert left_from(proxy, "::1") == "::1"


def test_the_systems_choice_must_be_allowed():
    """Nothing is sent from an address that is not in source_ip."""
    with Proxy("source_ip 127.0.0.5\n") as proxy, Raw() as mx:
        with pytest.raises(Refused) as refused:
            socks5(proxy.socks5, mx.endpoint)
        assert refused.value.args[0][:2] == b"\x05\x02"
        assert mx.connects == 0
        assert left_from(proxy, source="127.0.0.5") == "127.0.0.5"


def test_loopback_must_be_listed():
    """Without source_ip every address of the machine will do, but those."""
    base = "".join(line for line in BASE.splitlines(True) if not line.startswith("source_ip"))
    with Proxy(base=base) as proxy, Raw() as mx:
        for source in (None, "127.0.0.5"):
            with pytest.raises(Refused, match=r"x05\\x02"):
                socks5(proxy.socks5, mx.endpoint, source)
        assert "loopback must be listed in source_ip" in proxy.wait_line(r"^WARNING refused .*")[0]


def test_default_source_ip_of_each_family():
    with Proxy("default_source_ip 127.0.0.41, ::1\n") as proxy:
        assert left_from(proxy) == "127.0.0.41"
        assert left_from(proxy, "::1") == "::1"
        assert left_from(proxy, source="127.0.0.42") == "127.0.0.42"


def test_default_source_ip_of_one_family_only():
    """For the other one it is the system's choice, and no mistake."""
    with Proxy("default_source_ip 127.0.0.41\n") as proxy:
        assert left_from(proxy, "::1") == "::1"


def test_same():
    """Leave from the address that was dialled: with a listener on each address, or one on all of them."""
    with Proxy("default_source_ip same\nlisten_socks5 0.0.0.0:0\n") as proxy:
        port = proxy.socks5[1]
        for host in ("127.0.0.51", "127.0.0.52"):
            with Raw(greet) as mx, socks5((host, port), mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
                assert mx.peers[0][0] == host


def test_an_instances_one_source_is_its_default():
    text = f"""\
source_ip {EVERYTHING}
default_source_ip 127.0.0.41
instance one {{
    source_ip 127.0.0.61
}}
instance two {{
    source_ip 127.0.0.62, 127.0.0.63
}}
"""
    with Proxy(text) as proxy, Raw() as mx:
        assert left_from(proxy, user="one") == "127.0.0.61"
        assert left_from(proxy, user="two", source="127.0.0.63") == "127.0.0.63"
        with pytest.raises(Refused):  # the default is not one of its own
            socks5(proxy.socks5, mx.endpoint, user="two")
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint, "127.0.0.62", user="one")
        assert left_from(proxy, user="three") == "127.0.0.41"
        assert mx.connects == 0


def test_both_lists_hold():
    """An instance's source_ip narrows the global one and cannot widen it."""
    text = "source_ip 127.0.0.0/24\ninstance one {\n    source_ip 127.0.0.61, 127.1.0.61\n}\n"
    with Proxy(text) as proxy, Raw() as mx:
        assert left_from(proxy, user="one", source="127.0.0.61") == "127.0.0.61"
        for source in ("127.1.0.61", "127.0.0.62"):
            with pytest.raises(Refused):
                socks5(proxy.socks5, mx.endpoint, source, user="one")


def test_a_source_is_asked_for_by_name():
    """For who cannot BIND: the password is that of the instance, and a name that is not known sends nothing."""
    with Proxy("source vmta* {\n    ip 127.0.7.0/24, ::1\n}\n") as proxy, Raw() as mx:
        assert left_from(proxy, user="mta-1+vmta7") == "127.0.7.7"
        assert left_from(proxy, "::1", user="mta-1+vmta1") == "::1"
        assert left_from(proxy, user="mta-1") == "127.0.0.1"
        assert left_from(proxy, source="127.0.0.42", user="mta-1+vmta7") == "127.0.0.42"
        for user in ("mta-1+vmta999", "mta-1+typo"):
            with pytest.raises(Refused, match=r"x05\\x02"):
                socks5(proxy.socks5, mx.endpoint, user=user)
        assert mx.connects == 0
        assert "source typo is not known" in proxy.wait_line(r"^WARNING refused .*typo.*")[0]
        line = proxy.wait_line(r"^connection .* source=127.0.7.7 source_name=vmta7 destination=")[0]
        assert line.count(" instance=mta-1 ") == 1


def test_a_listeners_own_default_source(tmp_path):
    """A port chooses the source, as with SOCKS servers that know no other way; and `explain` says so."""
    socket = tmp_path / "control"
    text = (
        f"listen_socks5 127.0.1.2:1081, 127.0.1.2:1082, 127.0.1.4:1083\ndefault_source_ip 127.0.0.41\n"
        f"control_socket {socket}\n"
        "listener 127.0.1.2:1081 {\n    default_source_ip 127.0.0.51\n}\n"
        "listener 127.0.1.4:1083 {\n    default_source_ip same\n}\n"
    )
    with Proxy(text) as proxy, Raw(greet) as mx:
        found = {}
        for door in (("127.0.1.2", 1081), ("127.0.1.2", 1082), ("127.0.1.4", 1083)):
            with socks5(door, mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
                found[door[1]] = mx.peers[-1][0]
        assert found == {1081: "127.0.0.51", 1082: "127.0.0.41", 1083: "127.0.1.4"}
        command = [sys.executable, "greenarrow_proxy.py", "ctl", "--config-filename", proxy.path]
        done = subprocess.run(
            [*command, "explain", "-", f"{mx.endpoint[0]}:{mx.endpoint[1]}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "its own at 127.0.1.2:1081, 127.0.1.4:1083" in done.stdout, done.stdout + done.stderr
        proxy.hup(text.replace("127.0.0.51", "127.0.0.52"))
        with socks5(("127.0.1.2", 1081), mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
        assert mx.peers[-1][0] == "127.0.0.52"

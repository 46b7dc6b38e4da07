"""What blocks count at which listener, in words; and blocks that never hold."""

import re
from pathlib import Path

import pytest

from proxy.config import load as config
from proxy.policy.counting import never, overview

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"
SECRET = "auth_shared_secret drawn-at-random-by-the-operator-1\n"
SOCKS = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\n"
PROXY_ONLY = "listen_proxy_protocol 127.0.0.1:808\n"


def settings(text):
    return config.load(["--config-filename=f"], {}, lambda _: "allow_from 127.0.0.1\n" + text).settings


def block(lines, name="b"):
    return f"throttle {name} {{\n max_delivery_rate 10/s\n {lines}\n}}\n"


def test_the_example_of_the_document():
    text = """\
listen 0.0.0.0:807
listen_socks5 0.0.0.0:1080
listen_redirect 127.0.0.1:2525
instance box7 {
    mode smtp
}
instance box8 {
}
listener 127.0.0.1:2525 {
    mode smtp
}
throttle yahoo {
    domain yahoo.com
    max_delivery_rate 2000/hr
    max_concurrent_connections 20
}
throttle gmail {
    domain gmail.com
    max_delivery_rate 2000/hr
}
throttle orange {
    domain orange.fr
    max_concurrent_connections 2
    enforce no
}
"""
    shown = re.search(r"```\n(throttles yahoo, gmail count\n.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert overview(settings(SECRET + text)) == shown[1].splitlines()


@pytest.mark.parametrize(
    ("more", "instance", "told"),
    [
        ("", "", "connections (mode tcp)"),
        ("mode smtp\n", "", "messages (mode smtp)"),
        ("mode smtp\ninstance a {\n mode tcp\n}\n", "", "messages (mode smtp), but of a connections (mode tcp)"),
        ("instance a {\n mode smtp\n}\n", "instance a", "messages (mode smtp)"),
        ("instance a {\n mode smtp\n}\n", "instance a, b", "connections (mode tcp), but of a messages (mode smtp)"),
        ("mode smtp\nvia 192.0.2.1:807\nvia_secret drawn-at-random-by-the-operator-2\n", "", "nothing, since"),
    ],
)
def test_by_mode_and_instance(more, instance, told):
    lines = overview(settings(SOCKS + more + block(instance)))
    assert lines[0] == "throttle b counts"
    assert lines[1].startswith(f"  at listen_socks5 127.0.0.1:1080: {told}")
    assert len(lines) == 2


def test_ten_thousand_blocks_make_a_few_lines():
    alike = "".join(block("", f"t{n}") for n in range(10_000))
    first, _ = overview(settings(SOCKS + alike))
    assert first == "throttles t0, t1, t2, t3, t4, t5, t6, t7 and 9992 more count"
    different = "".join(block(f"instance i{n}, j", f"t{n}") + f"instance i{n} {{\n mode smtp\n}}\n" for n in range(60))
    lines = overview(settings(SOCKS + different))
    assert len(lines) == 101
    assert lines[-1] == "and 10 more groups of blocks"


NEVER = [
    (SOCKS, "instance anybody", ""),
    (PROXY_ONLY, "instance anybody", "nobody can come as anybody"),
    (PROXY_ONLY + "instance a {\n allow_from 127.0.0.1\n}\n", "instance a, b", ""),
    (PROXY_ONLY + "instance a {\n weight 2\n}\n", "instance a", "nobody can come as a"),
    ("listen 127.0.0.1:807\n" + SECRET, "instance anybody", ""),
    (SOCKS + "source_ip 192.0.2.0/24\n", "source 192.0.0.0/16", ""),
    (SOCKS + "source_ip 192.0.2.0/24\n", "source 198.51.100.1, 192.0.2.7", ""),
    (SOCKS + "source_ip 192.0.2.0/24\n", "source 198.51.100.1, 2001:db8::1", "none of its source addresses is in"),
    (SOCKS + "source_ip 192.0.2.0/24\nsource v* {\n ip 198.51.100.8/30\n}\n", "source v*", "none of its source addr"),
    (SOCKS + "source_ip 192.0.2.0/24\nsource v* {\n ip 192.0.2.8/30\n}\n", "source v2", ""),
    (SOCKS, "destination 10.0.0.0/8, 8.8.8.0/24", ""),
    (SOCKS, "destination 10.1.0.0/16, 127.0.0.1", "all its destinations are denied"),
    (SOCKS + "allow_destination 10.1.2.3\n", "destination 10.1.0.0/16", ""),
    (SOCKS + "allow_destination 10.1.0.0/16\n", "destination 10.1.0.0/16", ""),
    (SOCKS + "allow_destination 10.0.0.0/7\n", "destination 10.1.0.0/16", "all its destinations are denied"),
    (SOCKS, "destination 10.1.0.0/16\n domain a.example", ""),
    (SOCKS, "mx *.mail.protection.outlook.com", "nobody knows an MX by name here"),
    (SOCKS, "mx *.mail.protection.outlook.com\n destination 8.8.8.0/24", ""),
    (SOCKS + block("domain b.example", "other"), "mx *.a.example", ""),
    (SOCKS + "tls t {\n domain b.example\n level required\n}\n", "mx *.a.example", ""),
    (SOCKS + "listen 127.0.0.1:807\n" + SECRET, "mx *.a.example", ""),
]


@pytest.mark.parametrize(("base", "lines", "why"), NEVER)
def test_a_block_that_never_holds(base, lines, why):
    found = dict(never(settings(base + block(lines))))
    assert set(found) == ({"b"} if why else set())
    assert found.get("b", "").startswith(why)


@pytest.mark.parametrize("limit", ["warmup 5 /day from 2026-12-01", "backoff on 421 { rate 5/min }"])
def test_what_limits_messages_by_another_name(limit):
    lines = overview(settings(f"{SOCKS}mode smtp\nthrottle b {{\n {limit}\n}}\n"))
    assert lines == ["throttle b counts", "  at listen_socks5 127.0.0.1:1080: messages (mode smtp)"]

"""Every form of a value: what it accepts, and what it does not."""

from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import values
from proxy.model import Endpoint
from proxy.settings import Rate

VALID = [
    (values.BOOLEAN, "yes", True),
    (values.BOOLEAN, "True", True),
    (values.BOOLEAN, "no", False),
    (values.BOOLEAN, "false", False),
    (values.ENDPOINT, "0.0.0.0:807", Endpoint("0.0.0.0", 807)),
    (values.ENDPOINT, "127.0.0.1:0", Endpoint("127.0.0.1", 0)),
    (values.ENDPOINT, "[::]:807", Endpoint("::", 807)),
    (values.ENDPOINT, "[2001:DB8:0::1]:65535", Endpoint("2001:db8::1", 65535)),
    (values.ENDPOINT, "[::ffff:192.0.2.1]:25", Endpoint("192.0.2.1", 25)),
    (values.NETWORK, "192.0.2.7", (ip_network("192.0.2.7/32"),)),
    (values.NETWORK, "10.0.0.0/8", (ip_network("10.0.0.0/8"),)),
    (values.NETWORK, "0.0.0.0/0", (ip_network("0.0.0.0/0"),)),
    (values.NETWORK, "fd00::/8", (ip_network("fd00::/8"),)),
    (
        values.NETWORK,
        "192.0.2.1-192.0.2.6",
        tuple(ip_network(f"192.0.2.{n}") for n in ("1/32", "2/31", "4/31", "6/32")),
    ),
    (values.NETWORK, "192.0.2.0-192.0.2.255", (ip_network("192.0.2.0/24"),)),
    (values.NETWORK, "0.0.0.0-255.255.255.255", (ip_network("0.0.0.0/0"),)),
    (values.NETWORK, "2001:db8::-2001:DB8::1", (ip_network("2001:db8::/127"),)),
    (values.NETWORK, "192.0.2.7-192.0.2.7", (ip_network("192.0.2.7"),)),
    (values.ADDRESSES, "192.0.2.1-192.0.2.3", tuple(ip_network(f"192.0.2.{n}") for n in (1, 2, 3))),
    (values.ADDRESSES, "2001:db8::7", (ip_network("2001:db8::7"),)),
    (values.ADDRESSES, "192.0.2.0/30", (ip_network("192.0.2.1"), ip_network("192.0.2.2"))),
    (values.ADDRESSES, "192.0.2.4/32", (ip_network("192.0.2.4"),)),
    (values.SOURCE, "same", "same"),
    (values.SOURCE, "2001:DB8::0:1", "2001:db8::1"),
    (values.PORTS, "25", (25, 25)),
    (values.PORTS, "2500-2599", (2500, 2599)),
    (values.SIZE, "64K", 65536),
    (values.SIZE, "1M", 1048576),
    (values.SIZE, "2G", 2147483648),
    (values.SIZE, "4096", 4096),
    (values.RATE, "1000/hr", Rate(1000, 3600)),
    (values.RATE, "50/min", Rate(50, 60)),
    (values.RATE, "10/s", Rate(10, 1)),
    (values.RATE, "7/hour", Rate(7, 3600)),
    (values.RATE, "0", None),
    (values.RATE, "0/hr", None),
    (values.duration(), "30s", 30.0),
    (values.duration(), "4h15m", 15300.0),
    (values.duration(), "1d1h1m1s1ms", 90061.001),
    (values.duration(), "250ms", 0.25),
    (values.duration(), "1m250ms", 60.25),
    (values.duration(), "1.5s", 1.5),
    (values.duration(), "0", 0.0),
    (values.duration(), "24d", 24 * 86400.0),
    (values.count(1), "1", 1),
    (values.count(0), "007", 7),
    (values.choice("all", "errors", "none"), "errors", "errors"),
    (values.SECRET, "é" * 32, "é".encode() * 32),
    (values.PATH, "/etc/a b,c", "/etc/a b,c"),
    (values.WORKERS, "auto", "auto"),
    (values.WORKERS, "4", 4),
    (values.WEIGHT, "0.0625", 0.0625),
    (values.WEIGHT, "16", 16.0),
]

INVALID = [
    (values.BOOLEAN, ["", "1", "on", "y", "yes "]),
    (
        values.ENDPOINT,
        [
            "",
            "",
            "807",
            ":807",
            "*:807",
            "localhost:807",
            "1.2.3.4",
            "1.2.3.4:",
            "1.2.3.4:65536",
            "1.2.3.4:-1",
            "::1:807",
            "[::1]",
            "[1.2.3.4]:5",
            "[::1:807",
            "1.2.3:5",
            "1.2.3.4:٣",
            "[fe80::1%eth0]:5",
        ],
    ),
    (
        values.NETWORK,
        [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/255.0.0.0",
            "10",
            "10.0.0.0/8/8",
            "a.example",
            "::/129",
            "192.0.2.6-192.0.2.1",
            "192.0.2.1-::1",
            "192.0.2.1-",
            "-192.0.2.1",
            "192.0.2.0/24-192.0.2.6",
            "192.0.2.1-2-3",
        ],
    ),
    (
        values.ADDRESSES,
        [
            "",
            "192.0.2.1/24",
            "10.0.0.0/19",
            "2001:db8::/64",
            "192.0.2.2-192.0.2.1",
            "192.0.2.1-::1",
            "10.0.0.0-10.1.0.0",
            "::-ffff::",
        ],
    ),
    (values.SOURCE, ["", "Same", "0.0.0.0", "::", "224.0.0.1", "192.0.2.0/24"]),
    (values.PORTS, ["", "0", "65536", "30-20", "25-", "-25", "smtp", "1-2-3", "²"]),
    (values.SIZE, ["", "K", "64k", "64KB", "-1", "1.5M"]),
    (values.RATE, ["", "1000", "/hr", "1000/", "1000/day", "-1/s", "1.5/s", "10000000000/s", "1 / s"]),
    (values.duration(), ["", "30", "s", "30S", "15m4h", "1s1s", "-1s", "25d", "1e3s", "30 s", "1..5s"]),
    (values.duration(0.001), ["0", "0s", "0ms"]),
    (values.count(1, 10), ["", "0", "11", "-1", "1.0", "9" * 5000, "٣"]),
    (values.choice("text", "json"), ["", "TEXT", "xml"]),
    (values.SECRET, ["", "x" * 31, "x" * 40 + "\n", "x" * 40 + "\ud800", "x" * 40 + "\0"]),
    (values.PATH, ["", "a\0b", "a\nb", "\udc80"]),
    (values.WORKERS, ["", "0", "1025", "Auto", "-1"]),
    (values.WEIGHT, ["", "0", "0.06", "16.1", "nan", "inf", "-1", "1e1"]),
]


@pytest.mark.parametrize(("kind", "text", "value"), VALID)
def test_a_valid_value_is_parsed(kind, text, value):
    parsed = kind.parse(text)
    assert (tuple(parsed) if isinstance(parsed, Iterator) else parsed) == value


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in INVALID for text in texts])
def test_an_invalid_value_is_a_value_error(kind, text):
    with pytest.raises(ValueError):  # noqa: PT011  its words are checked where a user sees them
        kind.parse(text)


ALL_KINDS = {id(kind): kind for kind in [row[0] for row in VALID] + [row[0] for row in INVALID]}.values()


@given(st.text())
def test_no_text_gets_anything_but_a_value_or_a_value_error(text):
    for kind in ALL_KINDS:
        try:
            kind.parse(text)
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("kind", "text", "hint"),
    [
        (values.NETWORK, "10.0.0.1/8", "the network is 10.0.0.0/8"),
        (values.ENDPOINT, "1.2.3.4", "the port is missing"),
        (values.ENDPOINT, "::1:807", "brackets"),
        (values.duration(), "30", "a unit is missing"),
        (values.duration(), "15 m", "without a blank"),
        (values.NETWORK, "192.0.2.6-192.0.2.1", "the lower address of a range comes first"),
        (values.NETWORK, "192.0.2.1-::1", "one end of the range is IPv4"),
        (values.RATE, "1000", "the time is missing"),
    ],
)
def test_a_common_mistake_gets_a_hint(kind, text, hint):
    with pytest.raises(ValueError, match=hint):
        kind.parse(text)

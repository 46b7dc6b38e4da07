"""Which throttle blocks hold for a connection, what counts by itself, and what thousands of blocks cost."""

import gc
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import load as config
from proxy.errors import ConfigError
from proxy.model import UNNAMED, Names
from proxy.policy.limits import Limits
from proxy.settings import Rate
from tests.unit.feeding import alive

ROOT = Path(__file__).parents[3]
BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"
SOURCES = "source vmta* {\n ip 192.0.2.0/29\n}\nsource six {\n ip 2001:db8::6\n}\n"


def settings(text):
    return config.load(["--config-filename=f"], {}, lambda path: BASE + text).settings


def limits(*blocks, directory=None):
    """Blocks called a, b, c ... of these lines."""
    text = "".join(f"throttle {name} {{\n {lines}\n}}\n" for name, lines in zip("abcdefgh", blocks, strict=False))
    read = settings(SOURCES + text)
    return Limits(read.throttle, read.source, directory)


def holds(limits, source="192.0.2.1", destination="98.136.96.1", instance="box7", mx="", domain=""):
    return "".join(hit.block for hit in limits.match(instance, source, destination, Names(mx, domain)))


def test_each_question_and_all_of_them():
    blocks = limits(
        "source 192.0.2.0/24, vmta1",
        "destination 98.136.96.0/24\n instance box7, box8",
        "instance other",
        "max_concurrent_connections 1",
        "source vmta2\n destination 98.136.96.0/24",
        "source vmta*, six",
    )
    assert holds(blocks) == "abdf"
    assert holds(blocks, instance="") == "adf"
    assert holds(blocks, source="192.0.2.2") == "abdef"
    assert holds(blocks, source="192.0.2.200", destination="198.51.100.1") == "ad"
    assert holds(blocks, source="2001:db8::6", destination="2001:db8:1::1", instance="other") == "cdf"


def test_a_receiver_is_meant_by_address_host_or_domain():
    blocks = limits(
        "domain yahoo.com, ymail.com\n mx *.yahoodns.net\n destination 98.136.96.0/24", "mx mx1.example.net"
    )
    assert holds(blocks) == "a"
    assert holds(blocks, destination="192.0.2.99") == ""
    assert holds(blocks, destination="192.0.2.99", domain="ymail.com") == "a"
    assert holds(blocks, destination="192.0.2.99", mx="mta5.am0.yahoodns.net") == "a"
    assert holds(blocks, destination="192.0.2.99", mx="yahoodns.net") == ""
    assert holds(blocks, destination="192.0.2.99", mx="notyahoodns.net") == ""
    assert holds(blocks, destination="192.0.2.99", mx="mx1.example.net") == "b"
    assert holds(blocks, destination="192.0.2.99", mx="x.mx1.example.net") == ""


def test_a_domain_and_a_host_of_one_name_are_two_things():
    blocks = limits("domain example.net", "mx example.net")
    assert holds(blocks, mx="example.net") == "b"
    assert holds(blocks, domain="example.net") == "a"


class Known:
    def hosts(self, address):
        return ("mta1.example.net", "mta2.example.net") if address == "98.136.96.1" else ()

    def domains(self, address):
        return ("example.com",) if address == "98.136.96.1" else ()


def test_what_a_client_says_only_adds_to_what_is_known():
    blocks = limits("domain example.com", "mx mta2.example.net", "mx *.example.org", directory=Known())
    assert holds(blocks) == "ab"
    assert holds(blocks, mx="x.example.org", domain="other.example") == "abc"
    assert holds(blocks, destination="98.136.96.2") == ""


def test_what_counts_by_itself():
    blocks = limits(
        "per source",
        "per receiver",
        "per source, receiver",
        "per nothing",
        "mx *.example.net\n per receiver",
        "mx *.example.net\n domain example.com\n per receiver\n destination 0.0.0.0/0",
    )
    name = Names("mx2.example.net", "example.com")
    hits = {hit.block: hit[1:] for hit in blocks.match("", "192.0.2.1", "98.136.96.1", name)}
    assert hits == {
        "a": ("192.0.2.1", ""),
        "b": ("", "98.136.96.1"),
        "c": ("192.0.2.1", "98.136.96.1"),
        "d": ("", ""),
        "e": ("", "mx2.example.net"),
        "f": ("", "mx2.example.net"),
    }
    assert ("f", "", "98.136.96.1") in blocks.match("", "192.0.2.1", "98.136.96.1", UNNAMED)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("source vmta9", "source vmta9 is neither a network nor the name of a source block"),
        ("source 192.0.2.300", "is neither a network"),
        ("source 192.0.2.1/8", "is not a network such as"),
        ("per source, nothing", "`nothing` stands alone"),
        ("per everything", "is not source, receiver or nothing"),
        ("scope cluster", "throttle_store"),
        ("domain 192.0.2.1", "is not a domain"),
        ("domain *.example.com", "is not a domain"),
        ("domain localhost", "is not a domain"),
        ("mx *", "is not an MX host"),
        ("mx a.*.example.com", "is not an MX host"),
    ],
)
def test_mistakes(line, told):
    with pytest.raises(ConfigError, match=r"f:1[0-3]: ") as caught:
        limits(line)
    assert told in str(caught.value)


def test_names_are_canonical():
    read = settings("throttle a {\n domain Bücher.example, EXAMPLE.com.\n mx *.Example.NET\n}\n").throttle[0]
    assert read.domain == ("xn--bcher-kva.example", "example.com")
    assert read.mx == ("*.example.net",)


# --- against the plain reading of the rule ---


def test_a_list_may_say_something_twice():
    twice = "destination 98.136.96.0/24, 98.136.96.0/24\n source 192.0.2.1, 192.0.2.1\n domain a.example, a.example"
    blocks = limits(twice, "domain a.example, a.example")
    assert holds(blocks, domain="a.example") == "ab"


PREFIXES = ("10.0.0.0/8", "10.1.0.0/16", "10.1.1.1", "0.0.0.0/0", "2001:db8::/32")
ADDRESSES = ("10.1.1.1", "10.1.2.2", "10.9.9.9", "192.0.2.1")
LINES = st.lists(
    st.one_of(
        st.sampled_from(PREFIXES).map("source {}".format),
        st.sampled_from(PREFIXES).map("destination {}".format),
        st.sampled_from(("box7", "box8")).map("instance {}".format),
        st.sampled_from(("a.example", "b.example")).map("domain {}".format),
        st.sampled_from(("mx.a.example", "*.a.example", "*.b.example")).map("mx {}".format),
    ),
    max_size=5,
)


def plainly(block, instance, source, destination, names):
    def within(address, networks):
        return any(ip_address(address) in network for network in networks)

    hosts = [names.mx.endswith(host[1:]) if host.startswith("*") else names.mx == host for host in block.mx]
    receiver = any(hosts) or within(destination, block.destination) or names.domain in block.domain
    return (
        (not block.source or within(source, block.source))
        and (not block.instance or instance in block.instance)
        and (receiver or not (block.mx or block.destination or block.domain))
    )


@given(
    st.lists(LINES, max_size=8),
    st.sampled_from(("", "box7", "box9")),
    st.sampled_from(ADDRESSES),
    st.sampled_from(ADDRESSES),
    st.builds(Names, st.sampled_from(("", "mx.a.example", "x.b.example")), st.sampled_from(("", "a.example"))),
)
def test_the_tables_say_what_the_rule_says(blocks, instance, source, destination, names):
    found = limits(*["\n ".join(lines) or "wait 1s" for lines in blocks])
    expected = [b.name for b in found.blocks.values() if plainly(b, instance, source, destination, names)]
    assert [hit.block for hit in found.match(instance, source, destination, names)] == expected


# --- what it costs ---


def blocks_of(number, line):
    return Limits(settings("".join(f"throttle t{n} {{\n {line(n)}\n}}\n" for n in range(number))).throttle)


def steps(number, line):
    """Look-ups of one connection under `number` blocks, of which few hold."""
    found = blocks_of(number, line)
    assert len(found.match("box1", "10.0.0.1", "98.0.0.1", Names("mx1.example.net", "d1.example"))) <= 2
    return found.steps


@pytest.mark.parametrize(
    "line",
    [
        lambda n: f"source 10.0.{n // 256}.{n % 256}",
        lambda n: f"destination 98.0.{n // 256}.{n % 256}",
        lambda n: f"source 10.0.{n // 256}.{n % 256}\n destination 0.0.0.0/0",
        lambda n: f"source 0.0.0.0/0\n destination 98.{n // 256}.{n % 256}.0/24",
        lambda n: f"domain d{n}.example",
        lambda n: f"mx *.z{n}.example\n instance box{n}",
        # All different, and all of them have the receiver, or the source, or both.
        lambda n: f"destination 98.0.0.0/8, 99.{n // 256}.{n % 256}.0/24\n source 10.0.{n // 256}.{n % 256}",
        lambda n: f"mx *.example.net, *.z{n}.example\n domain d1.example\n source 10.0.{n // 256}.{n % 256}",
        lambda n: f"source 10.0.0.0/8, 11.{n // 256}.{n % 256}.0/24\n destination 98.0.{n // 256}.{n % 256}",
        lambda n: (
            f"source 10.0.0.0/8, 11.{n // 256}.{n % 256}.0/24\n instance box{n}\n "
            f"destination 98.0.0.0/8, 99.{n // 256}.{n % 256}.0/24"
        ),
    ],
)
def test_ten_thousand_blocks_cost_what_ten_do(line):
    assert steps(10_000, line) <= steps(10, line) + 3


def halves(n):
    """Half of the blocks have the receiver and never the source, the other half the source and never the receiver."""
    other = f"{n // 256}.{n % 256}.0/24"
    if n % 2:
        return f"destination 98.0.0.0/8, 99.{other}\n source 11.{other}, 12.0.0.0/8"
    return f"source 10.0.0.0/8, 11.{other}\n destination 99.{other}, 97.0.0.0/8"


def test_what_cannot_be_found_in_a_few_steps_is_remembered():
    """For all connections that stand in the same lists, whatever their addresses."""
    found = blocks_of(2_000, halves)
    assert found.match("", "10.0.0.1", "98.0.0.1") == ()
    assert 1_000 <= found.steps <= 2_010
    before = found.steps
    for n in range(1, 101):
        assert found.match("", f"10.0.1.{n}", f"98.0.{n}.1") == ()
    assert found.steps - before <= 100 * 4


def test_what_is_remembered_is_bounded(monkeypatch):
    found = blocks_of(100, lambda n: f"destination 98.0.0.0/8, 99.0.{n}.0/24, 100.0.{n}.0/24\n instance a, b{n % 20}")
    everything = found.match("a", "10.0.0.1", "98.0.0.1")
    assert len(everything) == 100
    monkeypatch.setattr("proxy.policy.matching._MOST_REMEMBERED", 150)
    for n in range(20):
        assert len(found.match(f"b{n}", "10.0.0.1", "98.0.0.1")) == 5
        assert found.match("a", "10.0.0.1", "98.0.0.1") == everything
    assert sum(1 + len(each) for each in found._found.values()) <= 150


def test_an_old_configuration_leaves_no_circles_behind():
    found = blocks_of(20, lambda n: f"destination 98.0.0.0/8\n source 10.0.0.0/8\n instance a\n domain d{n}.example")
    assert found.match("a", "10.0.0.1", "98.0.0.1")
    kind = type(found._receivers)
    before = alive(kind)
    gc.disable()
    try:
        del found
        assert alive(kind) == before - 1
    finally:
        gc.enable()


def test_the_example_of_the_document_is_taken_as_it_stands():
    """docs/throttling.md begins with it."""
    document = (ROOT / "docs/throttling.md").read_text(encoding="utf-8")
    example = document.partition("## Limits in your words")[2].partition("```\n")[2].partition("```")[0]
    read = settings(example)
    blocks = Limits(read.throttle, read.source)
    (yahoo,) = read.throttle
    assert holds(blocks) == "yahoo"
    assert holds(blocks, destination="192.0.2.9", mx="mta5.am0.yahoodns.net") == "yahoo"
    assert (yahoo.max_concurrent_connections, yahoo.max_delivery_rate) == (20, (Rate(2000, 3600),))
    assert yahoo.warmup.figures == (50, 100, 200, 500, 1000)
    quarter, pause = yahoo.backoff
    assert (quarter.percent, quarter.return_after, quarter.over) == (25, 3600.0, Rate(5, 60))
    assert pause.pause
    for reply, rules in {
        "421 4.3.2 busy": [quarter],
        "451 4.7.1 try later": [quarter],
        "421 4.7.0 [TSS04] deferred": [quarter],
        "554 5.7.1 you are\nblocked": [pause],
        "550 5.1.1 no such user": [],
    }.items():
        assert blocks.struck(["yahoo", "another"], reply) == ([("yahoo", rules)] if rules else []), reply

"""Names of sources: one by one and in bulk, what is said in EHLO there, and how a client asks for one."""

import dataclasses

import pytest

from proxy.config import load as config
from proxy.errors import ConfigError, FamilyMismatch, SourceNotAllowed
from proxy.model import Endpoint
from proxy.policy.access import Access
from proxy.policy.modes import Modes
from proxy.policy.sources import Sources, split_user

BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"
V4, V6 = Endpoint("198.51.100.1", 25), Endpoint("2001:db8:1::1", 25)


def settings(text):
    return config.load(["--config-filename=f"], {}, lambda path: BASE + text).settings


def mistakes(text):
    with pytest.raises(ConfigError) as caught:
        settings(text)
    return str(caught.value).split("\n")


def access(text):
    return Access(settings(text), ())


def test_one_name_has_its_addresses_by_family_and_several_take_turns():
    sources = Sources(settings("source v {\n ip 192.0.2.1, 192.0.2.2, 2001:db8::1\n}\n").source)
    assert [sources.address("v", V4) for _ in range(3)] == ["192.0.2.1", "192.0.2.2", "192.0.2.1"]
    assert sources.address("v", V6) == "2001:db8::1"
    assert sources.name_of("192.0.2.2") == "v"
    assert sources.name_of("192.0.2.3") == ""


def test_hundreds_of_names_in_one_line():
    """The documented example: the number is the last byte, and each has an EHLO name of its own."""
    read = settings("source vmta* {\n ip 192.0.2.0/24\n ehlo mail-{ip}.example.com\n}\n")
    assert len(read.source) == 254
    sources, modes = Sources(read.source), Modes(read)
    assert sources.address("vmta7", V4) == "192.0.2.7"
    assert sources.address("vmta254", V4) == "192.0.2.254"
    assert modes.terms("", "127.0.0.1", "192.0.2.7", V4).ehlo_name == "mail-192-0-2-7.example.com"


def test_each_family_is_counted_by_itself():
    read = settings("source v* {\n ip 192.0.2.10-192.0.2.12, 2001:db8::/126\n ehlo {ip}.example.com\n}\n")
    sources, modes = Sources(read.source), Modes(read)
    assert (sources.address("v1", V4), sources.address("v1", V6)) == ("192.0.2.10", "2001:db8::1")
    name = modes.terms("", "127.0.0.1", "2001:db8::1", V6).ehlo_name
    assert name == "2001-0db8-0000-0000-0000-0000-0000-0001.example.com"


def test_who_names_none_that_is_there_is_refused():
    sources = Sources(settings("source v {\n ip 192.0.2.1\n}\n").source)
    with pytest.raises(SourceNotAllowed, match="source w is not known"):
        sources.address("w", V4)
    with pytest.raises(FamilyMismatch, match="not of the same address family"):
        sources.address("v", V6)


def test_a_path_counts_by_an_address_or_by_the_name_of_several():
    rules = access(
        "source_ip 192.0.2.0/24\nsource one {\n ip 192.0.2.1\n}\nsource two {\n ip 192.0.2.2, 198.51.100.2\n}\n"
    )
    assert rules.source_of_path("", "one") == "192.0.2.1"
    assert rules.source_of_path("", "two") == "two"
    for source, address in (("192.0.2.1", "192.0.2.1"), ("two", "192.0.2.2"), ("two", "198.51.100.2")):
        assert rules.is_source_of_path(source, address)
    assert not rules.is_source_of_path("two", "192.0.2.1")
    with pytest.raises(SourceNotAllowed, match="source typo is not known"):
        rules.source_of_path("", "typo")


def test_a_path_by_name_needs_one_address_that_may_be_left_from():
    text = "source_ip {}\nsource two {{\n ip 192.0.2.2, 198.51.100.2\n}}\n"
    access(text.format("198.51.100.0/24")).check_source_of_path("", "two")
    with pytest.raises(SourceNotAllowed, match="is not in source_ip"):
        access(text.format("203.0.113.0/24")).check_source_of_path("", "two")
    access(text.format("203.0.113.0/24")).check_source_of_path("", "203.0.113.1")
    with pytest.raises(SourceNotAllowed, match="is not in source_ip"):
        access(text.format("203.0.113.0/24")).check_source_of_path("", "192.0.2.1")


def test_the_user_of_a_login_may_name_a_source():
    assert split_user("box+vmta7") == ("box", "vmta7")
    assert split_user("a+b+vmta7") == ("a+b", "vmta7")
    assert split_user("box") == ("box", None)
    assert split_user("box+") == ("box+", None)


def test_a_plus_belongs_to_the_name_of_an_instance_that_has_it_or_where_no_source_has_a_name():
    assert access("").names_of("a+b") == ("a+b", None)
    with_sources = access("source v {\n ip 192.0.2.1\n}\ninstance a+b {\n}\n")
    assert with_sources.names_of("a+b") == ("a+b", None)
    assert with_sources.names_of("a+b+v") == ("a+b", "v")
    assert with_sources.names_of("x+typo") == ("x", "typo")  # and refused: not sent from elsewhere
    with pytest.raises(SourceNotAllowed):
        with_sources.source_named("typo", V4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "source v* {\n ip 192.0.2.1\n}\nsource v1 {\n ip 192.0.2.2\n}\n",
            "f:7: source: v1 is the name of two sources",
        ),
        ("source v* {\n ip 192.0.2.1\n}\nsource w {\n ip 192.0.2.1\n}\n", "f:7: source: 192.0.2.1 is in two blocks"),
        ("source v** {\n ip 192.0.2.1\n}\n", 'f:4: source: "v**": one star at the most'),
        ("source a+b {\n ip 192.0.2.1\n}\n", "f:4: source: a+b: a source's name has letters"),
        ("source 192.0.2.1 {\n ip 192.0.2.1\n}\n", "f:4: source: 192.0.2.1: a source's name is no address"),
        ("source v* {\n ehlo x\n}\n", "f:4: source: v*: `ip` is missing"),
        ("source v {\n ip 192.0.2.1\n ehlo {nr}\n}\n", "f:6:"),
    ],
)
def test_mistakes_stand_where_the_block_is(text, told):
    assert any(line.startswith(told) for line in mistakes(text)), mistakes(text)


def test_a_name_costs_the_same_among_thousands():
    """Names are found, not searched for: the look-up is the dict's."""
    read = settings("source v* {\n ip 10.0.0.0/20\n}\n")
    assert len(read.source) == 4094
    assert dataclasses.asdict(read.source[4093])["name"] == "v4094"
    assert Sources(read.source).address("v4094", V4) == "10.0.15.254"

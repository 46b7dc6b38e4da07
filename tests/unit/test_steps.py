"""Who looks at the steps of connections sees those that are meant, and nobody else pays."""

from __future__ import annotations

import pytest

from proxy.log import steps
from proxy.model import Endpoint, is_meant
from proxy.stats import Standing

STANDING = Standing(
    7, "mta1", "socks5", Endpoint("10.0.0.5", 4321), "192.0.2.1", Endpoint("2001:db8::7", 25), "connect", 1.0
)


@pytest.fixture
def watch():
    begun = []

    def begin(**wanted):
        seen: list[str] = []
        begun.append(steps.Watch(lambda standing, text: seen.append(text), wanted))
        steps.begin(begun[-1])
        return seen

    yield begin
    for each in begun:
        steps.end(each)
    assert not steps.on


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        ({}, True),
        ({"instance": "mta1"}, True),
        ({"instance": "mta2"}, False),
        ({"client": "10.0.0.5"}, True),
        ({"client": "10.0.0.5:4322"}, False),
        ({"destination": "2001:db8::7"}, True),
        ({"destination": "[2001:db8::7]:25", "source": "192.0.2.1"}, True),
        ({"destination": "2001:db8::7", "source": "192.0.2.2"}, False),
    ],
)
def test_what_is_meant(watch, wanted, seen) -> None:
    found = watch(**wanted)
    steps.tell(STANDING, "connects")
    assert found == ["connects"] * seen


def test_on_while_anybody_looks(watch) -> None:
    first, second = watch(), watch(instance="mta1")
    assert steps.on
    steps.tell(STANDING, "a")
    assert (first, second) == (["a"], ["a"])


def test_who_stops_looking_while_it_is_told(watch) -> None:
    last: list[str] = []
    one = steps.Watch(lambda *_: steps.end(one), {})
    steps.begin(one)
    two = steps.Watch(lambda _, text: last.append(text), {})
    steps.begin(two)
    steps.tell(STANDING, "a")
    steps.end(two)
    steps.end(two)
    assert last == ["a"]
    assert not steps.on


@pytest.mark.parametrize(
    ("value", "wanted", "meant"),
    [
        ("192.0.2.1:25", "192.0.2.1", True),
        ("[2001:db8::7]:25", "2001:db8::7", True),
        ("2001:db8::7", "2001:db8:", False),
        ("team:one", "team", False),
        ("", "", True),
        ("mta1", "mta", False),
    ],
)
def test_an_address_without_a_port_means_all_its_ports_and_nothing_else_does(value, wanted, meant) -> None:
    assert is_meant(value, wanted) is meant

"""The proxy's own throttles: what counts by itself, connection rates, shadow mode, reloads in turns."""

from __future__ import annotations

from ipaddress import ip_network

from proxy.model import Names
from proxy.policy.limits import Limits
from proxy.settings import Rate, ThrottleSettings
from proxy.throttling.core import SWEEP
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND

START = 100_000 * SECOND


def block(name: str = "yahoo", **fields: object) -> ThrottleSettings:
    values: dict[str, object] = {
        "source": (),
        "destination": (),
        "max_concurrent_connections": 0,
        "max_delivery_rate": (),
        "wait": 20.0,
    }
    return ThrottleSettings(name=name, **{**values, **fields})  # type: ignore[arg-type]


class House:
    def __init__(self, *blocks: ThrottleSettings) -> None:
        self.manager = Manager(1, START - 90_000 * SECOND, blocks=Limits(blocks))
        self.now = START

    def open(
        self,
        source: str = "192.0.2.1",
        to: str = "198.51.100.1",
        names: Names = Names(),  # noqa: B008
        owner: str = "a",
        rated: bool = True,
    ) -> Places | Ticket:
        return self.manager.admit(owner, 1.0, source, to, (), self.now, rated, names)

    def in_at_once(self, *many: Places | Ticket) -> str:
        return "".join("x" if isinstance(each, Places) else "-" for each in many)


def test_what_counts_by_itself() -> None:
    house = House(block(max_concurrent_connections=1, per=("receiver",)))
    assert house.in_at_once(house.open(), house.open("192.0.2.2"), house.open(to="198.51.100.2")) == "x-x"
    house = House(block(max_concurrent_connections=1, per=("nothing",)))
    assert house.in_at_once(house.open(), house.open("192.0.2.2", "198.51.100.2")) == "x-"
    house = House(block(max_concurrent_connections=1, per=("source", "receiver")))
    assert (
        house.in_at_once(house.open(), house.open("192.0.2.2"), house.open(), house.open(to="198.51.100.9")) == "xx-x"
    )


def test_all_blocks_that_fit_hold_and_the_refusal_names_the_one() -> None:
    wide = block("wide", max_concurrent_connections=2, per=("nothing",))
    narrow = block("narrow", destination=(ip_network("198.51.100.0/25"),), max_concurrent_connections=1)
    house = House(wide, narrow)
    house.open()
    waiting = house.open()
    assert isinstance(waiting, Ticket)
    assert str(house.manager.refusal(waiting, house.now)).startswith("throttle narrow for 192.0.2.1: 1 of 1")
    house.open("192.0.2.2")
    waiting = house.open("192.0.2.3")
    assert isinstance(waiting, Ticket)
    assert str(house.manager.refusal(waiting, house.now)).startswith("throttle wide: 2 of 2 connections are in use")


def test_a_connection_rate_holds_where_messages_are_counted_too() -> None:
    house = House(block(max_connection_rate=(Rate(1, 10),), max_delivery_rate=(Rate(3600, 3600),)))
    first, second = house.open(rated=False), house.open(rated=False)
    assert house.in_at_once(first, second) == "x-"
    # Messages take no slot of it.
    for _ in range(3):
        ticket = house.manager.ask_message("a", 1.0, "192.0.2.1", "198.51.100.1", (), house.now)
        assert ticket is not None
        assert ticket.granted
        house.now += 2 * SECOND
    house.now += 10 * SECOND
    house.manager.advance(house.now)
    assert isinstance(second, Ticket)
    assert second.places is not None


def test_a_connection_that_changes_hands_is_no_new_one() -> None:
    house = House(block(max_connection_rate=(Rate(1, 3600),)))
    old = house.open()
    assert isinstance(old, Places)
    assert house.in_at_once(house.open(owner="b")) == "-"
    new = house.manager.swap(old, "b", 1.0, "192.0.2.2", "198.51.100.1", (), house.now)
    assert new is not None
    assert house.in_at_once(house.open("192.0.2.2")) == "x"  # its source has made no connection yet


def test_a_shadow_holds_nothing_and_counts_what_it_would_have() -> None:
    rates = {"max_concurrent_connections": 2, "max_delivery_rate": (Rate(1, 10),), "wait": 15.0, "enforce": False}
    house = House(block(**rates))
    assert house.in_at_once(*[house.open() for _ in range(4)]) == "xxxx"
    (throttle,) = house.manager.blocks.throttles()
    assert throttle.shadow is not None
    # The second would have waited 10 s for its slot, the others 20: longer than `wait`; and two for places.
    assert (throttle.shadow.waited, throttle.shadow.refused) == (3, 2)
    assert house.manager.ask_message("a", 1.0, "192.0.2.1", "198.51.100.1", (), house.now) is None
    assert throttle.shadow.refused == 3
    house.manager.reload(False, Limits([block(**rates | {"enforce": True})]), house.now)
    assert house.in_at_once(house.open()) == "-"


def test_who_waits_gets_in_when_a_block_becomes_a_shadow() -> None:
    house = House(block(max_concurrent_connections=1))
    waiting = [house.open(), house.open()][1]
    house.manager.reload(False, Limits([block(max_concurrent_connections=1, enforce=False)]), house.now)
    assert isinstance(waiting, Ticket)
    assert waiting.places is not None


def test_a_reload_reaches_many_throttles_in_turns_and_each_at_once_that_is_asked_for() -> None:
    """No call looks at more than a few, however many there are."""
    house = House(block(max_concurrent_connections=1))
    many = [f"10.0.{n // 256}.{n % 256}" for n in range(5 * SWEEP)]
    for source in many:
        house.open(source)
    house.manager.reload(False, Limits([block(max_concurrent_connections=2)]), house.now)

    def reached() -> int:
        return sum(throttle.cap == 2 for throttle in house.manager.blocks.throttles())

    assert reached() == SWEEP
    untouched = next(throttle for throttle in house.manager.blocks.throttles() if throttle.cap == 1)
    assert house.in_at_once(house.open(untouched.key.source)) == "x"
    turns = 0
    while house.manager.next_wakeup() == 0:
        before = reached()
        house.manager.advance(house.now)
        assert reached() - before <= SWEEP
        turns += 1
    assert (reached(), turns) == (len(many), 4)

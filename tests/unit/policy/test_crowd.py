"""Who has to go from a full crowd: one of the address that has most there, its first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import owner_of
from proxy.policy.crowd import Crowd


@pytest.mark.parametrize(
    ("address", "owner"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_what_an_address_counts_as(address: str, owner: str) -> None:
    assert owner_of(address) == owner


def test_a_flood_pushes_out_its_own_and_the_oldest_first() -> None:
    crowd = Crowd(4)
    assert crowd.enter("slow", "192.0.2.1") is None
    assert [crowd.enter(number, "192.0.2.9") for number in range(6)] == [None, None, None, 0, 1, 2]
    assert "slow" in crowd
    assert [number for number in range(6) if number in crowd] == [3, 4, 5]


def test_one_that_comes_to_a_crowd_of_a_flood_gets_in() -> None:
    crowd = Crowd(3)
    for number in range(3):
        crowd.enter(number, "192.0.2.9")
    assert crowd.enter("new", "192.0.2.1") == 0
    assert crowd.number_of("192.0.2.1") == 1
    assert (crowd.number_of("192.0.2.9"), crowd.most, len(crowd)) == (2, 2, 3)


def test_where_all_have_the_same_the_first_owner_goes() -> None:
    crowd = Crowd(2)
    crowd.enter("a", "192.0.2.1")
    crowd.enter("b", "192.0.2.2")
    assert crowd.enter("c", "192.0.2.3") == "a"


def test_a_network_of_one_owner_is_one_address() -> None:
    crowd = Crowd(3)
    crowd.enter("other", "2001:db8:2::1")
    put_out = [crowd.enter(number, f"2001:db8:1::{number:x}") for number in range(5)]
    assert put_out == [None, None, 0, 1, 2]


def test_who_has_left_is_not_put_out() -> None:
    crowd = Crowd(2)
    crowd.enter("a", "192.0.2.1")
    crowd.enter("b", "192.0.2.1")
    assert crowd.leave("a")
    assert not crowd.leave("a")
    assert crowd.enter("c", "192.0.2.2") is None
    assert len(crowd) == 2


ADDRESSES = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]


@given(
    st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.sampled_from(ADDRESSES), st.integers(0, 20)), max_size=60)
)
def test_against_a_plain_count(limit: int, steps: list[tuple[bool, str, int]]) -> None:
    """The same as counting anew each time: never more than the limit, and the one put out is of who had most."""
    crowd, inside = Crowd(limit), {}
    for entering, address, number in steps:
        who = (address, number)
        if not entering:
            assert crowd.leave(who) is (inside.pop(who, None) is not None)
        elif who not in inside:
            inside[who] = owner_of(address)
            most = max(Counter(inside.values()).values())
            put_out = crowd.enter(who, address)
            assert (put_out is None) is (len(inside) <= limit)
            if put_out is not None:
                owner = inside[put_out]
                assert Counter(inside.values())[owner] == most
                assert put_out == next(member for member, of in inside.items() if of == owner)
                del inside[put_out]
        assert len(crowd) == len(inside) <= limit
        assert all(member in crowd for member in inside)
        assert crowd.most == max(Counter(inside.values()).values(), default=0)


def test_nothing_is_remembered_of_owners_who_left() -> None:
    crowd = Crowd(10)
    for number in range(100):
        crowd.enter(number, f"192.0.2.{number}")
        crowd.leave(number)
    assert not crowd._members
    assert not crowd._by_number

"""Who has proven a name with which secret."""

from __future__ import annotations

from proxy.policy.logins import Known, Logins

OLD, NEW = b"the old secret", b"the new secret"


def test_who_still_uses_the_old_one() -> None:
    logins = Logins()
    logins.proven("a", "10.0.0.1", OLD, 1.0)
    logins.proven("b", "10.0.0.2", OLD, 2.0)
    logins.proven("a", "10.0.0.1", NEW, 3.0)
    logins.proven("b", "10.0.0.2", OLD, 4.0)
    assert list(logins.known(lambda _: (NEW, OLD), 10.0)) == [
        Known("b", "10.0.0.2", 2, True, 2, 6.0),
        Known("a", "10.0.0.1", 1, True, 1, 7.0),
        Known("a", "10.0.0.1", 2, False, 1, 9.0),
    ]


def test_the_numbers_are_those_of_the_configuration_in_force() -> None:
    logins = Logins()
    logins.proven("a", "10.0.0.1", OLD, 1.0)
    for secrets, number in (((OLD,), 1), ((NEW, OLD), 2), ((NEW,), 0)):
        assert [each.secret for each in logins.known(lambda _, found=secrets: found, 1.0)] == [number]


def test_one_name_at_two_addresses_is_two_clients() -> None:
    logins = Logins()
    logins.proven("a", "10.0.0.1", OLD, 1.0)
    logins.proven("a", "10.0.0.2", NEW, 2.0)
    assert [each.latest for each in logins.known(lambda _: (NEW, OLD), 2.0)] == [True, True]


def test_it_is_bounded_and_who_came_last_is_kept() -> None:
    logins = Logins(most=2)
    for at, name in enumerate("abac"):
        logins.proven(name, "10.0.0.1", OLD, float(at))
    assert [each.instance for each in logins.known(lambda _: (OLD,), 9.0)] == ["c", "a"]


def test_no_secret_is_kept() -> None:
    logins = Logins()
    logins.proven("a", "10.0.0.1", OLD, 1.0)
    assert OLD not in repr(list(logins.entries())).encode()

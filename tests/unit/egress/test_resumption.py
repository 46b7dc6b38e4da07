"""Which TLS session goes on for whom, and that they stay few. Time is an argument."""

import pytest

from proxy.egress.resumption import LONGEST, Known, Sessions, Terms
from proxy.model import Endpoint

CONTEXT = object()
MX = Endpoint("198.51.100.7", 25)
TERMS = Terms("192.0.2.1", MX, "mx.example.net", "profile", "")


def known(session: object = "session") -> Known:
    return Known(session, CONTEXT, (b"leaf",))


@pytest.mark.parametrize(
    "other",
    [
        {"source": "192.0.2.2"},
        {"destination": Endpoint("198.51.100.8", 25)},
        {"destination": Endpoint("198.51.100.7", 465)},
        {"name": ""},
        {"profile": "strict"},
        {"proof": "verify abc"},
    ],
)
def test_it_is_for_the_same_terms_alone(other: dict[str, object]) -> None:
    sessions = Sessions()
    sessions.keep(TERMS, known(), 100.0, 0.0)
    assert sessions.get(TERMS, CONTEXT, 1.0) == known()
    assert sessions.get(TERMS._replace(**other), CONTEXT, 1.0) is None  # type: ignore[arg-type]
    assert sessions.get(TERMS, CONTEXT, 1.0) == known(), "several connections may go on in it"


def test_it_ends_when_the_receiver_says_and_after_an_hour_at_the_latest() -> None:
    sessions = Sessions()
    sessions.keep(TERMS, known(), 100.0, 0.0)
    assert sessions.get(TERMS, CONTEXT, 100.0) is None
    sessions.keep(TERMS, known(), 7 * 86400.0, 0.0)
    assert sessions.get(TERMS, CONTEXT, LONGEST - 1)
    assert sessions.get(TERMS, CONTEXT, LONGEST) is None
    assert len(sessions) == 0


def test_a_context_that_was_made_anew_has_none() -> None:
    sessions = Sessions()
    sessions.keep(TERMS, known(), 100.0, 0.0)
    assert sessions.get(TERMS, object(), 1.0) is None
    assert len(sessions) == 0


def test_the_one_that_was_kept_last_counts_and_a_forgotten_one_does_not() -> None:
    sessions = Sessions()
    sessions.keep(TERMS, known("old"), 100.0, 0.0)
    sessions.keep(TERMS, known("new"), 100.0, 0.0)
    found = sessions.get(TERMS, CONTEXT, 1.0)
    assert found is not None
    assert (found.session, len(sessions)) == ("new", 1)
    sessions.forget(TERMS)
    sessions.forget(TERMS)
    assert sessions.get(TERMS, CONTEXT, 1.0) is None


def test_they_are_bounded_together_and_by_address() -> None:
    sessions = Sessions(most=10, most_of_one=3)
    for number in range(5):
        sessions.keep(TERMS._replace(source=f"192.0.2.{number}"), known(number), 100.0, 0.0)
    assert [bool(sessions.get(TERMS._replace(source=f"192.0.2.{n}"), CONTEXT, 1.0)) for n in range(5)] == [
        *(False, False),
        *(True, True, True),
    ]
    for number in range(30):
        sessions.keep(TERMS._replace(destination=Endpoint(f"203.0.113.{number}", 25)), known(), 100.0, 0.0)
    assert len(sessions) == 10
    assert sum(map(len, sessions._of_address.values())) == len(sessions._of_address) == 10

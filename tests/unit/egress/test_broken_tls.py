"""The memory of broken TLS, on a clock of its own."""

from __future__ import annotations

from proxy.egress.broken_tls import BrokenTls
from proxy.model import Endpoint

MX = Endpoint("192.0.2.25", 25)
OTHER = Endpoint("192.0.2.25", 465)


def test_one_failure_is_none() -> None:
    broken = BrokenTls(memory=600.0)
    broken.failed(MX, "no shared cipher", 0.0)
    assert broken.why(MX, 1.0) == ""
    broken.failed(MX, "bad record", 10.0)
    assert (broken.why(MX, 11.0), broken.why(OTHER, 11.0)) == ("bad record", "")


def test_it_is_tried_again_when_its_time_is_up() -> None:
    broken = BrokenTls(memory=600.0)
    broken.failed(MX, "x", 0.0)
    broken.failed(MX, "y", 10.0)
    assert broken.why(MX, 609.9) == "y"
    assert (broken.why(MX, 610.0), len(broken)) == ("", 0)
    broken.failed(MX, "z", 611.0)
    assert broken.why(MX, 612.0) == "", "two failures running, counted anew"


def test_failures_far_apart_are_not_two_running() -> None:
    broken = BrokenTls(memory=600.0)
    broken.failed(MX, "x", 0.0)
    broken.failed(MX, "y", 600.0)
    assert broken.why(MX, 600.0) == ""


def test_a_success_between_them_clears_it() -> None:
    broken = BrokenTls()
    broken.failed(MX, "x", 0.0)
    broken.worked(MX)
    broken.failed(MX, "x", 1.0)
    assert broken.why(MX, 1.0) == ""
    broken.worked(OTHER)


def test_it_is_bounded_and_forgets_the_oldest() -> None:
    broken = BrokenTls(most=2)
    for port in (1, 2, 1, 3):
        broken.failed(Endpoint("192.0.2.25", port), "x", 0.0)
        broken.failed(Endpoint("192.0.2.25", port), "x", 0.0)
    assert len(broken) == 2
    assert [bool(broken.why(Endpoint("192.0.2.25", port), 0.0)) for port in (1, 2, 3)] == [True, False, True]

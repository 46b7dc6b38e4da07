"""What page, terminal and metrics say of throttle blocks that back off."""

from __future__ import annotations

from dataclasses import replace

from proxy.policy.limits import Limits
from proxy.settings import BackoffSettings
from proxy.status import metrics, page, terminal
from proxy.status.backoffs import MOST_BACKOFFS
from proxy.status.parts import Part
from proxy.status.rows import BackoffRow
from proxy.status.spelled import backoff_state, held_by, throttle_state
from proxy.throttling.throttle import SECOND
from tests.unit.status.test_view import SOURCE, House, block

QUARTER = BackoffSettings(on=("421",), percent=25, return_after=600.0)
PAUSE = BackoffSettings(on=("blocked",), pause=True, return_after=3600.0)
SAID = "421 4.7.0 too <much>"


def house(*rules: BackoffSettings, **fields: object) -> House:
    return House([replace(block("yahoo", 20), backoff=rules, **fields)])


def refused(world: House, reply: str, source: str = SOURCE) -> None:
    places = world.manager.admit("a", 1.0, source, "198.51.100.1", (), world.now, rated=False)
    world.manager.replied(places, reply, world.now)


def test_what_is_on_is_shown_with_its_reply_and_its_end() -> None:
    world = house(QUARTER, PAUSE)
    assert world.view().backoffs == []
    refused(world, SAID)
    world.now += 10 * SECOND
    view = world.view()
    row = BackoffRow("yahoo", SOURCE, "", "backoff", 590.0, "25 % of each limit", SAID, "a")
    assert view.backoffs == [row]
    assert backoff_state(row) == "25 % of each limit for 9m50s"
    assert throttle_state(world.throttle()) == "backoff 9m50s"
    assert [(each.kind, each.text) for each in view.trouble] == [
        ("backoff", f"throttle yahoo for {SOURCE} backs off: {SAID}")
    ]
    assert f"BACK-OFF OF yahoo for {SOURCE}: 25 % of each limit for 9m50s; a was told: {SAID}" in list(
        terminal.lines(view)
    )
    text = "".join(page.pieces(view))
    assert ">Back-off</h2>" in text
    assert "too &lt;much&gt;" in text
    figures = metrics.render(view, Part()).decode().splitlines()
    assert "greenarrow_proxy_throttle_backoffs_total 1.0" in figures
    assert "greenarrow_proxy_throttles_backing_off 1.0" in figures


def test_a_pause_is_what_those_who_wait_wait_for_and_then_its_limits_come_back() -> None:
    world = house(QUARTER, PAUSE)
    refused(world, SAID)
    refused(world, "550 blocked")
    world.manager.admit("b", 1.0, SOURCE, "198.51.100.1", (), world.now, rated=False)
    row = world.throttle()
    assert throttle_state(row) == "paused 1h0m0s"
    assert held_by(row) == "pause"
    assert row.limits == [], "what stands in for a rate that there is not is nobody's business"
    assert [each.state for each in world.view().backoffs] == ["backoff", "paused"]
    world.now += 3601 * SECOND
    world.manager.advance(world.now)
    assert throttle_state(world.throttle()) == "rising"
    assert backoff_state(world.view().backoffs[-1]) == "its limits come back"


def test_a_shadow_says_that_it_would_have_backed_off() -> None:
    world = house(QUARTER, enforce=False)
    refused(world, SAID)
    assert throttle_state(world.throttle()) == "shadow: would have waited 0 times, backoff 10m0s"


def test_a_bounded_number_is_shown_and_the_latest_first() -> None:
    world = house(QUARTER)
    for number in range(MOST_BACKOFFS + 5):
        refused(world, SAID, f"192.0.3.{number}")
    view = world.view()
    assert len(view.backoffs) == MOST_BACKOFFS
    assert view.backoffs_left_out == 5
    assert view.backoffs[0].source == f"192.0.3.{MOST_BACKOFFS + 4}"
    assert view.trouble[0].text.startswith(f"{MOST_BACKOFFS + 5} throttles back off, yahoo for 192.0.3.104 is the last")
    assert "and 5 more throttles that back off" in list(terminal.lines(view))


def test_what_cannot_be_utf_8_is_shown_all_the_same() -> None:
    world = house(QUARTER)
    refused(world, "421 \udcff")
    assert world.view().backoffs[0].reply == "421 \\udcff"


def test_limits_know_no_rules_by_default() -> None:
    assert Limits([block("yahoo", 1)]).listeners == {}

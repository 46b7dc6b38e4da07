"""The oracle must be able to fail: broken variants of the core, each of which it has to catch.

The same worlds pass with the real code (`test_throttle_world`). A mutant that survives means that the oracle, or the
world, does not look where the mutant is broken.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.audit import Audit
from proxy.throttling.dispenser import Dispenser
from proxy.throttling.flows import Flow, Path, Run, Throttle
from proxy.throttling.lease import Lease, Permit
from proxy.throttling.throttle import Limit, Window
from tests.unit.throttling.oracle import Oracle, Rule, Violation, check_slots, check_uses, check_windows
from tests.unit.throttling.simulation import moody_soak, soak

Patch = pytest.MonkeyPatch
SECOND = 1_000_000_000


def bucket_full_after_restart(patch: Patch) -> None:
    patch.setattr(Throttle, "floor", lambda self, limit, start: -(10**18))


def restart_forgets_what_was_given_out_ahead(patch: Patch) -> None:
    floor = Throttle.floor
    patch.setattr(Throttle, "floor", lambda self, limit, start: floor(self, limit, start) - 3 * SECOND)


def tat_refunded(patch: Patch) -> None:
    def give_back(self: Dispenser, flow: Flow, first: int, n: int, now: int) -> int:
        start = flow.granted - (flow.granted - first) % 2**32
        taken = self._take_back(flow, start, start + n)
        for throttle in flow.path.throttles:
            for window in throttle.windows:
                window.tat -= window.interval * len(taken)
        return len(taken)

    patch.setattr(Dispenser, "give_back", give_back)


def slot_restamped(patch: Patch) -> None:
    recycle = Dispenser.recycle

    def restamped(self: Dispenser, path: object, now: int) -> None:
        path.returned = [max(slot, now // 1000 * 1000) for slot in path.returned or []]  # type: ignore[attr-defined]
        recycle(self, path, now)  # type: ignore[arg-type]

    patch.setattr(Dispenser, "recycle", restamped)


def slot_recycled_twice(patch: Patch) -> None:
    take_back = Dispenser._take_back
    patch.setattr(Dispenser, "_take_back", lambda self, flow, start, end: take_back(self, flow, start, end) * 2)


def second_return_accepted(patch: Patch) -> None:
    def look_only(self: Dispenser, flow: Flow, start: int, end: int) -> list[int]:
        runs: list[Run] = flow.held or []
        return [r.first + r.step * i for r in runs for i in range(r.n) if start <= r.serial + i < end]

    patch.setattr(Dispenser, "_take_back", look_only)
    patch.setattr(Audit, "returned", lambda self, flow, first, n: [(first, n)])


def use_by_unchecked(patch: Patch) -> None:
    patch.setattr(Permit, "usable", lambda self, now: self.not_before <= now)


def use_by_from_receipt(patch: Patch) -> None:
    granted = Lease.granted

    def from_receipt(
        self: Lease, n: int, first: int, step: int, ping_t: int, hold: int, received: int, now: int
    ) -> None:
        granted(self, n, first, step, received // 1000, 0, received, now)

    patch.setattr(Lease, "granted", from_receipt)


def not_before_ignored(patch: Patch) -> None:
    take = Lease.take
    patch.setattr(Lease, "take", lambda self, now: take(self, now + 25_000_000))
    patch.setattr(Permit, "usable", lambda self, now: now <= self.use_by)


def path_charged_in_part(patch: Patch) -> None:
    take = Throttle.take_slot
    patch.setattr(Throttle, "take_slot", lambda self, slot: None if self.key.name == "address" else take(self, slot))


def only_the_first_window_counts(patch: Patch) -> None:
    def take_slot(self: Throttle, slot: int) -> None:
        for window in self.windows[:1]:
            window.tat = max(window.tat, slot) + window.interval

    patch.setattr(Throttle, "take_slot", take_slot)


def given_out_too_early(patch: Patch) -> None:
    made = Path.__init__

    def __init__(self: Path, throttles: tuple[Throttle, ...]) -> None:
        made(self, throttles)
        self.horizon = 200_000_000

    patch.setattr(Path, "__init__", __init__)


def burst_grows_full(patch: Patch) -> None:
    change = Window.change

    def grown(self: Window, limit: Limit, slack: int, floor: int, now: int) -> None:
        burst = self.limit.burst
        change(self, limit, slack, floor, now)
        fill = max(0, limit.burst - burst) * self.interval
        self.tat, self.filled_at = self.tat - fill, self.filled_at - fill

    patch.setattr(Window, "change", grown)


def burst_falls_and_the_debt_with_it(patch: Patch) -> None:
    change = Window.change

    def fallen(self: Window, limit: Limit, slack: int, floor: int, now: int) -> None:
        burst = self.limit.burst
        change(self, limit, slack, floor, now)
        self.tat = max(self.filled_at, self.tat - max(0, burst - limit.burst) * self.interval)

    patch.setattr(Window, "change", fallen)


def debt_forgiven_by_a_change(patch: Patch) -> None:
    patch.setattr("proxy.throttling.throttle._scaled", lambda span, new, old: 0)


def new_length_owes_nothing(patch: Patch) -> None:
    patch.setattr(Window, "inherit", lambda self, other, now: None)


def new_window_has_its_whole_burst(patch: Patch) -> None:
    begin = Window.__init__

    def full(self: Window, limit: Limit, slack: int, floor: int, now: int) -> None:
        begin(self, limit, slack, floor, now)
        self.tat = self.filled_at = max(floor, now)

    patch.setattr(Window, "__init__", full)


MUTANTS = [
    bucket_full_after_restart,
    restart_forgets_what_was_given_out_ahead,
    tat_refunded,
    slot_restamped,
    slot_recycled_twice,
    second_return_accepted,
    use_by_unchecked,
    use_by_from_receipt,
    not_before_ignored,
    path_charged_in_part,
    only_the_first_window_counts,
    given_out_too_early,
]
#: Seen only where limits change.
CHANGE_MUTANTS = [
    burst_grows_full,
    burst_falls_and_the_debt_with_it,
    debt_forgiven_by_a_change,
    new_length_owes_nothing,
    new_window_has_its_whole_burst,
]


def soak_all() -> None:
    for seed in range(24):
        soak(seed, 250)


def moody_soak_all() -> None:
    for seed in range(100):
        moody_soak(seed, 60, 1.0)


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        soak_all()


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize("mutant", CHANGE_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught_where_limits_change(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        moody_soak_all()


# --- the oracle itself, against sequences written by hand ---


def test_slots_closer_than_the_interval() -> None:
    rule = Rule(60, 60, 1, 0)
    check_slots([0, SECOND, 2 * SECOND], rule)
    with pytest.raises(Violation):
        check_slots([0, SECOND, 2 * SECOND - 1], rule)


def test_burst_is_allowed_once() -> None:
    rule = Rule(6, 60, 3, 0)  # 15 s apart, three at once
    check_slots([0, 0, 0, 15 * SECOND], rule)
    with pytest.raises(Violation):
        check_slots([0, 0, 0, 15 * SECOND - 1], rule)


def test_half_open_windows() -> None:
    check_windows([0, 10], 10, 1)
    with pytest.raises(Violation):
        check_windows([0, 9], 10, 1)


def world() -> Oracle:
    return Oracle({"t": [Rule(60, 60)]}, {"p": ("t",)}, {"p": 100})


def test_use_within_the_slack_to_the_nanosecond() -> None:
    oracle = world()
    oracle.use(oracle.grant("p", 5, 0, 25), 105)
    oracle.finish()
    for at in (4, 106):
        late = world()
        with pytest.raises(Violation):
            late.use(late.grant("p", 5, 0, 25), at)


def test_one_slot_one_use() -> None:
    oracle = world()
    number = oracle.grant("p", 5, 0, 25)
    oracle.use(number, 5)
    with pytest.raises(Violation):
        oracle.use(number, 6)
    with pytest.raises(Violation):
        oracle.give_back(number)


def test_a_slot_comes_back_once() -> None:
    oracle = world()
    oracle.give_back(oracle.grant("p", 5, 0, 25))
    oracle.grant("p", 5, 0, 25)
    oracle.finish()
    oracle.grant("p", 5, 0, 25)
    with pytest.raises(Violation):
        oracle.finish()


def test_uses_that_slots_allow_pass_however_late_they_are() -> None:
    rule = Rule(600, 60, burst=3, slack=SECOND // 4, latest=SECOND // 2)
    slots = [0, 0, 0, *(int((number + 1) * rule.interval) + 1 for number in range(200))]
    for late in (0, SECOND // 2):
        check_uses(sorted(slot + (number % 2) * late for number, slot in enumerate(slots)), rule)


@pytest.mark.parametrize("where", [1, 60, 180])
def test_one_use_too_many_is_seen_wherever_it_is_and_whatever_the_window(where: int) -> None:
    rule = Rule(600, 60, latest=SECOND // 20)
    uses = [number * SECOND // 10 for number in range(200)]
    check_uses(uses, rule)
    with pytest.raises(Violation):
        check_uses(sorted([*uses, uses[where]]), rule)


@given(st.lists(st.integers(0, 3 * SECOND), max_size=12), st.integers(1, 3), st.integers(0, SECOND))
def test_it_says_the_same_as_each_pair(times: list[int], burst: int, late: int) -> None:
    rule, uses = Rule(5, 1, burst=burst, latest=late), sorted(times)
    pairs = ((i, j) for j in range(len(uses)) for i in range(j + 1))
    fine = all(uses[j] - uses[i] >= (j - i + 1 - burst) * rule.interval - late for i, j in pairs)
    try:
        check_uses(uses, rule)
    except Violation:
        assert not fine
    else:
        assert fine

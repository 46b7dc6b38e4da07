"""Connection places while managers are exchanged: never more sockets than places, and nobody waits beside a free one.

The sockets are the test's: it opens one when it has places and says so when it has closed it, to whichever manager has
them by then. Broken variants of the handing over are below, each of which has to be caught.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from proxy.policy.limits import Limits
from proxy.settings import Rate
from proxy.throttling import estate
from proxy.throttling.adopting import Adopting
from proxy.throttling.estate import Reader
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.later import Later
from proxy.throttling.line import Line
from proxy.throttling.manager import Manager
from proxy.throttling.registry import Registry
from proxy.throttling.throttle import SECOND
from tests.unit.throttling import test_handover as steps
from tests.unit.throttling.oracle import Violation, check_windows
from tests.unit.throttling.test_backoff import block

MS = 1_000_000
SOURCES = ("192.0.2.1", "192.0.2.2")
OWNERS = "abcd"
BLOCKS = (
    block(name="all", per=("nothing",), max_concurrent_connections=6),
    block(name="each", max_concurrent_connections=4),
    block(name="fresh", per=("nothing",), max_connection_rate=(Rate(20, 1),)),
)

Patch = pytest.MonkeyPatch


class Sockets:
    """Owners that want more connections than there are places, each for a short time.

    Attributes:
        open: who has one, from where. begun: when each was opened. served: how many each owner has had.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 100_000 * SECOND
        self.rules = Limits(BLOCKS)
        self.manager = Manager(1, self.now - 50_000 * SECOND, blocks=self.rules)
        self.waiting: dict[Ticket, str] = {}
        self.open: list[tuple[Places, str]] = []
        self.begun: list[int] = []
        self.served: Counter[str] = Counter()

    def ask(self, owner: str, source: str) -> None:
        answer = self.manager.admit(owner, 1.0, source, "198.51.100.1", (), self.now)
        if isinstance(answer, Places):
            self._begin(answer, source)
        else:
            self.waiting[answer] = source

    def close(self) -> None:
        if not self.open:
            return
        places, _ = self.open.pop(self.rng.randrange(len(self.open)))
        self._let_in(self.manager.release(places, self.now))

    def give_up(self) -> None:
        ticket = self.rng.choice(list(self.waiting))
        del self.waiting[ticket]
        self._let_in(self.manager.cancel(ticket, self.now))

    def run_for(self, span: int) -> None:
        end = self.now + span
        self._collect()
        while (wake := self.manager.next_wakeup()) is not None and wake <= end:
            self.now = max(self.now, wake)
            self.manager.advance(self.now)
            self._collect()
        self.now = end

    def exchange(self, eventful: bool = True) -> None:
        """Sockets close while the one is frozen, somebody asks it; all that wait ask the next one in their order."""
        former = self.manager
        former.freeze(self.now)
        reader = Reader()
        for chunk in former.gather(self.now):
            reader.feed(chunk)
            if eventful:
                self._something()
        heir = Manager(0, self.now, blocks=self.rules)
        held = heir.adopt(reader.finish(), self.now)
        for chunk in former.meanwhile():
            heir.adopt_meanwhile(chunk, held, self.now)
        self.manager = heir
        self.open = [(held[places.number], source) for places, source in self.open]
        asked, self.waiting = self.waiting, {}
        for ticket, source in asked.items():
            self.ask(ticket.owner, source)

    def thaw(self) -> None:
        """It comes to nothing."""
        self.manager.freeze(self.now)
        for _ in range(3):
            self._something()
        list(self.manager.gather(self.now))
        self.manager.thaw(self.now)

    def _something(self) -> None:
        self._collect()
        dice = self.rng.random()
        if dice < 0.4:
            self.close()
        elif dice < 0.5 and self.waiting:
            self.give_up()
        elif dice < 0.8:
            self.ask(self.rng.choice(OWNERS), self.rng.choice(SOURCES))

    def _collect(self) -> None:
        self._let_in(self.manager.take_admitted())

    def _let_in(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            source = self.waiting.pop(ticket, None)
            if source is not None:
                assert ticket.places is not None
                self._begin(ticket.places, source)

    def _begin(self, places: Places, source: str) -> None:
        self.open.append((places, source))
        self.begun.append(self.now)
        self.served[places.owner] += 1

    def check(self) -> None:
        by_source = Counter(source for _, source in self.open)
        if len(self.open) > 6 or max(by_source.values(), default=0) > 4:
            raise Violation(f"{by_source} connections")
        check_windows(self.begun[-100:], SECOND, 21)
        slot = max(each.earliest(self.now) for each in self.manager.blocks.throttles())
        for ticket, source in self.waiting.items():
            if slot <= self.now and len(self.open) < 6 and by_source[source] < 4:
                raise Violation(f"{ticket.owner} waits beside a free place")


def walk(seed: int, rounds: int = 400) -> Sockets:
    world = Sockets(seed)
    for _ in range(rounds):
        dice = world.rng.random()
        while len(world.waiting) < 5:
            world.ask(world.rng.choice(OWNERS), world.rng.choice(SOURCES))
        if dice < 0.5:
            world.close()
        elif dice < 0.6:
            world.give_up()
        elif dice < 0.8:
            for _ in range(world.rng.choice((1, 1, 20))):
                world.exchange()
        elif dice < 0.9:
            world.thaw()
        world.run_for(world.rng.choice((0, MS, 60 * MS, 300 * MS)))
        world.check()
    return world


@pytest.mark.parametrize("seed", range(6))
def test_never_more_sockets_than_places_and_nobody_beside_a_free_one(seed: int) -> None:
    assert walk(seed).served.total() > 150


def crowd(seed: int, exchanges: bool) -> Counter[str]:
    """How many of eight owners' connections were served, with four places and five requests of each, always asked in
    the same order."""
    world = Sockets(seed)
    owners = "abcdefgh"
    for _ in range(400):
        waiting = Counter(ticket.owner for ticket in world.waiting)
        for owner in owners:
            for _ in range(5 - waiting[owner]):
                world.ask(owner, SOURCES[0])
        world.close()
        if exchanges:
            world.exchange(eventful=False)
        world.run_for(100 * MS)
    return world.served


def test_few_places_are_shared_fairly_though_all_ask_anew_all_the_time() -> None:
    """Who asks first each time has no more of them: it is known who was served last."""
    for seed in range(3):
        assert crowd(seed, exchanges=True) == crowd(seed, exchanges=False)


# --- broken variants ---


def a_place_is_forgotten(patch: Patch) -> None:
    adopt = Adopting._places

    def forgetful(self: Adopting, record: estate.PlacesOf) -> None:
        adopt(self, record)
        if record.number % 3 == 0:
            self._core._book.release(self.held[record.number], self._now)

    patch.setattr(Adopting, "_places", forgetful)


def what_closed_meanwhile_is_forgotten(patch: Patch) -> None:
    patch.setattr(Manager, "meanwhile", lambda self: [])


def thawed_it_forgets_what_closed(patch: Patch) -> None:
    freeze = Manager.freeze

    def deaf(self: Manager, now: int) -> None:
        freeze(self, now)
        self._held = _Deaf()

    patch.setattr(Manager, "freeze", deaf)


class _Deaf(Later):
    def append(self, call: Callable[[int], object]) -> None:
        if len(self.calls) % 2:
            super().append(call)


def walk_all() -> None:
    for seed in range(10):
        walk(seed)


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize(
    "mutant",
    [a_place_is_forgotten, what_closed_meanwhile_is_forgotten, thawed_it_forgets_what_closed],
    ids=lambda mutant: mutant.__name__,
)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        walk_all()


def fines_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_fine", lambda self, record: None)


def permits_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_holding", lambda self, record: None)


def back_offs_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_cause", lambda self, record: None)


def replies_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_struck", lambda self, record: None)


def parts_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_stake", lambda self, record: None)


def turns_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_turn", lambda self, record: None)


def who_was_served_is_dropped(patch: Patch) -> None:
    patch.setattr(Line, "expect", lambda self, owner, due: None)


def overrides_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_override", lambda self, record: None)


def slots_that_came_back_are_dropped(patch: Patch) -> None:
    patch.setattr(Adopting, "_returned", lambda self, record: None)


def the_start_is_now(patch: Patch) -> None:
    patch.setattr(Registry, "adopt", lambda self, start: None)


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (fines_are_dropped, lambda: steps.test_a_message_without_a_permit_is_paid_for_after_the_change(True)),
        (permits_are_dropped, steps.test_a_permit_that_is_used_after_the_change_is_a_permit_once),
        (back_offs_are_dropped, steps.test_a_back_off_goes_on_begins_anew_with_the_next_reply_and_ends),
        (replies_are_dropped, steps.test_replies_that_were_let_pass_count_on_and_a_pause_pauses),
        (parts_are_dropped, steps.test_the_parts_of_all_stay_until_they_are_back),
        (turns_are_dropped, steps.test_whose_turn_it_is_stays_so_whoever_comes_back_first),
        (who_was_served_is_dropped, steps.test_who_was_served_last_is_last_in_the_line_again),
        (overrides_are_dropped, steps.test_what_was_set_by_hand_keeps_its_number_and_its_end),
        (slots_that_came_back_are_dropped, steps.test_a_slot_that_came_back_goes_to_somebody_once),
        (the_start_is_now, steps.test_limits_that_come_later_are_no_news_to_who_has_been_there_all_the_time),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_dropped_is_missed(
    mutant: Callable[[Patch], None], test: Callable[[], None], monkeypatch: Patch
) -> None:
    test()
    mutant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        test()

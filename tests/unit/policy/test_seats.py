"""Seats of all processes together: never more than there are, none refused while one is free, few words."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.seats import Seats, Word


class Process:
    """As `server.reception` is: clients come and go, and wait when there is no seat."""

    def __init__(self) -> None:
        self.seats = self.open = self.waiting = self.refused = 0
        self.asks = False

    def fill(self) -> None:
        while self.waiting and self.open < self.seats:
            self.waiting -= 1
            self.open += 1

    def half(self) -> int:
        count = (max(0, self.seats - self.open) + 1) // 2
        self.seats -= count
        return count


class House:
    """Processes and the book, with words that are under way both ways, each in its order."""

    def __init__(self, limit: int, processes: int) -> None:
        self.limit = limit
        self.book = Seats(limit, processes)
        self.processes = {number: Process() for number in range(processes)}
        self.down: dict[int, deque[int | None]] = {number: deque() for number in self.processes}
        self.up: dict[int, deque[tuple[str, int]]] = {number: deque() for number in self.processes}
        self.words = 0

    def say(self, words: list[Word]) -> None:
        for word in words:
            self.words += 1
            self.down[word.who].append(word.seats)

    def come(self, who: int) -> None:
        process = self.processes[who]
        process.waiting += 1
        process.fill()
        self.ask(who)

    def ask(self, who: int) -> None:
        process = self.processes[who]
        if process.waiting and not process.asks:
            process.asks = True
            self.words += 1
            self.up[who].append(("want", process.waiting + max(0, process.open - process.seats)))

    def leave(self, who: int) -> None:
        process = self.processes[who]
        if process.open:
            process.open -= 1
            process.fill()

    def die(self, who: int) -> None:
        self.processes[who] = Process()
        self.down[who].clear()
        self.up[who].clear()
        self.say(self.book.gone(who))

    def set_limit(self, limit: int) -> None:
        self.limit = limit
        self.say(self.book.set_limit(limit))

    def step(self, who: int, up: bool) -> None:
        """One word of this way arrives."""
        process = self.processes[who]
        if up and self.up[who]:
            what, count = self.up[who].popleft()
            self.say(self.book.want(who, count) if what == "want" else self.book.given_back(who, count))
        elif not up and self.down[who]:
            count = self.down[who].popleft()
            if count is None:
                self.words += 1
                self.up[who].append(("back", process.half()))
                return
            process.seats += count
            process.fill()
            if count >= 0:
                process.asks = False
                if not count:
                    process.refused, process.waiting = process.refused + process.waiting, 0
                self.ask(who)

    def settle(self) -> None:
        while any(self.up.values()) or any(self.down.values()):
            for who in self.processes:
                self.step(who, True)
                self.step(who, False)

    def taken(self) -> int:
        return sum(process.open for process in self.processes.values())


def test_one_process_after_the_other_fills_the_house_and_not_one_more() -> None:
    house = House(10, 3)
    for number in range(14):
        house.come(number % 3)
        house.settle()
    assert house.taken() == 10
    assert sum(process.refused for process in house.processes.values()) == 4


def test_a_client_is_let_in_wherever_the_last_free_seat_is() -> None:
    house = House(10, 2)
    for _ in range(10):
        house.come(0)
        house.settle()
    house.leave(0)
    house.come(1)
    house.settle()
    assert (house.processes[0].open, house.processes[1].open) == (9, 1)
    house.come(0)
    house.settle()
    assert house.processes[0].refused == 1


def test_many_clients_cost_few_words() -> None:
    house = House(10_000, 2)
    for number in range(9_000):
        house.come(number % 2)
        house.settle()
    assert house.taken() == 9_000
    assert house.words < 60
    before = house.words
    for _ in range(5_000):  # they come and go
        house.leave(0)
        house.come(0)
        house.settle()
    assert house.words == before


def test_who_has_died_has_none() -> None:
    house = House(4, 2)
    for _ in range(4):
        house.come(0)
        house.settle()
    house.die(0)
    house.come(1)
    house.settle()
    assert house.processes[1].open == 1
    assert house.book.lent(0) == 0


def test_one_that_dies_instead_of_answering_frees_what_is_waited_for() -> None:
    house = House(2, 2)
    for _ in range(2):
        house.come(0)
        house.settle()
    house.come(1)
    house.step(1, True)
    assert house.book.waits
    house.die(0)
    house.settle()
    assert (house.processes[1].open, house.processes[1].refused) == (1, 0)


def test_one_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    book = Seats(2, 2)
    assert book.want(0, 2) == [Word(0, 2)]
    assert book.want(1, 1) == [Word(0, None)]
    assert book.hurry() == [Word(1, 0)]
    assert book.given_back(0, 1) == []  # late, and kept for the next one
    assert book.want(1, 1) == [Word(1, 1)]


def test_a_lower_limit_takes_from_everybody() -> None:
    house = House(20, 2)
    for number in range(20):
        house.come(number % 2)
        house.settle()
    house.set_limit(8)
    house.settle()
    for who in (0, 1):
        for _ in range(7):
            house.leave(who)
    assert house.taken() == 6
    for number in range(5):
        house.come(number % 2)
        house.settle()
    assert house.taken() == 8
    house.set_limit(9)
    house.come(0)
    house.come(1)
    house.settle()
    assert house.taken() == 9


_steps = st.lists(
    st.tuples(st.sampled_from(["come", "come", "up", "down", "up", "down", "leave", "die"]), st.integers(0, 2)),
    max_size=200,
)


@given(st.integers(1, 12), _steps)
def test_whatever_comes_when_the_seats_are_as_many_as_they_are(limit: int, steps: list[tuple[str, int]]) -> None:
    house = House(limit, 3)
    for what, who in steps:
        if what in ("up", "down"):
            house.step(who, what == "up")
        else:
            getattr(house, what)(who)
        assert house.taken() <= limit
        assert sum(process.seats for process in house.processes.values()) <= limit
    house.settle()
    assert not house.book.waits
    assert all(not process.waiting for process in house.processes.values())
    for process in house.processes.values():
        process.refused = 0
    for _ in range(limit - house.taken()):  # nobody is refused while one is free
        house.come(0)
        house.settle()
    assert house.taken() == limit
    assert not house.processes[0].refused

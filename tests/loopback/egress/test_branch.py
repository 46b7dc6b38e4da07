"""Random walks of workers that ask for places over links: never more than there are, none lost, whatever is given up
when, and whichever link breaks."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent import sleep

from proxy.egress.admission import Admission
from proxy.egress.asking import wait_for_place
from proxy.egress.branch import Branch, Branches
from proxy.egress.clock import clock_ns
from proxy.egress.office import Applicant
from proxy.egress.remote import Remote
from proxy.egress.switch import Switch
from proxy.errors import Throttled
from proxy.net.seam import Seam, pair
from proxy.policy.limits import Limits
from proxy.throttling.manager import Manager
from tests.loopback.houses import block
from tests.waiting import wait_for

until = partial(wait_for, pause=sleep)
CAP = 3


class House:
    """A manager with one block, and workers at the ends of links."""

    def __init__(self, workers: int) -> None:
        self.blocks = Limits((block("narrow", connections=CAP),))
        self.admission = Admission(Manager(1, clock_ns(), False, self.blocks), lambda *missing: False)
        self.branches = Branches(Switch(self.admission))
        self.workers = [self._worker() for _ in range(workers)]
        self.throttles: set[object] = set()

    def _worker(self) -> SimpleNamespace:
        ours, theirs = pair()
        worker = SimpleNamespace(held=[], waiting=set())
        branch = self.branches.open(lambda record: worker.master.say(record))
        worker.branch = branch
        worker.remote = Remote(
            lambda record: worker.link.say(record),
            lambda: self.blocks,
            lambda *_: 0,
            say_late=lambda record: worker.link.say_late(record),
        )
        worker.master = Seam(ours, True, partial(self._hear, branch), branch.close)
        worker.link = Seam(theirs, False, lambda records, _: list(map(worker.remote.hear, records)), worker.remote.lost)
        return worker

    def _hear(self, branch: Branch, records: list[Any], _: object) -> None:
        with self.branches.together():
            for record in records:
                branch.hear(record)

    def enter(self, worker: SimpleNamespace, seconds: float) -> None:
        def run() -> None:
            try:
                places = wait_for_place(worker.remote, Applicant("a", 1.0, "127.0.0.1", "127.0.0.2"), seconds)
                assert places is not None
                self.throttles |= {each for own in worker.branch._places.values() for each in own.throttles}
                worker.held.append(places)
                self.check()
            except Throttled:
                pass
            finally:
                worker.waiting.discard(greenlet)

        greenlet = gevent.spawn(run)
        worker.waiting.add(greenlet)

    def used(self) -> int:
        return sum(throttle.used for throttle in self.throttles)

    def check(self) -> None:
        assert sum(len(worker.held) for worker in self.workers) <= CAP, "more than there are"

    def close(self) -> None:
        for worker in self.workers:
            gevent.killall(list(worker.waiting))
            while worker.held:
                worker.remote.leave(worker.held.pop())
        until(lambda: not any(len(worker.branch) for worker in self.workers), what="all places are back")
        until(lambda: not self.used(), what="the manager has them")
        assert not any(worker.remote._loans._held or worker.remote._asked for worker in self.workers)
        for worker in self.workers:
            worker.link.close()
            worker.master.close()
        self.admission.stop()


@pytest.mark.parametrize("seed", range(12))
def test_a_random_walk(seed):
    dice = random.Random(seed)
    house = House(2)
    for _ in range(300):
        worker = dice.choice(house.workers)
        step = dice.random()
        if step < 0.4:
            house.enter(worker, dice.choice([0.0, 20.0]))
        elif step < 0.6 and worker.held:
            worker.remote.leave(worker.held.pop(dice.randrange(len(worker.held))))
        elif step < 0.75 and worker.waiting:
            dice.choice(list(worker.waiting)).kill(block=False)  # also while its answer is under way
        elif step < 0.8 and worker.held:
            places = worker.held.pop()
            may, new = worker.remote.swap(places, Applicant("b", 1.0, "127.0.0.1", "127.0.0.3"))
            worker.held.append(new if may else places)
        else:
            for _ in range(dice.randrange(4)):
                sleep(0)
        house.check()
    house.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_worker_that_is_gone_in_the_middle_of_a_walk_leaves_nothing(seed):
    """What it had is free, what it waited for is called off, and the other one gets all there is."""
    dice = random.Random(seed)
    house = House(2)
    dead, alive = house.workers
    for _ in range(dice.randrange(1, 12)):
        house.enter(dice.choice(house.workers), 20.0)
        for _ in range(dice.randrange(4)):
            sleep(0)
    dead.link.close()
    dead.remote.lost()
    until(lambda: dead.master.closed, what="its end is seen")
    dead.held.clear()
    until(lambda: not dead.waiting, what="who waited there is told")
    dead.held.clear()
    while len(alive.held) + len(alive.waiting) < CAP:
        house.enter(alive, 20.0)
    until(lambda: len(alive.held) == CAP, what="the other one has all places")
    assert house.used() == CAP
    dead.remote._loans._held.clear()
    house.close()

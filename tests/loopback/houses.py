"""A keeper on real sockets with all that is around it, used as channels use it, its books checked in the end."""

from __future__ import annotations

from functools import partial
from ipaddress import ip_network
from time import monotonic
from types import SimpleNamespace

import gevent

from proxy.egress.admission import Admission
from proxy.egress.asking import wait_for_place
from proxy.egress.branch import Branches
from proxy.egress.bring_up import open_receiver
from proxy.egress.clock import clock_ns
from proxy.egress.keeper import Keeper
from proxy.egress.office import Applicant
from proxy.egress.pool import PoolKey
from proxy.egress.receiver import Limits, Wish
from proxy.egress.remote import Remote
from proxy.egress.switch import Switch
from proxy.model import Endpoint, TlsMode
from proxy.net import seam
from proxy.net.crew import Crew
from proxy.net.relay import make_engine
from proxy.policy.limits import Limits as BlockLimits
from proxy.settings import ThrottleSettings
from proxy.stats import Counters
from proxy.throttling.flows import Places, Throttle
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import Key
from tests.waiting import wait_for

until = partial(wait_for, pause=gevent.sleep)
SOURCE = "127.0.0.1"
SETTINGS = {
    "connections": True,
    "connections_max_idle": 30.0,
    "connections_max_age": 300.0,
    "connections_max_messages": 100,
    "connections_max_errors": 5,
    "connections_max_cached": 1000,
    "connections_max_cached_per_destination": 1000,
}


def limits(**changes):
    """Settings of the pool; names without `connections_max_`."""
    changed = {name if name == "connections" else f"connections_max_{name}": value for name, value in changes.items()}
    reuse = {f"reuse_{name}": value for name, value in (SETTINGS | changed).items()}
    return SimpleNamespace(**reuse, throttle_close_timeout=1.0)


def block(name, destination="127.0.0.0/8", connections=1):
    return ThrottleSettings(
        name=name,
        source=(),
        destination=(ip_network(destination),),
        max_concurrent_connections=connections,
        max_delivery_rate=(),
        wait=20.0,
    )


def key_of(mx, tls=TlsMode.NONE, tenant=""):
    return PoolKey(SOURCE, Endpoint(*mx.endpoint), "mta.example.org", tls, tenant=tenant)


def throttle(name="t"):
    """One that no manager knows."""
    return Throttle(Key(SOURCE, name))


def places(*throttles):
    return Places(1, "a", 1.0, throttles, ())


class House:
    """A keeper with everything around it, and the way that a channel uses it."""

    def __init__(self, settings=None, *blocks):
        self.engine = make_engine()
        self.counters = Counters()
        self.blocks = BlockLimits(blocks)
        self.manager = Manager(1, clock_ns(), False, self.blocks)
        self.admission = self.office()
        self.keeper = Keeper(self.engine, Crew(), self.counters, settings or limits(), self.admission)
        self.out = {}  # receivers that a user has
        self.throttles = set()  # that a connection had a place under
        self._sweeper = gevent.spawn(self.keeper.run)

    def office(self):
        self.at_the_manager = Admission(self.manager, lambda *missing: self.keeper.make_way(*missing))
        return self.at_the_manager

    def waits(self):
        """How many wait for places."""
        return self.admission.waiters.for_places

    def who(self, key, owner):
        return Applicant(owner, 1.0, key.source, key.destination.host)

    def open(self, key, owner="a", seconds=5.0):
        """As an OPEN is served: cached, or waited for, or fresh."""

        def swap(kept):
            may, places = self.admission.swap(kept.place, self.who(key, owner))
            if may:
                kept.place = places
            return may

        def move_in(kept):
            old, kept.place = kept.place, places
            self.admission.leave(old)
            return True

        receiver = self.keeper.take(key, swap)
        if receiver is None:
            places = wait_for_place(self.admission, self.who(key, owner), seconds, key)
            receiver = self.keeper.take(key, move_in, with_places=True) if places is not None else None
        if receiver is None:
            wish = Wish(key.ehlo_name, key.tls, key.tls_server_name)
            limits = Limits(20.0, 20.0, monotonic() + 20.0)

            def failed(stream):
                self.keeper.close_early(stream, places)

            receiver = open_receiver(self.engine, wish, key.source, key.destination, limits, 900.0, failed)
            receiver.place = places
        if receiver.place is not None:
            self.throttles |= set(receiver.place.throttles)
        self.out[receiver] = key
        return receiver

    def give(self, receiver, messages=1):
        receiver.messages += messages
        self.keeper.give(receiver, self.out.pop(receiver))

    def cache(self, mx, **more):
        """A connection that is idle now."""
        receiver = self.open(key_of(mx, **more))
        self.give(receiver)
        until(lambda: receiver in self.keeper.pool, what="it is cached")
        gevent.sleep(0)  # out of the batch of events that woke us: a socket closed in it stays open until its end
        return receiver

    def take(self, key):
        receiver = self.keeper.take(key, lambda kept: True)
        if receiver is not None:
            self.out[receiver] = key
        return receiver

    def check(self):
        pool = self.keeper.pool
        assert pool.offered == pool.hits + sum(pool.discards.values()) + len(pool)
        assert self.counters.discarded == dict(pool.discards)

    def discarded(self):
        """Reasons so far."""
        self.check()
        return dict(self.keeper.pool.discards)

    def close(self):
        for receiver in list(self.out):
            self.give(receiver)
        self.keeper.drain()
        until(lambda: self.keeper.cached == 0, what="nothing is held")
        self.check()
        assert not any(throttle.used or throttle.line for throttle in self.throttles), "places are left behind"
        self._sweeper.kill()
        self.at_the_manager.stop()
        self.engine.stop()


class Elsewhere(House):
    """The same with the manager at the other end of a link, as in a worker."""

    def office(self):
        self.at_the_manager = Admission(self.manager, lambda *missing: bool(self.branches.make_way(*missing)))
        self.branches = Branches(Switch(self.at_the_manager))
        ends = seam.pair()
        branch = self.branches.open(lambda record: self.master.say(record))
        office = Remote(
            lambda record: self.worker.say(record),
            lambda: self.blocks,
            lambda throttle, count: self.keeper.give_way(throttle, count),
            say_late=lambda record: self.worker.say_late(record),
        )
        self.master = seam.Seam(ends[0], True, lambda records, _: list(map(branch.hear, records)), branch.close)
        self.worker = seam.Seam(ends[1], False, lambda records, _: list(map(office.hear, records)), office.lost)
        self.branch = branch
        return office

    def waits(self):
        return self.branches.office.here.waiters.for_places

    def close(self):
        for receiver in list(self.out):
            self.give(receiver)
        self.keeper.drain()
        until(lambda: self.keeper.cached == 0, what="nothing is held")
        until(lambda: not len(self.branch), what="the places are back")
        assert not self.admission._loans._held
        assert not self.admission._loans._wanted
        assert not self.admission._asked
        super().close()
        self.worker.close()
        self.master.close()

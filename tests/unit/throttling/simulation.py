"""A small world for the throttle core: one manager, some MTAs, a network that delays, stops and breaks, and true time.

Nothing is real but the code under test (`manager`, `lease`). Every frame is a call that is made later, in order for
each direction; clients have clocks of their own. All that happens is told to the oracle, which knows only what went
over the wire. Randomness comes from the caller.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from proxy.throttling.lease import Demand, Lease, Permit
from proxy.throttling.limits import Mode, Part
from proxy.throttling.manager import Manager
from proxy.throttling.session import Output, Session
from proxy.throttling.throttle import AHEAD, Key, Limit
from tests.unit.throttling.heirs import read
from tests.unit.throttling.oracle import SECOND, Oracle, Rule, Terms

MS = 1_000_000
SOURCE = "192.0.2.1"

#: Throttles of the world: name → limits; and its paths.
LIMITS: dict[str, tuple[Limit, ...]] = {
    "minute": (Limit(120, 60),),
    "burst": (Limit(600, 60, 20), Limit(9000, 3600, 30)),
    "fast": (Limit(150, 1),),
    "rare": (Limit(1, 60),),
    "address": (Limit(40, 1, 5),),
}
PATHS: dict[str, tuple[str, ...]] = {
    "minute": ("minute",),
    "burst": ("burst", "address"),
    "fast": ("fast",),
    "rare": ("rare", "address"),
    "moody": ("moody",),
}
#: Throttles whose limits the clients change all the time, and what they begin with.
MOODY: dict[str, tuple[Limit, ...]] = {"moody": (Limit(100, 60),)}
#: What the design allows d to be for the smallest window of a path.
SLACK = {"minute": SECOND // 2, "burst": SECOND // 2, "fast": SECOND // 2, "rare": SECOND // 2}
# With both modes it may have no limit for a while: that gives the most slack.
SLACK["moody"] = 2 * SECOND


def make_rule(limit: Limit) -> Rule:
    smallest = 2 * SECOND if limit.seconds >= 600 else SECOND // 4 if limit.seconds >= 30 else SECOND // 10
    return Rule(limit.amount, limit.seconds, limit.burst, smallest, max(smallest, SECOND // 2))


def make_oracle() -> Oracle:
    rules = {name: [make_rule(limit) for limit in own] for name, own in LIMITS.items()}
    return Oracle(rules, PATHS, SLACK, {name: Terms() for name in MOODY}, AHEAD)


def draw_part(rng: random.Random, one_rate: float = 0.0) -> Part:
    """Limits of a client that has changed its mind: other amounts, bursts, lengths, modes; paused now and then."""
    if rng.random() < one_rate:
        return Part((Limit(100, rng.choice((60, 60, 60, 61)), rng.choice((1, 50, 50, 50))),))
    limits = []
    for seconds in sorted(rng.sample((60, 60, 60, 61, 75, 1), rng.choice((1, 1, 1, 2)))):
        amount = rng.choice((100, 100, 100, 30, 200))
        limits.append(Limit(amount, seconds, rng.choice((1, 1, 5, 25, 25))))
    unique = {limit.seconds: limit for limit in limits}
    mode = Mode.SUM if rng.random() < 0.1 else Mode.AVERAGE
    return Part(tuple(unique.values()), mode=mode, paused=rng.random() < 0.1)


@dataclass(eq=False)
class Link:
    """One connection between a client and the manager: two ordered pipes. Broken: nothing arrives any more."""

    session: Session | None = None
    up: int = 0
    down: int = 0
    broken: bool = False


@dataclass(eq=False)
class Grip:
    """One path's permits of one session at a client, with the oracle's number of each."""

    lease: Lease = field(default_factory=Lease)
    demand: Demand = field(default_factory=Demand)
    numbers: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Client:
    """An MTA. `naughty` ones hoard, lie and return what they do not hold, but send no message without a permit."""

    name: str
    clock_offset: int
    delay: tuple[int, int]
    naughty: bool = False
    #: Its senders hang: nobody comes for its permits.
    hung: bool = False
    run: int = 0
    link: Link | None = None
    incarnation: int = 0
    parts: dict[str, Part] = field(default_factory=lambda: {name: Part(own) for name, own in (LIMITS | MOODY).items()})
    ready: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATHS, 0))
    grips: dict[str, Grip] = field(default_factory=dict)
    old: list[tuple[str, Grip]] = field(default_factory=list)
    stopped_until: int = 0
    stalled_until: int = 0
    sent: int = 0


class World:
    """Time, the manager's host, and the clients."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 1_000 * SECOND
        self.oracle = make_oracle()
        self.clients: list[Client] = []
        self.incarnation = 0
        #: How often clients change only what should not matter: other rates hide what bursts let through.
        self.one_rate = 0.0
        #: Whether threads of the clients may be slow between a permit and its use.
        self.dawdling = True
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._wake: int | None = None
        self.manager: Manager | None = None
        self.start_manager()

    # --- time ---

    def at(self, when: int, what: Callable[[], None]) -> None:
        heappush(self._events, (max(when, self.now), next(self._order), what))

    def run_for(self, span: int) -> None:
        end = self.now + span
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heappop(self._events)
            what()
        self.now = end

    # --- manager ---

    def start_manager(self) -> None:
        self.incarnation += 1
        self.manager = Manager(self.incarnation, self.now)
        self.oracle.restarted(self.now)
        self._in_force: dict[str, tuple[Limit, ...]] = {}
        self._wake = None

    def kill_manager(self, down_for: int) -> None:
        self.manager = None
        for client in self.clients:
            if client.link is not None:
                client.link.broken = True
        self.at(self.now + down_for, self._restart)

    def exchange_manager(self, back_after: tuple[int, int] = (0, SECOND), frozen_for: int = 0) -> None:
        """An upgrade: another manager goes on where this one is; the clients are back within so much."""
        if self.manager is None:
            return
        former = self.manager
        former.freeze(self.now)
        estate = read(former.gather(self.now))
        self.run_for(frozen_for)
        self.manager = Manager(0, self.now)
        held = self.manager.adopt(estate, self.now)
        for chunk in former.meanwhile():
            self.manager.adopt_meanwhile(chunk, held, self.now)
        self._wake = None
        for client in self.clients:
            link = client.link
            if link is not None and not link.broken:
                link.broken = True
                back = max(self.now + self.rng.randint(*back_after), client.stopped_until)
                self.at(back, lambda c=client, old=link: self.connect(c) if c.link is old else None)  # type: ignore[misc]
        self._served()

    def _restart(self) -> None:
        if self.manager is None:
            self.start_manager()

    def _served(self) -> None:
        """After each call: send what came of it, and arm the one timer."""
        manager = self.manager
        if manager is None:
            return
        self._look_at_limits(manager)
        for session in manager.take_ready():
            client, link = next(
                ((c, c.link) for c in self.clients if c.link is not None and c.link.session is session), (None, None)
            )
            output = manager.take(session, self.now)
            if client is not None and link is not None and not link.broken:
                self._down(client, link, output)
        for session in manager.take_ended():
            self._closed(session)
        wake = manager.next_wakeup()
        if wake is not None and (self._wake is None or wake < self._wake or self._wake <= self.now):
            self._wake = wake
            self.at(wake, lambda: self._advance(manager))

    def _look_at_limits(self, manager: Manager) -> None:
        """Tell the oracle what is in force. Where nobody says anything, nobody gets anything."""
        for name, terms in self.oracle.terms.items():
            throttle = manager.throttles.get(Key(SOURCE, name))
            if throttle is None or throttle.terms is None or all(stake.part.paused for stake in throttle.terms.stakes):
                continue
            limits = tuple(window.limit for window in throttle.windows)
            if limits != self._in_force.get(name):
                self._in_force[name] = limits
                terms.change(self.now, [make_rule(limit) for limit in limits])

    def _closed(self, session: Session) -> None:
        """The manager has given a session up; its client connects again when it can."""
        for client in self.clients:
            link = client.link
            if link is not None and link.session is session and not link.broken:
                link.broken = True
                back = max(self.now, client.stopped_until) + 50 * MS
                self.at(back, lambda c=client, old=link: self.connect(c) if c.link is old else None)  # type: ignore[misc]

    def _advance(self, manager: Manager) -> None:
        if self.manager is manager:
            self._wake = None
            manager.advance(self.now)
            self._served()

    # --- network ---

    def _delay(self, client: Client) -> int:
        return self.rng.randint(*client.delay)

    def up(self, client: Client, call: Callable[[Manager, Session], None]) -> None:
        """A frame from the client; frames of another incarnation, or on a broken link, are lost."""
        link, incarnation = client.link, client.incarnation
        if link is None or link.broken:
            return
        link.up = max(link.up, self.now + self._delay(client), client.stalled_until)

        def arrive() -> None:
            manager, session = self.manager, link.session
            if manager is None or session is None or link.broken or manager.incarnation != incarnation:
                return
            call(manager, session)
            self._served()

        self.at(link.up, arrive)

    def _down(self, client: Client, link: Link, output: Output) -> None:
        names = list(PATHS)
        base = self.now // 1000 * 1000
        grants: list[tuple[str, int, int, int, list[int]]] = []
        for record in output.grants:
            path = names[record.id]
            slots = [base + (record.first_offset_us + i * record.step_us) * 1000 for i in range(record.n)]
            numbers = [self.oracle.grant(path, slot, self.now, AHEAD) for slot in slots]
            grants.append((path, record.n, record.first_offset_us, record.step_us, numbers))
        link.down = max(link.down, self.now + self._delay(client), client.stalled_until)
        self.at(link.down, lambda: self._receive(client, link, output, grants))

    def _receive(
        self, client: Client, link: Link, output: Output, grants: list[tuple[str, int, int, int, list[int]]]
    ) -> None:
        if client.link is not link or link.broken:
            return
        if client.stopped_until > self.now:  # the socket keeps it for the process
            self.at(client.stopped_until, lambda: self._receive(client, link, output, grants))
            return
        clock = self.now + client.clock_offset
        if output.ping is not None:
            t = output.ping
            self.up(client, lambda manager, session: manager.pong(session, t, 0, self.now))
        for limit in output.limits:
            client.grips[list(PATHS)[limit.id]].lease.slack_us = limit.slack_us
        for path, n, offset, step, numbers in grants:
            grip = client.grips[path]
            grip.numbers += numbers
            grip.lease.granted(n, offset, step, output.ping_t, output.hold_us, clock, clock)
        self.work(client)

    # --- clients ---

    def connect(self, client: Client) -> None:
        """A new session: the same run after a broken link, which knows of its permits still."""
        if self.manager is None or client.stopped_until > self.now:
            return
        self.cut(client)
        client.old += [(path, grip) for path, grip in client.grips.items() if len(grip.lease)]
        client.grips = {path: Grip() for path in PATHS}
        client.incarnation = self.manager.incarnation
        run = client.run.to_bytes(16, "big")
        session = self.manager.hello(client.name, run, client.name, 1.0, self.now)
        client.link = Link(session)
        self._served()
        self.ping(client)
        for id, (_, throttles) in enumerate(PATHS.items()):
            parts = [(Key(SOURCE, name), client.parts[name]) for name in throttles]
            self.up(client, lambda manager, session, id=id, parts=parts: manager.register(session, id, parts, self.now))  # type: ignore[misc]
        self.work(client)

    def cut(self, client: Client) -> None:
        """The connection breaks, and the manager sees it."""
        link = client.link
        if link is not None and not link.broken:
            link.broken = True
            if self.manager is not None and link.session is not None:
                self.manager.lost(link.session, self.now)
                self._served()

    def restart_client(self, client: Client) -> None:
        """The process died and begins anew: permits and mail in memory are gone."""
        self.cut(client)
        client.run += 1
        client.grips, client.old = {}, []
        self.connect(client)

    def ping(self, client: Client) -> None:
        link = client.link
        if link is None or link.broken:
            return
        if client.stopped_until <= self.now:
            t = (self.now + client.clock_offset) // 1000
            self.up(client, lambda manager, session: manager.ping(session, t, self.now))
        self.at(self.now + SECOND, lambda: self.ping(client) if client.link is link else None)

    def mail(self, client: Client, path: str, messages: int) -> None:
        client.ready[path] += messages
        self.work(client)

    def flush(self, client: Client, path: str) -> None:
        """The queue is empty all of a sudden: permits at hand go back."""
        client.ready[path] = 0
        grip = client.grips.get(path)
        if grip is None:
            return
        self.give_back(client, path, grip)
        self.work(client)

    def give_back(self, client: Client, path: str, grip: Grip) -> None:
        id = list(PATHS).index(path)
        for first, n in grip.lease.give_back(self.now + client.clock_offset):
            for number in grip.numbers[first : first + n]:
                self.oracle.give_back(number)
            for _ in range(2 if client.naughty else 1):
                self.up(client, lambda manager, session, f=first, m=n: manager.give_back(session, id, f, m, self.now))  # type: ignore[misc]

    def lie(self, client: Client, path: str) -> None:
        """Return what is not held or was used, and ask for more than there is."""
        id = list(PATHS).index(path)
        first, n, got = self.rng.randrange(2**32), self.rng.randrange(1, 50), self.rng.randrange(2**32)
        self.up(client, lambda manager, session: manager.give_back(session, id, first, n, self.now))
        self.up(client, lambda manager, session: manager.demand(session, id, 10**6, got, 10**6, 0, 0, self.now))

    def change_mind(self, client: Client, path: str) -> None:
        """The client registers other limits for the throttles of `path`."""
        id = list(PATHS).index(path)
        for name in PATHS[path]:
            client.parts[name] = draw_part(self.rng, self.one_rate)
        parts = [(Key(SOURCE, name), client.parts[name]) for name in PATHS[path]]
        self.up(client, lambda manager, session: manager.register(session, id, parts, self.now))

    def stop(self, client: Client, span: int) -> None:
        """SIGSTOP, and SIGCONT later."""
        client.stopped_until = max(client.stopped_until, self.now + span)

    def stall(self, client: Client, span: int) -> None:
        """The link passes nothing for a while, then everything."""
        client.stalled_until = max(client.stalled_until, self.now + span)

    def work(self, client: Client) -> None:
        """Use what can be used, say what is wanted, come back when the next permit is due."""
        if client.stopped_until > self.now:
            self.at(client.stopped_until, lambda: self.work(client))
            return
        clock = self.now + client.clock_offset
        soonest: int | None = None
        for path, grip in [*client.old, *client.grips.items()]:
            while client.ready[path] and not client.hung and (permit := grip.lease.take(clock)):
                client.ready[path] -= 1
                number = grip.numbers[permit.serial]
                # Between the permit and MAIL FROM some time passes, during which the process may be stopped.
                pause = self._pause() if self.dawdling else 0
                if pause:
                    self.at(self.now + pause, lambda c=client, p=path, t=permit, n=number: self._send(c, p, t, n))  # type: ignore[misc]
                else:
                    self._send(client, path, permit, number)
            due = grip.lease.next_at(clock)
            if client.hung:
                due = grip.lease.lapses_at()
            if due is not None and client.ready[path]:
                soonest = due if soonest is None else min(soonest, due)
        client.old = [(path, grip) for path, grip in client.old if len(grip.lease)]
        for id, (path, grip) in enumerate(client.grips.items()):
            want = max(0, client.ready[path] - grip.lease.at_hand(clock))
            due = grip.demand.due_at(want, grip.lease.got, clock, grip.lease.voided)
            if due is not None and due <= clock:
                grip.demand.sent(want, grip.lease.got, clock, grip.lease.voided)
                got, lapsed = grip.lease.got, grip.lease.voided
                self.up(
                    client,
                    lambda manager, session, id=id, want=want, got=got, lapsed=lapsed: manager.demand(  # type: ignore[misc]
                        session, id, want, got % 2**32, want, 0, 0, self.now, lapsed % 2**32
                    ),
                )
            elif due is not None:
                soonest = due if soonest is None else min(soonest, due)
            if not client.ready[path] and len(grip.lease) and not client.naughty:
                self.give_back(client, path, grip)
        if soonest is not None:
            self.at(soonest - client.clock_offset, lambda: self.work(client))

    def _pause(self) -> int:
        if self.rng.random() < 0.02:  # the thread just does not get its turn
            return 700 * MS
        return self.rng.choice((0, 0, 0, self.rng.randrange(30 * MS)))

    def _send(self, client: Client, path: str, permit: Permit, number: int) -> None:
        if client.stopped_until > self.now:
            self.at(client.stopped_until, lambda: self._send(client, path, permit, number))
            return
        if permit.usable(self.now + client.clock_offset):
            self.oracle.use(number, self.now)
            client.sent += 1
        else:
            client.ready[path] += 1


def act(world: World, rng: random.Random, restarts: bool = True) -> None:
    """One random thing happens."""
    client = rng.choice(world.clients)
    path = rng.choice(list(PATHS))
    dice = rng.random()
    if client.link is None or client.link.broken:
        world.connect(client)
    elif dice < 0.45:
        world.mail(client, path, rng.choice((1, 5, 40, 400)))
    elif dice < 0.65:
        world.flush(client, path)
    elif dice < 0.70:
        world.stall(client, rng.choice((50 * MS, 400 * MS, 3 * SECOND, 8 * SECOND)))
    elif dice < 0.75:
        world.stop(client, rng.choice((100 * MS, 600 * MS, 10 * SECOND)))
    elif dice < 0.80:
        world.connect(client)
    elif dice < 0.83:
        world.restart_client(client)
    elif dice < 0.85 and restarts and world.manager is not None:
        world.kill_manager(rng.choice((20 * MS, 2 * SECOND)))
    elif dice < 0.90:
        world.change_mind(client, "moody")
        world.mail(client, "moody", 200)
    elif dice < 0.97 and client.naughty:
        world.lie(client, path)
    world.run_for(rng.choice((0, 5 * MS, 30 * MS, 300 * MS, 2 * SECOND)))


def make_world(rng: random.Random) -> World:
    """Five MTAs: near, far, with clocks of their own, and one of them naughty."""
    world = World(rng)
    delays = ((0, MS), (MS, 3 * MS), (5 * MS, 30 * MS), (80 * MS, 110 * MS), (0, 5 * MS))
    for index, delay in enumerate(delays):
        offset = rng.randrange(-(10**6), 10**6) * SECOND
        world.clients.append(Client(f"mta{index}", offset, delay, naughty=index == 4))
    return world


def nobody_is_forgotten(manager: Manager, now: int) -> None:
    """Whoever wants a slot and may have one stands in a queue that will be looked at, or is parked for its session."""
    dispenser = manager._dispenser
    for session in manager.sessions.values():
        for flow in session.flows.values():
            if flow.want <= 0 or flow.paused:
                continue
            if flow.queued is None:
                assert flow in session.parked, flow.id
            else:
                assert flow.queued in dispenser.wheel, flow.id
                assert flow.queued.slots is not None


def moody_soak(seed: int, steps: int, one_rate: float = 0.5) -> World:
    """Three MTAs with more mail than their common throttle lets through, which come and go and change its limits."""
    rng = random.Random(seed)
    world = World(rng)
    world.dawdling, world.one_rate = False, one_rate
    world.clients = [Client(f"mta{index}", index * SECOND, (0, 2 * MS)) for index in range(3)]
    for _ in range(steps):
        client, dice = rng.choice(world.clients), rng.random()
        if client.link is None or client.link.broken:
            world.connect(client)
        elif dice < 0.08:
            world.up(client, lambda manager, session: manager.bye(session, world.now))
        elif dice < 0.12:  # all of them, and it is forgotten when its debt is paid
            for each in world.clients:
                world.up(each, lambda manager, session: manager.bye(session, world.now))
            world.run_for(rng.choice((2 * SECOND, 70 * SECOND)))
        elif dice < 0.18:  # nobody has mail, so that bursts fill
            for each in world.clients:
                world.flush(each, "moody")
            world.run_for(70 * SECOND)
        elif dice < 0.25:
            world.restart_client(client)
        elif dice < 0.27 and world.manager is not None:
            world.kill_manager(rng.choice((20 * MS, 2 * SECOND)))
        else:
            world.change_mind(client, "moody")
        for each in world.clients:
            world.mail(each, "moody", max(0, 1000 - each.ready["moody"]))
        world.run_for(rng.choice((0, 30 * MS, SECOND, 5 * SECOND, 30 * SECOND)))
    world.oracle.finish()
    return world


def soak(seed: int, steps: int) -> World:
    """A world after `steps` random actions, checked to the end."""
    rng = random.Random(seed)
    world = make_world(rng)
    for _ in range(steps):
        act(world, rng)
        if world.manager is not None:
            nobody_is_forgotten(world.manager, world.now)
    world.oracle.finish()
    return world

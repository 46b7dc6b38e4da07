"""What processes ask each other for operators, with two whole servers in one process that ask each other over bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic
from types import SimpleNamespace
from typing import Any

import gevent
import msgspec
import pytest

from proxy.config import load
from proxy.errors import Step, UpstreamError
from proxy.log import outputs, steps
from proxy.log.events import Event
from proxy.log.outputs import Recent
from proxy.model import Endpoint
from proxy.server.here import Here
from proxy.server.questions import Answering, Everywhere, Household, Verbose
from proxy.server.server import Server
from proxy.stats import Standing
from proxy.status import parts as known
from proxy.status.colleagues import Hear, Member, Reply, Say
from proxy.status.parts import Part, merge
from proxy.status.roll import Roll
from tests import program

MX = Endpoint("198.51.100.7", 25)
SOURCE = "192.0.2.1"
REFUSED = UpstreamError("connect: refused", Step.CONNECT)


class Connection:
    """One that an operator may look at and end."""

    def __init__(self, number: int, age: float) -> None:
        self.number, self.started, self.endings = number, monotonic() - age, list[Any]()

    def standing(self) -> Standing:
        client = Endpoint("127.0.0.1", self.number)
        return Standing(self.number, "mta", "socks5", client, SOURCE, MX, "relay", self.started)

    def cut(self, ending: Any) -> None:
        self.endings.append(ending)


class Colleagues:
    """Workers whose questions and answers are bytes, as if they came over a link."""

    def __init__(self) -> None:
        self.roll = Roll(1, "1", 0.0)
        self.workers: dict[int, Any] = {}
        self.silent: set[int] = set()
        self.asked: list[tuple[int, str]] = []
        self.following: list[Callable[[], None]] = []
        self.has_room = True

    def add(self, number: int, answering: Any) -> None:
        self.workers[number] = answering
        self.roll.begun(number, 100 + number, "1", monotonic())

    def members(self) -> list[Member]:
        return self.roll.members()

    def parts(self) -> list[Part]:
        return self.roll.parts()

    def heard(self, who: int, part: Part) -> None:
        self.roll.heard(who, part, monotonic())

    def ask(self, what: str, body: bytes, seconds: float, who: int | None = None) -> list[Reply]:
        assert seconds > 0
        replies = []
        for number, answering in self.workers.items():
            self.asked.append((number, what))
            body_ = None if number in self.silent else answering.answer(what, bytes(body))
            replies.append(Reply(number, body_))
        return replies

    def follow(self, what: str, body: bytes, hear: Hear) -> Callable[[], None]:
        ends = []
        for number, answering in self.workers.items():

            def say(body: bytes, number: int = number) -> bool:
                if self.has_room:
                    hear(number, body)
                return self.has_room

            ends.append(answering.tell(what, body, say))
        self.following += ends
        return lambda: [end() for end in ends] and None


class Worker:
    """The worker's side of one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.here = Here(lambda: server.services, server._part)
        self.answering = Answering(self.here)

    def add(self, *connections: Any) -> None:
        for connection in connections:
            self.server.services.instances.connections[connection] = None


class World:
    """A master and two workers."""

    def __init__(self, servers: list[Server]) -> None:
        self.master, self.one, self.two = map(Worker, servers)
        self.colleagues = Colleagues()
        self.colleagues.add(1, self.one.answering)
        self.colleagues.add(2, self.two.answering)
        self.everywhere = Everywhere(self.master.here, lambda: self.colleagues)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(outputs, "reconfigure", lambda settings: None)
    loaded = load.load(["--config-filename=f"], {}, lambda path: program.config())
    servers = [Server(lambda breathe, lent: loaded, loaded) for _ in range(3)]
    for server in servers:
        server._take(server._prepare(loaded, lambda: None), lambda: None)
    world = World(servers)
    yield world
    for worker in (world.master, world.one, world.two):
        worker.here.watching.end()
    for server in servers:
        server.services.instances.connections.clear()
        server.close()
        server._wiring.engine.stop()


def test_connections_of_all_are_listed_the_oldest_first(world: World) -> None:
    world.master.add(Connection(10, 5.0))
    world.one.add(Connection(11, 1.0), Connection(21, 9.0))
    world.two.add(Connection(12, 3.0))
    rows, silent = world.everywhere.connections()
    assert [row.id for row in rows] == [21, 10, 12, 11]
    assert silent == ()
    world.colleagues.silent.add(1)
    rows, silent = world.everywhere.connections()
    assert ([row.id for row in rows], silent) == ([10, 12], (1,))


def test_one_is_closed_wherever_it_is(world: World) -> None:
    there, elsewhere = Connection(10, 1.0), Connection(12, 1.0)
    world.master.add(there)
    world.two.add(elsewhere)
    assert world.everywhere.close(10) == (True, ())
    assert world.colleagues.asked == [], "it was found here"
    assert world.everywhere.close(12) == (True, ())
    assert (len(there.endings), len(elsewhere.endings)) == (1, 1)
    assert world.everywhere.close(99) == (False, ())
    world.colleagues.silent.add(2)
    assert world.everywhere.close(12) == (False, (2,))


@pytest.mark.only_python("a method of the keeper put in the place of its own")
def test_cached_connections_are_dropped_everywhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for worker, count in ((world.master, 1), (world.one, 2), (world.two, 4)):
        monkeypatch.setattr(
            worker.server._wiring.keeper, "forsake", lambda source, count=count: count if source == SOURCE else 0
        )
    assert world.everywhere.drop_cached(SOURCE) == (7, ())
    assert world.everywhere.drop_cached("192.0.2.2") == (0, ())


def test_who_has_logged_in_anywhere(world: World) -> None:
    now = monotonic()
    for worker, at in ((world.master, 30.0), (world.one, 20.0), (world.one, 10.0), (world.two, 5.0)):
        logins = worker.server.services.instances.logins
        logins.proven("mta", "10.0.0.5", b"new" if at == 20.0 else b"old", now - at)
    logins_, silent = world.everywhere.logins()
    found = list(logins_.known(lambda instance: [b"old", b"new"], now))
    assert silent == ()
    assert [(each.secret, each.latest, each.logins, round(each.ago)) for each in found] == [
        (1, True, 3, 5),
        (2, False, 1, 20),
    ]


def test_what_was_logged_anywhere_in_its_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*times: float) -> Callable[[], list[Recent]]:
        return lambda: [Recent("now", at, "INFO", Event.CONTROL, f"at {at}") for at in times]

    for worker, times in ((world.master, (1.0, 4.0)), (world.one, (2.0,)), (world.two, (3.0, 5.0))):
        monkeypatch.setattr(worker.here, "events", lines(*times))
    found, silent = world.everywhere.events()
    assert ([line.at for line in found], silent) == ([1.0, 2.0, 3.0, 4.0, 5.0], ())
    assert all(isinstance(line.event, Event) for line in found)
    monkeypatch.setattr(world.one.here, "events", lines(*map(float, range(-500, 0))))
    found, _ = world.everywhere.events()
    assert len(found) == outputs.MOST_RECENT
    assert [line.at for line in found[-5:]] == [-1.0, 1.0, 3.0, 4.0, 5.0]


def test_steps_are_logged_everywhere_until_their_time_is_over(world: World) -> None:
    assert world.everywhere.log_verbose({"instance": "mta"}, 60.0, "why") == (None, ())
    watches = [worker.here.watching.verbose for worker in (world.master, world.one, world.two)]
    assert [[(each.id, each.wanted) for each in some] for some in watches] == [[("log1", {"instance": "mta"})]] * 3
    assert all(59.0 < each.left <= 60.0 for (each,) in watches)
    world.colleagues.silent.add(1)
    assert world.everywhere.log_less("log1") == (1, (1,))
    watches = [worker.here.watching.verbose for worker in (world.master, world.one, world.two)]
    assert [len(some) for some in watches] == [0, 1, 0], "that of the silent one ends by itself"


def test_a_worker_that_is_new_is_asked_what_the_others_were(world: World) -> None:
    world.everywhere.log_verbose({"instance": "mta"}, 60.0, "why")
    world.everywhere.log_verbose({}, 30.0, "why not")
    world.one.here.watching.end()
    for what, body in world.everywhere.standing_orders():
        world.one.answering.answer(what, body)
    found = world.one.here.watching.verbose
    assert [(each.id, dict(each.wanted)) for each in found] == [("log1", {"instance": "mta"}), ("log2", {})]
    assert found[0].left > 50.0
    assert 20.0 < found[1].left <= 30.0


def told(world: World, wanted: dict[str, str], say: Say) -> Callable[[], None]:
    return world.one.answering.tell("trace", msgspec.msgpack.encode(wanted), say)


def step(number: int, text: str) -> None:
    steps.tell(Connection(number, 1.0).standing(), text)


def test_steps_are_told_to_who_traces(world: World) -> None:
    seen: list[list[str]] = []
    end = told(world, {"instance": "mta"}, lambda body: seen.append(msgspec.msgpack.decode(body)) is None)
    step(11, "connects")
    (lines,) = seen
    assert lines[0].startswith("11 mta 127.0.0.1:11 192.0.2.1 -> 198.51.100.7:25 +1.0")
    assert lines[0].endswith(" connects")
    end()
    end()
    assert not steps.on
    step(11, "over")
    assert len(seen) == 1


def test_steps_for_which_there_is_no_room_are_counted(world: World) -> None:
    seen: list[str] = []
    has_room = True

    def say(body: bytes) -> bool:
        if has_room:
            seen.extend(msgspec.msgpack.decode(body))
        return has_room

    end = told(world, {}, say)
    step(11, "one")
    has_room = False
    step(11, "two")
    step(11, "three")
    has_room = True
    step(11, "four")
    step(11, "five")
    end()
    assert [line.rpartition(" ")[2] for line in seen] == ["one", "enough", "four", "five"]
    assert seen[1].startswith("2 steps left out")


def test_a_trace_has_the_steps_of_all_and_its_end_ends_them(world: World) -> None:
    """In one process each of three watches sees each step."""
    lines = world.everywhere.trace({"instance": "mta"}, 60.0)
    found: list[str] = []
    reading = gevent.spawn(lambda: [found.extend(next(lines)) for _ in range(3)])
    while not steps.on:
        gevent.sleep(0)
    for text in ("one", "two", "three"):
        step(11, text)
        gevent.sleep(0)
    reading.get(timeout=30)
    assert sorted(line.rpartition(" ")[2] for line in found) == sorted(["one", "two", "three"] * 3)
    lines.close()  # type: ignore[attr-defined]
    assert not steps.on


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("no such question", b""),
        ("close", b"\xc1"),
        ("close", msgspec.msgpack.encode("x")),
        ("log_verbose", msgspec.msgpack.encode({"id": 1})),
        ("expect", msgspec.msgpack.encode((["no address"], []))),
        ("log_less", b""),
    ],
)
def test_what_cannot_be_understood_is_not_answered(world: World, what: str, body: bytes) -> None:
    assert world.one.answering.answer(what, body) == b""


@pytest.mark.parametrize(("what", "body"), [("trace", b"\xc1"), ("other", msgspec.msgpack.encode({}))])
def test_nor_told(world: World, what: str, body: bytes) -> None:
    end = world.one.answering.tell(what, body, lambda body: True)
    assert not steps.on
    end()


def test_an_answer_of_another_version_is_none(world: World) -> None:
    class Other:
        def answer(self, what: str, body: bytes) -> bytes:
            return msgspec.msgpack.encode({"not": "a list"})

    world.colleagues.workers[2] = Other()
    world.one.add(Connection(11, 1.0))
    rows, silent = world.everywhere.connections()
    assert ([row.id for row in rows], silent) == ([11], (2,))
    numbers = [len(part.processes) for part in world.everywhere.parts()]
    assert numbers == [1, 0], "its part was not understood; the other's, and what the dead have left, are there"


def test_details_are_said_now_and_then(world: World) -> None:
    said = [known.decode(world.one.answering.part()).details is not None for _ in range(21)]
    assert said == [True, *[False] * 9, True, *[False] * 9, True]


def test_a_view_is_of_all(world: World) -> None:
    for number, worker in enumerate((world.master, world.one, world.two), 1):
        worker.server.services.counters.bytes_up = number
        worker.server.services.gauges.outgoing = number
        worker.server.services.troubles.failed(SOURCE, MX, REFUSED, monotonic())
        worker.add(*(Connection(10 * number + each, 1.0) for each in range(number)))
    whole = merge([world.master.here.part(), *world.everywhere.parts()])
    assert (whole.counters["bytes_up"], whole.active) == (6, 6)
    assert whole.details is not None
    assert whole.details.instances == {"mta": 6}
    assert whole.details.receivers[str(MX)].failed == {"connect": 3}
    assert len(whole.processes) == 3


def test_what_goes_well_elsewhere_ends_trouble(world: World) -> None:
    now = monotonic()
    for _ in range(3):
        world.one.server.services.troubles.failed(SOURCE, MX, REFUSED, now)
    world.everywhere.parts()
    asked = [what for _, what in world.colleagues.asked]
    assert asked.count("expect") == 2
    world.two.server.services.troubles.over(SOURCE, MX, "", True, now + 1)
    world.everywhere.parts()
    whole = merge([world.master.here.part(), *world.everywhere.parts()])
    assert [what for _, what in world.colleagues.asked].count("expect") == 2, "all know of all already"
    assert whole.details is not None
    for peer in (whole.details.receivers[str(MX)], whole.details.sources[SOURCE]):
        assert known.failing_in_a_row(peer) is None
        assert (peer.failed, peer.opened) == ({"connect": 3}, 1)


def test_parts_of_the_silent_are_those_that_they_said_last(world: World) -> None:
    world.one.server.services.counters.bytes_up = 5
    world.everywhere.parts()
    world.one.server.services.counters.bytes_up = 9
    world.colleagues.silent.add(1)
    assert merge(world.everywhere.parts()).counters["bytes_up"] == 5
    world.colleagues.roll.died(1, "killed", monotonic())
    del world.colleagues.workers[1]
    assert merge(world.everywhere.parts()).counters["bytes_up"] == 5


def test_a_process_that_was_replaced_answers_for_its_workers_too(world: World) -> None:
    """As the one sees it that took its place, which knows it as one worker."""
    household = Answering(Household(world.master.here, lambda: world.colleagues))
    colleagues = Colleagues()
    colleagues.add(65, household)
    outside: Any = SimpleNamespace(
        connections=list, close=lambda number: False, trouble=lambda: (set(), set()), expect=lambda *names: None
    )
    everywhere = Everywhere(outside, lambda: colleagues)
    closing = Connection(12, 1.0)
    world.master.add(Connection(10, 3.0))
    world.two.add(closing)
    for number, worker in enumerate((world.master, world.one, world.two), 1):
        worker.server.services.counters.bytes_up = number
        worker.server.services.troubles.failed(f"192.0.2.{number}", MX, REFUSED, monotonic())
    assert [row.id for row in everywhere.connections().found] == [10, 12]
    assert everywhere.close(12) == (True, ())
    assert len(closing.endings) == 1
    for _ in range(2):
        whole = merge(everywhere.parts())
        assert whole.counters["bytes_up"] == 6
        assert len(whole.processes) == 1
        assert whole.details is not None
        assert set(whole.details.sources) == {"192.0.2.1", "192.0.2.2", "192.0.2.3"}
    assert known.decode(household.part()).counters["bytes_up"] == 6
    household.answer("log_verbose", msgspec.msgpack.encode(Verbose("log7", {}, 60.0)))
    for worker in (world.master, world.one, world.two):
        assert [each.id for each in worker.here.watching.verbose] == ["log7"]
    assert msgspec.msgpack.decode(household.answer("log_less", msgspec.msgpack.encode(None))) == 1
    assert world.two.here.watching.verbose == []
    seen: list[str] = []
    end = household.tell(
        "trace", msgspec.msgpack.encode({}), lambda body: seen.extend(msgspec.msgpack.decode(body)) is None
    )
    step(11, "connects")
    assert len(seen) == 3, "in one process each of three sees it"
    end()
    assert not steps.on


def test_verbose_survives_the_link() -> None:
    verbose = Verbose("log1", {"instance": "mta"}, 60.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(verbose), type=Verbose) == verbose

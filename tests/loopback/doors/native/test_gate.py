"""A MAIL that has to wait on a channel: what goes on before it, what stands behind it, and who leaves meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise

import gevent
import pytest

from proxy.doors.native.gate import Gate, Way
from proxy.doors.native.link import ClientGone, Link
from proxy.doors.native.transfer import Transfer
from proxy.egress.admission import Admission
from proxy.egress.clock import clock_ns
from proxy.errors import Throttled
from proxy.net.relay import Engine
from proxy.net.tls import PlainStream
from proxy.policy.limits import Limits
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.smtp.tracker import Tracker
from proxy.throttling.flows import Places
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import LATENESS, SECOND, Key, Limit
from tests.loopback.doors.native import ends
from tests.loopback.egress.test_admission import Block
from tests.loopback.net.relays import close_peers, tcp_pair, until

Admit = Callable[[Manager], Admission]

MAIL, REST = b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.net>\r\nDATA\r\n"


class Barrier:
    """A gate that a test opens."""

    def __init__(self) -> None:
        self.closed = False
        self.refusal: Throttled | None = None
        self.holds = True
        self.asked = 0
        self.asked_unseen = 0

    def unseen(self) -> bool:
        self.asked_unseen += 1
        self.closed = self.holds and self.asked_unseen == 1
        return not self.closed

    def mail(self) -> bool:
        self.asked += 1
        self.closed = self.holds
        return not self.closed

    def open(self, refusal: Throttled | None = None) -> None:
        self.closed, self.refusal = False, refusal
        self.link.wake()

    link: Link


class Carried:
    """A transfer between a client and a receiver, with a barrier."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.client, ours = tcp_pair("127.0.0.1")
        self.receiver, theirs = tcp_pair("127.0.0.2")
        self.receiver.settimeout(30)
        self.client.settimeout(30)
        for sock in (ours, theirs):
            self.engine.register(sock.fileno())
        self.guest = ends.guest(PlainStream(ours))
        self.stream = PlainStream(theirs)
        self.gate = Barrier()
        self.heard = frames.FrameDecoder(frames.MAX_PAYLOAD)
        self.transfer: Transfer | None = None
        self.greenlet = gevent.spawn(self._carry)
        until(lambda: self.transfer is not None, what="the transfer began")

    def _carry(self) -> Transfer:
        self.gate.link = link = Link(self.engine, self.guest)
        self.transfer = Transfer(link, ends.receiver(self.stream), Tracker(), gate=self.gate)  # type: ignore[arg-type]
        self.transfer.carry()
        return self.transfer

    def says(self, *pieces: bytes) -> None:
        self.client.sendall(b"".join(frames.encode_data(piece) for piece in pieces))

    def held(self, asked: int = 1) -> None:
        until(lambda: self.gate.asked == asked and self.gate.closed, what="a MAIL is held")

    def hears(self, expected: bytes) -> None:
        """The client, in DATA frames."""
        got = b""
        while len(got) < len(expected):
            kind, payload = self._frame()
            assert kind == frames.DATA
            got += payload
        assert got == expected

    def hears_word(self) -> m.Message:
        return frames.decode(self._frame(), frames.CHANNEL_FROM_PROXY)

    def _frame(self) -> frames.Frame:
        while (frame := self.heard.next_frame()) is None:
            self.heard.receive(self.client.recv(1000))
        return frame[0], bytes(frame[1])

    def gets(self, expected: bytes) -> None:
        got = b""
        while len(got) < len(expected):
            got += self.receiver.recv(len(expected) - len(got))
        assert got == expected

    def gets_nothing(self) -> None:
        gevent.sleep(0.02)
        self.receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.receiver.recv(1)
        self.receiver.settimeout(30)

    def close(self) -> None:
        self.greenlet.kill()
        self.engine.close(self.guest.stream.socket)
        self.engine.close(self.stream.socket)
        self.engine.stop()
        close_peers()


@pytest.fixture(params=[pytest.param("barrier", marks=pytest.mark.only_python("a gate that the test opens"))])
def carried():
    it = Carried()
    yield it
    it.close()


@pytest.mark.parametrize("cuts", [[], [4], [1, 20], [len(MAIL) - 1], [len(MAIL)], list(range(1, 60))])
def test_what_stands_behind_a_held_mail_comes_after_it_and_once(carried, cuts):
    group = b"RSET\r\n" + MAIL + REST
    edges = [0, *[6 + cut for cut in cuts if 6 + cut < len(group)], len(group)]
    carried.says(*[group[a:b] for a, b in pairwise(edges)])
    carried.held()
    carried.gets(b"RSET\r\n")
    carried.gate.holds = False
    carried.gate.open()
    carried.gets(MAIL + REST)
    carried.gets_nothing()


def test_each_mail_of_a_group_waits_for_itself(carried):
    carried.says(MAIL + b"RSET\r\n" + MAIL + b"RSET\r\n" + MAIL)
    for asked in (1, 2, 3):
        carried.held(asked)
        carried.gets_nothing()
        carried.gate.open()
        carried.gets(MAIL + (b"RSET\r\n" if asked < 3 else b""))
    carried.gets_nothing()


def test_the_receiver_is_heard_while_a_mail_waits(carried):
    carried.says(MAIL)
    carried.held()
    carried.receiver.sendall(b"421 4.4.2 timeout\r\n")
    assert carried.client.recv(100) == frames.encode_data(b"421 4.4.2 timeout\r\n")


def test_an_end_behind_a_held_mail_is_seen_and_the_mail_is_never_sent(carried):
    carried.says(MAIL)
    carried.held()
    carried.client.sendall(frames.encode(m.End(True, 0)))
    transfer = carried.greenlet.get(timeout=30)
    assert transfer.unclean() is not None
    carried.gets_nothing()


def test_bytes_that_nobody_understands_wait_once(carried):
    """A client's own TLS, or what is no SMTP: no MAIL is seen in it, so it counts as its connection does."""
    carried.says(b"no\nSMTP\r\n" + MAIL)
    until(lambda: carried.gate.asked_unseen == 1, what="it is held")
    carried.gets_nothing()
    carried.gate.open()
    carried.gets(b"no\nSMTP\r\n" + MAIL)
    carried.says(MAIL)
    carried.gets(MAIL)
    assert carried.gate.asked == 0


def test_an_eof_behind_a_held_mail_comes_after_it(carried):
    carried.says(MAIL)
    carried.client.sendall(frames.encode(m.Eof()))
    carried.held()
    carried.gets_nothing()
    carried.gate.open()
    carried.gets(MAIL)
    assert carried.receiver.recv(1) == b""


@pytest.mark.parametrize("flood", [0, 3])
def test_a_client_that_leaves_while_its_mail_waits_ends_the_session(carried, flood):
    """Also when nothing more is read, since what stands behind a MAIL that waits is bounded."""
    carried.says(MAIL)
    carried.held()
    for _ in range(flood):
        carried.says(b"x" * 30_000)
    if flood:
        until(lambda: len(carried.transfer._kept) >= 65_536, what="as much is kept as may be")
    assert len(carried.transfer._kept) < 131_072
    carried.client.close()
    with pytest.raises(ClientGone):
        carried.greenlet.get(timeout=30)


NOT_NOW, NO_MAIL = b"451 4.7.1 throttle rule: again in 2 s\r\n", b"503 5.5.1 no message was begun\r\n"


def test_a_slot_that_never_comes_is_451_and_the_receiver_hears_nothing_of_the_message(carried):
    carried.says(MAIL + REST)
    carried.held()
    carried.gate.open(Throttled("no", "rule", 1.5))
    carried.hears(NOT_NOW + NO_MAIL + NO_MAIL)
    carried.gets_nothing()
    carried.gate.holds = False
    carried.says(b"RSET\r\n" + MAIL + REST)
    carried.gets(b"RSET\r\n" + MAIL + REST)
    assert (carried.gate.asked, carried.transfer.refused) == (2, 1)


def test_after_a_451_the_connection_may_be_kept(carried):
    carried.says(MAIL)
    carried.held()
    carried.gate.open(Throttled("no", "rule", 1.5))
    carried.hears(NOT_NOW)
    carried.client.sendall(frames.encode(m.End(True, 0)))
    transfer = carried.greenlet.get(timeout=30)
    assert transfer.unclean() is None
    carried.gets_nothing()


def test_a_451_does_not_overtake_what_the_receiver_owes(carried):
    carried.says(b"RSET\r\nNOOP\r\n" + MAIL + REST)
    carried.held()
    carried.gets(b"RSET\r\nNOOP\r\n")
    carried.gate.open(Throttled("no", "rule", 1.5))
    carried.receiver.sendall(b"250 reset\r\n250-noth")
    carried.hears(b"250 reset\r\n250-noth")
    carried.receiver.sendall(b"ing\r\n250 at all\r\n")
    carried.hears(b"ing\r\n250 at all\r\n" + NOT_NOW + NO_MAIL + NO_MAIL)
    carried.gets_nothing()


@pytest.mark.parametrize(
    ("gone", "answer", "held"),
    [
        pytest.param(MAIL[:4], b"", MAIL[4:], id="the receiver has a part of the line already"),
        pytest.param(b"QUIT\r\n", b"221 bye\r\n", MAIL, id="behind QUIT"),
        pytest.param(b"NOOP\r\n", b"250 OK\r\n250 more\r\n", MAIL, id="the receiver says more than it was asked"),
        pytest.param(b"", b"", MAIL + b"DATA\r\nMAIL FROM:<text>\r\n", id="text behind DATA is no command"),
    ],
)
def test_where_no_reply_would_be_right_the_receiver_is_lost(carried, gone, answer, held):
    carried.says(gone)
    carried.gets(gone)
    carried.receiver.sendall(answer)
    carried.hears(answer)
    carried.says(held)
    carried.held()
    carried.gate.open(Throttled("no", "rule", 1.5))
    assert isinstance(carried.hears_word(), m.Aborted)


@pytest.fixture
def admit() -> Iterator[Admit]:
    """Makes an admission of this manager."""
    with ExitStack() as stack:

        def admit(manager: Manager) -> Admission:
            made = Admission(manager, lambda throttle, count: False)
            stack.callback(made.stop)
            return made

        yield admit


def test_the_gate_asks_the_manager_and_gives_everything_back(admit):
    """A late MAIL waits for a slot of its own; one in vain is late again; a session that ends calls its waiting off."""
    manager = Manager(1, clock_ns() - 10_000 * SECOND)
    admission = admit(manager)
    now = clock_ns()
    session = manager.hello("a", b"run", "host", 1.0, now)
    manager.ping(session, 1, now)
    manager.register(session, 0, [(Key("192.0.2.1", "rule"), Part((Limit(1, 1),)))], now)
    places = manager.admit("a", 1.0, "192.0.2.1", "198.51.100.1", manager.flows(session, (0,)), now)
    assert isinstance(places, Places)
    woken: list[bool] = []
    gate = Gate(admission, places, Way("192.0.2.1", "198.51.100.1"), lambda: woken.append(gate.closed))

    manager.demand(session, 0, 1, 0, 0, 0, 0, clock_ns())
    assert manager.take(session, clock_ns()).grants
    at = clock_ns() + SECOND // 4
    until(lambda: clock_ns() >= at, what="the permit is too old: it lives for a tenth of a second")
    assert not gate.mail()
    assert gate.closed
    until(lambda: woken == [False], what="its slot")
    assert gate.refusal is None
    gate.in_vain()
    assert not gate.mail(), "said again: late again"
    gate.leave()
    assert not gate.closed
    assert not admission.waiters.for_slots
    assert manager.unpermitted == 0


WAY = Way("192.0.2.1", "198.51.100.1")


class Blocked:
    """A session under a block of the proxy's own, and under a path of its instance."""

    def __init__(self, admit: Admit, rate: Limit, wait: float = 30.0, path: Limit | None = None) -> None:
        block = Block(max_concurrent_connections=0, max_delivery_rate=(rate,), wait=wait)
        self.manager = manager = Manager(1, clock_ns() - 10_000 * SECOND, blocks=Limits((block,)))
        self.admission = admit(manager)
        self.session = manager.hello("a", b"run", "host", 1.0, clock_ns())
        manager.ping(self.session, 1, clock_ns())
        ids = () if path is None else (0,)
        if path is not None:
            manager.register(self.session, 0, [(Key(WAY.source, "rule"), Part((path,)))], clock_ns())
        flows = manager.flows(self.session, ids)
        places = manager.admit("a", 1.0, WAY.source, WAY.destination, flows, clock_ns(), rated=False)
        assert isinstance(places, Places)
        self.woken = 0
        self.gate = Gate(self.admission, places, WAY, self._wake)

    def _wake(self) -> None:
        self.woken += 1


def test_each_mail_takes_a_slot_of_the_proxys_own_throttles_and_the_connection_none(admit):
    it = Blocked(admit, Limit(4, 1))
    gone: list[int] = []
    for number in range(4):
        if not it.gate.mail():
            assert number, "the connection has not taken the first one's"
            until(lambda: not it.gate.closed, what="its slot")
        gone.append(clock_ns())
    assert it.woken == 3
    # Never sooner; a slot may be used a little later than it came.
    assert gone[-1] - gone[0] >= 3 * SECOND // 4 - 4 * LATENESS


def test_a_block_that_refuses_says_why(admit):
    it = Blocked(admit, Limit(1, 3600), wait=0.02)
    assert it.gate.mail()
    assert not it.gate.mail()
    until(lambda: not it.gate.closed, what="its time is up")
    assert it.woken == 1
    assert it.gate.refusal is not None
    assert "narrow" in str(it.gate.refusal)


def test_what_is_not_understood_takes_one_slot(admit):
    it = Blocked(admit, Limit(1, 3600))
    assert it.gate.unseen()
    assert it.gate.unseen()
    assert not it.gate.mail(), "the hour's only one is gone"
    it.gate.leave()
    assert not it.admission.waiters.for_slots


def test_a_permit_that_lapses_while_its_mail_waits_for_the_block_is_late(admit):
    """The permit has to be good in the moment in which the MAIL goes."""
    it = Blocked(admit, Limit(1, 3), path=Limit(1, 1))
    assert it.gate.mail()
    it.manager.demand(it.session, 0, 1, 0, 0, 0, 0, clock_ns())
    until(
        lambda: bool(it.manager.advance(clock_ns()) or it.manager.take(it.session, clock_ns()).grants), what="a permit"
    )
    assert not it.gate.mail(), "the block's next slot is seconds away, the permit lives for a tenth"
    until(lambda: not it.gate.closed, what="both slots")
    assert it.gate.refusal is None
    assert it.manager._audit.late == 1

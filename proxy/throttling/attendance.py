"""Sessions come, answer pings or fall silent, and go; who is far away or lets permits lapse gets fewer.

What a session says of its paths is `statements`'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from proxy.throttling.blocks import Rules
from proxy.throttling.cluster import Cluster
from proxy.throttling.core import DELIVERY, SWEEP, Core
from proxy.throttling.doubt import Doubt, lapsed_too_many, since
from proxy.throttling.flows import WORD, Flow
from proxy.throttling.session import DEAD_AFTER, LEASE, PING_EVERY, End, Session
from proxy.throttling.throttle import MICROSECOND, TICK
from proxy.throttling.wheel import Wheel


class Attendance(Core):
    """The sessions by name. The arguments are `manager.Manager`'s."""

    def __init__(
        self,
        incarnation: int,
        start: int,
        enforce: bool = False,
        blocks: Rules | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        super().__init__(incarnation, start, enforce, blocks, cluster)
        self.sessions: dict[str, Session] = {}
        self._pings: Wheel[Session] = Wheel(TICK)
        self._departed: deque[tuple[Session, int | None]] = deque()  # and until when their parts stay
        self._stretching: dict[Session, Iterator[Flow]] = {}  # sessions that need more slack, and flows not looked at
        self._ended: list[Session] = []

    def hello(self, name: str, run: bytes, address: str, weight: float, now: int) -> Session:
        """A session of an authenticated instance begins; the one that the name had before ends."""
        session = Session(name, run, address, weight, now)
        if self._held is None:
            self._begin(session, now)
        else:
            self._held.append(lambda later: self._begin(session, later))
        return session

    def bye(self, session: Session, now: int) -> None:
        """The session ends in good order: its part in the limits goes with it."""
        if self._held is None:
            self._end(session, End.BYE, now)
        else:
            self._held.append(lambda later: self._end(session, End.BYE, later))

    def lost(self, session: Session, now: int) -> None:
        """The session's connection broke. Its slots are not given out again, its part stays for a while."""
        if self._held is None:
            self._end(session, End.LOST, now)
        else:
            self._held.append(lambda later: self._end(session, End.LOST, later))

    def ping(self, session: Session, t: int, now: int) -> None:
        """The client's ping: answered, and from now on its grants count from it."""
        if session.end is None:
            session.pinged(t, now)
            if self._held is None:
                self._pinged(session, now)
            else:
                self._held.append(lambda later: self._pinged(session, later))
                self._dispenser.touched[session] = None

    def pong(self, session: Session, t: int, hold_us: int, now: int) -> None:
        """The answer to our ping of `t` microseconds; one of another time or from the future measures nothing."""
        rtt = now - (t + hold_us) * MICROSECOND
        if session.end is None and -MICROSECOND <= rtt <= DEAD_AFTER:
            farther = session.measured(max(0, rtt), now)
            if self._held is None:
                self._ponged(session, farther, now)
            else:
                self._held.append(lambda later: self._ponged(session, farther, later))

    def weigh(self, session: Session, weight: float) -> None:
        """The operator has given the instance another weight; it holds from the next permit on."""
        session.weigh(weight)

    def congest(self, session: Session, congested: bool, now: int) -> None:
        """The session's outgoing queue is full (it gets no grants), or no longer."""
        session.congested = congested
        if self._held is not None:
            self._held.append(lambda later: self.congest(session, session.congested, later))
            return
        if not congested:
            self._dispenser.touched[session] = None  # what has gathered meanwhile
        self._unpark(session, now)

    def take_ended(self) -> list[Session]:
        ended, self._ended = self._ended, []
        return ended

    # --- steps ---

    def _begin(self, session: Session, now: int) -> None:
        old = self.sessions.get(session.name)
        if old is not None:
            self._end(old, End.REPLACED if old.run == session.run else End.FENCED, now)
        self.sessions[session.name] = session
        self._ping(session, now)

    def _pinged(self, session: Session, now: int) -> None:
        if session.end is None:
            self._look_at_doubts(session, now)
            self._dispenser.touched[session] = None
            self._unpark(session, now)

    def _ponged(self, session: Session, farther: bool, now: int) -> None:
        if session.end is None:
            if farther:
                self._stretching[session] = iter(list(session.flows.values()))
                self._stretch(now)
            self._unpark(session, now)

    def _ping(self, session: Session, now: int) -> None:
        """Ping a live session; end one that has not answered for too long."""
        if session.end is not None:
            return
        if now - session.pong_at > DEAD_AFTER:
            self._end(session, End.SILENT, now)
            return
        session.ping_due = now // MICROSECOND
        self._dispenser.touched[session] = None
        self._pings.arm(session, now + PING_EVERY)

    def _unpark(self, session: Session, now: int) -> None:
        if session.parked and session.may_receive(now):
            self._dispenser.unpark(session, now)
        self._settle(now)

    def _end(self, session: Session, reason: End, now: int) -> None:
        if session.end is not None:
            return
        session.end = reason
        session.runs.clear()
        self._pings.disarm(session)
        if self.sessions.get(session.name) is session:
            del self.sessions[session.name]
        if reason in (End.SILENT, End.FENCED, End.REPLACED):
            self._ended.append(session)
        lease = None if reason is End.BYE else session.pong_at + LEASE
        self._departed.append((session, lease))
        self._sweep(now)
        self._settle(now)

    def _sweep(self, now: int) -> None:
        """Clear away some flows of sessions that ended."""
        left = SWEEP
        while self._departed and left:
            session, lease = self._departed[0]
            while session.flows and left:
                self._registry.leave(session.flows.popitem()[1], now, lease)
                left -= 1
            if not session.flows:
                self._departed.popleft()
                session.forget()

    def _stretch(self, now: int) -> None:
        """Give some flows the slack that their session needs; until then their permits may come too late to be used."""
        left = SWEEP
        while self._stretching and left:
            session, flows = next(iter(self._stretching.items()))
            for flow in flows:
                if flow.want > 0 and session.flows.get(flow.id) is flow:
                    self._registry.stretch(flow.path, session.slack, now)
                    self._registry.announce(flow)  # perhaps it is too far away: then this says so
                left -= 1
                if not left:
                    break
            else:
                del self._stretching[session]

    # --- permits that lapse ---

    def _judge(self, session: Session, flow: Flow, got: int, lapsed: int, now: int) -> None:
        """What an instance says of its permits, or its distance: does it use what it gets?"""
        too_many = False
        if lapsed:
            last_got, last_lapsed = session.lapses.get(flow.id, (0, 0))
            session.lapses[flow.id] = got, lapsed
            too_many = lapsed_too_many(since(last_lapsed, lapsed), since(last_got, got))
        if too_many or session.rtt > flow.path.slack:
            doubt = session.doubted.get(flow)
            if doubt is None:
                if not any(throttle.windows for throttle in flow.path.throttles):
                    return
                doubt = session.doubted[flow] = Doubt(flow, now)
                self._registry.announce(flow)
            doubt.halve(flow, flow.granted - (flow.granted - got) % WORD)

    def _look_at_doubts(self, session: Session, now: int) -> None:
        """Give the flows in doubt what time has earned them; some at a time, each second."""
        for flow, doubt in list(islice(session.doubted.items(), DELIVERY)):
            del session.doubted[flow]
            if session.flows.get(flow.id) is not flow:
                continue
            want = flow.want - flow.fine + doubt.held
            if doubt.refresh(flow, now, session.worst_rtt):
                self._registry.announce(flow)
            else:
                session.doubted[flow] = doubt
                if session.rtt > flow.path.slack:
                    doubt.halve(flow, flow.granted)
                want = doubt.hold(flow, want)
            flow.want = want + flow.fine
            self._dispenser.activate(flow, now)

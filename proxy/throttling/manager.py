"""The throttle manager: sessions, the paths they name, demand, grants, outcomes, connection places. docs/throttling.md.

Everything is a call with the time in it, nothing polls: `next_wakeup` says when `advance` is due, one timer is enough.
What follows from a call piles up until it is collected: `take_ready` (sessions that have something to send, see
`Session.take`), `take_admitted` (tickets that got their places), `take_ended` (sessions whose connection is to be
closed), `take_notices` (for the log). Frames, sockets and proof of identity are `control`'s and `native`'s; the
arithmetic is in `throttle`, `dispenser`, `places` and `limits`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from proxy.errors import Throttled
from proxy.model import UNNAMED, Names
from proxy.throttling.advice import Adviser
from proxy.throttling.audit import Audit, Mail, Spent, Verdict
from proxy.throttling.blocks import Blocks, NoRules, Rules
from proxy.throttling.desk import Desk, MessageTicket
from proxy.throttling.dispenser import Dispenser
from proxy.throttling.doubt import Doubt, lapsed_too_many, since
from proxy.throttling.flows import WORD, Flow, Places, Run, Throttle, Ticket
from proxy.throttling.limits import BackoffRule, Part
from proxy.throttling.places import PlaceBook
from proxy.throttling.refusals import refusal
from proxy.throttling.registry import Registry, Remark
from proxy.throttling.session import DEAD_AFTER, LEASE, PING_EVERY, SMALLEST_SLACK, End, Output, Session
from proxy.throttling.throttle import MICROSECOND, SECOND, TICK, Key, check
from proxy.throttling.wheel import Wheel

#: Departed flows are cleared away, and throttles that fall due together are served, this many at a time, so that a
#: session with 100,000 paths stops nobody.
SWEEP = 100
#: Records of a kind that are taken for one delivery; the others wait their turn.
DELIVERY = 500


class Manager:
    """All throttles of this proxy.

    Args:
        incarnation: names this run of the manager.
        start: when it began, in nanoseconds of the clock that all calls use. What came before is unknown, so every
            limit begins as if its last slot had been given out at that moment.
        enforce: `throttle_enforce`: messages sent without a permit are paid for before the next connection.
        blocks: the proxy's own throttles.
    """

    def __init__(self, incarnation: int, start: int, enforce: bool = False, blocks: Rules | None = None) -> None:
        self.incarnation = incarnation
        self.enforce = enforce
        self.blocks = Blocks(blocks or NoRules(), start)
        self.sessions: dict[str, Session] = {}
        self._audit = Audit(start)
        self._dispenser = Dispenser()
        self._book = PlaceBook(self._shut)
        self._registry = Registry(start, self._dispenser, self._book)
        self._desk = Desk(self._dispenser, self._registry)
        self._adviser = Adviser()
        self._pings: Wheel[Session] = Wheel(TICK)
        self._departed: deque[tuple[Session, int | None]] = deque()  # and until when their parts stay
        self._stretching: dict[Session, Iterator[Flow]] = {}  # sessions that need more slack, and flows not looked at
        self._active: set[Throttle] = set()
        self._debts: Wheel[Throttle] = Wheel(SECOND)  # throttles that are active, as far as is known, for debt alone
        self._ended: list[Session] = []

    # --- sessions ---

    def hello(self, name: str, run: bytes, address: str, weight: float, now: int) -> Session:
        """A session of an authenticated instance begins; the one that the name had before ends."""
        session = Session(name, run, address, weight, now)
        old = self.sessions.get(name)
        if old is not None:
            self._end(old, End.REPLACED if old.run == run else End.FENCED, now)
        self.sessions[name] = session
        self._ping(session, now)
        return session

    def bye(self, session: Session, now: int) -> None:
        """The session ends in good order: its part in the limits goes with it."""
        self._end(session, End.BYE, now)

    def lost(self, session: Session, now: int) -> None:
        """The session's connection broke. Its slots are not given out again, its part stays for a while."""
        self._end(session, End.LOST, now)

    def ping(self, session: Session, t: int, now: int) -> None:
        """The client's ping: answered, and from now on its grants count from it."""
        if session.end is None:
            session.pinged(t, now)
            self._look_at_doubts(session, now)
            self._dispenser.touched[session] = None
            self._unpark(session, now)

    def pong(self, session: Session, t: int, hold_us: int, now: int) -> None:
        """The answer to our ping of `t` microseconds; one of another time or from the future measures nothing."""
        rtt = now - (t + hold_us) * MICROSECOND
        if session.end is None and -MICROSECOND <= rtt <= DEAD_AFTER:
            if session.measured(max(0, rtt), now):
                self._stretching[session] = iter(list(session.flows.values()))
                self._stretch(now)
            self._unpark(session, now)

    def weigh(self, session: Session, weight: float) -> None:
        """The operator has given the instance another weight; it holds from the next permit on."""
        session.weigh(weight)

    def congest(self, session: Session, congested: bool, now: int) -> None:
        """The session's outgoing queue is full (it gets no grants), or no longer."""
        session.congested = congested
        if not congested:
            self._dispenser.touched[session] = None  # what has gathered meanwhile
        self._unpark(session, now)

    # --- what an instance says ---

    def register(
        self, session: Session, id: int, parts: Sequence[tuple[Key, Part]], now: int, names: Names = UNNAMED
    ) -> None:
        """`id` names the path of these throttles, with the instance's limits for each.

        Args:
            names: of the receivers that connections on it go to, where these do not say themselves.

        Raises:
            ValueError: a limit that would not hold (see `throttle.check`), no throttle, one named twice, or more than
                there is room for; nothing changed.
        """
        keys = [key for key, _ in parts]
        if not keys or len(set(keys)) != len(keys):
            raise ValueError("a path needs one or more throttles, each once")
        for _, part in parts:
            for limit in part.limits + ((part.backoff.rate,) if part.backoff and part.backoff.rate else ()):
                check(limit)
        if session.end is not None:
            return
        registry = self._registry
        flow = session.flows.get(id)
        named = session.named + len(keys) - (len(flow.path.throttles) if flow is not None else 0)
        registry.check_room(named, keys)
        if flow is None or [throttle.key for throttle in flow.path.throttles] != keys:
            registry.check_crowd(keys)
        throttles = tuple([registry.throttle(key) for key in keys])
        said = [part for _, part in parts]
        paused = any(part.paused for part in said)
        session.named = named
        if flow is not None and flow.path.throttles == throttles:
            flow.paused = flow.paused or paused  # before its part in the limits goes, or it would be free of them
            registry.restake(flow, said, now)
        else:
            old, flow = flow, registry.join(session, id, throttles, said, now)
            session.flows[id] = flow
            session.lapses.pop(id, None)
            if old is not None:  # last, so that no throttle is without limits in between
                registry.leave(old, now, None)
                session.backlog(id, 0, 0, 0)
        flow.paused, flow.names = paused, names
        if not flow.paused:
            self._dispenser.activate(flow, now)
            self._book.retry(flow, now)
        else:
            self._book.shut(flow, now)
        registry.announce(flow)
        self._settle(now)

    def unregister(self, session: Session, id: int, now: int) -> None:
        """`id` names nothing any more: no grants, and no part in the limits."""
        flow = session.flows.get(id)
        if flow is None or session.end is not None:
            return
        session.backlog(id, 0, 0, 0)
        del session.flows[id]
        session.lapses.pop(id, None)
        session.named -= len(flow.path.throttles)
        self._registry.leave(flow, now, None)
        self._settle(now)

    def demand(
        self,
        session: Session,
        id: int,
        want: int,
        got: int,
        ram: int,
        bounce: int,
        disk: int,
        now: int,
        lapsed: int = 0,
    ) -> None:
        """`want` messages of path `id` are ready without a permit, after `got` permits (modulo 2**32) have arrived.

        `lapsed`: so many of them (modulo 2**32) came too late or grew too old.
        """
        flow = session.flows.get(id)
        if flow is None or session.end is not None:
            return
        session.backlog(id, ram, bounce, disk)
        if session.slack > SMALLEST_SLACK:
            self._registry.stretch(flow.path, session.slack, now)
        if lapsed or session.rtt > SMALLEST_SLACK:
            self._judge(session, flow, got, lapsed, now)
        self._dispenser.demand(flow, want, got, now, session.doubted.get(flow) if session.doubted else None)
        if want:
            for throttle in flow.path.throttles:
                self._active.add(throttle)
        self._settle(now)

    def give_back(self, session: Session, id: int, first: int, n: int, now: int) -> None:
        """Permits of path `id` from the `first`th on (counted from 0, modulo 2**32) will not be used."""
        flow = session.flows.get(id)
        if flow is not None and session.end is None:
            for start, count in self._audit.returned(flow, first, n):
                self._dispenser.give_back(flow, start, count, now)
        self._settle(now)

    def outcome(self, session: Session, id: int, ok: int, deferred: int, failed: int, backoff: bool, now: int) -> None:
        """How attempts of path `id` ended; `backoff`: the instance's word that its throttles shall slow down."""
        flow = session.flows.get(id)
        if flow is None or session.end is not None:
            return
        for throttle in flow.path.throttles:
            terms = throttle.terms
            stake = terms.stake(session.name) if terms is not None else None
            if terms is None or stake is None:
                continue
            rule = stake.part.backoff
            if terms.count(ok, deferred + failed, rule.threshold if rule is not None else 0, now) or (
                backoff and (rule is not None or len(flow.path.throttles) == 1)
            ):
                self._registry.slow_down(throttle, rule or BackoffRule(), session.name, now)
        self._settle(now)

    # --- connections ---

    def flows(self, session: Session, ids: Iterable[int]) -> tuple[Flow, ...]:
        """The flows that a session's path numbers name, for `admit`.

        Raises:
            KeyError: a number that is not registered.
        """
        return tuple([session.flows[id] for id in ids])

    def admit(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> Places | Ticket:
        """Places for one connection under every throttle that applies, all or none.

        Args:
            owner: instance name, else the client's address: fairness is among owners.
            source: address to leave from. destination: address to go to; canonical text, for the proxy's own throttles.
            flows: what the OPEN names; empty for clients without a session.
            rated: the connection takes a slot of the proxy's own throttles; not if its messages do, see `ask_message`.
            names: what the client says of its receiver.

        Returns:
            the places, or a ticket to wait with; it comes back in `take_admitted`, or `cancel` it and see `refusal`.
        """
        answer = self._book.admit(
            owner, weight, self._under(owner, source, destination, names, flows, now), flows, now, rated
        )
        if isinstance(answer, Places):
            for throttle in answer.throttles:
                self._active.add(throttle)
        self._settle(now)
        return answer

    def swap(
        self,
        old: Places,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> Places | None:
        """A cached connection goes to another user: its places for those of the new path. None: not possible now."""
        new = self._book.swap(
            old, owner, weight, self._under(owner, source, destination, names, flows, now), flows, now, rated
        )
        if new is not None:
            for throttle in new.throttles:
                self._active.add(throttle)
            self._registry.released(old, now)
        self._settle(now)
        return new

    def release(self, places: Places, now: int) -> list[Ticket]:
        """The socket is closed; a second time changes nothing.

        Returns:
            tickets that got in by it (and any others not yet collected); their `places` are set.
        """
        self._book.release(places, now)
        self._registry.released(places, now)
        self._settle(now)
        return self.take_admitted()

    def cancel(self, ticket: Ticket, now: int) -> list[Ticket]:
        """Nobody waits for `ticket` any more, whether it got in or not. Returns as `release`."""
        self._book.cancel(ticket, now)
        if ticket.places is not None:
            self._registry.released(ticket.places, now)
        self._settle(now)
        return self.take_admitted()

    def wanted(self, places: Places) -> bool:
        """Whether somebody waits for a place that these hold: a cached connection then gives way."""
        return any(throttle.line is not None for throttle in places.throttles)

    def wait_of(self, ticket: Ticket | MessageTicket) -> float | None:
        """Seconds that the proxy's own throttles let a request wait; None: none of them applies."""
        return self.blocks.wait(ticket.throttles)

    def refusal(self, ticket: Ticket | MessageTicket, now: int) -> Throttled:
        """Why `ticket` did not get in, and when to come back."""
        return self._desk.refusal(ticket, now) if isinstance(ticket, MessageTicket) else refusal(ticket, now)

    # --- messages ---

    def ask_message(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        now: int,
        names: Names = UNNAMED,
    ) -> MessageTicket | None:
        """A slot for one message that the proxy passes on for `owner`, in fair order with everybody's demand.

        Args:
            owner, weight, source, destination, names: as for `admit`; who has a session shares its turns with it.
                Without a source the proxy's own throttles do not apply.
            flows: paths of a session whose throttles it shall pass, too.

        Returns:
            None: nothing limits it. A ticket: `granted` already, or later (`take_granted`); it may be called off at any
            time (`cancel_message`), and `refusal` says why it was not.
        """
        if len(flows) == 1:
            throttles = flows[0].path.throttles
        else:
            throttles = tuple(dict.fromkeys(throttle for flow in flows for throttle in flow.path.throttles))
        if source and self.blocks:
            for throttle in self.blocks.match(owner, source, destination, names, now).messages:
                if throttle.shadow is None:
                    throttles += (throttle,)
                else:
                    throttle.shadow_slot(now)
        ticket = self._desk.ask(owner, weight, throttles, now)
        if ticket is not None:
            for throttle in throttles:
                self._active.add(throttle)
        self._settle(now)
        return ticket

    def cancel_message(self, ticket: MessageTicket, now: int) -> None:
        """Nobody waits for `ticket` any more; a slot that it got and that was not used goes to the next."""
        self._desk.cancel(ticket, now)
        self._settle(now)

    def put_off(self, ticket: MessageTicket, now: int) -> bool:
        """The message of a granted ticket goes only now; False: much too late, it needs another slot."""
        return self._desk.put_off(ticket, now)

    def take_granted(self) -> list[MessageTicket]:
        granted, self._desk.granted = self._desk.granted, []
        return granted

    def mail(self, places: Places, now: int) -> Mail:
        """The proxy saw a MAIL on a connection: it should have had a permit on every path.

        Returns:
            with the paths on which it came too late for its permit: it must not go on before it has another slot there
            (`ask_message`).
        """
        late: list[Flow] = []
        spent: list[Spent] = []
        for flow in places.flows:
            verdict, used = self._audit.mail(flow, now)
            if used is not None:
                spent.append(used)
            if verdict is Verdict.LATE:
                late.append(flow)
                self._audit.tell_late(flow, now)
            elif verdict is Verdict.UNPERMITTED:
                self._charge(flow, now)
        self._settle(now)
        return Mail(tuple(late), tuple(spent))

    def in_vain(self, mail: Mail, now: int) -> None:
        """That MAIL was no message, and will be said again elsewhere with the same permit."""
        for spent in mail.spent:
            self._audit.in_vain(spent, now)

    def _charge(self, flow: Flow, now: int) -> None:
        """A message without a permit, on a connection that an earlier session of the instance may have opened."""
        session = self.sessions.get(flow.receiver.name)
        self._audit.tell_unpermitted(flow, session, now)
        if not self.enforce:
            return
        payer = flow if flow.receiver is session else self._registry.successor(flow, session)
        if payer is None:
            self._registry.owe(flow)
            return
        payer.fine += 1
        payer.want += 1
        self._book.shut(payer, now)
        self._dispenser.activate(payer, now)

    # --- time, settings, results ---

    def reload(self, enforce: bool, blocks: Rules, now: int) -> None:
        """New settings; places, debts and sessions stay."""
        if self.enforce and not enforce:
            self._pardon(now)
        self.enforce = enforce
        self.blocks.reload(blocks)
        self._refresh(now)
        self._settle(now)

    def advance(self, now: int) -> None:
        """Do what is due."""
        for session in self._pings.expire(now):
            self._ping(session, now)
        for throttle in self._registry.backoffs.expire(now, SWEEP):
            self._registry.relimit(throttle, now)
        for throttle, name in self._registry.leases.expire(now, SWEEP):
            self._registry.end_lease(throttle, name, now)
        self._sweep(now)
        self._stretch(now)
        self._refresh(now)
        self._registry.teller.step()
        self._dispenser.resume(now)
        self._serve_counted(now)
        self._dispenser.expire(now, SWEEP)
        self._desk.expire(now, SWEEP)
        self._settle(now)
        self._adviser.expire(now, SWEEP)
        self._audit.expire(now, SWEEP)
        for throttle in self._registry.forgetting.expire(now, SWEEP):
            self._registry.forget(throttle, now)
        self._drop_idle(now, SWEEP)
        self._settle(now)

    def next_wakeup(self) -> int | None:
        """When `advance` is due, in nanoseconds; in the past: at once; None: not before the next call."""
        if (
            self._departed
            or self._stretching
            or self._registry.teller
            or self._dispenser.unfinished
            or self.blocks.stale
        ):
            return 0
        wheels = (
            self._dispenser.wheel,
            self._dispenser.fine,
            self._desk.wheel,
            self._book.wheel,
            self._adviser.wheel,
            self._audit.wheel,
            self._pings,
            self._registry.leases,
            self._registry.backoffs,
            self._registry.forgetting,
        )
        return min([due for wheel in wheels if (due := wheel.next_wakeup()) is not None], default=None)

    def take_ready(self) -> list[Session]:
        ready, self._dispenser.touched = self._dispenser.touched, {}
        return [session for session in ready if isinstance(session, Session) and session.end is None]

    def take(self, session: Session, now: int, most: int = DELIVERY) -> Output:
        """What is to be sent to `session`, `most` records of a kind; `now` must not be after the moment of sending.

        What is left (see `Session.parked_records`) is to be asked for again when this is sent.
        """
        teller = self._registry.teller
        return session.take(self._sent, now, most, teller.owes if teller else None)

    def _sent(self, run: Run, now: int) -> None:
        self._dispenser.sent(run, now)
        self._audit.granted(run)

    def take_blocked(self) -> list[Throttle]:
        """Full throttles that somebody began to wait under: a cached connection with a place there should give way."""
        throttles, self._book.blocked = list(self._book.blocked), {}
        return throttles

    def take_admitted(self) -> list[Ticket]:
        admitted, self._book.admitted = self._book.admitted, []
        return admitted

    def take_ended(self) -> list[Session]:
        ended, self._ended = self._ended, []
        return ended

    def take_notices(self) -> list[Remark]:
        remarks, self._registry.remarks = self._registry.remarks + self._audit.remarks, []
        self._audit.remarks = []
        return remarks

    @property
    def throttles(self) -> Mapping[Key, Throttle]:
        """Those that instances have named, by key; to be read only."""
        return self._registry.throttles

    @property
    def unpermitted(self) -> int:
        """Messages that were sent without a permit."""
        return self._audit.unpermitted

    def active_throttles(self, now: int) -> int:
        """Keys with demand, places in use or unexpired debt (which is looked at once a second)."""
        self._drop_idle(now)  # all of them: a few, since it is done all the time
        return len(self._active)

    # --- steps ---

    def _serve_counted(self, now: int) -> None:
        """The proxy's own throttles whose slots have come: for a connection and for a message by turns."""
        due = self._book.wheel.expire(now, SWEEP) + self._dispenser.fine.expire(now, SWEEP)
        for throttle in dict.fromkeys(due):
            if throttle.taken % 2:
                self._dispenser.serve(throttle, now)
            self._book.pump(throttle, now)
            self._dispenser.serve(throttle, now)

    def _drop_idle(self, now: int, most: int | None = None) -> None:
        """Look at throttles that nobody waits under or uses any more, or whose debt should be paid."""
        throttles = self._debts.expire(now, most)
        for idle in (self._dispenser.idle, self._book.idle):
            while idle and len(throttles) != most:
                throttles.append(idle.pop())
        for throttle in throttles:
            if not throttle.busy(now):
                self._active.discard(throttle)
            elif not throttle.in_use() and throttle in self._active:
                self._debts.arm(throttle, throttle.debt_until())

    def _pardon(self, now: int) -> None:
        """Messages without a permit are only counted from now on."""
        for session in self.sessions.values():
            for flow in session.flows.values():
                if flow.fine:
                    flow.want -= flow.fine
                    flow.fine = 0
                    self._dispenser.paid.append(flow)

    def _shut(self, flow: Flow) -> bool:
        """Whether connections of this flow wait for itself."""
        return flow.paused or (self.enforce and flow.fine > 0)

    def _refresh(self, now: int) -> None:
        """New settings reach some more of the proxy's own throttles."""
        for throttle in self.blocks.refresh(now, SWEEP):
            self._book.pump(throttle, now)
            self._dispenser.serve(throttle, now)

    def _under(
        self, owner: str, source: str, destination: str, names: Names, flows: tuple[Flow, ...], now: int
    ) -> list[Throttle]:
        throttles = [throttle for flow in flows for throttle in flow.path.throttles]
        if self.blocks:
            throttles += self.blocks.match(owner, source, destination, names, now).all
        return throttles

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

    def _settle(self, now: int) -> None:
        """Pass on what one part's work means for another."""
        if self._desk.open:
            self._desk.settle(now)
        paid = self._dispenser.paid
        while paid:
            self._book.retry(paid.pop(), now)
        if self._book.crowded:
            for throttle in self._book.crowded:
                self._adviser.crowded(throttle, now)
            self._book.crowded.clear()
        if self._adviser.given:
            for flow in self._adviser.given:
                session = flow.receiver
                if flow.cap is not None and isinstance(session, Session):
                    session.caps[flow.id] = flow.cap[0]
                    self._dispenser.touched[session] = None
            self._adviser.given.clear()

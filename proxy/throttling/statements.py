"""What instances say in their sessions: paths and limits, demand, permits that come back, how attempts ended.

And what is sent to them in return.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from proxy.model import UNNAMED, Names
from proxy.throttling.attendance import Attendance
from proxy.throttling.core import DELIVERY
from proxy.throttling.flows import Run
from proxy.throttling.limits import BackoffRule, Part
from proxy.throttling.session import SMALLEST_SLACK, Output, Session
from proxy.throttling.throttle import Key, check


class Statements(Attendance):
    """The calls that a session's frames become."""

    def register(
        self, session: Session, id: int, parts: Sequence[tuple[Key, Part]], now: int, names: Names = UNNAMED
    ) -> None:
        """`id` names the path of these throttles, with the instance's limits for each.

        Args:
            names: of the receivers that connections on it go to, where these do not say themselves.

        Raises:
            ValueError: a limit that would not hold (see `throttle.check`), no throttle, one named twice, more than
                there is room for, or another scope than others have said; nothing changed.
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
        registry.check_scopes(parts)
        if flow is None or [throttle.key for throttle in flow.path.throttles] != keys:
            registry.check_crowd(keys)
        if self._held is not None:
            self._held.append(lambda later: self._register_late(session, id, parts, later, names))
            return
        throttles = tuple([registry.throttle(key, part.cluster, now) for key, part in parts])
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

    def _register_late(
        self, session: Session, id: int, parts: Sequence[tuple[Key, Part]], now: int, names: Names
    ) -> None:
        """There was room for it when it was said; many may have been said since."""
        with suppress(ValueError):
            self.register(session, id, parts, now, names)

    def unregister(self, session: Session, id: int, now: int) -> None:
        """`id` names nothing any more: no grants, and no part in the limits."""
        if self._held is not None:
            self._held.append(lambda later: self.unregister(session, id, later))
            return
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
        if self._held is not None:
            self._held.append(lambda later: self.demand(session, id, want, got, ram, bounce, disk, later, lapsed))
            return
        flow = session.flows.get(id)
        if flow is None or session.end is not None:
            return
        session.backlog(id, ram, bounce, disk)
        if session.slack > SMALLEST_SLACK and session.slack > flow.path.slack:
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
        if self._held is not None:
            self._held.append(lambda later: self.give_back(session, id, first, n, later))
            return
        flow = session.flows.get(id)
        if flow is not None and session.end is None:
            for start, count in self._audit.returned(flow, first, n):
                self._dispenser.give_back(flow, start, count, now)
        self._settle(now)

    def outcome(self, session: Session, id: int, ok: int, deferred: int, failed: int, backoff: bool, now: int) -> None:
        """How attempts of path `id` ended; `backoff`: the instance's word that its throttles shall slow down."""
        if self._held is not None:
            self._held.append(lambda later: self.outcome(session, id, ok, deferred, failed, backoff, later))
            return
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

    # --- what is sent ---

    def take_ready(self) -> list[Session]:
        touched = self._dispenser.touched
        if not touched:
            return []
        self._dispenser.touched = {}
        return [session for session in touched if isinstance(session, Session) and session.end is None]

    def take(self, session: Session, now: int, most: int = DELIVERY) -> Output:
        """What is to be sent to `session`, `most` records of a kind; `now` must not be after the moment of sending.

        What is left (see `Session.parked_records`) is to be asked for again when this is sent.
        """
        if self._held is not None:
            return session.answer(now)
        teller = self._registry.teller
        return session.take(self._sent, now, most, teller.owes if teller else None)

    def _sent(self, run: Run, slack: int, now: int) -> None:
        self._dispenser.sent(run, now)
        self._audit.granted(run, slack)

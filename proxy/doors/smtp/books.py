"""What one client of mode smtp comes to: counters, and its lines in the log."""

from __future__ import annotations

from time import monotonic

from proxy.doors.smtp.egress import Line, Preview
from proxy.errors import ProxyError
from proxy.log import lines as log
from proxy.log import steps
from proxy.model import Ending, Endpoint
from proxy.policy.modes import Terms
from proxy.protocols.smtp.tracker import Tracker
from proxy.services import Door, Services, note_failure
from proxy.stats import Fate, Outcomes, Standing


class Facts:
    """What the log says of a client; `started` on the monotonic clock."""

    def __init__(self, number: int, client: Endpoint, terms: Terms, started: float) -> None:
        self.number = number
        self.client = client
        self.terms = terms
        self.started = started


class Books:
    """Of one client.

    Args:
        first: its first connection, or what it has instead.

    Attributes:
        up, down: bytes to the receiver, and to the client.
        reused: its first connection was somebody else's before.
        tls: the version with the receiver, of the last connection that had any.
        ending: how it ended.
        refused_by: a receiver's greeting that was a refusal, or "". reply: the last refusal of any kind.
    """

    def __init__(self, services: Services, door: Door, facts: Facts, first: Line | Preview) -> None:
        self.outcomes = Outcomes()
        self.up = self.down = 0
        line = first if isinstance(first, Line) else None
        self.reused = line is not None and line.reused
        self.tls = line.tls if line is not None else ""
        self.seen = line.seen if line is not None else None
        self.ending = Ending.CLIENT_CLOSED
        self.refused_by = ""
        self.reply = ""
        self._services = services
        self._door = door
        self._facts = facts

    def count(self, tracker: Tracker, in_vain: bool) -> None:
        """A connection to a receiver is over; `in_vain`: its last message is said again on another."""
        mails = tracker.mails - in_vain
        self.reply = tracker.said or self.reply
        self.outcomes.add(mails, tracker.accepted, tracker.deferred, tracker.rejected)
        self._services.counters.messages += mails

    def note_failure(self, error: ProxyError) -> None:
        """A line of its own: the client goes on, or is told by SMTP."""
        facts, terms = self._facts, self._facts.terms
        note_failure(
            self._services,
            self._door,
            facts.number,
            terms.instance,
            facts.client,
            terms.source,
            terms.destination,
            facts.started,
            error,
        )

    def tell_fate(self, fate: Fate, local: Endpoint | None) -> None:
        """The line of one message; called in the middle of reading its reply."""
        facts = self._facts
        log.message(
            facts.number,
            facts.terms.instance,
            facts.terms.source,
            facts.terms.destination,
            local,
            self.tls,
            fate,
        )

    def step(self, text: str) -> None:
        """For who looks at steps."""
        if steps.on:
            facts, terms = self._facts, self._facts.terms
            ends = terms.source, terms.destination
            told = Standing(
                facts.number, terms.instance, self._door.protocol, facts.client, *ends, "dialogue", facts.started
            )
            steps.tell(told, text)

    def close(self, refused: int) -> None:
        """Count and log; `refused`: messages that we refused at MAIL."""
        services, facts, terms = self._services, self._facts, self._facts.terms
        outcomes, counters, now = self.outcomes, services.counters, monotonic()
        good = outcomes.accepted > 0 or (not self.reply and self.down > 0)
        seen = outcomes.deferred, outcomes.rejected
        services.troubles.over(terms.source, terms.destination, self.reply, good, now, *seen)
        outcomes.deferred += refused
        ending = self.ending.after(self.refused_by) if self.refused_by else self.ending
        if steps.on:
            self.step(f"over: {ending}, {outcomes.messages} messages {self.reply}".rstrip())
        seconds = now - facts.started
        counters.over(ending, terms.instance, terms.source, self.up, self.down, seconds, outcomes.messages)
        counters.count_outcomes(terms.instance, terms.source, outcomes)
        log.connection(
            facts.number,
            terms.instance,
            self._door.protocol,
            facts.client,
            terms.source,
            terms.destination,
            self.reused,
            self.tls,
            self.up,
            self.down,
            seconds,
            ending,
            outcomes,
            self.reply,
            self.seen,
        )

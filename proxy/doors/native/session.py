"""One SMTP session on a native channel, from OPENED to its closing log line.

What OPENED says, whether the connection may be kept at END, and what is counted; bytes are `transfer`'s.
"""

from __future__ import annotations

from functools import lru_cache, partial
from time import monotonic

from proxy.doors.native.entrance import Guest, check_still_welcome
from proxy.doors.native.gate import Gate, Way
from proxy.doors.native.link import Link
from proxy.doors.native.open import Attempts, Taken, is_raw
from proxy.doors.native.receiver_names import names_of
from proxy.doors.native.transfer import Transfer
from proxy.egress.receiver import TlsFacts
from proxy.errors import Refused
from proxy.log import lines as log
from proxy.model import Discard, Ending
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.smtp.fates import FateTracker
from proxy.protocols.smtp.tracker import Tracker
from proxy.services import Door, Services
from proxy.stats import Fate, Outcomes

#: Bytes of OPENED's longest parts: all of them together, with what else is in it, fit in one frame.
_MAX_VERDICT = 200
_MAX_KEY = 64
_MAX_ISSUERS = 10
_MAX_CERTIFICATE = 32_768
_MAX_GREETING = 4_096
_MAX_EHLO = 16_384
_MAX_EHLO_LINES = 256
_MAX_ATTEMPT_MESSAGE = 100
_MAX_ATTEMPT_REPLY = 128
_MAX_TLS_FAILURE = 512
_DEAD = frozenset({Discard.PEER_CLOSED, Discard.SAID_421})
_KEPT = frames.encode(m.Ended(True, "kept"))


class Session:
    """One of them.

    Args:
        services: those it begins, and is counted, with.
        number: in the log. started: when its OPEN came.
    """

    def __init__(
        self,
        services: Services,
        door: Door,
        guest: Guest,
        link: Link,
        request: m.Open,
        taken: Taken,
        number: int,
        started: float,
    ) -> None:
        assert guest.handshake.peer is not None
        self._services = services
        self._door = door
        self._guest = guest
        self._peer = guest.handshake.peer
        self._link = link
        self._request = request
        self._taken = taken
        self._number = number
        self._started = started
        self._parting: Discard | None = None  # nobody may have it, and its receiver waits for a command: it hears QUIT
        place = taken.receiver.place
        tracked = not is_raw(request) and (request.reuse or request.throttles or place is not None)
        self._gate: Gate | None = None
        if tracked and place is not None:
            way = Way(taken.receiver.source, taken.receiver.destination.host, names_of(request, place.flows))
            self._gate = Gate(services.office, place, way, link.wake)
        tracker = self._tracker() if tracked else None
        self.transfer = Transfer(link, taken.receiver, tracker, taken.reused, self._gate, request.probes)

    def finish(self, current: Services) -> tuple[Ending, bool]:
        """Answer END: keep the connection for the next one, or close it; how it ended, and whether by a reset.

        Args:
            current: the services of the moment, which decide whether it is kept.
        """
        link, transfer = self._link, self.transfer
        assert transfer.end is not None
        reason = self._why_not_kept(current, transfer.end)
        if reason is None:
            link.answer(_KEPT)
            return Ending.KEPT, False
        if transfer.end.keep:
            self._services.keeper.decline(reason)
        if transfer.waits_for_command:
            self._parting = reason
        delivered = transfer.flush()
        link.answer(frames.encode_fields(m.Ended.TYPE, (False, reason)))
        if transfer.broken is not None:
            return transfer.broken, True
        return Ending.UPSTREAM_CLOSED if transfer.receiver_done else Ending.CLIENT_CLOSED, not delivered

    def _why_not_kept(self, services: Services, end: m.End) -> Discard | None:
        """Only what the tracker has found clean is kept, and only when the client says so."""
        taken = self._taken
        if not end.keep or not self._request.reuse or self.transfer.tracker is None:
            return Discard.NOT_OFFERED
        reason = self.transfer.unclean()
        if reason is not None:
            return reason
        if not services.settings.reuse_connections or not self._is_welcome(services):
            return Discard.DISABLED
        if self._link.goes_at is not None:
            return Discard.DRAINING
        admission = services.admission
        # Who waits for its place may want this very connection; whose turn it is turns out when it is clean.
        if admission.wanted(taken.receiver.place) and not admission.awaited(taken.key):
            return Discard.YIELDED
        return None

    def _is_welcome(self, services: Services) -> bool:
        """Whether a reload has left the instance its place, and its source."""
        try:
            check_still_welcome(services.access, self._peer, self._guest.client.host)
        except Refused:
            return False
        return True

    def over(self, ending: Ending, reset: bool) -> None:
        """Close, count, log."""
        services, transfer, receiver = self._services, self.transfer, self._taken.receiver
        services.gauges.outgoing -= 1
        outcomes = self._count_messages()
        if ending is Ending.KEPT:
            assert self._taken.key is not None
            services.keeper.give(receiver, self._taken.key)
        elif self._parting is not None and not reset:
            services.keeper.part(receiver, self._parting, transfer.may_hold)
        else:
            services.keeper.close(receiver, reset)
        now, said = monotonic(), transfer.tracker.said if transfer.tracker is not None else ""
        seconds, messages = now - self._started, outcomes.messages if outcomes is not None else None
        ends = self._peer.instance, receiver.source
        services.counters.over(ending, *ends, transfer.up, transfer.down, seconds, messages)
        seen = outcomes or Outcomes()
        good = seen.accepted > 0 or (not said and transfer.down > 0)
        services.troubles.over(receiver.source, receiver.destination, said, good, now, seen.deferred, seen.rejected)
        log.connection(
            self._number,
            self._peer.instance,
            self._door.protocol,
            self._guest.client,
            receiver.source,
            receiver.destination,
            self._taken.reused,
            receiver.tls.version if receiver.tls else "failed" if self._taken.in_clear else "",
            transfer.up,
            transfer.down,
            seconds,
            ending,
            outcomes,
            said,
            receiver.tls.seen if receiver.tls else None,
        )

    def _tracker(self) -> Tracker:
        """The judge of a session, which also tells what the receiver refuses and what becomes of each message, where
        that is wanted."""
        admission = self._services.admission
        place = self._taken.receiver.place if admission.listens else None
        refused = partial(admission.replied, place) if place is not None else None
        if not self._services.settings.log_messages:
            return Tracker(refused)
        number, receiver, instance = self._number, self._taken.receiver, self._peer.instance
        tls = receiver.tls.version if receiver.tls else ""

        def tell(fate: Fate) -> None:
            log.message(number, instance, receiver.source, receiver.destination, receiver.local, tls, fate)

        return FateTracker(tell, refused)

    def _count_messages(self) -> Outcomes | None:
        """What the tracker saw, else what the client says; what became of messages, where that was seen."""
        services, transfer, receiver = self._services, self.transfer, self._taken.receiver
        if transfer.tracker is None:
            services.counters.messages += transfer.end.messages if transfer.end is not None else 0
            return None
        mails = transfer.tracker.mails
        receiver.messages += mails
        receiver.errors += transfer.tracker.errors
        services.counters.messages += mails
        # What a shared connection that turned out to be dead was told is said again elsewhere, with the same permit.
        in_vain = self._taken.reused and not transfer.tracker.accepted and transfer.unclean() in _DEAD
        if self._gate is not None:
            self._gate.leave()
            if in_vain:
                self._gate.in_vain()
        outcomes, tracker = Outcomes(), transfer.tracker
        outcomes.add(mails, tracker.accepted, tracker.deferred + transfer.refused, tracker.rejected)
        services.counters.count_outcomes(self._peer.instance, receiver.source, outcomes)
        if receiver.place is not None:
            receiver.place.carried(tracker.accepted, tracker.deferred, tracker.rejected)
        return outcomes


def tls_info(facts: TlsFacts) -> m.TlsInfo:
    """What TLS came to, within the bounds of a frame: issuers that are too long together are left out."""
    verdict, leaf, issuers = facts.verdict, b"", list(facts.chain[1:])
    if facts.chain and len(facts.chain[0]) <= _MAX_CERTIFICATE:
        leaf = facts.chain[0]
    if len(leaf) + sum(map(len, issuers)) > _MAX_CERTIFICATE:
        issuers = []
    return m.TlsInfo(
        version=facts.version,
        cipher=facts.cipher,
        verified=verdict.verified,
        verdict=verdict.why[:_MAX_VERDICT],
        certificate=leaf,
        result=verdict.result,
        proven_by=verdict.by,
        key=verdict.key[:_MAX_KEY],
        subject=verdict.subject[:_MAX_VERDICT],
        issuers=issuers[:_MAX_ISSUERS],
    )


def opened(taken: Taken, attempts: Attempts) -> bytes:
    """The answer to an OPEN that succeeded, within the bounds of a frame."""
    receiver = taken.receiver
    fields = (
        taken.reused,
        receiver.destination,
        receiver.local,
        receiver.messages,
        int((monotonic() - receiver.opened_at) * 1000),
        receiver.greeting.encode()[:_MAX_GREETING] if receiver.greeting is not None else None,
        _bounded(receiver.hello),
        tls_info(receiver.tls) if receiver.tls is not None else None,
        frames.attempts_of(attempts, _MAX_ATTEMPT_MESSAGE, _MAX_ATTEMPT_REPLY) if attempts else (),
        taken.in_clear.why[:_MAX_TLS_FAILURE] if taken.in_clear is not None else "",
        taken.in_clear.result if taken.in_clear is not None else "",
    )
    return frames.encode_fields(m.Opened.TYPE, fields)


@lru_cache(maxsize=256)
def _bounded(lines: tuple[str, ...]) -> list[bytes]:
    """As many lines as fit. Not to be changed: many receivers say the same."""
    bounded: list[bytes] = []
    left = _MAX_EHLO
    for line in lines:
        text = line.encode()[:_MAX_GREETING]
        left -= len(text)
        if left < 0 or len(bounded) == _MAX_EHLO_LINES:
            break
        bounded.append(text)
    return bounded

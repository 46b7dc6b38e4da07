"""A dialogue's receivers, had by this proxy itself: its own sockets, its keeper, its throttles. See `egress`.

Connections stand in the same keeper under the same keys as those of native channels: an MTA of either kind can be
handed what the other has left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Final

from proxy.doors.smtp.egress import Line, Preview, TlsAtOnce
from proxy.egress import upstream
from proxy.egress.asking import wait_for_place, wait_for_slot
from proxy.egress.bring_up import BringUp, connect_receiver, open_receiver
from proxy.egress.claim import Claim
from proxy.egress.office import Applicant, Slot
from proxy.egress.pool import PoolKey
from proxy.egress.receiver import InClear, Limits, Receiver, StaleSession, Wish, may_do_without, may_try_again
from proxy.errors import Overloaded, Throttled, UpstreamError
from proxy.log import lines as log
from proxy.model import Discard, Endpoint, TlsMode
from proxy.net.conversation import may_wait
from proxy.net.relay import RawSocket
from proxy.policy.access import place_within
from proxy.policy.modes import Terms
from proxy.services import Services
from proxy.throttling.flows import Places

#: An MTA waits five minutes for the reply to EHLO or MAIL (RFC 5321 section 4.5.3.2); the answer must be there before.
_ANSWER_WITHIN: Final = 240.0
#: Of those minutes, what is left for the connection itself when slot and place have taken all of that.
_CONNECT_WITHIN: Final = 50.0
#: Shown of a receiver that nobody knows: what cannot be done without by who needs it. A message that does need it is
#: put off if it turns out not to be there; without it, some MTAs would send it back for good.
_SUPPOSED = ("8BITMIME", "SMTPUTF8")


class Direct:
    """One client's.

    Args:
        terms: what holds for the client.
        owner: who it is among those that throttles are fair to; weight: its weight there.
        sock: a socket that is bound to the source already, for the first connection.
        connect_within: seconds for that one's place and connect together.
    """

    def __init__(
        self,
        services: Services,
        terms: Terms,
        owner: str,
        weight: float,
        sock: RawSocket | None,
        connect_within: float,
    ) -> None:
        self._services = services
        self._terms = terms
        self._who = Applicant(owner, weight, terms.source, terms.destination.host, rated=False)
        self._bound = sock
        self._slot: Slot | None = None  # the last one
        self._wished = Wish(None, terms.tls)  # see `_settle`
        self._connect_by = monotonic() + connect_within
        self._answer_by: float | None = None  # of the MAIL that has its slot and no connection yet

    # ---------------------------------------------------------------- having one

    def connect(self) -> Line | Preview:
        """See `Egress`."""
        self._settle(place_within(self._connect_by - monotonic()))
        name = self._terms.ehlo_name
        if name is not None and self._shares and (kept := self._kept(name, self._swap)) is not None:
            self._close_bound()
            return kept
        try:
            places = self._enter_now()
        except Throttled:
            return self.preview()
        try:
            sock, self._bound = self._bound, None
            left = self._connect_by - monotonic()
            seconds = min(self._services.settings.connect_timeout, upstream.LONGEST_CONNECT, left)
            receiver = self._had(lambda: self._connected(seconds, sock))
        except BaseException:
            self._services.office.leave(places)
            raise
        receiver.place = places
        bring_up = BringUp(self._services.engine, receiver, self._wish(None), self._services.tls_sessions)
        return Line(receiver.stream, receiver.local, handle=_Held(receiver, None, bring_up))

    def preview(self) -> Preview:
        """See `Egress`."""
        terms, services = self._terms, self._services
        said = services.acquaintances.known(terms.destination, self._tls)
        local, host = Endpoint(terms.source, 0), services.host_name
        return Preview(local, *(said or (f"220 {host} ESMTP", (host, *_SUPPOSED))))

    def greet(self, line: Line) -> None:
        """See `Egress`."""
        held = _held(line)
        assert held.bring_up is not None
        try:
            held.bring_up.greet(self._services.settings.idle_timeout)
        except TlsAtOnce:
            raise
        except BaseException as error:
            if not isinstance(error, UpstreamError) or error.smtp_reply is None:
                self.drop(line, False)
                raise
            line.greeting = error.smtp_reply
            self.refused(line, error.smtp_reply)
        else:
            line.greeting = held.receiver.greeting
            held.receiver.missed = not may_wait(held.receiver.stream)

    def hello(self, line: Line, name: str) -> Line:
        """See `Egress`."""
        if line.knows(name):
            return line
        if line.reused:
            self.give(line)
            return self.renew(name, True, False)
        held = _held(line)
        assert held.bring_up is not None
        try:
            held.bring_up.hello(name, _ANSWER_WITHIN)
        except BaseException as error:
            if isinstance(error, UpstreamError) and error.smtp_reply is not None:
                self.refused(line, error.smtp_reply)
            self.drop(line, False)
            if not (isinstance(error, UpstreamError) and self._tries_again(error)):
                raise
            failure = error
        else:
            return self._line(held.receiver, name, held.bring_up.mode, False)
        # Not on the same connection: after half a handshake it is of no use.
        if isinstance(failure, StaleSession):
            answer_by = monotonic() + _ANSWER_WITHIN
            return self._fresh(name, self._enter(_ANSWER_WITHIN, None), self._tls, answer_by)
        return self._fresh(
            name,
            self._enter(_ANSWER_WITHIN, None),
            TlsMode.NONE,
            monotonic() + _ANSWER_WITHIN,
            InClear("handshake", failure.reason, failure.tls_result),
        )

    def renew(self, name: str, fresh: bool, patient: bool = True) -> Line:
        """See `Egress`."""
        terms = self._terms
        self._services.access.check_route(terms.instance, terms.source, terms.destination)  # a reload may have come
        self._settle(_ANSWER_WITHIN)
        shares = self._may_share(name)
        if shares and not fresh and (kept := self._kept(name, self._swap)) is not None:
            return kept
        answer_by, self._answer_by = self._answer_by or monotonic() + _ANSWER_WITHIN, None
        places = self._enter(answer_by - monotonic(), name if shares else None) if patient else self._enter_now()
        if shares and not fresh:
            try:
                kept = self._kept_with(name, places)
            except BaseException:
                self._services.office.leave(places)
                raise
            if kept is not None:
                return kept
        return self._fresh(name, places, self._tls, answer_by + _CONNECT_WITHIN)

    def slot(self, waits: Callable[[], None]) -> None:
        """See `Egress`."""
        self._answer_by = monotonic() + _ANSWER_WITHIN
        self._slot = wait_for_slot(self._services.office, self._who, _ANSWER_WITHIN, waits)

    def redeem(self) -> bool:
        """See `Egress`."""
        return self._services.office.put_off(self._slot)

    def refused(self, line: Line, reply: str) -> None:
        """See `Egress`."""
        self._services.office.replied(_held(line).receiver.place, reply)

    def carried(self, line: Line, accepted: int, deferred: int, rejected: int) -> None:
        """See `Egress`."""
        self._services.office.carried(_held(line).receiver.place, accepted, deferred, rejected)

    def reloaded(self, services: Services) -> None:
        """See `Egress`."""
        self._services = services

    # ---------------------------------------------------------------- leaving it

    def lend(self, line: Line, taken: Callable[[], None]) -> None:
        """See `Egress`."""
        receiver = _held(line).receiver
        if self._services.office.wanted(receiver.place):
            taken()
        elif receiver.place is not None:
            self._services.keeper.lend(receiver, taken)

    def keep(self, line: Line) -> None:
        """See `Egress`."""
        self._services.keeper.keep(_held(line).receiver)

    def missed(self, line: Line) -> bool:
        """See `Egress`."""
        return _held(line).receiver.missed

    def give(self, line: Line, look: bool = True) -> None:
        """See `Egress`."""
        key, receiver = _held(line).key, self._leaving(line)
        office = self._services.office
        if not self._shares or key is None:
            self._services.keeper.part(receiver, Discard.DISABLED)
        # Who waits for its place may want this very connection; whose turn it is turns out when it is clean.
        elif office.wanted(receiver.place) and not office.awaited(key):
            self._services.keeper.decline(Discard.YIELDED)
            self._services.keeper.part(receiver, Discard.YIELDED)
        else:
            self._services.keeper.give(receiver, key, look)

    def part(self, line: Line, reason: Discard) -> None:
        """See `Egress`."""
        receiver = self._leaving(line)
        if line.shared:
            self._services.keeper.decline(reason)
        self._services.keeper.part(receiver, reason)

    def drop(self, line: Line, reset: bool) -> None:
        """See `Egress`."""
        self._services.keeper.close(self._leaving(line), reset)

    def close(self) -> None:
        """See `Egress`."""
        self._close_bound()

    # ---------------------------------------------------------------- steps

    @property
    def _shares(self) -> bool:
        return self._services.settings.reuse_connections

    def _may_share(self, name: str) -> bool:
        own = self._terms.ehlo_name
        return self._shares and own is not None and own.lower() == name.lower()

    def _settle(self, seconds: float) -> None:
        """Find out what TLS with the receiver has to be, as settings and DNS have it now.

        Raises:
            UpstreamError: it cannot be had; see `Demands.join`.
        """
        terms, join = self._terms, self._services.demands.join
        base = Wish(None, terms.tls)
        self._wished = join(base, terms.instance, terms.source, terms.destination, max(seconds, 0.001))

    @property
    def _tls(self) -> TlsMode:
        """TLS as it is to be tried now: in clear where it has failed before and may be done without."""
        broken = self._services.broken_tls
        if may_do_without(self._wished) and broken.why(self._terms.destination, monotonic()):
            return TlsMode.NONE
        return self._wished.tls

    def _key(self, name: str, tls: TlsMode) -> PoolKey:
        terms, wish = self._terms, self._wished
        name = terms.ehlo_name if terms.ehlo_name is not None and self._may_share(name) else name
        if tls is TlsMode.NONE:
            return PoolKey(terms.source, terms.destination, name, tls, group=terms.group)
        return PoolKey(terms.source, terms.destination, name, tls, wish.tls_server_name, wish.proof, group=terms.group)

    def _wish(self, name: str | None) -> Wish:
        return self._wished._replace(ehlo_name=name, tls=self._tls)

    def _enter(self, seconds: float, name: str | None) -> Places | None:
        """A place under the proxy's throttles, whose rates count messages here."""
        key = self._key(name, self._tls) if name is not None else None
        return wait_for_place(self._services.office, self._who, max(seconds, 0.001), key)

    def _enter_now(self) -> Places | None:
        """The same, if it need not be waited for.

        Raises:
            Throttled: it would have to.
        """
        may, places = self._services.office.swap(None, self._who)
        if not may:
            raise Throttled("no place is free", "", 0.0)
        return places

    def _kept(self, name: str, claim: Callable[[Receiver], bool], with_places: bool = False) -> Line | None:
        tls = self._tls
        key = self._key(name, tls)
        receiver = self._services.keeper.take(key, claim, with_places=with_places)
        if receiver is None:
            return None
        self._services.gauges.outgoing += 1
        self._services.counters.reused += 1
        return self._line(receiver, name, tls, True, key)

    def _kept_with(self, name: str, places: Places | None) -> Line | None:
        """What came with a place that had to be waited for."""
        if places is None:
            return None

        def move_in(kept: Receiver) -> bool:
            old, kept.place = kept.place, places
            self._services.office.leave(old)
            return True

        return self._kept(name, move_in, True)

    def _swap(self, kept: Receiver) -> bool:
        """Its places for ours, if these are free."""
        may, places = self._services.office.swap(kept.place, self._who)
        if may:
            kept.place = places
        return may

    def _fresh(
        self, name: str, places: Places | None, tls: TlsMode, ends_at: float, in_clear: InClear | None = None
    ) -> Line:
        """A new connection with its session up, which takes the places over.

        Args:
            ends_at: see `Limits`.
            in_clear: why TLS is not tried, where that is so.
        """
        services, terms = self._services, self._terms
        timeout, idle = services.settings.connect_timeout, services.settings.idle_timeout
        wish = self._wish(name)._replace(tls=tls)
        limits = Limits(timeout, _ANSWER_WITHIN, ends_at)
        claim = Claim(services.keeper, places, partial(self._place_again, ends_at))
        make = partial(
            open_receiver,
            *(services.engine, wish, terms.source, terms.destination, limits, idle),
            *(claim.failed, claim.once_more, services.tls_sessions),
        )
        try:
            receiver = self._had(make)
        except BaseException as error:
            if isinstance(error, UpstreamError) and error.smtp_reply is not None:
                services.office.replied(claim.asked_with, error.smtp_reply)
            services.office.leave(claim.places)
            raise
        receiver.place = claim.places
        receiver.in_clear = receiver.in_clear or in_clear
        return self._line(receiver, name, tls, False)

    def _place_again(self, ends_at: float, error: UpstreamError) -> Places | None:
        """See `Claim`."""
        self._tries_again(error)
        return self._enter(ends_at - monotonic(), None)

    def _had(self, make: Callable[[], Receiver]) -> Receiver:
        services = self._services
        services.gauges.outgoing += 1
        try:
            receiver = make()
        except BaseException as error:
            services.gauges.outgoing -= 1
            if isinstance(error, Overloaded):
                services.keeper.shed(1)
            raise
        services.counters.fresh += 1
        return receiver

    def _connected(self, seconds: float, sock: RawSocket | None) -> Receiver:
        services, terms, ends = self._services, self._terms, self._services.gauges.ends
        noted: list[Endpoint] = []

        def note(sock: RawSocket) -> None:
            if ends is not None:
                noted.append(upstream.local_endpoint(sock))
                ends.update(noted)

        idle = services.settings.idle_timeout
        try:
            return connect_receiver(
                services.engine, terms.source, terms.destination, max(seconds, 0.001), idle, sock, note
            )
        except BaseException:
            if ends is not None:
                ends.difference_update(noted)
            raise

    def _tries_again(self, error: UpstreamError) -> bool:
        """TLS failed, and may be done without (RFC 7435), or has not failed for good; see `may_try_again`."""
        if not may_try_again(self._wished, error):
            return False
        self._services.counters.failed.count(error.step)
        how = "with a full handshake"
        if not isinstance(error, StaleSession):
            how = "in clear"
            self._services.broken_tls.failed(self._terms.destination, error.reason, monotonic())
        log.note(log.Event.TLS, log.INFO, f"{error}; going on {how}", destination=self._terms.destination)
        return True

    def _line(self, receiver: Receiver, name: str, tls: TlsMode, reused: bool, key: PoolKey | None = None) -> Line:
        """For the dialogue; `tls` is what was tried. In clear instead, it is shared as one that is to be in clear.

        Args:
            key: that of `name` and `tls`, if it is at hand.
        """
        services = self._services
        if not reused:  # we have come from its reply, and have not waited since
            receiver.missed = not may_wait(receiver.stream)
        if not reused and receiver.greeting is not None:
            services.acquaintances.met(self._terms.destination, tls, receiver.greeting, receiver.hello)
        if receiver.tls is not None and not reused:
            services.broken_tls.worked(self._terms.destination)
            services.counters.tls(receiver.tls.seen)
        cause = receiver.in_clear.cause if receiver.in_clear is not None and not reused else ""
        if not cause and tls is TlsMode.NONE and may_do_without(self._wished):
            cause = "remembered"
        if cause:
            services.counters.in_clear.count(cause)
            tls, key = TlsMode.NONE, None
        most = services.settings.reuse_connections_max_messages
        if receiver.mailmax is not None:
            most = min(most, receiver.mailmax)
        return Line(
            stream=receiver.stream,
            local=receiver.local,
            reused=reused,
            greeting=receiver.greeting,
            hello=receiver.hello,
            ehlo_name=name,
            shared=self._may_share(name),
            left=max(0, most - receiver.messages),
            tls=receiver.tls.version if receiver.tls else "failed" if cause else "",
            seen=receiver.tls.seen if receiver.tls else None,
            handle=_Held(receiver, key or self._key(name, tls), None),
        )

    def _leaving(self, line: Line) -> Receiver:
        services, receiver = self._services, _held(line).receiver
        receiver.messages += line.messages
        receiver.errors += line.errors
        services.keeper.keep(receiver)
        services.gauges.outgoing -= 1
        if services.gauges.ends is not None:
            services.gauges.ends.discard(receiver.local)
        return receiver

    def _close_bound(self) -> None:
        sock, self._bound = self._bound, None
        if sock is not None:
            self._services.engine.close(sock)


def egress_for(
    services: Services, terms: Terms, owner: str, weight: float, sock: RawSocket | None, connect_within: float
) -> Direct:
    """The egress of one client; for the arguments see `Direct`."""
    return Direct(services, terms, owner, weight, sock, connect_within)


class _Held:
    """What stands behind a `Line`: the key is None until its session is up, `bring_up` afterwards."""

    def __init__(self, receiver: Receiver, key: PoolKey | None, bring_up: BringUp | None) -> None:
        self.receiver = receiver
        self.key = key
        self.bring_up = bring_up


def _held(line: Line) -> _Held:
    assert isinstance(line.handle, _Held)
    return line.handle

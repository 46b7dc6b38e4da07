"""A worker of `queue_sender`: takes messages of one lane and brings them through the proxy to the receiver.

Read `Worker._deliver` first: it is the whole way of one message, and what each failure means for it.
"""

from __future__ import annotations

import re
import smtplib
import threading
import time

from mail_queue import Envelope, Replies, log, says
from queue_lanes import Lane, Lanes

from greenarrow_proxy_client import (
    MailLimitReached,
    Permit,
    PermitExpired,
    ProxiedSMTP,
    ProxyRefused,
    ProxyRejected,
    ProxyUnavailable,
    ThrottleRejected,
    ThrottleTimeout,
)

LOOK = 0.25  # seconds between looks whether the process shall end
OPEN_WITHIN = 20.0  # seconds that the proxy has to open a connection, its waiting for a place included


class Stopping(Exception):
    """The process shall end; the message in hand stays in the queue."""


class Worker(threading.Thread):
    """Lives as long as its lane has mail for it. Holds at most one connection, and uses it for many messages."""

    def __init__(self, sender: Lanes, lane: Lane) -> None:
        super().__init__(name=lane.route.name)
        self._sender = sender
        self._lane = lane
        self._smtp: ProxiedSMTP | None = None

    def run(self) -> None:
        try:
            while (envelope := self._sender.take(self._lane)) is not None:
                self._deliver(envelope)
        except Stopping:
            pass
        except Exception as error:  # nothing will work until somebody changes something; the queue is safe on the disk
            self._sender.give_up_all(error)
        finally:
            self._release()
            self._sender.worker_ends(self)

    def _deliver(self, envelope: Envelope) -> None:
        """One attempt.

        Raises:
            Stopping. ProxyRejected: the proxy will not have us until somebody changes something.
        """
        sender, lane = self._sender, self._lane
        content = sender.queue.content(envelope)
        try:
            self._connect()  # before the permit, which would not wait for it
            permit = self._permit()
            replies = self._converse(envelope, content, permit)
        except (PermitExpired, MailLimitReached) as error:  # nothing was sent
            sender.put_back(lane, envelope)
            if isinstance(error, MailLimitReached):
                self._release()
        except (ProxyRefused, ThrottleRejected) as error:
            # No place under a throttle, no connection, no good greeting, no TLS, or what the proxy's configuration does
            # not allow. It is the lane's trouble and not this message's: the others need not find out one by one.
            sender.trouble(lane, envelope, _why(error), error.retry_after)
        except (ProxyUnavailable, ProxyRejected) as error:
            sender.put_back(lane, envelope)
            if not error.retry:
                raise
            log("proxy_away", reason=str(error))
            sender.stop.wait(max(1.0, error.retry_after))
        except OSError as error:  # the connection broke; smtplib's own errors are OSErrors, too
            self._close()
            lane.throttle.report(deferred=1)
            sender.try_again(envelope, f"{type(error).__name__}: {error}")
        else:
            sender.settle(envelope, replies)
            self._report(replies)
            self._end_message(replies)

    # --- the connection, and a permit for it ---

    def _connect(self) -> None:
        """A connection of the message before, or one that the proxy opens, perhaps somebody else's."""
        if self._smtp is not None:
            return
        session, lane = self._sender.session, self._lane
        while not session.wait_until_up(LOOK):
            if session.rejected is not None and not session.rejected.retry:
                raise session.rejected
            self._go_on()
        route, throttles = lane.route, [lane.throttle]
        self._smtp = session.smtp(lane.mx, route.ehlo_name, tls=route.tls, throttles=throttles, deadline=OPEN_WITHIN)
        self._sender.connected(lane)

    def _permit(self) -> Permit:
        """For one message. A connection that would have to wait long for it is better used by others meanwhile."""
        throttle, hold = self._lane.throttle, self._lane.route.hold
        try:
            far = (throttle.seconds_to_next() or 0.0) > hold
            return throttle.acquire(0.0 if far else hold)
        except ThrottleTimeout:
            self._release()
        permit = self._wait_for_permit()
        self._connect()
        return permit if permit.usable else self._wait_for_permit()  # else connecting took too long

    def _wait_for_permit(self) -> Permit:
        while True:
            try:
                return self._lane.throttle.acquire(LOOK)
            except ThrottleTimeout:
                self._go_on()

    def _go_on(self) -> None:
        if self._sender.stop.is_set():
            raise Stopping

    def _release(self) -> None:
        """Give the connection, if there is one, to whoever opens the same next."""
        smtp, self._smtp = self._smtp, None
        if smtp is not None:
            smtp.release()
            self._sender.tell(self._lane)

    def _close(self) -> None:
        smtp, self._smtp = self._smtp, None
        if smtp is not None:
            smtp.close()
            self._sender.tell(self._lane)

    # --- the dialogue ---

    def _converse(self, envelope: Envelope, content: bytes, permit: Permit) -> Replies:
        """MAIL, RCPT, DATA; what the receiver said to each recipient.

        Raises:
            OSError: the connection broke. PermitExpired, MailLimitReached: nothing was sent.
        """
        smtp = self._smtp
        assert smtp is not None
        options = [f"size={len(content)}"] if smtp.has_extn("size") else []
        if smtp.has_extn("8bitmime") and not content.isascii():
            options.append("body=8bitmime")
        at = time.monotonic()
        smtp.permit = permit  # used up by `mail`
        replies: Replies = dict.fromkeys(envelope.recipients, smtp.mail(envelope.sender, options))
        if all(code == 250 for code, _ in replies.values()):
            replies = {recipient: _too_many_is_later(smtp.rcpt(recipient)) for recipient in envelope.recipients}
            welcome = [recipient for recipient, (code, _) in replies.items() if code in (250, 251)]
            if welcome:
                log("data", id=envelope.id)
                replies |= dict.fromkeys(welcome, _data(smtp, content))
        opened, seconds = smtp.opened, round(time.monotonic() - at, 4)
        way = {"source": opened.local.host, "port": opened.local.port, "reused": opened.reused}
        log("attempt", id=envelope.id, at=at, seconds=seconds, **way, replies={r: says(*x) for r, x in replies.items()})
        return replies

    def _end_message(self, replies: Replies) -> None:
        """Is the connection good for another message, and is it still our turn?"""
        smtp, codes = self._smtp, {code for code, _ in replies.values()}
        assert smtp is not None
        if 421 in codes:  # the receiver closes
            self._close()
        elif smtp.over_cap or smtp.mails_left == 0 or smtp.messages >= self._lane.route.messages_per_connection:
            self._release()
        elif codes != {250}:
            try:
                smtp.rset()  # some replies leave the transaction open
            except OSError:
                self._close()

    def _report(self, replies: Replies) -> None:
        """Outcomes, for the common backoff. 4.7.x (RFC 3463: policy) is how receivers say that we are too fast."""
        kinds = {code // 100 for code, _ in replies.values()}
        slower = any(code < 500 and re.match(rb"4\.7\.", text) for code, text in replies.values())
        self._lane.throttle.report(int(2 in kinds), int(4 in kinds), int(kinds == {5}), backoff=slower)


def _why(error: ProxyRefused | ThrottleRejected) -> str:
    if isinstance(error, ThrottleRejected):
        return f"{error.code}: {error}"
    return f"{error.step or error.code}: {error} {error.smtp_reply.decode('utf-8', 'replace')}".rstrip()


def _data(smtp: ProxiedSMTP, content: bytes) -> tuple[int, bytes]:
    try:
        return smtp.data(content)
    except smtplib.SMTPDataError as error:  # an answer other than 354: nothing was sent
        return error.smtp_code, error.smtp_error if isinstance(error.smtp_error, bytes) else error.smtp_error.encode()


def _too_many_is_later(reply: tuple[int, bytes]) -> tuple[int, bytes]:
    """552 to RCPT means 452 (RFC 5321 section 4.5.3)."""
    return (452, reply[1]) if reply[0] == 552 else reply

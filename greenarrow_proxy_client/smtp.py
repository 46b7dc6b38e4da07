"""`smtplib.SMTP` over a connection that the proxy has opened: greeting, EHLO and TLS are already done."""

from __future__ import annotations

import re
import smtplib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from greenarrow_proxy_client.errors import ProxyFailure
from greenarrow_proxy_client.stream import Stream
from greenarrow_proxy_client.throttle import Permit, Throttle
from proxy.protocols.native import messages as m
from proxy.protocols.smtp.dialogue import mailmax

_EXTENSION = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*) ?(.*)")


class MailLimitReached(ProxyFailure):
    """The receiver takes no more messages on this connection (LIMITS MAILMAX, RFC 9422): release it, open the next."""

    code = "mail_limit"


class ProxiedSMTP(smtplib.SMTP):
    """Made by `Session.smtp`. All of `smtplib.SMTP`'s methods from `mail` and `sendmail` on.

    When done, `release()` offers the connection for sharing; `quit()` and `close()` do not. `quit()` leaves QUIT to the
    proxy and waits for nothing. As a context manager it
    releases on success where sharing was asked for, and closes otherwise.

    Attributes:
        opened: what the proxy said, see docs/protocol.md, OPENED.
        messages: accepted by the receiver so far in this SMTP session.
        permit: for the next message, see `Throttle.acquire`; it is checked right before MAIL FROM and used up by it.
    """

    def __init__(self, stream: Stream, ehlo_name: str, reuse: bool, throttles: Sequence[Throttle] = ()) -> None:
        super().__init__(local_hostname=ehlo_name)
        self.sock: Any = stream
        self.messages = 0
        self.permit: Permit | None = None
        self._throttles = throttles
        self._mails = 0  # MAIL commands of ours; all of them are said again on a connection that replaces a dead one
        self._reuse = reuse
        stream.on_reopened = self._take_over
        self._take_over(stream.opened)

    def release(self, wait: bool = False) -> str:
        """Offer the connection for sharing, and be done with it.

        Args:
            wait: wait for the proxy's verdict, a round trip.

        Returns:
            as `Stream.release`.
        """
        stream = self._let_go()
        return stream.release(self.messages, wait) if stream is not None else ""

    def quit(self) -> tuple[int, bytes]:
        """Close the connection in good order: the proxy says QUIT in our place, and hears the answer.

        Raises:
            SMTPServerDisconnected: it is closed already.
        """
        stream = self._let_go()
        if stream is None:
            raise smtplib.SMTPServerDisconnected("please run connect() first")
        stream.leave(self.messages)
        return 221, b"the proxy says QUIT"

    def _let_go(self) -> Stream | None:
        stream: Stream | None = self.sock
        self.sock = None
        if self.file is not None:
            self.file.close()
            self.file = None
        return stream

    @property
    def over_cap(self) -> bool:
        """Whether this MTA has more connections than its fair share: this one should be released after the message."""
        return any(throttle.over_cap for throttle in self._throttles)

    @property
    def mails_left(self) -> int | None:
        """How many messages the receiver still takes on this connection, failed ones included; None: it did not say."""
        most = mailmax({"LIMITS": self.esmtp_features.get("limits", "")})
        return None if most is None else max(0, most - self.opened.messages - self._mails)

    def mail(self, sender: str, options: Sequence[str] = ()) -> tuple[int, bytes]:
        """As `smtplib.SMTP.mail`.

        Raises:
            PermitExpired: `permit` is too old; nothing was sent.
            MailLimitReached: `mails_left` is 0; nothing was sent, and `permit` is as it was.
        """
        if self.mails_left == 0:
            raise MailLimitReached("the receiver takes no more messages on this connection (MAILMAX)")
        permit, self.permit = self.permit, None
        if permit is not None:
            permit.check()
        self._mails += 1
        return super().mail(sender, options)

    def data(self, msg: Any) -> tuple[int, bytes]:
        code, text = super().data(msg)
        if code == 250:
            self.messages += 1
        return code, text

    def connect(self, *_: Any, **__: Any) -> tuple[int, bytes]:
        """Not here: it would go past the proxy. `Session.smtp` opens the next one."""
        raise smtplib.SMTPNotSupportedError("a proxied connection is not connected a second time")

    def starttls(self, *_: Any, **__: Any) -> tuple[int, bytes]:
        """Not here: TLS ends at the proxy, see `Session.smtp`'s `tls`."""
        raise smtplib.SMTPNotSupportedError("TLS to the receiver ends at the proxy: ask Session.smtp for it")

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None and self._reuse:
            self.release()
        elif kind is None and self.sock is not None:
            self.quit()
        else:
            self.close()

    def _take_over(self, opened: m.Opened) -> None:
        """What `ehlo` would have found out."""
        self.opened = opened
        lines = [line.decode("latin-1") for line in opened.ehlo]
        self.ehlo_resp = b"\n".join(opened.ehlo)
        self.does_esmtp = True
        self.esmtp_features = {}
        for match in filter(None, map(_EXTENSION.match, lines[1:])):
            name, params = match[1].lower(), match[2].strip()
            if name == "auth":  # may come twice, and as smtplib has it
                params = f"{self.esmtp_features.get(name, '')} {params}"
            self.esmtp_features[name] = params

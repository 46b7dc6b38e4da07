"""A channel: carries one SMTP session after another over one connection to the proxy. docs/protocol.md section 7.

`Channel` keeps the order of the dialogue; the SMTP sessions on it are `stream.Stream`s. A channel is used by one SMTP
session at a time; which one comes next is `session`'s to decide.
"""

from __future__ import annotations

import enum
import time

from greenarrow_proxy_client.errors import ProxyRefused, ProxyRejected
from greenarrow_proxy_client.link import Link
from proxy.errors import PeerError
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

#: Seconds beyond an OPEN's own deadline that its answer is waited for.
_GRACE = 5.0
#: Seconds that the answer to END is waited for, where it is wanted.
_END_TIMEOUT = 10.0


class State(enum.Enum):
    """Where the dialogue is; `ENDING`: END is sent, ENDED not seen yet. The next OPEN may be sent all the same."""

    IDLE = "idle"
    OPEN = "open"
    ENDING = "ending"
    CLOSED = "closed"


class ChannelLost(Exception):
    """The channel closed or broke before it answered OPEN: nothing of ours has reached a receiver, try another one."""


class Channel:
    """Args:
    link: connected, and authenticated unless `opening` does that.
    opening: bytes to send in one flight with the first OPEN (CHANNEL_AUTH), b"" for none.
    """

    def __init__(self, link: Link, opening: bytes = b"") -> None:
        self._link = link
        self._opening = opening
        self.state = State.IDLE
        self.going_away = False
        self.used_at = time.monotonic()

    def open(self, request: m.Open) -> m.Opened:
        """Open an SMTP session.

        Raises:
            ProxyRefused: the proxy could not; the channel is ready for the next one.
            ProxyRejected: the proxy ended the channel, and said why.
            TimeoutError: it did not answer. ChannelLost: it ended the channel without a word.
        """
        flight, self._opening = self._opening + frames.encode(request), b""
        give_up = time.monotonic() + request.deadline_ms / 1000 + _GRACE
        try:
            self._link.send(flight)
            answer = self._answer(give_up)
        except (OSError, PeerError) as error:
            self.close()
            if isinstance(error, ProxyRejected | TimeoutError):
                raise
            raise ChannelLost(str(error)) from None
        if isinstance(answer, m.Failed):
            self.state = State.IDLE
            raise ProxyRefused(answer)
        self.state = State.OPEN
        return answer

    def send(self, data: bytes | memoryview) -> None:
        """Send bytes to the receiver.

        Raises:
            OSError: the channel is broken.
        """
        view = memoryview(data)
        try:
            for at in range(0, len(view), frames.MAX_PAYLOAD):
                self._link.send(frames.encode_data(view[at : at + frames.MAX_PAYLOAD]))
        except OSError:
            self.close()
            raise

    def limit_sending(self, timeout: float | None) -> None:
        """Seconds that the proxy may take to accept 64 KB; None: any time."""
        self._link.limit_sending(timeout)

    def finish(self) -> None:
        """Say that no more bytes will come (half-close).

        Raises:
            OSError: the channel is broken.
        """
        self._link.send(frames.encode(m.Eof()))

    def receive(self, timeout: float | None) -> bytes | m.Eof | m.Aborted:
        """Bytes of the receiver, or how its side ended.

        Raises:
            TimeoutError: nothing came. OSError: the channel is broken.
        """
        try:
            while True:
                frame = self._frame(timeout)
                if frame[0] == frames.DATA:
                    return bytes(frame[1])
                message = frames.decode(frame, frames.CHANNEL_FROM_PROXY)
                if isinstance(message, m.Eof | m.Aborted):
                    return message
                self._control(message)
        except TimeoutError:
            raise
        except OSError:
            self.close()
            raise
        except PeerError as error:
            self.close()
            raise ConnectionResetError(str(error)) from None

    def end(self, keep: bool, messages: int, quit: bool = False) -> None:
        """End the SMTP session; `keep` offers its connection for sharing, `quit` has the proxy say QUIT to it.
        Never raises; look at `state` afterwards."""
        if self.state is not State.OPEN:
            return
        if self._link.unsent:  # END would stand behind it; a reset is seen at once
            self.close()
            return
        self.state, self.used_at = State.ENDING, time.monotonic()
        try:
            self._link.send(frames.encode(m.End(keep, messages, quit)))
        except OSError:
            self.close()

    def ended(self, timeout: float = _END_TIMEOUT) -> m.Ended | None:
        """Wait for the answer to `end`; None: it did not come, and the channel is closed, or none is due."""
        try:
            while self.state is State.ENDING:
                frame = self._frame(timeout)
                message = _message(frame)
                if isinstance(message, m.Ended):
                    self.state = State.IDLE
                    return message
                self._late(message)
        except (OSError, PeerError):
            self.close()
        return None

    def retire(self) -> None:
        """Close in good order: not before END has arrived, which a close with unread bytes could undo."""
        self.ended()
        self.close()

    def close(self) -> None:
        """Close the connection; an SMTP session on it is broken off."""
        self.state = State.CLOSED
        self._link.close()

    def _answer(self, give_up: float) -> m.Opened | m.Failed:
        """OPENED or FAILED; before it, what is left of the SMTP session before."""
        while True:
            frame = self._frame(max(0.0, give_up - time.monotonic()))
            message = _message(frame)
            if self.state is State.ENDING:
                if isinstance(message, m.Ended):
                    self.state = State.IDLE
                else:
                    self._late(message)
            elif isinstance(message, m.Opened | m.Failed):
                return message
            else:
                self._control(message)

    def _late(self, message: m.Message | None) -> None:
        """What may come between END and ENDED besides: it belongs to the session that is over."""
        if message is not None and not isinstance(message, m.Eof | m.Aborted):
            self._control(message)

    def _control(self, message: m.Message | None) -> None:
        if isinstance(message, m.Goaway):
            self.going_away = True
        elif isinstance(message, m.Error):
            raise ProxyRejected(message)
        else:
            raise PeerError(f"{type(message).__name__ if message else 'DATA'} is out of order")

    def _frame(self, timeout: float | None) -> frames.Frame:
        """The next one that says anything. PROBE does not, nor does it give the proxy more time."""
        give_up = None if timeout is None else time.monotonic() + timeout
        while True:
            frame = self._link.next_frame(timeout)
            if frame is None:
                raise ConnectionResetError("the proxy closed the channel")
            if frame[0] != m.Probe.TYPE:
                return frame
            frames.decode(frame, frames.CHANNEL_FROM_PROXY)
            if give_up is not None:
                timeout = give_up - time.monotonic()
                if timeout <= 0:
                    raise TimeoutError("timed out")


def _message(frame: frames.Frame) -> m.Message | None:
    """The message in a frame, None for DATA."""
    if frame[0] == frames.DATA:
        return None
    message: m.Message = frames.decode(frame, frames.CHANNEL_FROM_PROXY)
    return message

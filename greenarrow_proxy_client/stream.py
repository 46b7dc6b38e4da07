"""One SMTP session on a channel, as a socket-like object.

It also hides one accident of shared connections: one that has died before it answered the first command of its new user
is replaced by a fresh one, once, and what was said to it is said again. Nothing of a message can have been accepted
before the first reply, unless the whole of it was pipelined; then nothing is said again, and the failure is told.
"""

from __future__ import annotations

import errno
import io
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from greenarrow_proxy_client.channel import Channel, State
from proxy.protocols.native import messages as m

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What was sent before the first reply is remembered up to this size; MAIL and RCPT commands are far below it.
_REMEMBERED = 65536
_LONGEST_LINE = 4096


class Stream:
    """A connection to a receiver through the proxy. Reading and writing may be done by two threads.

    Made by `Session.connect` and `Session.smtp`. Has the methods of a socket that programs like `smtplib` use; it has
    no file descriptor of its own, since its bytes share a channel with the proxy's frames.

    Args:
        channel: in an SMTP session.
        opened: the proxy's answer.
        timeout: seconds that a read, or the sending of 64 KB, may take; None: any time.
        give_back: takes the channel when the SMTP session is over.
        reopen: opens a fresh connection on the same channel instead of a shared one that is dead; None: never.

    Attributes:
        opened: what the proxy said: `reused`, `greeting`, `ehlo`, `tls` …; see docs/protocol.md, OPENED.
        on_reopened: called after `opened` has changed, because a fresh connection took the place of a dead one.
    """

    def __init__(
        self,
        channel: Channel,
        opened: m.Opened,
        timeout: float | None,
        give_back: Callable[[Channel], None],
        reopen: Callable[[Channel], m.Opened] | None = None,
    ) -> None:
        self.opened = opened
        self.on_reopened: Callable[[m.Opened], None] | None = None
        self._channel: Channel | None = channel
        self._give_back = give_back
        self._reopen = reopen
        self._buffer = b""
        self._over: m.Eof | m.Aborted | None = None
        self._sent: bytes | None = b"" if opened.reused and reopen else None  # None: nothing will be said again
        self._held = b""  # of the first reply, as long as it is not a whole line
        self.settimeout(timeout)

    # --- as a socket ---

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._live().limit_sending(timeout)

    def gettimeout(self) -> float | None:
        return self._timeout

    def getpeername(self) -> tuple[str, int]:
        """The receiver's address."""
        return self.opened.destination.host, self.opened.destination.port

    def getsockname(self) -> tuple[str, int]:
        """The address at the proxy that the connection leaves from."""
        return self.opened.local.host, self.opened.local.port

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything.

        Raises:
            OSError: the channel is broken. That the receiver's connection is broken is told by `recv`.
        """
        channel = self._live()
        if self._sent is not None:
            remembered = self._sent + bytes(data)
            self._sent = remembered if len(remembered) <= _REMEMBERED else None
        channel.send(memoryview(data))

    def send(self, data: bytes | bytearray | memoryview) -> int:
        self.sendall(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        """At most `size` bytes; b"" when the receiver has closed.

        Raises:
            TimeoutError: nothing came in time. ConnectionResetError: the receiver's connection broke.
            OSError: the channel is broken.
        """
        if not self._buffer:
            self._buffer = self._next() if self._sent is None else self._first_reply()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def recv_into(self, buffer: Buffer, size: int = 0) -> int:
        view = memoryview(buffer)
        data = self.recv(size or len(view))
        view[: len(data)] = data
        return len(data)

    def makefile(self, mode: str = "rb") -> BinaryIO:
        """A buffered reader; closing it leaves the connection alone. Only for reading."""
        if mode != "rb":
            raise ValueError("only for reading: mode 'rb'")
        return io.BufferedReader(_Reader(self))

    def shutdown(self, how: int) -> None:
        """`SHUT_WR` tells the receiver that no more will come. The other directions have no use here."""
        if how != socket.SHUT_WR:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._live().finish()

    def close(self) -> None:
        """Close the connection to the receiver; it is not offered for sharing. A second time does nothing."""
        self._finish(keep=False, messages=0, wait=False)

    def leave(self, messages: int = 0) -> None:
        """Close it in good order: the proxy says QUIT to the receiver, and nobody waits for the answer.

        Every reply must have been read.

        Args:
            messages: accepted by the receiver in this SMTP session.
        """
        self._finish(keep=False, messages=messages, wait=False, quit=True)

    def release(self, messages: int = 0, wait: bool = False) -> str:
        """Offer the connection to whoever opens the same next; otherwise as `close`.

        Every reply must have been read. The proxy looks for itself whether the dialogue allows it.

        Args:
            messages: accepted by the receiver in this SMTP session.
            wait: wait for the proxy's verdict, a round trip.

        Returns:
            "kept", or the word for why not (docs/protocol.md, ENDED); "" without `wait`, or when none came.
        """
        return self._finish(keep=True, messages=messages, wait=wait)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ---

    def _live(self) -> Channel:
        if self._channel is None:
            raise OSError(errno.EBADF, "the connection is closed")
        return self._channel

    def _finish(self, keep: bool, messages: int, wait: bool, quit: bool = False) -> str:
        channel, self._channel = self._channel, None
        if channel is None:
            return ""
        channel.end(keep, messages, quit)
        ended = channel.ended() if wait else None
        self._give_back(channel)
        return ended.reason if ended else ""

    def _next(self) -> bytes:
        """The next bytes of the receiver, b"" at its end."""
        if self._over is None:
            piece = self._live().receive(self._timeout)
            if isinstance(piece, bytes):
                return piece
            self._over = piece
        if isinstance(self._over, m.Eof):
            return b""
        raise ConnectionResetError(self._over.errno or errno.ECONNRESET, self._over.message or "connection reset")

    def _first_reply(self) -> bytes:
        """The first whole line that a shared connection says, or that of the fresh one that replaces it."""
        broken: ConnectionResetError | None = None
        while b"\n" not in self._held and len(self._held) < _LONGEST_LINE:
            try:
                piece = self._next()
            except ConnectionResetError as error:
                broken = error
                break
            if not piece:
                break
            self._held += piece
        held, self._held = self._held, b""
        sent, self._sent = self._sent or b"", None
        dead = b"\n" not in held or held.startswith(b"421")
        if dead and _may_be_said_again(sent) and self._replace(sent):
            return self._next()
        if broken is not None and not held:
            raise broken
        return held

    def _replace(self, sent: bytes) -> bool:
        """Put a fresh connection in the place of the dead one, and say again what was said; False: the channel is gone.

        Raises:
            OSError: no fresh one was to be had.
        """
        channel = self._live()
        if channel.state is not State.OPEN or self._reopen is None:
            return False
        channel.end(keep=False, messages=0)
        self.opened = self._reopen(channel)
        self._over = None
        if self.on_reopened is not None:
            self.on_reopened(self.opened)
        channel.limit_sending(self._timeout)
        channel.send(sent)
        return True


def _may_be_said_again(sent: bytes) -> bool:
    """Not if a message may be in it, complete: then the dead connection may have taken it."""
    return b"BDAT" not in sent.upper() and b"\n.\r\n" not in sent


class _Reader(io.RawIOBase):
    """What `Stream.makefile` buffers."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        return self._stream.recv_into(buffer)

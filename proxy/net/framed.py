"""One SMTP session's bytes in the DATA frames of a native channel, in the shape of a plain stream (`tls.PlainStream`).

The same for both ends of a channel: what is read are the other side's DATA, EOF is its end of the file, and whatever
else it sends is for the owner, who is told by an exception or looks at `word`.
"""

from __future__ import annotations

import contextlib
import errno
import os

from proxy.errors import PeerError
from proxy.net.peer import holds_back
from proxy.net.relay import RawSocket
from proxy.net.tls import Stream
from proxy.policy.turns import Turn
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

_READ_SIZE = 65536


class FramedStream:
    """A stream inside a stream. As there, `recv` and `send` never wait, and raise BlockingIOError instead.

    Args:
        under: the authenticated connection.
        decoder: what came behind its handshake is in it.
        table: which frames the other side may send, see `frames`.

    Attributes:
        word: a message other than DATA, EOF, ABORTED and PROBE that came when bytes were expected; `recv` goes on no
            further.
    """

    __slots__ = ("_decoder", "_done", "_left", "_out", "_table", "socket", "under", "word")

    def __init__(self, under: Stream, decoder: frames.FrameDecoder, table: frames.Table) -> None:
        self.under = under
        self.socket: RawSocket = under.socket
        self.word: m.Message | None = None
        self._decoder = decoder
        self._table = table
        self._left = b""  # of a frame that was longer than what was asked for
        self._out = b""  # of frames that the stream below has not taken yet
        self._done = False

    @property
    def drained(self) -> bool:
        return not self._left and not self._decoder.unread and self.under.drained

    @property
    def turn(self) -> Turn:
        return self.under.turn

    @property
    def unsent(self) -> bool:
        return bool(self._out) or self.under.unsent

    def recv(self, size: int) -> bytes:
        """As `PlainStream.recv`; b"" after EOF, and once there is a `word`.

        Raises:
            BlockingIOError: nothing now. OSError: the connection is broken, or the other side says that its is.
            PeerError: what the protocol does not allow here.
        """
        while not self._left:
            if self._done or self.word is not None:
                return b""
            frame = self.next_frame()
            if frame[0] == frames.DATA:
                self._left = bytes(frame[1])
            else:
                self._take(frames.decode(frame, self._table))
        data, self._left = self._left[:size], self._left[size:]
        return data

    def next_frame(self) -> frames.Frame:
        """The next frame, or piece of DATA, of the connection.

        Raises:
            BlockingIOError: none now. OSError: the connection is broken or closed. PeerError.
        """
        while (frame := self._decoder.next_frame()) is None:
            data = self.under.recv(_READ_SIZE)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            self._decoder.receive(data)
        return frame

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Eof):
            self._done = True
        elif isinstance(message, m.Aborted):
            self._done = True
            raise OSError(message.errno or errno.ECONNRESET, message.message or os.strerror(errno.ECONNRESET))
        elif isinstance(message, m.Opened | m.Failed | m.Ended):
            raise PeerError(f"{type(message).__name__.upper()} is out of order")
        elif not isinstance(message, m.Probe):
            self.word = message

    def send(self, data: bytes | memoryview) -> int:
        """As `PlainStream.send`: at most a frame; what is taken and cannot go yet is `unsent`."""
        if self.unsent:
            self.flush()
        piece = bytes(data[: frames.MAX_PAYLOAD])
        self._out = frames.encode_data(piece)
        self._push()
        return len(piece)

    def say(self, message: m.Message) -> None:
        """A message of the channel, behind all that was sent. Does not wait: see `unsent`."""
        self._out += frames.encode(message)
        self._push()

    def flush(self) -> None:
        """Hand on what is held back.

        Raises:
            BlockingIOError: not all of it went. OSError.
        """
        while self._out:
            sent = self.under.send(self._out)
            self._out = self._out[sent:]
        if self.under.unsent:
            self.under.flush()

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.flush()

    def probe(self) -> None:
        """Say PROBE, the proxy's word that means nothing, unless the client takes nothing.

        Raises:
            OSError: the connection is broken.
        """
        if not self.unsent and not holds_back(self.socket):
            self.say(m.Probe())

    def finish(self) -> None:
        """Say EOF: no more bytes will come, the other direction goes on."""
        self.say(m.Eof())

    def next_session(self) -> None:
        """The SMTP session is over; the next one may begin."""
        self._done = False
        self._left = b""

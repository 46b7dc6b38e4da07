"""One connection to one server: commands out in one pipeline, replies back in their order.

Whoever asks waits for its own replies only (`Batch`); whoever stops waiting leaves its place in the order, so that no
reply goes to the wrong one. Which server it is, and what is asked, is not known here.
"""

from __future__ import annotations

import os
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event

from proxy.errors import PeerError
from proxy.net.conversation import rest_for
from proxy.net.relay import Engine
from proxy.net.tls import Stream
from proxy.net.turns import TurnOver
from proxy.policy.turns import READ, SECONDS
from proxy.store.servers import Trouble, refusal
from proxy.store.wire import NOTHING, ErrorReply, Push, Replies

#: Bytes that are read at once: of the smallest items there are, it takes 4 ms to make something of so many.
_READ_SIZE = 16384


class Batch:
    """Commands that went out together.

    Attributes:
        replies: those that have come, in order. sent_ns, received_ns: before the first byte went, after the last came.
        broken: why no more will come. given_up: nobody waits for them any more.
    """

    __slots__ = ("_done", "broken", "given_up", "missing", "received_ns", "replies", "sent_ns")

    def __init__(self, number: int, now_ns: int) -> None:
        self.replies: list[Any] = []
        self.missing = number
        self.sent_ns = self.received_ns = now_ns
        self.broken: Trouble | None = None
        self.given_up = False
        self._done = Event()

    def take(self, reply: Any, now_ns: int) -> None:
        self.replies.append(reply)
        self.missing -= 1
        self.received_ns = now_ns
        if not self.missing:
            self._done.set()

    def break_off(self, trouble: Trouble) -> None:
        self.broken = trouble
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether all replies have come, or no more will, within that time."""
        return bool(self._done.wait(max(seconds, 0)))


class Link:
    """A connected stream, TLS done.

    Args:
        where: the server, for messages.
        clock: nanoseconds of CLOCK_BOOTTIME.
        secrets: what it is told and nobody else may see.

    Attributes:
        trouble: why it ended, or None. ended: set then.
    """

    def __init__(
        self, engine: Engine, stream: Stream, where: str, clock: Callable[[], int], secrets: Sequence[str] = ()
    ) -> None:
        self.where = where
        self.trouble: Trouble | None = None
        self.ended = Event()
        self._engine, self._stream, self._clock = engine, stream, clock
        self._out = bytearray()
        self._waiting: deque[Batch] = deque()
        self._replies = Replies()
        self._secrets = tuple(secrets)
        self._reader = gevent.spawn(self._run)

    def owes(self, patience_ns: int) -> bool:
        """Whether a reply is missing for longer than that, or was given up."""
        if not self._waiting:
            return False
        oldest = self._waiting[0]
        return oldest.given_up or self._clock() - oldest.sent_ns > patience_ns

    def send(self, commands: Sequence[bytes]) -> Batch:
        """Send these; what comes of it is in the batch. Never waits.

        Raises:
            Trouble: the connection has ended; nothing was sent.
        """
        if self.trouble is not None:
            raise self.trouble
        batch = Batch(len(commands), self._clock())
        self._waiting.append(batch)
        self._out += b"".join(commands)
        try:
            self._flush()
        except (OSError, PeerError) as error:
            self.close(self._why(error))
        return batch

    def ask(self, commands: Sequence[bytes], seconds: float, step: str) -> list[Any]:
        """Send these and wait for the replies.

        Raises:
            Trouble: the connection has ended, or the replies have not come in time.
        """
        batch = self.send(commands)
        batch.given_up = not batch.wait(seconds)
        if batch.broken is not None:
            for reply in batch.replies:  # its last word: DENIED, too many clients
                if isinstance(reply, ErrorReply):
                    raise self.refusal(step, reply)
            raise Trouble(step, self.where, batch.broken.reason, batch.broken.number)
        if batch.missing:
            raise Trouble(step, self.where, f"no answer within {seconds:g} s")
        return batch.replies

    def refusal(self, step: str, reply: Any) -> Trouble:
        """What a reply means that is an error, or not what was expected."""
        return refusal(step, self.where, reply, self._secrets)

    def close(self, trouble: Trouble) -> None:
        """End it; whoever waits for a reply learns why."""
        if self.trouble is not None:
            return
        self.trouble = trouble
        self._engine.close(self._stream.socket, reset=bool(self._out) or self._stream.unsent)
        self._out.clear()
        while self._waiting:
            self._waiting.popleft().break_off(trouble)
        self.ended.set()
        self._reader.kill(block=False)

    def read(self) -> bool:
        """Take in what has come, without waiting; False: there may be more, and it is the turn of others.

        Raises:
            OSError, PeerError: the connection is broken.
        """
        ends = monotonic() + SECONDS
        while True:
            try:
                data = self._stream.recv(_READ_SIZE)
            except BlockingIOError:
                return True
            except TurnOver:
                return False
            if not data:
                raise PeerError("the server has closed the connection")
            self._replies.feed(data)
            now = self._clock()
            while (reply := self._replies.next()) is not NOTHING:
                self._hand_out(reply, now)
            if monotonic() > ends:
                return False

    def catch_up(self) -> None:
        """Take in what has come while the program was busy with other things."""
        if self.trouble is None:
            try:
                self.read()
            except (OSError, PeerError) as error:
                self.close(self._why(error))

    def _hand_out(self, reply: Any, now: int) -> None:
        # Pushes are of RESP3, which we do not speak.
        if not self._waiting or isinstance(reply, Push):
            raise PeerError("a reply that nobody has asked for")
        first = self._waiting[0]
        first.take(reply, now)
        if not first.missing:
            self._waiting.popleft()

    def _flush(self) -> None:
        """Give the kernel what it takes; an event tells when it takes more.

        Raises:
            OSError, PeerError: the connection is broken.
        """
        stream = self._stream
        try:
            while self._out or stream.unsent:
                if self._out:
                    del self._out[: stream.send(bytes(self._out[:_READ_SIZE]))]
                else:
                    stream.flush()
                    if stream.unsent:
                        return
        except BlockingIOError:
            return
        except OSError:
            self.read()  # the peer's last word says why, if there is one: an alert, DENIED
            raise

    def _run(self) -> None:
        """The reader; events of both directions come to it."""
        turn, fd = self._stream.turn, self._stream.socket.fileno()
        turn.key = self.where
        try:
            while self.trouble is None:
                self._flush()
                if not self.read():
                    turn.end()
                    rest_for(turn)
                    continue
                self._engine.wait(fd)
                turn.begin(monotonic())
                turn.spend(READ, monotonic())
        except (OSError, PeerError) as error:
            self.close(self._why(error))

    def _why(self, error: Exception) -> Trouble:
        if isinstance(error, ssl.SSLError):
            return Trouble("tls", self.where, f"TLS: {error.reason or error.strerror or 'broken'}")
        number = getattr(error, "errno", None) or 0
        return Trouble("call", self.where, os.strerror(number) if number else str(error), number)

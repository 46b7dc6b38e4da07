"""A command said to a receiver that nobody uses at the moment, and its answer: in the hub, without a greenlet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from proxy.model import Discard
from proxy.net.alarm import TimeIsUp
from proxy.net.relay import UNSURE, Engine
from proxy.net.tls import PlainStream, Stream
from proxy.net.turns import TurnOver

_READ_SIZE: Final = 4096


class Exchange:
    """One. Its bytes are bounded by who judges the answer.

    Args:
        stream: its socket is registered with the engine, and has no other reader until this is over.
        receive: given what the receiver says, until it returns true: that was all.
        over: called once, perhaps from within `begin`: None: all was said; else what came instead.
    """

    __slots__ = ("_alarm", "_command", "_engine", "_over", "_receive", "_stream", "_unsure")

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        command: bytes,
        receive: Callable[[bytes], bool],
        over: Callable[[Discard | None], object],
    ) -> None:
        self._engine = engine
        self._stream = stream
        self._command = command
        self._receive = receive
        self._over: Callable[[Discard | None], object] | None = over
        self._alarm: Any = None
        self._unsure = False  # its end may have come, and no other event will tell

    def begin(self, seconds: float, look: bool = True) -> None:
        """Say the command; the answer has so long. Does not wait.

        Args:
            look: its end may have come before, and will not come again.
        """
        self._engine.watch(self._stream.socket.fileno(), self._event)
        self._alarm = self._engine.alarms.start(seconds, self)
        self._unsure = look
        self._guarded(self._go_on if look else self._say)

    def throw(self, up: TimeIsUp) -> None:
        """The deadline has passed."""
        self._end(Discard.TIMED_OUT)

    def _event(self, events: int) -> None:
        self._unsure = self._unsure or events & UNSURE != 0
        self._guarded(self._go_on)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BlockingIOError:
            pass
        except TurnOver:  # TLS of its own, and no end of it
            self._end(Discard.PEER_SPOKE)
        except OSError:
            self._end(Discard.PEER_CLOSED)

    def _say(self) -> None:
        stream = self._stream
        while self._command:
            sent = stream.send(self._command)  # by itself: compiled, a slice evaluates its bound twice
            self._command = self._command[sent:]
        if stream.unsent:
            stream.flush()

    def _go_on(self) -> None:
        if self._command or self._stream.unsent:
            self._say()
        while self._over is not None:
            data = self._stream.recv(_READ_SIZE)
            if self._unsure and isinstance(self._stream, PlainStream):
                self._stream.drained = False
            if not data:
                self._end(Discard.PEER_CLOSED)
            elif self._receive(data):
                self._end(None)

    def _end(self, reason: Discard | None) -> None:
        over, self._over = self._over, None
        if over is not None:
            self._alarm.cancel()
            self._alarm = None  # which refers to us
            self._engine.watch(self._stream.socket.fileno(), None)
            over(reason)

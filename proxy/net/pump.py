"""Bytes both ways between two streams, one of which is more than a raw socket: TLS, or frames.

Two raw sockets are `relay`'s business, without a greenlet. Here a greenlet does it, by the same rules: try, then wait;
what one side does not take stops reading from the other; a half-close travels on.
"""

from __future__ import annotations

from collections.abc import Callable
from select import EPOLLERR
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from proxy.model import Ending
from proxy.net.conversation import rest_for
from proxy.net.framed import FramedStream
from proxy.net.relay import Engine
from proxy.net.tls import Stream
from proxy.net.turns import TurnOver
from proxy.policy.turns import READ, Turn

_READ_SIZE = 65536
#: Reads of one side before the other has its say.
_READS_A_SIDE = 4

AnyStream = Stream | FramedStream


class _Broken(Exception):
    """A side is gone otherwise than by a FIN."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending


class _Way:
    """One direction.

    Args:
        fin: how the whole ends if this direction's FIN came first. unread, unwritten: how, if its ends break.
        heard: is told the first bytes.
    """

    def __init__(
        self,
        source: AnyStream,
        sink: AnyStream,
        turn: Turn,
        fin: Ending,
        unread: Ending,
        unwritten: Ending,
        heard: Callable[[bytes], None] | None = None,
    ) -> None:
        self._heard = heard
        self._source, self._sink = source, sink
        self._turn = turn
        self._unread, self._unwritten = unread, unwritten
        self.fin = fin
        self.moved = 0
        self.ended = False  # the source's FIN was read
        self.done = False  # and the sink was told
        self._held = b""

    @property
    def unsent(self) -> bool:
        """Whether the sink has not taken all that it was given."""
        return bool(self._held) or self._sink.unsent

    def step(self) -> bool:
        """Move what can be moved; whether anything was."""
        if self.done or not self._push():
            return False
        for count in range(_READS_A_SIDE):
            if self.ended:
                break
            if not self._turn.spend(READ, monotonic()):
                return count > 0
            try:
                data = self._source.recv(_READ_SIZE)
            except TurnOver:
                self._turn.end()
                return count > 0
            except BlockingIOError:
                return count > 0
            except OSError:
                raise _Broken(self._unread) from None
            if self._heard is not None and data:
                self._heard(data)
                self._heard = None
            self.ended = not data
            self.moved += len(data)
            self._held = data
            if not self._push():
                return True
        if self.ended:
            self._write(self._sink.finish)
            self.done = True
        return True

    def _push(self) -> bool:
        """Hand what is held to the sink; whether nothing is left."""
        while self.unsent:
            if not self._write(self._send if self._held else self._sink.flush):
                return False
        return True

    def _send(self) -> None:
        sent = self._sink.send(self._held)
        self._held = self._held[sent:]

    def _write(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except BlockingIOError:
            return False
        except OSError:
            raise _Broken(self._unwritten) from None
        return True


class Pump:
    """Belongs to the greenlet that makes it.

    Args:
        client, receiver: the two streams, set up, their sockets registered with the engine.
        heard: is told the receiver's first bytes.
    """

    def __init__(
        self,
        engine: Engine,
        client: AnyStream,
        receiver: AnyStream,
        heard: Callable[[bytes], None] | None = None,
    ) -> None:
        self._engine = engine
        self._fds = client.socket.fileno(), receiver.socket.fileno()
        reset, gone = Ending.CLIENT_RESET, Ending.UPSTREAM_RESET
        self._turn = client.turn
        self._up = _Way(client, receiver, self._turn, Ending.CLIENT_CLOSED, reset, gone)
        self._down = _Way(receiver, client, self._turn, Ending.UPSTREAM_CLOSED, gone, reset, heard)
        self._greenlet: Any = getcurrent()
        self._waiting = False
        self._doom: Ending | None = None

    @property
    def up(self) -> int:
        """Bytes towards the receiver."""
        return self._up.moved

    @property
    def down(self) -> int:
        return self._down.moved

    @property
    def delivered(self) -> bool:
        """Whether the client has been told all that the receiver said, and its end."""
        return self._down.done and not self._down.unsent

    @property
    def half_closed(self) -> bool:
        """Whether one side has closed, and the other has not."""
        return self._up.done != self._down.done

    def run(self) -> Ending:
        """Until both sides have closed, one is broken, or `cut`. Closes nothing."""
        first: Ending | None = None
        try:
            while not (self._up.done and self._down.done):
                moved = self._up.step()
                moved |= self._down.step()
                if first is None:
                    first = next((way.fin for way in (self._up, self._down) if way.ended), None)
                if self._doom is not None:
                    return self._doom
                if self._turn.over:
                    rest_for(self._turn)
                elif not moved:
                    self._wait()
        except _Broken as broken:
            return broken.ending
        assert first is not None
        return first

    def cut(self, ending: Ending) -> None:
        """End it; must not wait."""
        self._doom = self._doom or ending
        get_hub().loop.run_callback(self._resume)

    def _wait(self) -> None:
        client, receiver = self._fds
        self._engine.watch(client, self._client_event)
        self._engine.watch(receiver, self._receiver_event)
        self._waiting = True
        try:
            get_hub().switch()
        finally:
            self._waiting = False
            for fd in self._fds:
                self._engine.watch(fd, None)
            self._turn.begin(monotonic())

    def _client_event(self, events: int) -> None:
        if events & EPOLLERR:  # a reset: it must not have to wait until the receiver takes bytes again
            self._doom = self._doom or Ending.CLIENT_RESET
        self._resume()

    def _receiver_event(self, _events: int) -> None:
        self._resume()

    def _resume(self) -> None:
        if self._waiting:
            self._greenlet.switch()

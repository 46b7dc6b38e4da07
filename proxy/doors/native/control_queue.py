"""Frames of a session on their way to the client: what the kernel has not taken yet, in order.

A frame of which a part is gone must be finished before any other; pings may overtake all the rest. Nothing here waits.
How full a queue may be, and what follows from that, is `control`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Protocol


class Stream(Protocol):
    """As much of a stream as is used here."""

    @property
    def unsent(self) -> bool:
        """Whether the stream itself holds bytes."""

    def send(self, data: bytes) -> int:
        """Take some of it, at least one byte. Raises: BlockingIOError: nothing now. OSError."""

    def flush(self) -> None:
        """Pass on what the stream itself holds. Raises: BlockingIOError, OSError."""


#: Frames that go in one call together are this long at most, but for a single one: a call costs more than copying them.
_TOGETHER: Final = 16384


class Outgoing:
    """The queue of one session.

    Attributes:
        frames: those that are not wholly gone; only to be looked at.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.frames: deque[bytes] = deque()
        self._begun = False  # some bytes of the first frame are gone

    def add(self, frames: Iterable[bytes]) -> None:
        """Behind all others."""
        self.frames.extend(frames)

    def add_first(self, frames: Sequence[bytes]) -> None:
        """Before all but a frame of which a part is gone already."""
        begun = self.frames.popleft() if self._begun else b""
        self.frames.extendleft(reversed(frames))
        if begun:
            self.frames.appendleft(begun)

    def send(self, frames: Sequence[bytes]) -> None:
        """Behind all others, and what the kernel takes goes now; a frame by itself is queued only if it does not.

        Raises:
            OSError: the connection is broken.
        """
        if len(frames) == 1 and not self.frames and not self._stream.unsent:
            frame = frames[0]
            try:
                sent = self._stream.send(frame)
            except BlockingIOError:
                sent = 0
            if sent < len(frame):
                self.frames.append(frame[sent:])
                self._begun = sent > 0
        else:
            self.frames.extend(frames)
            self.flush()

    def flush(self) -> None:
        """Hand over what the kernel takes now.

        Raises:
            OSError: the connection is broken.
        """
        stream, frames = self._stream, self.frames
        try:
            while frames:
                data = frames[0] if len(frames) == 1 else self._together()
                sent = stream.send(data)
                if sent == len(data) == len(frames[0]):
                    frames.popleft()
                    self._begun = False
                else:
                    self._gone(sent)
            if stream.unsent:
                stream.flush()
        except BlockingIOError:
            pass

    def _together(self) -> bytes:
        """The first frames, as many as go in one call."""
        chosen: list[bytes] = []
        size = 0
        for frame in self.frames:
            size += len(frame)
            if chosen and size > _TOGETHER:
                break
            chosen.append(frame)
        return b"".join(chosen)

    def _gone(self, sent: int) -> None:
        """So many bytes of the first frames have been taken."""
        frames = self.frames
        while sent:
            frame = frames.popleft()
            if sent < len(frame):
                frames.appendleft(frame[sent:])
                self._begun = True
                return
            sent -= len(frame)
            self._begun = False

"""Frames of a session on their way to the client: what the kernel has not taken yet, in order.

A frame of which a part is gone must be finished before any other; pings may overtake all the rest. Nothing here waits.
How full a queue may be, and what follows from that, is `control`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol


class Stream(Protocol):
    """As much of a stream as is used here."""

    def send(self, data: bytes) -> int:
        """Take some of it, at least one byte. Raises: BlockingIOError: nothing now. OSError."""

    def flush(self) -> None:
        """Pass on what the stream itself holds. Raises: BlockingIOError, OSError."""


class Outgoing:
    """The queue of one session; its length is the number of frames that are not wholly gone."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._frames: deque[bytes] = deque()
        self._begun = False  # some bytes of the first frame are gone

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, frames: Iterable[bytes]) -> None:
        """Behind all others."""
        self._frames.extend(frames)

    def add_first(self, frames: Sequence[bytes]) -> None:
        """Before all but a frame of which a part is gone already."""
        begun = self._frames.popleft() if self._begun else b""
        self._frames.extendleft(reversed(frames))
        if begun:
            self._frames.appendleft(begun)

    def flush(self) -> None:
        """Hand over what the kernel takes now.

        Raises:
            OSError: the connection is broken.
        """
        stream, frames = self._stream, self._frames
        try:
            while frames:
                frame = frames[0]
                sent = stream.send(frame)
                self._begun = sent < len(frame)
                if self._begun:
                    frames[0] = frame[sent:]
                else:
                    frames.popleft()
            stream.flush()
        except BlockingIOError:
            pass

"""Lines to an inherited descriptor without ever waiting for it, from inside the gevent hub.

The program's stdout may be a pipe that nobody reads. Then lines wait here in a bounded queue, are dropped beyond it,
counted, and the loss is told as soon as there is room again. How a line looks does not belong here (that is `log`).

O_NONBLOCK belongs to the *open file*, which we share with whoever started us, so it is never set on what we inherited:
pipes and terminals are opened anew through /proc/self/fd, sockets are written with MSG_DONTWAIT, files do not block.

Several processes of the program may share one output (`share`). Then nothing is written but whole lines, at most
PIPE_BUF bytes of them at once: so much goes into a pipe, or a Unix socket, as one piece or not at all (pipe(7)). A
longer line is cut (`fitting`). What is written to a file is one piece in any case.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from gevent import get_hub

from proxy.log.fitting import fitting

#: At most this many lines go into one write(): about 50 KB of closing lines.
BATCH = 256
#: At most this many writes before other callbacks of the loop get their turn.
WRITES_PER_PASS = 8
_EV_WRITE = 2


class Writer:
    """One output of the program.

    Args:
        fd: the inherited descriptor; a closed one behaves like /dev/null.
        environ: JOURNAL_STREAM is looked up here (systemd.exec(5)).
        lost_line: makes the line that tells a loss from (lines lost now, since the start).
        limit: lines that may wait.
    """

    def __init__(
        self, fd: int, environ: Mapping[str, str], lost_line: Callable[[int, int], str], limit: int = 10_000
    ) -> None:
        try:
            status = os.fstat(fd)
        except OSError:
            fd = os.open(os.devnull, os.O_WRONLY)
            status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)
        self.is_journal = environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        self.is_terminal = os.isatty(fd)
        self.lost_total = 0
        self._lost_line = lost_line
        self._limit = limit
        self._most: int | None = None  # bytes at once
        self._is_file = stat.S_ISREG(status.st_mode)
        self._queue: deque[str] = deque()
        self._pending = b""
        self._pending_lines = 0
        self._lost = 0
        self._scheduled = False
        self._watcher: Any = None
        self._fd, self._write, self._close = _opened(fd, status.st_mode)

    def share(self, shared: bool = True) -> None:
        """From now on other processes write there, too, or do so no more."""
        self._most = select.PIPE_BUF if shared and not self._is_file else None

    def put(self, line: str) -> None:
        """Queue one line (without its line end). Costs an append; the write happens in the loop's next pass."""
        if self._lost or len(self._queue) >= self._limit:
            if len(self._queue) >= self._limit:
                self._lose(1)
                return
            self._tell_loss()
        self._queue.append(line)
        if not self._scheduled:
            self._scheduled = True
            get_hub().loop.run_callback(self._pass)

    def flush(self, timeout: float) -> bool:
        """Write what waits, blocking up to `timeout` seconds: for the end of the program, when no hub runs any more.

        Returns:
            Whether everything was written.
        """
        deadline = time.monotonic() + timeout
        if self._lost:
            self._tell_loss()
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        while self._fill():
            try:
                self._pending = self._pending[self._write(self._pending) :]
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not poller.poll(left * 1000):
                    return False
            except OSError:
                self._lose_pending()
                return False
        return True

    def close(self) -> None:
        """Forget what waits and close what was opened here; the inherited descriptor stays open."""
        self._queue.clear()
        self._pending = b""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self._close()

    def _pass(self) -> None:
        """The loop's callback. It must not raise: the hub would print a traceback, to the very stream that failed."""
        for _ in range(WRITES_PER_PASS):
            if not self._fill():
                self._scheduled = False
                return
            try:
                self._pending = self._pending[self._write(self._pending) :]
            except BlockingIOError:
                self._wait_for_room()
                return
            except OSError:
                # The reader is gone, or the disk is full. The next line tries again; trying now would spin.
                self._lose_pending()
                self._scheduled = False
                return
        get_hub().loop.run_callback(self._pass)

    def _fill(self) -> bool:
        """Make `_pending` hold the next bytes to write; False when there are none."""
        if not self._pending and self._queue:
            if self._most is not None:
                self._pending, self._pending_lines = self._piece(self._most)
                return True
            count = min(len(self._queue), BATCH)
            lines = [self._queue.popleft() for _ in range(count)]
            lines.append("")
            self._pending = "\n".join(lines).encode("utf-8", "backslashreplace")
            self._pending_lines = count
        return bool(self._pending)

    def _piece(self, most: int) -> tuple[bytes, int]:
        """As many lines as fit, at least one, and how many."""
        lines: list[bytes] = []
        left = most
        while self._queue:
            line = fitting(self._queue[0], most - 1)
            left -= len(line) + 1
            if left < 0:
                break
            lines.append(line)
            self._queue.popleft()
        return b"\n".join([*lines, b""]), len(lines)

    def _wait_for_room(self) -> None:
        if self._watcher is None:
            self._watcher = get_hub().loop.io(self._fd, _EV_WRITE, ref=False)
        self._watcher.start(self._on_room)

    def _on_room(self) -> None:
        self._watcher.stop()
        self._pass()

    def _lose(self, count: int) -> None:
        self._lost += count
        self.lost_total += count

    def _lose_pending(self) -> None:
        self._lose(self._pending_lines)
        self._pending = b""

    def _tell_loss(self) -> None:
        lost, self._lost = self._lost, 0
        self._queue.append(self._lost_line(lost, self.lost_total))


def _opened(fd: int, mode: int) -> tuple[int, Callable[[bytes], int], Callable[[], None]]:
    """A descriptor to wait on, a write function that raises BlockingIOError instead of waiting, a close function."""
    if stat.S_ISSOCK(mode):
        stream = socket.socket(fileno=os.dup(fd))
        return stream.fileno(), lambda data: stream.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL), stream.close
    if stat.S_ISREG(mode):
        return fd, lambda data: os.write(fd, data), lambda: None
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        # No /proc, or another user's pipe (we were started through `su`).
        return fd, lambda data: _polite_write(fd, data), lambda: None
    return own, lambda data: os.write(own, data), lambda: os.close(own)


def _polite_write(fd: int, data: bytes) -> int:
    """Write to a blocking pipe or terminal what it takes at once.

    Before Linux 6.5 a pipe is asked first: a writable one has room for PIPE_BUF bytes, if nobody else has taken it by
    then.
    """
    try:
        return os.pwritev(fd, [data[: select.PIPE_BUF]], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL, errno.ENOSYS):
            raise
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])

"""A process of this program that is ours: started with its end of a link, and watched until it has ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gevent import get_hub

from proxy.net.seam import pair

#: Where it finds its end of the link.
LINK_FD = 3


class Child:
    """One that runs.

    Attributes:
        pid: its number. link: our end.
    """

    def __init__(self, pid: int, link: socket.socket, pidfd: int) -> None:
        self.pid = pid
        self.link = link
        self._pidfd = pidfd
        self._watcher: Any = None

    def watch(self, ended: Callable[[str], object]) -> None:
        """Call this when the kernel has closed all that it had, with how it ended, in words."""
        self._watcher = watch(self.pid, self._pidfd, lambda: ended(self._waited_for()))

    def _waited_for(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def watch(pid: int, pidfd: int, ended: Callable[[], object]) -> Any:
    """Call it once when the process has ended, whose descriptor this takes over."""
    watcher: Any = get_hub().loop.io(pidfd, 1)

    def over() -> None:
        watcher.stop()
        watcher.close()
        os.close(pidfd)
        ended()

    watcher.start(over)
    return watcher


def start_child(
    arguments: Sequence[str], without: Sequence[str], also: Mapping[str, str], blocked: Sequence[int] = ()
) -> Child:
    """Start this interpreter with these arguments.

    Args:
        without: variables of the environment that are ours alone. also: further ones.
        blocked: signals that wait until it is ready for them.

    Raises:
        OSError: it cannot be; nothing is left of it.
    """
    environ = {name: value for name, value in os.environ.items() if name not in without} | dict(also)
    ours, theirs = pair()
    pid = 0
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *arguments],
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), LINK_FD)],
            setsigmask=blocked,
            setsigdef=(signal.SIGPIPE,),
        )
        return Child(pid, ours, os.pidfd_open(pid))
    except OSError:
        ours.close()
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        theirs.close()

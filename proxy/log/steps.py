"""The steps of single connections as they happen, for who wants to see them: `log_verbose` and the control socket.

Who has steps to tell asks `on` first: nearly always nobody looks, and then a step must cost nothing. What a step says
holds no secret and nothing of a message; who shows it makes it harmless for a log or a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.model import is_meant
from proxy.stats import Standing

Tell = Callable[[Standing, str], object]

#: Whether anybody looks.
on = False
_watches: list[Watch] = []

#: What may be asked for.
COLUMNS = ("instance", "protocol", "client", "source", "destination")


class Watch:
    """Somebody who looks.

    Args:
        tell: called with each step that fits; must not wait.
        wanted: column (`COLUMNS`) → value; empty: all connections.
    """

    def __init__(self, tell: Tell, wanted: Mapping[str, str]) -> None:
        self.wanted = dict(wanted)
        self._tell = tell

    def take(self, standing: Standing, text: str) -> None:
        """Tell it, if it fits."""
        for column, wanted in self.wanted.items():
            if not is_meant(str(getattr(standing, column)), wanted):
                return
        self._tell(standing, text)


def begin(watch: Watch) -> None:
    """It looks from now on."""
    global on
    _watches.append(watch)
    on = True


def end(watch: Watch) -> None:
    """It looks no more; also a second time."""
    global on
    if watch in _watches:
        _watches.remove(watch)
    on = bool(_watches)


def tell(standing: Standing, text: str) -> None:
    """A connection has come so far."""
    for watch in tuple(_watches):
        watch.take(standing, text)

"""What the commands that change something do, each with the words that tell how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxy.control.commands import Answer, done, refused
from proxy.control.house import House
from proxy.errors import Mistake


def change(words: tuple[str, ...], arguments: Sequence[str], house: House) -> Answer:
    """Do it; may wait.

    Raises:
        Mistake: an argument cannot be understood; nothing has changed.
    """
    return _CHANGES[words](house, list(arguments))


def _reload(house: House, _: list[str]) -> Answer:
    mistakes = house.reload()
    if mistakes:
        return refused("failed", "the old configuration is still in force", mistakes)
    return done("the new configuration is in force")


def _drop_cached(house: House, arguments: list[str]) -> Answer:
    return done(f"{house.drop_cached(arguments[0])} connections closed")


def _close(house: House, arguments: list[str]) -> Answer:
    (number,) = arguments
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise Mistake("bad_command", f"{number}: the number of a connection, as show connections tells it")
    if not house.close(int(number)):
        return refused("failed", f"there is no connection {number} (any more)")
    return done(f"connection {number} is closed")


def _stop(house: House, _: list[str]) -> Answer:
    house.stop()
    return done("stopping: no new connections")


_CHANGES: dict[tuple[str, ...], Callable[[House, list[str]], Answer]] = {
    ("reload",): _reload,
    ("drop", "cached"): _drop_cached,
    ("close", "connection"): _close,
    ("drain",): _stop,
    ("stop",): _stop,
}

"""What the commands that change something do, each with the words that tell how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxy.control.commands import Answer, done, refused
from proxy.control.filters import columns, for_a_time
from proxy.control.house import House
from proxy.errors import Mistake
from proxy.log import steps
from proxy.stats import whole_seconds

#: Seconds for which steps are logged, where nothing is said; and at most.
_VERBOSE, _LONGEST_VERBOSE = 600.0, 86_400.0


def change(words: tuple[str, ...], arguments: Sequence[str], house: House, because: str) -> Answer:
    """Do it; may wait.

    Raises:
        Mistake: an argument cannot be understood; nothing has changed.
    """
    if words == ("log", "verbose"):
        return _verbose(house, arguments, because)
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


def _verbose(house: House, arguments: Sequence[str], because: str) -> Answer:
    if list(arguments) == ["off"]:
        return done(f"{house.log_less()} ended")
    words, seconds = for_a_time(arguments, _VERBOSE, _LONGEST_VERBOSE)
    wanted = columns(words, steps.COLUMNS)
    house.log_verbose(wanted, seconds, because)
    which = " ".join(f"{column}={value}" for column, value in wanted.items()) or "all connections"
    return done(f"the steps of {which} are logged for {whole_seconds(seconds)}")


def _end_backoff(house: House, arguments: list[str]) -> Answer:
    count = house.end_backoff(arguments[0])
    if count is None:
        return refused("failed", f"there is no throttle block {arguments[0]}")
    return done(f"the back-off of {count} throttles is over")


def _stop(house: House, _: list[str]) -> Answer:
    house.stop()
    return done("stopping: no new connections")


_CHANGES: dict[tuple[str, ...], Callable[[House, list[str]], Answer]] = {
    ("reload",): _reload,
    ("drop", "cached"): _drop_cached,
    ("close", "connection"): _close,
    ("backoff", "end"): _end_backoff,
    ("drain",): _stop,
    ("stop",): _stop,
}

"""What the commands that change something do, each with the words that tell how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxy.config.values import RATE, count
from proxy.control.commands import Answer, done, refused, without
from proxy.control.filters import columns, for_a_time
from proxy.control.house import House
from proxy.errors import Mistake
from proxy.log import steps
from proxy.model import canonical_ip
from proxy.stats import whole_seconds
from proxy.throttling.overrides import Override
from proxy.throttling.throttle import Limit

#: Seconds for which steps are logged, where nothing is said; and at most.
_VERBOSE, _LONGEST_VERBOSE = 600.0, 86_400.0
#: The same for what is set by hand on throttles.
_BY_HAND, _LONGEST_BY_HAND = 3600.0, 7 * 86_400.0


def change(words: tuple[str, ...], arguments: Sequence[str], house: House, because: str) -> Answer:
    """Do it; may wait.

    Raises:
        Mistake: an argument cannot be understood; nothing has changed.
    """
    if words == ("log", "verbose"):
        return _verbose(house, arguments, because)
    if words in (("pause", "throttle"), ("limit", "throttle")):
        return _set_by_hand(house, words[0] == "pause", arguments, because)
    return _CHANGES[words](house, list(arguments))


def _reload(house: House, _: list[str]) -> Answer:
    mistakes = house.reload()
    if mistakes:
        return refused("failed", "the old configuration is still in force", mistakes)
    return done("the new configuration is in force")


def _drop_cached(house: House, arguments: list[str]) -> Answer:
    count, silent = house.drop_cached(arguments[0])
    return done(f"{count} connections closed", *without(silent))


def _close(house: House, arguments: list[str]) -> Answer:
    (number,) = arguments
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise Mistake("bad_command", f"{number}: the number of a connection, as show connections tells it")
    found, silent = house.close(int(number))
    if not found:
        return refused("failed", f"there is no connection {number} (any more)", without(silent))
    return done(f"connection {number} is closed")


def _verbose(house: House, arguments: Sequence[str], because: str) -> Answer:
    if list(arguments) == ["off"]:
        ended, silent = house.log_less()
        return done(f"{ended} ended", *without(silent))
    words, seconds = for_a_time(arguments, _VERBOSE, _LONGEST_VERBOSE)
    wanted = columns(words, steps.COLUMNS)
    silent = house.log_verbose(wanted, seconds, because).silent
    which = " ".join(f"{column}={value}" for column, value in wanted.items()) or "all connections"
    return done(f"the steps of {which} are logged for {whole_seconds(seconds)}", *without(silent))


def _set_by_hand(house: House, pause: bool, arguments: Sequence[str], because: str) -> Answer:
    words, seconds = for_a_time(arguments, _BY_HAND, _LONGEST_BY_HAND)
    limits = [word for word in words if "=" in word and not pause]
    name, source = _throttle(house, [word for word in words if word not in limits])
    places, rates = _lower(limits)
    if not (pause or limits):
        raise Mistake("bad_command", "limit throttle: connections=NUMBER, rate=RATE, or both")
    house.set_by_hand(Override(name, source, pause, places, rates, 0, because), seconds)
    what = "paused" if pause else f"limited to {' '.join(limits)}"
    return done(f"{name}{f' for {source}' * bool(source)} is {what} for {whole_seconds(seconds)}")


def _throttle(house: House, words: Sequence[str]) -> tuple[str, str]:
    """Name and source address ("": all) of a throttle.

    Raises:
        Mistake: there is none, or that is no address.
    """
    if not 1 <= len(words) <= 2:
        raise Mistake("bad_command", "the name of a throttle, and perhaps a source address")
    name, source = words[0], ""
    if len(words) == 2:
        try:
            source = canonical_ip(words[1])
        except ValueError:
            raise Mistake("bad_command", f"{words[1]}: not the address of a source") from None
    if not house.is_throttle(name):
        raise Mistake("bad_command", f"{name}: neither a throttle block nor a rule that an instance has named")
    return name, source


def _lower(words: Sequence[str]) -> tuple[int, tuple[Limit, ...]]:
    """Places (0: nothing said) and rates.

    Raises:
        Mistake: a word is none of that.
    """
    places, rates = 0, {}
    for word in words:
        column, _, value = word.partition("=")
        try:
            if column == "connections":
                (places,) = count(1).values(value)
            elif column == "rate":
                (rate,) = RATE.values(value)
                rates[rate.seconds] = Limit(rate.amount, rate.seconds)
            else:
                raise ValueError
        except ValueError:
            raise Mistake("bad_command", f"{word}: what may stand here is connections=5 or rate=500/hr") from None
    return places, tuple(rates[seconds] for seconds in sorted(rates))


def _resume(house: House, arguments: list[str]) -> Answer:
    name, source = _throttle(house, arguments)
    ended = house.end_by_hand(name, source)
    if not ended:
        return refused("failed", f"{name}{f' for {source}' * bool(source)} is not paused by hand")
    return done(f"{name} goes on")


def _end_override(house: House, arguments: list[str]) -> Answer:
    if not house.end_override(arguments[0]):
        return refused("failed", f"there is no override {arguments[0]} (any more); see show overrides")
    return done(f"override {arguments[0]} is over")


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
    ("resume", "throttle"): _resume,
    ("end", "override"): _end_override,
    ("drain",): _stop,
    ("stop",): _stop,
}

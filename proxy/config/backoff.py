"""The form of a `backoff` rule: `on PATTERN, … [over RATE] { … }`, as one text.

In the braces stands what follows, separated by semicolons or line ends: `percent N`, `rate RATE` or `pause`, and
`return_after DURATION`. What a pattern may be is `policy.patterns`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proxy.config import file
from proxy.config.hints import did_you_mean, shown
from proxy.config.values import Kind, count, duration, parse_rate
from proxy.policy.patterns import BadPattern, Pattern
from proxy.settings import BackoffSettings, Rate

#: Each is held against every refusal.
MOST_PATTERNS = 50
#: The times of so many replies are remembered for each throttle.
MOST_OVER = 1000
#: Seconds.
SHORTEST_RETURN = 1.0

_PERCENT = count(1, 99)
_RETURN_AFTER = duration(minimum=SHORTEST_RETURN)
_ACTS = ("percent", "rate", "pause")
_WORDS = (*_ACTS, "return_after")


def parse_backoff(text: str) -> BackoffSettings:
    """A whole rule.

    Raises:
        ValueError: says what is wrong with it.
    """
    tokens = [(token.text, token.type) for token in file.rule_tokens(text)]
    opening = tokens.index(("{", "mark"))
    head, body = tokens[:opening], tokens[opening + 1 : -1]
    if not head or head[0] != ("on", "word"):
        raise ValueError("`on` and a pattern are missing")
    over = None
    if ("over", "word") in head[2:] and head[-2] == ("over", "word"):
        over = _over(head[-1][0])
        head = head[:-2]
    patterns = tuple(_patterns(head[1:]))
    return BackoffSettings(on=patterns, over=over, **_body(body))


def _patterns(tokens: list[tuple[str, str]]) -> Iterator[str]:
    values = tokens[::2]
    if (
        len(tokens) % 2 == 0
        or any(kind == "mark" for _, kind in values)
        or any(t != (",", "mark") for t in tokens[1::2])
    ):
        raise ValueError("patterns are separated by commas; one with blanks in it is quoted")
    if len(values) > MOST_PATTERNS:
        raise ValueError(f"more than {MOST_PATTERNS} patterns in one rule")
    for text, _ in values:
        try:
            Pattern(text)
        except BadPattern as error:
            raise ValueError(f"pattern {shown(text)}: {error}") from None
        yield text


def _over(text: str) -> Rate:
    rate = parse_rate(text)
    if rate is None or rate.amount > MOST_OVER:
        raise ValueError(f"over: a number of replies in a time, such as 5/min; at most {MOST_OVER}")
    return rate


def _body(tokens: list[tuple[str, str]]) -> dict[str, Any]:
    """What follows, by field."""
    found: dict[str, Any] = {}
    for part in _parts(tokens):
        name, values = part[0], part[1:]
        if name not in _WORDS:
            raise ValueError(f"nothing is called {shown(name)} here{did_you_mean(name, _WORDS)}")
        if name in found or (name in _ACTS and any(act in found for act in _ACTS)):
            raise ValueError("one of percent, rate and pause" if name in _ACTS else f"{name} is given twice")
        if len(values) != (name != "pause"):
            raise ValueError(f"{name}: one value is meant" if name != "pause" else "pause takes no value")
        found[name] = _value(name, values)
    return found


def _value(name: str, values: list[str]) -> object:
    try:
        if name == "percent":
            return _PERCENT.parse(values[0])
        if name == "return_after":
            return _RETURN_AFTER.parse(values[0])
        value = parse_rate(values[0]) if name == "rate" else True
    except ValueError as error:
        valid = {"percent": _PERCENT, "return_after": _RETURN_AFTER}
        reason = str(error) or (f"not {valid[name].valid}" if name in valid else "not a rate such as 100/hr")
        raise ValueError(f"{name}: {reason}") from None
    if value is None:
        raise ValueError("rate: 0 is no limit; `pause` is meant, perhaps")
    return value


def _parts(tokens: list[tuple[str, str]]) -> Iterator[list[str]]:
    part: list[str] = []
    for text, kind in [*tokens, (";", "mark")]:
        if kind != "mark":
            part.append(text)
        elif text != ";":
            raise ValueError(f"no `{text}` in the braces")
        elif part:
            yield part
            part = []


BACKOFF = Kind("rule", parse_backoff, "a rule such as `on 421 over 5/min { percent 25; return_after 1h }`", rule=True)

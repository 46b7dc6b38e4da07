"""The form of a `warmup`: `FIGURE, … /day from DATE`, as one text; and dates, without a clock that could be asked."""

from __future__ import annotations

import re

from proxy.config.values import Kind
from proxy.settings import WarmupSettings

MOST_DAYS = 366
_LEAP_DAYS_BEFORE_1970 = 477


def parse_date(text: str) -> int:
    """`2026-12-01`: its number, counted in days from 1970-01-01."""
    match = re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})", text)
    if match is None:
        raise ValueError("a date is written 2026-12-01")
    year, month, day = map(int, match.groups())
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not year >= 1970 or not 1 <= month <= 12 or not 1 <= day <= lengths[month - 1]:
        raise ValueError("there is no such day")
    before = year - 1
    leap_days = before // 4 - before // 100 + before // 400 - _LEAP_DAYS_BEFORE_1970
    return (year - 1970) * 365 + leap_days + sum(lengths[: month - 1]) + day - 1


def parse_warmup(text: str) -> WarmupSettings:
    """`50, 100, 200 /day from 2026-12-01`"""
    figures, slash, rest = text.partition("/")
    match = re.fullmatch(r"day from (\S+)", rest.strip())
    if not slash or match is None:
        raise ValueError("`/day from DATE` is missing")
    texts = [figure.strip() for figure in figures.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,10}", text) for text in texts):
        raise ValueError
    numbers = tuple(map(int, texts))
    if not all(1 <= number <= 10**9 for number in numbers) or len(numbers) > MOST_DAYS:
        raise ValueError(f"figures from 1 to 1000000000, for {MOST_DAYS} days at most")
    return WarmupSettings(figures=numbers, first_day=parse_date(match[1]))


WARMUP = Kind("days", parse_warmup, "figures for the days such as 50, 100, 200 /day from 2026-12-01", line=True)

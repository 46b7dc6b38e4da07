"""`warmup`: how it is written, and dates that exist."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import load as config
from proxy.config.warmup import parse_date
from proxy.errors import ConfigError
from proxy.settings import WarmupSettings

BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"
EPOCH = datetime.date(1970, 1, 1)


def read(line: str) -> WarmupSettings | None:
    text = f"{BASE}throttle t {{\n{line}\n}}\n"
    return config.load(["--config-filename=f"], {}, lambda path: text).settings.throttle[0].warmup


@pytest.mark.parametrize(
    "line",
    [
        "warmup 50, 100, 200, 500, 1000 /day from 2026-12-01",  # as in the documents, to the letter
        "warmup 50,100,200,500,1000/day from 2026-12-01  # a comment",
        "warmup 50, 100, 200, 500, 1000/day   from 2026-12-01",
    ],
)
def test_how_it_is_written(line: str) -> None:
    day = (datetime.date(2026, 12, 1) - EPOCH).days
    assert read(line) == WarmupSettings(figures=(50, 100, 200, 500, 1000), first_day=day)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("warmup 50", "`/day from DATE` is missing"),
        ("warmup 50, 100", "`/day from DATE` is missing"),
        ("warmup 50 /hr from 2026-12-01", "`/day from DATE` is missing"),
        ("warmup 50 /day from 2026-02-29", "there is no such day"),
        ("warmup 50 /day from 1.12.2026", "a date is written 2026-12-01"),
        ("warmup 0, 50 /day from 2026-12-01", "figures from 1"),
        ("warmup " + ", ".join(["1"] * 367) + " /day from 2026-12-01", "366 days at most"),
        ("warmup 50, x /day from 2026-12-01", "is not figures for the days"),
        ("warmup 50 /day from 2026-12-01\nwarmup 1 /day from 2026-12-02", "given twice"),
        ("warmup {}", "a body in braces does not belong here"),
        ("warmup", "a value is missing"),
    ],
)
def test_what_is_none_is_told_with_its_line(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(line)
    assert said in str(caught.value)
    assert str(caught.value).startswith('f:6: throttle "t": ' if "\n" in line else 'f:5: throttle "t": ')


@given(st.dates(min_value=EPOCH))
def test_days_are_counted_as_the_calendar_does(date: datetime.date) -> None:
    assert parse_date(date.isoformat()) == (date - EPOCH).days


@given(st.integers(0, 9999), st.integers(0, 99), st.integers(0, 99))
def test_no_other_day_is_taken(year: int, month: int, day: int) -> None:
    text = f"{year:04}-{month:02}-{day:02}"
    try:
        exists = datetime.date.fromisoformat(text) >= EPOCH
    except ValueError:
        exists = False
    try:
        parse_date(text)
    except ValueError:
        assert not exists
    else:
        assert exists

"""The day of a time zone, as a wall clock's own date in that zone."""

from datetime import UTC, datetime

import pytest

from proxy.server.calendar import day_in, zone

#: 2026-12-01, counted from 1970-01-01.
FIRST = 20_788


@pytest.mark.parametrize(
    ("name", "now", "day"),
    [
        ("UTC", datetime(1970, 1, 1, 0, 0, tzinfo=UTC), 0),
        ("UTC", datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC), FIRST - 1),
        ("UTC", datetime(2026, 12, 1, tzinfo=UTC), FIRST),
        ("Europe/Berlin", datetime(2026, 11, 30, 22, 59, 59, tzinfo=UTC), FIRST - 1),
        ("Europe/Berlin", datetime(2026, 11, 30, 23, 0, tzinfo=UTC), FIRST),
        ("America/New_York", datetime(2026, 12, 1, 4, 59, tzinfo=UTC), FIRST - 1),
        ("America/New_York", datetime(2026, 12, 1, 5, 0, tzinfo=UTC), FIRST),
    ],
)
def test_the_day_of_a_zone(name, now, day):
    assert day_in(zone(name), now) == day


@pytest.mark.parametrize("name", ["Nowhere/Atall", "Europe", "posixrules/x"])
def test_a_zone_that_this_machine_does_not_know(name):
    with pytest.raises(ValueError, match="knows no time zone"):
        zone(name)

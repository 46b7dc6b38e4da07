"""A source address that is not on this machine: a warning, once a minute for each, naming it whatever door asked."""

import pytest

from proxy.errors import SourceMissing
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.stats import Limiter

CLIENT = Endpoint("10.0.0.5", 40000)


@pytest.fixture
def noted(monkeypatch):
    """What was noted, and a clock."""
    lines, clock = [], [1000.0]
    monkeypatch.setattr(log, "note", lambda event, level, message, **fields: lines.append((event, level, fields)))
    monkeypatch.setattr(log, "_sources", Limiter(lines=1))
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    return lines, clock


def missing(source):
    log.refused(1, "a", "socks5", CLIENT, "", None, 0.0, SourceMissing(source))


def test_it_is_a_warning_with_the_source_in_it(noted):
    lines, _ = noted
    missing("192.0.2.9")
    ((event, level, fields),) = lines
    assert (event, level) == (log.Event.FAILED, log.WARNING)
    assert (fields["source"], fields["step"], fields["errno"]) == ("192.0.2.9", "bind", "EADDRNOTAVAIL")


def test_each_source_is_told_once_a_minute_and_what_was_left_out_afterwards(noted):
    lines, clock = noted
    for _ in range(100):
        missing("192.0.2.9")
        missing("192.0.2.10")
    assert [fields["source"] for _, _, fields in lines] == ["192.0.2.9", "192.0.2.10"]
    lines.clear()
    clock[0] += 61
    missing("192.0.2.9")
    told = {(event, fields["source"]): fields.get("lines") for event, _, fields in lines}
    assert told == {
        (log.Event.SUPPRESSED, "192.0.2.9"): 99,
        (log.Event.SUPPRESSED, "192.0.2.10"): 99,
        (log.Event.FAILED, "192.0.2.9"): None,
    }

"""Counters, and the status lines exactly as docs/operations.md and the product's documentation show them."""

from __future__ import annotations

import pytest

from proxy.model import Ending, Endpoint
from proxy.stats import (
    COUNTED,
    MAX_NAMES,
    MOST_LINES,
    OTHER,
    Backlog,
    Counters,
    Flow,
    Limiter,
    ManagerFigures,
    SessionFigures,
    Snapshot,
    Table,
    bare,
    duration,
    listener_line,
    remote_line,
    session_line,
    whole_seconds,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3919, "1h5m19s"),
        (3919.99, "1h5m19s"),
        (0, "0s"),
        (0.00025, "0.250ms"),
        (0.9994, "999.400ms"),
        (0.0000001, "0s"),
        (0.000001, "0.001ms"),
        (1, "1s"),
        (59.9, "59s"),
        (60, "1m0s"),
        (3600, "1h0m0s"),
        (360000, "100h0m0s"),
        (-3, "0s"),
        (-0.2, "0s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_age_below_a_second_is_0s() -> None:
    assert whole_seconds(0.99) == "0s"
    assert whole_seconds(61.5) == "1m1s"


def test_documented_example_lines() -> None:
    """The four lines of the product's documentation, figure by figure."""
    server_a = SessionFigures("server-a", connected=3919.4, ping=0.00025, ping_age=0.4)
    server_b = SessionFigures("server-b", connected=1, ping=0, ping_age=0, backlog=Backlog(532, 0, 1000))
    server_c = SessionFigures("server-c", connected=1, ping=0, ping_age=0, backlog=Backlog(0, 0, 93))
    snapshot = Snapshot(
        listeners=(("0.0.0.0:807", 965),),
        manager=ManagerFigures("0543b19c", 1758, (server_a, server_b, server_c)),
        active=610,
        cached=3,
    )
    lines = [line.text for line in snapshot.lines()]
    assert len(lines) == 6
    assert lines[0] == "listener(0.0.0.0:807): open_connections=965"
    assert lines[1] == (
        "throttle: manager(0543b19c): throttles=1758 sessions=3 backlog(ram=532 bounce=0 disk=1093) "
        "forward(in=0/16 out=0/16 buf=0) back(in=0/16 out=0/16 buf=0)"
    )
    assert lines[2] == (
        "throttle: session(server-a): timeconnected=1h5m19s ping=0.250ms(0s ago) backlog(ram=0 bounce=0 disk=0) "
        "forward(in=0/16 out=0/16 buf=0) back(in=0/16 out=0/16 buf=0)"
    )
    assert lines[5] == "direct_remote_smtp: connections=613(active=610 cached=3)"


def test_flow_and_backlog_figures_stand_in_their_places() -> None:
    manager = ManagerFigures(
        "00000001",
        2,
        (SessionFigures("x", 0, 0, 0, Backlog(1, 2, 3)), SessionFigures("y", 0, 0, 0, Backlog(10, 20, 30))),
        forward=Flow(1, 2, 3),
        back=Flow(4, 5, 6, 32),
    )
    assert Snapshot((), manager, 0, 0).lines()[0].text == (
        "throttle: manager(00000001): throttles=2 sessions=2 backlog(ram=11 bounce=22 disk=33) "
        "forward(in=1/16 out=2/16 buf=3) back(in=4/32 out=5/32 buf=6)"
    )


def test_the_same_figures_by_name() -> None:
    session = SessionFigures("a b", 12.3456, 0.00025, 0.4, Backlog(1, 2, 3), Flow(4, 5, 6), Flow(7, 8, 9))
    manager = ManagerFigures("00000001", 2, (session,), Flow(1, 2, 3), Flow(4, 5, 6))
    listener, total, one, remote = Snapshot((("[::]:25", 7),), manager, 10, 3).lines()
    assert listener.fields == {"listener": "[::]:25", "open_connections": 7}
    assert (total.fields["manager"], total.fields["throttles"], total.fields["sessions"]) == ("00000001", 2, 1)
    assert one.fields == {
        "session": "a b",
        "timeconnected": 12.346,
        "ping": 0.00025,
        "ping_age": 0.4,
        "backlog_ram": 1,
        "backlog_bounce": 2,
        "backlog_disk": 3,
        "forward_entering": 4,
        "forward_leaving": 5,
        "forward_parked": 6,
        "forward_depth": 16,
        "back_entering": 7,
        "back_leaving": 8,
        "back_parked": 9,
        "back_depth": 16,
    }
    assert remote.fields == {"connections": 13, "active": 10, "cached": 3}


def test_many_listeners_and_sessions_are_summed_up_and_nothing_is_lost() -> None:
    """4,096 listeners wrote 4,097 lines every ten seconds. The busiest keep their lines, in their order."""
    listeners = tuple((str(Endpoint("127.0.0.1", 1 + number)), number % 7) for number in range(4096))
    sessions = tuple(SessionFigures(f"s{number}", 1, 0, 0, Backlog(number, 1, 2)) for number in range(300))
    snapshot = Snapshot(listeners, ManagerFigures("0543b19c", 0, sessions), 1, 2)
    lines = snapshot.lines(MOST_LINES)
    assert len(lines) == 2 * MOST_LINES + 4
    busy = [endpoint for endpoint, count in listeners if count == 6][:MOST_LINES]
    assert lines[:MOST_LINES] == [listener_line(endpoint, 6) for endpoint in busy]
    rest = sum(count for _, count in listeners) - 6 * MOST_LINES
    assert lines[MOST_LINES].text == f"listeners(3996 more): open_connections={rest}"
    assert lines[MOST_LINES + 2].text.startswith("throttle: session(s200): ")
    assert lines[-2].text == f"throttle: sessions(200 more): backlog(ram={sum(range(200))} bounce=200 disk=400)"
    assert lines[-1] == remote_line(1, 2)
    everything = snapshot.lines()
    assert len(everything) == 4096 + 1 + 300 + 1
    assert [line for line in lines if line not in everything] == [lines[MOST_LINES], lines[-2]]
    few = Snapshot(listeners[:MOST_LINES], None, 1, 2)
    assert few.lines(MOST_LINES) == few.lines()


def test_without_a_manager_no_throttle_line() -> None:
    assert [line.text for line in Snapshot((("[::]:1080", 0),), None, 1, 2).lines()] == [
        "listener([::]:1080): open_connections=0",
        "direct_remote_smtp: connections=3(active=1 cached=2)",
    ]


def test_single_lines() -> None:
    assert listener_line("[2001:db8::1]:25", 7).text == "listener([2001:db8::1]:25): open_connections=7"
    assert remote_line(0, 0).text == "direct_remote_smtp: connections=0(active=0 cached=0)"


def test_a_table_is_bounded_and_loses_no_count() -> None:
    table = Table()
    for number in range(10 * MAX_NAMES):
        table.count(f"name-{number}")
    table.count("name-0", 5)
    assert len(table) == MAX_NAMES + 1
    assert table["name-0"] == 6
    assert table[OTHER] == 9 * MAX_NAMES
    assert sum(table.values()) == 10 * MAX_NAMES + 5


def test_counters_start_at_zero_and_a_dump_is_a_copy() -> None:
    counters = Counters()
    assert all(value in (0, {}) for value in counters.as_dict().values())
    counters.ended.count(Ending.CLIENT_CLOSED)
    counters.bytes_up += 10
    dump = counters.as_dict()
    counters.ended.count(Ending.CLIENT_CLOSED)
    assert dump["ended"] == {"client_closed": 1}
    assert dump["bytes_up"] == 10
    assert set(dump) == set(COUNTED)


def test_only_a_normal_end_is_clean() -> None:
    clean = {ending for ending in Ending if ending.is_clean}
    assert clean == {Ending.CLIENT_CLOSED, Ending.UPSTREAM_CLOSED, Ending.KEPT}


def test_a_limiter_admits_so_many_a_window_and_tells_what_it_left_out() -> None:
    limiter = Limiter(lines=3, window=60, keys=8)
    assert [limiter.admit("a", 100 + n) for n in range(5)] == [True, True, True, False, False]
    assert limiter.admit("b", 104)
    assert limiter.expired(110) == []
    assert not limiter.admit("a", 159.9)
    assert limiter.expired(170) == [("a", 3)]
    assert limiter.admit("a", 170)
    assert limiter.expired(240) == []


def test_a_limiter_looks_at_its_table_rarely() -> None:
    limiter = Limiter(lines=1, window=60)
    limiter.admit("a", 0)
    limiter.admit("a", 0)
    assert limiter.expired(59) == []
    assert limiter.expired(61) == []
    assert limiter.expired(69) == [("a", 1)]


def test_a_limiter_holds_a_bounded_number_of_keys() -> None:
    limiter = Limiter(lines=2, window=60, keys=10)
    admitted = sum(limiter.admit(f"key-{n}", 0) for n in range(1000))
    assert admitted == 10 + 2
    assert dict(limiter.expired(60)) == {"others": 988}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("mta-1.example.net", "mta-1.example.net"),
        ("x): backlog(ram=9", r"x\x29:\x20backlog\x28ram\x3d9"),
        ("a\nthrottle: manager(", r"a\x0athrottle:\x20manager\x28"),
        (r"a\x29", r"a\x5cx29"),
        ("m\u00fcnchen\u202e\U0001f600", r"m\xfcnchen\u202e\U0001f600"),
        ("x" * 300, "x" * 200),
    ],
)
def test_a_name_forges_no_figures(name: str, shown: str) -> None:
    assert bare(name) == shown
    line = session_line(SessionFigures(name, 1.0, 0.0, 0.0)).text
    assert line.startswith(f"throttle: session({shown}): timeconnected=1s ")
    assert line.count("backlog(") == 1

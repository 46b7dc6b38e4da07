"""Log lines through real descriptors: pipes, sockets, terminals, files, and outputs that nobody reads."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import tty
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gevent
import pytest

from proxy import errors
from proxy.log import lines as log
from proxy.log import outputs, writer
from proxy.log.lines import Event
from proxy.model import Ending, Endpoint
from proxy.stats import Limiter, remote_line

ROOT = Path(__file__).resolve().parents[3]
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
CLIENT = Endpoint("10.0.0.5", 43210)
MX = Endpoint("198.51.100.7", 25)


def settings(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"log_verbose": False, "log_format": "text", "log_connections": "all"} | changes)


@pytest.fixture(autouse=True)
def _clean_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_limiter", Limiter())
    monkeypatch.setattr(outputs, "name_of_source", outputs.name_of_source)
    root, own = logging.getLogger(), logging.getLogger("greenarrow_proxy")
    saved = (root.handlers, root.level, own.handlers, logging.raiseExceptions)
    yield
    root.handlers, root.level, own.handlers, logging.raiseExceptions = saved
    logging.captureWarnings(False)
    for output in {outputs.out, outputs._err} - {None}:
        output.close()
    for fd in OPENED:
        os.close(fd)
    OPENED.clear()
    outputs.out = outputs._err = None


#: Descriptors to be closed after the test.
OPENED: set[int] = set()


def pipe() -> tuple[int, int]:
    """A pipe whose read end does not block."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    OPENED.update({read_end, write_end})
    return read_end, write_end


def terminal() -> tuple[int, int]:
    """A terminal in raw mode, whose master does not block: (master, slave)."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    OPENED.update({master, slave})
    return master, slave


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


class Output:
    """stdout and stderr of the program as two pipes; `out()` and `err()` give the lines written since the last call."""

    def __init__(self, environ: dict[str, str] | None = None, **changes: object) -> None:
        self._out_end, out = pipe()
        self._err_end, err = pipe()
        outputs.setup(settings(**changes), environ or {}, out, err)

    def out(self) -> list[str]:
        return self._lines(self._out_end)

    def err(self) -> list[str]:
        return self._lines(self._err_end)

    def _lines(self, end: int) -> list[str]:
        gevent.sleep(0)
        gevent.sleep(0)
        try:
            data = os.read(end, 1 << 20)
        except BlockingIOError:
            return []
        assert data.endswith(b"\n")
        return data.decode().removesuffix("\n").split("\n")


def refuse(error: errors.ProxyError, client: Endpoint = CLIENT) -> None:
    log.refused(7, "server-a", "socks5", client, "192.0.2.9", MX, 0.25, error)


def close(**changes: object) -> None:
    """Log one closing line; every argument has a value of its own."""
    fields: dict[str, object] = {
        "id": 17,
        "instance": "server-a",
        "protocol": "socks5",
        "client": CLIENT,
        "source": "192.0.2.1",
        "destination": MX,
        "reused": False,
        "tls": "TLSv1.3",
        "bytes_up": 20480,
        "bytes_down": 312,
        "seconds": 1.2345,
        "outcome": Ending.CLIENT_CLOSED,
    }
    log.connection(**(fields | changes))  # type: ignore[arg-type]


CLOSING = (
    "connection id=17 instance=server-a protocol=socks5 client=10.0.0.5:43210 source=192.0.2.1 "
    "destination=198.51.100.7:25 reused=no tls=TLSv1.3 up=20480 down=312 seconds=1.234 outcome=client_closed"
)


def test_the_closing_line() -> None:
    output = Output()
    close()
    (line,) = output.out()
    assert re.fullmatch(STAMP + " " + re.escape(CLOSING), line)
    assert output.err() == []


def test_the_closing_line_has_a_word_in_every_place() -> None:
    output = Output()
    close(
        instance="",
        tls="",
        reused=True,
        client=Endpoint("::1", 9),
        destination=None,
        source="",
        outcome=Ending.UPSTREAM_RESET,
    )
    (line,) = output.out()
    assert " instance=- " in line
    assert " source=- destination=- " in line
    assert " client=[::1]:9 " in line
    assert " tls=- " in line
    assert " reused=yes " in line
    assert line.endswith(" outcome=upstream_reset")
    assert all(part.count("=") == 1 for part in line.split(" ")[2:])


def test_lines_that_name_a_source_have_its_name_too() -> None:
    """Behind the address, in whatever line; one without a name is as it was."""
    output = Output()
    outputs.name_sources({"192.0.2.1": "vmta1", "192.0.2.9": "vmta9"}.get)  # type: ignore[arg-type]
    close()
    close(source="192.0.2.2")
    refuse(errors.FamilyMismatch("no"))
    log.note(log.Event.ADDRESS, log.INFO, "gone", source="192.0.2.1", dropped=1)
    first, second, third, last = output.out() + output.err()
    assert CLOSING.replace("source=192.0.2.1 ", "source=192.0.2.1 source_name=vmta1 ") in first
    assert " source=192.0.2.2 destination=" in second
    assert " source=192.0.2.1 source_name=vmta1 dropped=1" in third
    assert " source=192.0.2.9 source_name=vmta9 destination=" in last
    output = Output(log_format="json")
    outputs.name_sources({"192.0.2.1": "vmta1"}.get)  # type: ignore[arg-type]
    close()
    fields = list(json.loads(output.out()[0]).items())
    assert fields[fields.index(("source", "192.0.2.1")) + 1] == ("source_name", "vmta1")


def test_the_closing_line_as_json() -> None:
    output = Output(log_format="json")
    close()
    (line,) = output.out()
    entry = json.loads(line)
    assert re.fullmatch(STAMP, entry.pop("time"))
    assert entry == {
        "level": "info",
        "event": "connection",
        "id": 17,
        "instance": "server-a",
        "protocol": "socks5",
        "client": "10.0.0.5:43210",
        "source": "192.0.2.1",
        "destination": "198.51.100.7:25",
        "reused": False,
        "tls": "TLSv1.3",
        "up": 20480,
        "down": 312,
        "seconds": 1.234,
        "outcome": "client_closed",
    }


@pytest.mark.parametrize(
    ("setting", "expected"), [("all", ["client_closed", "client_reset"]), ("errors", ["client_reset"]), ("none", [])]
)
def test_log_connections(setting: str, expected: list[str]) -> None:
    output = Output(log_connections=setting)
    close()
    close(outcome=Ending.CLIENT_RESET)
    refuse(errors.SourceNotAllowed("no"))
    assert [re.findall("outcome=(.*)", line)[0] for line in output.out()] == expected
    assert len(output.err()) == (0 if setting == "none" else 1)


def test_status_lines_carry_their_documented_text_and_nothing_else() -> None:
    output = Output()
    log.status([remote_line(610, 3)])
    (line,) = output.out()
    assert re.fullmatch(STAMP + r" direct_remote_smtp: connections=613\(active=610 cached=3\)", line)


def test_status_lines_are_fields_in_json() -> None:
    output = Output(log_format="json")
    log.status([remote_line(610, 3)])
    (line,) = output.out()
    entry = json.loads(line)
    assert entry["message"] == "direct_remote_smtp: connections=613(active=610 cached=3)"
    assert (entry["event"], entry["connections"], entry["active"], entry["cached"]) == ("status", 613, 610, 3)


def test_warnings_and_errors_go_to_stderr() -> None:
    output = Output()
    log.note(Event.RELOAD, log.INFO, "new configuration in force", file="/etc/a b.conf", listeners=2)
    log.note(Event.RELOAD_FAILED, log.ERROR, "old configuration stays in force")
    (out,), (err,) = output.out(), output.err()
    assert re.fullmatch(STAMP + ' reload: new configuration in force file="/etc/a b.conf" listeners=2', out)
    assert re.fullmatch(STAMP + " ERROR reload_failed: old configuration stays in force", err)


def test_debug_lines_appear_only_when_verbose_and_a_reload_changes_that() -> None:
    output = Output()
    log.note(Event.TLS, log.DEBUG, "first")
    outputs.reconfigure(settings(log_verbose=True))
    log.note(Event.TLS, log.DEBUG, "second")
    (line,) = output.out()
    assert line.endswith(" DEBUG tls: second")


def test_peer_text_cannot_forge_a_line_or_move_the_cursor() -> None:
    hostile = 'x"\n2026-01-01 INFO connection id=1 \x1b[2J\u202e\x9b\x00\\'
    output = Output()
    close(instance=hostile)
    log.note(Event.SESSION, log.INFO, "hello " + hostile, name=hostile)
    lines = output.out()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert r'instance="x\"\n2026-01-01 INFO connection id=1 \x1b[2J\u202e\x9b\x00\\" protocol=socks5' in lines[0]
    outputs.reconfigure(settings(log_format="json"))
    close(instance=hostile)
    log.note(Event.SESSION, log.INFO, "hello " + hostile, name=hostile)
    lines = output.out()
    assert len(lines) == 2
    assert all(line.isprintable() and json.loads(line) for line in lines)


def test_long_peer_text_is_cut() -> None:
    output = Output()
    close(instance="a" * 100_000)
    log.note(Event.SESSION, log.INFO, "b" * 100_000)
    first, second = output.out()
    assert len(first) < 600
    assert len(second) < 1100
    assert 'instance="' + "a" * 200 + '..."' in first


def test_text_that_is_not_unicode_is_written() -> None:
    output = Output()
    close(instance="\udcff\ud800")
    assert r'instance="\udcff\ud800"' in output.out()[0]


@pytest.mark.parametrize(
    ("error", "word", "end"),
    [
        (
            errors.SourceNotAllowed("source 192.0.2.9 is not allowed"),
            "WARNING refused",
            'reason=source_not_allowed message="source 192.0.2.9 is not allowed"',
        ),
        (errors.Throttled("no place", "yahoo", 2.5), "refused", 'reason=throttled message="no place"'),
        (errors.PeerError("not SOCKS"), "refused", 'reason=bad_protocol message="not SOCKS"'),
        (
            errors.UpstreamError("connection refused", errors.Step.CONNECT, 111),
            "failed",
            'reason=upstream_failed step=connect errno=ECONNREFUSED message="connection refused"',
        ),
        (
            errors.UpstreamError('greeting: 554 "no" outcome=client_closed', errors.Step.GREETING),
            "failed",
            r'reason=upstream_failed step=greeting errno=- message="greeting: 554 \"no\" outcome=client_closed"',
        ),
    ],
)
def test_refused_and_failed(error: errors.ProxyError, word: str, end: str) -> None:
    output = Output()
    refuse(error)
    (line,) = output.err() if word.startswith("WARNING") else output.out()
    middle = "id=7 instance=server-a protocol=socks5 client=10.0.0.5:43210 source=192.0.2.9 destination=198.51.100.7:25"
    assert line[25:] == f"{word} {middle} seconds=0.250 {end}"


def test_lines_that_a_stranger_can_cause_are_limited_per_address(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    output = Output()
    for port in range(25):
        refuse(errors.ClientNotAllowed("not in allow_from"), Endpoint("203.0.113.9", port))
        refuse(errors.ClientNotAllowed("no"), Endpoint(f"2001:db8:1:2::{port:x}", 1))
    refuse(errors.ClientNotAllowed("no"), Endpoint("203.0.113.10", 1))
    assert len(output.err()) == 10 + 10 + 1
    log.status([])
    assert output.err() == []
    now += 61
    log.status([])
    told = [re.sub(".*left out ", "", line) for line in output.err()]
    assert told == ["client=203.0.113.9 lines=15", "client=2001:db8:1:2::/64 lines=15"]
    refuse(errors.ClientNotAllowed("no"), Endpoint("203.0.113.9", 1))
    assert len(output.err()) == 1


def test_a_failure_of_the_receiver_is_never_left_out() -> None:
    output = Output()
    for _ in range(30):
        refuse(errors.UpstreamError("x", errors.Step.CONNECT, 110))
    assert len(output.out()) == 30


def test_an_internal_error_is_one_line_that_says_where() -> None:
    output = Output()
    try:
        os.stat("/nonexistent\n")
    except OSError as error:
        log.internal_error("relay failed", error)
    (line,) = output.err()
    assert re.search(r'ERROR internal: relay failed error="FileNotFoundError: .*" at=test_lines\.py:\d+$', line)


def test_what_libraries_log_or_warn_about_is_caught() -> None:
    output = Output()
    logging.getLogger("some.library").warning("careful %s", "\x1b[1m")
    logging.getLogger("some.library").info("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old function", UserWarning, stacklevel=1)
    first, second = output.err()
    assert first.endswith(r" WARNING library: careful \x1b[1m")
    assert " WARNING library: " in second
    assert output.out() == []


def test_the_journal_gets_no_timestamp_but_a_priority(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    status = os.fstat(ours.fileno())
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    for form in ("text", "json"):
        outputs.setup(settings(log_format=form), environ, ours.fileno(), ours.fileno())
        close()
        log.note(Event.DRAIN, log.WARNING, "two connections cut")
        gevent.sleep(0)
        lines = theirs.recv(65536).decode().splitlines()
        if form == "text":
            assert lines == [CLOSING, "<4>WARNING drain: two connections cut"]
        else:
            assert "time" not in json.loads(lines[0])
            assert json.loads(lines[1].removeprefix("<4>")) == {
                "level": "warning",
                "event": "drain",
                "message": "two connections cut",
            }


def test_a_journal_stream_of_somebody_else_keeps_the_timestamp() -> None:
    output = Output({"JOURNAL_STREAM": "1:2"})
    close()
    assert re.match(STAMP, output.out()[0])


def test_colour_on_a_terminal_only() -> None:
    master, slave = terminal()
    outputs.setup(settings(), {}, slave, slave)
    log.note(Event.STOP, log.ERROR, "red")
    gevent.sleep(0)
    coloured = os.read(master, 65536).decode()
    assert coloured.startswith("\x1b[31m")
    assert coloured.rstrip("\n").endswith("\x1b[0m")
    assert not fcntl.fcntl(slave, fcntl.F_GETFL) & os.O_NONBLOCK
    output = Output()
    log.note(Event.STOP, log.ERROR, "plain")
    assert "\x1b" not in output.err()[0]


def fill_and_drain(write_fd: int, read: Callable[[], bytes], total: int) -> list[str]:
    """Write `total` lines while nobody reads, then read everything; returns the lines."""
    outputs.setup(settings(), {}, write_fd, write_fd)
    for number in range(total):
        close(id=number)
        if number % 1000 == 0:
            gevent.sleep(0)  # comes back although the output is full
    gevent.sleep(0)
    assert outputs.out is not None
    assert outputs.out._watcher.active  # waits to be told of room, does not poll for it
    assert not fcntl.fcntl(write_fd, fcntl.F_GETFL) & os.O_NONBLOCK
    data = b""
    with gevent.Timeout(20):
        while b"id=999999 " not in data or not data.endswith(b"\n"):  # a read may end in the middle of a line
            try:
                data += read()
            except BlockingIOError:
                # Until the loss is told and a line written after it has come through.
                if len(outputs.out._queue) < 100 and b" lost: " not in data:
                    close(id=999999)
                gevent.sleep(0.001)
    lines = data.decode().splitlines()
    assert [line for line in lines if not line.endswith(" outcome=client_closed") and " lost: " not in line] == []
    return lines


def check_loss(lines: list[str], total: int) -> None:
    """No line is damaged, out of order or lost without being counted, and the loss stands where it happened."""
    told = sum(int(n) for line in lines for n in re.findall(r"WARNING lost: (\d+) lines lost", line))
    ids = [m[1] for line in lines if (m := re.search(r"connection id=(\d+) ", line)) and m[1] != "999999"]
    assert told > 0
    assert len(ids) + told == total
    assert ids == [str(n) for n in range(len(ids))]
    assert outputs.lines_lost() == told


def test_a_pipe_that_nobody_reads_stops_nothing() -> None:
    read_end, write_end = pipe()
    check_loss(fill_and_drain(write_end, lambda: os.read(read_end, 65536), 15_000), 15_000)


def test_a_socket_that_nobody_reads_stops_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    check_loss(fill_and_drain(ours.fileno(), lambda: theirs.recv(65536), 15_000), 15_000)


def test_a_pipe_that_cannot_be_opened_anew_stops_nothing_either() -> None:
    read_end, write_end = pipe()
    with mock.patch.object(writer.os, "open", side_effect=PermissionError):
        lines = fill_and_drain(write_end, lambda: os.read(read_end, 65536), 15_000)
    check_loss(lines, 15_000)


def test_a_terminal_that_is_stopped_stops_nothing() -> None:
    master, slave = terminal()
    with mock.patch.dict(os.environ, {"NO_COLOR": "1"}):
        lines = fill_and_drain(slave, lambda: os.read(master, 65536), 12_000)
    check_loss(lines, 12_000)


def test_lines_of_one_pass_of_the_loop_go_out_in_one_write() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # a datagram is one write
    with ours, theirs:
        outputs.setup(settings(), {}, ours.fileno(), ours.fileno())
        for _ in range(100):
            close()
        gevent.sleep(0)
        assert theirs.recv(1 << 20).count(b"\n") == 100


def test_a_reader_that_has_gone_is_counted_and_not_asked_in_a_loop() -> None:
    read_end, write_end = pipe()
    outputs.setup(settings(), {}, write_end, write_end)
    os.close(read_end)
    OPENED.remove(read_end)
    for expected in range(1, 4):
        close()
        gevent.sleep(0)
        gevent.sleep(0)
        assert outputs.lines_lost() >= expected
    assert outputs.out is not None
    assert not outputs.out._scheduled


def test_a_full_disk_is_counted() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    OPENED.add(full)
    outputs.setup(settings(), {}, full, full)
    for _ in range(2 * writer.BATCH):
        close()
    gevent.sleep(0)
    gevent.sleep(0)
    assert outputs.lines_lost() == writer.BATCH  # the rest waits for the next line, when there may be room


def test_a_file_is_written_plainly(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.write(b"before\n")
        file.flush()
        outputs.setup(settings(), {}, file.fileno(), file.fileno())
        close()
        log.note(Event.STOP, log.WARNING, "after")
        gevent.sleep(0)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1].endswith(CLOSING)
    assert lines[2].endswith("WARNING stop: after")


def test_flush_waits_for_room_but_not_for_ever() -> None:
    read_end, write_end = pipe()
    outputs.setup(settings(), {}, write_end, write_end)
    for _ in range(2000):
        close()
    assert outputs.out is not None
    assert outputs.out.flush(0.01) is False
    count = "import os, sys; sys.exit(sum(1 for line in sys.stdin if line.endswith('client_closed\\n')) != 2000)"
    os.set_blocking(read_end, True)
    with subprocess.Popen([sys.executable, "-c", count], stdin=read_end) as reader:
        assert outputs.out.flush(20) is True
        outputs.out.close()
        os.close(write_end)
        OPENED.remove(write_end)
        assert reader.wait(30) == 0
    outputs.out = outputs._err = None


def test_lines_written_just_before_the_end_arrive() -> None:
    script = (
        "from types import SimpleNamespace as S; from proxy.log import lines as log, outputs; "
        "outputs.setup(S(log_verbose=False, log_format='text', log_connections='all')); "
        "log.note(log.Event.STOP, log.INFO, 'good bye'); log.note(log.Event.STOP, log.WARNING, 'alas')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" stop: good bye\n")
    assert done.stderr.endswith(" WARNING stop: alas\n")


def test_a_closed_stdout_is_no_reason_to_fail() -> None:
    script = (
        "import os; os.close(1); from types import SimpleNamespace as S; from proxy.log import lines as log, outputs; "
        "outputs.setup(S(log_verbose=False, log_format='text', log_connections='all')); "
        "log.note(log.Event.STOP, log.INFO, 'unheard'); log.note(log.Event.STOP, log.WARNING, 'heard')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.endswith(" WARNING stop: heard\n")
    assert done.stderr.count("\n") == 1


def test_every_event_and_outcome_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    section = page.partition("## Log lines")[2].partition("\n## ")[0]
    assert [event for event in Event if f"| `{event}` |" not in section] == []
    assert [outcome for outcome in Ending if f"| `{outcome}` |" not in section] == []


def test_the_vocabulary_has_no_dead_words() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    # What `log` itself writes has no Event at its place in the source.
    assert [event for event in Event if f"Event.{event.name}" not in sources and event is not Event.CONNECTION] == []


def test_the_documented_closing_line_is_the_one_that_is_written() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert "\n" + CLOSING + "\n" in page


def test_a_store_that_is_lost_and_one_that_is_back_are_a_line_each() -> None:
    output = Output()
    log.store_lost("redis://10.0.0.9:6379/0", "no answer in 100 ms", 3)
    log.store_back("redis://10.0.0.9:6379/0", 12.25, 4)
    (lost,) = output.err()
    assert lost.endswith(
        "store: the throttle store does not answer: its limits go on with this proxy's share "
        'store=redis://10.0.0.9:6379/0 share=1/3 reason="no answer in 100 ms"'
    )
    (back,) = output.out()
    assert back.endswith(
        "store: the throttle store answers again store=redis://10.0.0.9:6379/0 seconds=12.250 calls_lost=4"
    )

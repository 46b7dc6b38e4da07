"""A reload in turns: others run in the middle of it, see one whole configuration, and a stop leaves no door open."""

import sys
from collections import Counter

import gevent
import pytest

from proxy.config import load
from proxy.log import lines as log
from proxy.log import outputs
from proxy.net import certificates, turns
from proxy.server import server as module
from proxy.server.server import Server
from tests import program

BEFORE = program.config("idle_timeout 11m\n")
AFTER = program.config(
    "idle_timeout 12m\n"
    + "listen_proxy_protocol "
    + ", ".join(f"127.0.2.{number}:0" for number in range(1, 60))
    + "\ndeny_destination "
    + ", ".join(f"198.51.100.{number}" for number in range(200))
    + "\n"
)


def loaded(text, breathe=lambda: None):
    return load.load(["--config-filename=f"], {}, lambda path: text, breathe)


@pytest.fixture
def server(monkeypatch):
    """A server in force, whose every breath is a rest, and which reads AFTER at a reload."""
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(outputs, "reconfigure", lambda settings: None)
    first = loaded(BEFORE)
    server = Server(lambda breathe, lent: loaded(AFTER, breathe), first)
    server._take(server._prepare(first, lambda: None), lambda: None)
    yield server
    server.close()
    server._wiring.engine.stop()


def test_others_run_in_the_middle_and_see_one_whole_configuration(server):
    """Before, the hub stood still for as long as a reload took: 3 s with 4,096 listeners."""
    seen = []
    reload = gevent.spawn(server._reload)
    while not reload.ready():
        settings = server.services.settings
        seen.append((settings.idle_timeout, len(settings.listen_proxy_protocol), len(server._doors.listening())))
        turns.rest("others")
    reload.get()
    assert server._wiring.counters.reloads == 1
    assert [(timeout, doors) for timeout, doors, _ in seen] == sorted((timeout, doors) for timeout, doors, _ in seen)
    assert {(timeout, doors) for timeout, doors, _ in seen} == {(660.0, 1), (720.0, 59)}
    # A piece for each value read and each door opened, and the doors come one after the other.
    assert len(seen) > 4 * 59 + 4 * 200
    assert len({open for *_, open in seen}) > 50


#: What may be done between two breaths, in lines of Python: below `MANY`, and under a millisecond.
MOST_LINES = 15_000
MANY = 3000
SIZES = {
    "instances": "".join(
        f"instance mta-{number} {{\n    mode smtp\n    share_with group-{number}\n    answer_within 60s\n"
        f"    allow_from 10.0.{number >> 8}.{number & 255}\n    source_ip 127.1.{number >> 8}.{number & 255}\n"
        f'    auth_shared_secret "a-secret-of-32-characters-for-tests-{number}"\n}}\n'
        for number in range(MANY)
    ),
    "sources": "source_ip 127.0.0.0/8, 10.0.0.0/8\ninstance smtp {\n    mode smtp\n}\n"
    + "".join(
        f"source vmta-{number} {{\n    ip 10.0.{number >> 8}.{number & 255}\n    ehlo mx{number}.example\n}}\n"
        for number in range(MANY)
    ),
    "throttles": "".join(
        f"throttle t-{number} {{\n    max_delivery_rate 10/s\n    source 10.0.{number >> 8}.{number & 255}\n}}\n"
        for number in range(MANY)
    ),
    "blocks by name": "".join(
        f"throttle t-{number} {{\n    max_delivery_rate 10/s\n    domain d{number}.example\n"
        f"    mx *.d{number}.example\n    instance i{number}\n"
        f"    destination 98.0.0.0/8, 99.0.{number >> 8}.{number & 255}\n"
        f"    source 10.0.0.0/8, 11.0.{number >> 8}.{number & 255}\n}}\n"
        for number in range(MANY)
    ),
    "sources in bulk": "source_ip 127.0.0.0/8, 10.0.0.0/8\nsource vmta* {\n    ip 10.0.0.0/20\n}\n"
    "throttle all {\n    max_delivery_rate 10/s\n    source vmta*\n}\n",
    "lists": "".join(
        f"{name} 127.0.0.0/8, " + ", ".join(f"10.0.{number >> 8}.{number & 255}" for number in range(MANY)) + "\n"
        for name in ("allow_from", "source_ip", "allow_destination", "deny_destination")
    ),
    "secrets": "".join(
        f'auth_shared_secret "a-secret-of-32-characters-for-tests-{number}"\n' for number in range(MANY)
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_between_two_breaths_there_is_little_however_much_is_configured(server, monkeypatch, size):
    """Counted, not timed: a step that goes through all that is configured without a breath does more than this."""
    lines, most = 0, Counter()

    def breath():
        nonlocal lines
        frame = sys._getframe(1)
        most[frame.f_code.co_qualname] = max(most[frame.f_code.co_qualname], lines)
        lines = 0

    def trace(frame, event, _):
        nonlocal lines
        lines += 1
        return trace

    text = program.config(SIZES[size])
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        new = loaded(text, breath)
        prepared = server._prepare(new, breath)
        breath()
        server._take(prepared, breath)
        breath()
        module._tell_doubts(new, breath)
        breath()
    finally:
        sys.settrace(before)
    assert max(most.values()) < MOST_LINES, most.most_common(8)


#: Blocks of memory that may be freed between two breaths: 20,000 are a millisecond. A table of names or addresses is
#: freed in one go.
MOST_FREED = 10 * MANY
#: Breaths of the same work between two looks: each goes through the whole heap.
SAMPLE = 100


@pytest.mark.parametrize("size", ["instances", "sources", "throttles", "sources in bulk"])
def test_what_a_reload_gives_up_is_freed_in_turns(server, monkeypatch, size):
    """The texts of the file, the places of its values and the settings before: 30 ms in one go with 20,000 blocks."""
    text = program.config(SIZES[size])
    freed, before, breaths, last = Counter(), 0, 0, ""

    def breath():
        nonlocal before, breaths, last
        name = sys._getframe(1).f_code.co_qualname
        breaths += 1
        if name == last and breaths % SAMPLE:
            return
        now = sys.getallocatedblocks()
        freed[name] = max(freed[name], before - now)
        before, last = now, name

    monkeypatch.setattr(module, "Breather", lambda key: breath)
    monkeypatch.setattr(server, "_load", lambda breathe, lent: loaded(text, breathe))
    for _ in range(2):
        assert server._reload() == []
        breath()
    assert max(freed.values()) < MOST_FREED, freed.most_common(8)


def test_a_stop_in_the_middle_leaves_no_door_open(server):
    """The doors that the reload opens after the stop has closed all others would stay open until the end."""
    reload = gevent.spawn(server._reload)
    while len(server._doors.listening()) < 10:
        turns.rest("others")
    assert not reload.ready()
    server._stop.set()
    server._drain()
    assert reload.ready()
    assert all(listener.closed for listener in server._doors._listeners.values())


def test_authorities_are_read_by_a_thread(server, monkeypatch):
    """It takes 20 to 40 ms, each time."""
    where = []
    read = certificates.Authorities

    def spy(pem):
        where.append(gevent.get_hub() is server._wiring.crew._hub)
        return read(pem)

    monkeypatch.setattr(certificates, "Authorities", spy)
    before = list(certificates._judges)
    server._reload()
    assert where == [False]
    assert len(certificates._judges) == 1
    assert certificates._judges != before


def test_what_a_check_would_warn_of_is_logged(server, monkeypatch):
    noted = []
    monkeypatch.setattr(log, "note", lambda event, level, message, **fields: noted.append((event, level, message)))
    server._reload()
    told = [message for event, level, message in noted if event == log.Event.CONFIG and level == log.WARNING]
    assert any("allow_destination: loopback is in it" in message for message in told)

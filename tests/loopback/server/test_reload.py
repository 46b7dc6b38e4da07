"""A reload in turns: others run in the middle of it, see one whole configuration, and a stop leaves no door open."""

import gevent
import pytest

from proxy.config import load
from proxy.log import lines as log
from proxy.net import certificates, turns
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
    monkeypatch.setattr(log, "reconfigure", lambda settings: None)
    first = loaded(BEFORE)
    server = Server(lambda breathe, lent: loaded(AFTER, breathe), first)
    server._take(server._prepare(first, lambda: None), lambda: None)
    yield server
    if not server._stop.is_set():
        server._doors.finish()
    server._engine.stop()


def test_others_run_in_the_middle_and_see_one_whole_configuration(server):
    """Before, the hub stood still for as long as a reload took: 3 s with 4,096 listeners."""
    seen = []
    reload = gevent.spawn(server._reload)
    while not reload.ready():
        settings = server.services.settings
        seen.append((settings.idle_timeout, len(settings.listen_proxy_protocol), len(server._doors.listening())))
        turns.rest("others")
    reload.get()
    assert server._counters.reloads == 1
    assert [(timeout, doors) for timeout, doors, _ in seen] == sorted((timeout, doors) for timeout, doors, _ in seen)
    assert {(timeout, doors) for timeout, doors, _ in seen} == {(660.0, 1), (720.0, 59)}
    # A piece for each value read and each door opened, and the doors come one after the other.
    assert len(seen) > 4 * 59 + 4 * 200
    assert len({open for *_, open in seen}) > 50


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
        where.append(gevent.get_hub() is server._crew._hub)
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

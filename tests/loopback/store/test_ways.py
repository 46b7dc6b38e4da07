"""Ways to a server: a socket on this machine, IPv6, names with one address or more, a DNS or a kernel that fails."""

from __future__ import annotations

import errno
import socket
import threading
from pathlib import Path
from typing import Any

import gevent
import pytest

from proxy.store import dial
from proxy.store.calls import Fate
from tests import engines
from tests.loopback.store.conftest import Caller, Connect, connected
from tests.loopback.store.fake import Fake
from tests.peers import free_port
from tests.waiting import wait_for


def trouble_of(store: Any) -> Any:
    wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
    return store.view().trouble


@pytest.mark.usefixtures("patient")
def test_a_socket_on_this_machine(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "valkey.sock"
    with engines.engine(engines.VALKEY_8, f"unixsocket {path}", password="p/w") as server:
        caller = Caller(connected(connect(f"unix://:p%2Fw@{path}?db=1")), b"unix")
        assert caller.call().fate is Fate.ANSWERED
        assert list(caller.store.view().servers) == [str(path)]
        server.kill()
        assert caller.call().fate in (Fate.LOST, Fate.UNSENT)
        path.unlink()
        wait_for(lambda: "No such file" in str(caller.store.view().trouble), 30, "it is told", gevent.sleep)
        server.start()
        caller.until(Fate.ANSWERED)


def test_a_file_that_is_no_socket(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    trouble = trouble_of(connect(f"unix://{path}"))
    assert (trouble.step, trouble.number) == ("connect", errno.ECONNREFUSED)


def test_ipv6(connect: Connect) -> None:
    port = free_port("::1")
    with engines.engine(engines.VALKEY_9, "bind 0.0.0.0 ::1", port=port):
        store = connected(connect(f"redis://[::1]:{port}"))
        assert list(store.view().servers) == [f"[::1]:{port}"]


def _found(*hosts: str) -> list[tuple[Any, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """DNS says this; whom it was asked for."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *more: Any, **flags: Any) -> Any:
        if flags.get("flags"):
            return real(host, port, *more, **flags)
        asked.append(host)
        found = answer()
        return [(*each[:4], (each[4][0], port)) for each in found]

    monkeypatch.setattr(dial.socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_looked_up_anew_each_time(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever moves a store by DNS need not tell the proxies."""
    with Fake() as fake:
        port = fake.where.split(":")[1]
        answers = iter([_found("127.0.0.3"), _found("127.0.0.3")])
        asked = answering(monkeypatch, lambda: next(answers, _found("127.0.0.2")))
        store = connected(connect(f"redis://store.example:{port}"))
        assert asked == ["store.example"] * 3
        assert list(store.view().servers) == [f"store.example:{port}"]


def test_a_name_with_several_addresses_of_which_one_is_good(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        answering(monkeypatch, lambda: _found("127.0.0.3", "127.0.0.4", "127.0.0.2"))
        connected(connect(f"redis://store.example:{fake.where.split(':')[1]}"))
        assert fake.connects == 1


def test_a_name_with_no_address(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, list)
    assert "the name has no address" in str(trouble_of(connect("redis://store.example")))


def test_a_dns_that_hangs_makes_nobody_wait(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has threads of its own; what is waited for is told, and tried anew."""
    monkeypatch.setattr(dial, "WITHIN", 0.2)
    answered = threading.Event()

    def hang() -> list[Any]:
        answered.wait(30)
        return _found("127.0.0.2")

    with Fake() as fake:
        asked = answering(monkeypatch, hang)
        store = connect(f"redis://store.example:{fake.where.split(':')[1]}")
        trouble = trouble_of(store)
        assert "no answer within 0.2 s" in str(trouble)
        wait_for(lambda: len(asked) >= 2, 30, "it is asked again", gevent.sleep)
        answered.set()
        connected(store)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOBUFS])
def test_no_descriptor_for_it(connect: Connect, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, left = dial.RawSocket, [1, 1, 1]

    def make(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise OSError(number, "x")
        return real(*arguments)

    monkeypatch.setattr(dial, "RawSocket", make)
    with Fake() as fake:
        store = connect(fake.url)
        trouble = trouble_of(store)
        assert (trouble.step, trouble.number) == ("connect", number)
        connected(store)


def test_a_mistake_of_ours_is_not_the_last_attempt(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, left = dial.read_info, [1]

    def read(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(dial, "read_info", read)
    with Fake() as fake:
        store = connect(fake.url)
        assert "ZeroDivisionError" in str(trouble_of(store))
        connected(store)

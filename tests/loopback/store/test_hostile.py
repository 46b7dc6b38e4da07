"""Servers that break the protocol, lie, stall and talk without an end: a call has a fate, and nothing else happens."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.store import dial
from proxy.store.calling import ROUNDS
from proxy.store.calls import Call, Fate
from proxy.store.store import Store
from tests.loopback.store.conftest import TRACE, Connect, connected
from tests.loopback.store.fake import INFO, Fake, bulk
from tests.waiting import wait_for

SECRET = "Tr0ub4dor:&3"
CALL = Call((b"{ga:x}",), (1,))


def one(store: Store) -> Any:
    return store.call(TRACE, [CALL])[0]


def then_close(answer: bytes) -> Callable[[list[bytes], Any], None]:
    def act(words: list[bytes], sock: Any) -> None:
        sock.sendall(answer)
        sock.close()

    return act


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no reply"),
        (b"*100000000\r\n", "items"),
        (b"$99999999999\r\n", "a text of"),
        (b"*1\r\n" * 50, "without an end"),
        (b":7\r\n:8\r\n", "nobody has asked for"),
        (b"+" + b"x" * 100_000, "a line of more"),
        (b"*60000\r\n" + b"$1000\r\n%b\r\n" % (b"x" * 1000) * 2000, "more than 1048576 bytes"),
        (then_close(b"*2\r\n:7\r\n"), "closed"),
        (then_close(b""), "closed"),
    ],
)
def test_an_answer_that_is_none(connect: Connect, answer: Any, words: str) -> None:
    with Fake(EVALSHA=answer) as fake:
        store = connected(connect(fake.url))
        reply = one(store)
        if reply.fate is Fate.ANSWERED:  # one too many behind it
            wait_for(lambda: words in str(store.view().trouble), 30, "it is let go", gevent.sleep)
        else:
            assert reply.fate is Fate.LOST
            assert words in str(reply.trouble)
        fake.answers["EVALSHA"] = b":9\r\n"
        found = wait_for(lambda: one(connected(store)), 30, "it is answered", gevent.sleep)
        assert (found.fate, found.value) == (Fate.ANSWERED, 9)


def test_half_an_answer_and_then_nothing(connect: Connect) -> None:
    with Fake(EVALSHA=b"*2\r\n:7\r\n") as fake:
        store = connected(connect(fake.url))
        assert one(store).fate is Fate.LOST
        assert one(store).fate is Fate.UNSENT
        assert fake.asked["EVALSHA"] == 1


def test_an_answer_in_single_bytes(connect: Connect) -> None:
    def drip(words: list[bytes], sock: Any) -> None:
        for byte in b"*2\r\n$3\r\na\r\n\r\n:-1\r\n":
            sock.sendall(bytes([byte]))
            gevent.sleep(0)

    with Fake(EVALSHA=drip) as fake:
        assert one(connected(connect(fake.url))).value == [b"a\r\n", -1]


def test_what_a_server_says_of_itself_answers_nothing(connect: Connect) -> None:
    """With a client that takes a push for an answer every later call would get its neighbour's."""
    with Fake(EVALSHA=b">2\r\n+invalidate\r\n:0\r\n:7\r\n") as fake:
        store = connected(connect(fake.url))
        reply = one(store)
        assert (reply.fate, reply.value) == (Fate.LOST, None)
        assert "nobody has asked for" in str(reply.trouble)


def test_a_script_that_stays_unknown_is_not_sent_for_ever(connect: Connect) -> None:
    with Fake(EVALSHA=b"-NOSCRIPT No matching script.\r\n") as fake:
        store = connected(connect(fake.url))
        reply = one(store)
        assert (reply.fate, reply.trouble and reply.trouble.reply) == (Fate.REFUSED, "NOSCRIPT No matching script")
        assert fake.asked["EVALSHA"] <= ROUNDS
        assert store.view().connected


def test_a_cluster_that_sends_us_round_in_circles(connect: Connect) -> None:
    with Fake() as fake:
        host, port = fake.where.split(":")
        slots = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n%b:%d\r\n" % (bulk(host.encode()), int(port))
        fake.answers |= {"CLUSTER": slots, "EVALSHA": b"-MOVED 5 %b\r\n" % fake.where.encode()}
        store = connect(f"redis+cluster://{fake.where}")
        reply = wait_for(lambda: _if_sent(one(store)), 30, "it is sent", gevent.sleep)
        assert reply.fate is Fate.REFUSED
        assert fake.asked["EVALSHA"] <= ROUNDS
        fake.answers["EVALSHA"] = b"-ASK 5 %b\r\n" % fake.where.encode()
        assert one(store).fate is Fate.REFUSED
        assert fake.asked["EVALSHA"] <= 2 * ROUNDS


@pytest.mark.parametrize(
    ("right", "wrong", "step"),
    [(b"role:master", b"role:slave", "role"), (b"valkey_version:9", b"valkey_version:6", "version")],
)
def test_a_server_of_a_cluster_that_is_no_master_or_too_old(
    connect: Connect, right: bytes, wrong: bytes, step: str
) -> None:
    """Whatever the map says of it."""
    with Fake(INFO=bulk(INFO.replace(right, wrong))) as fake:
        host, port = fake.where.split(":")
        fake.answers["CLUSTER"] = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n%b:%d\r\n" % (bulk(host.encode()), int(port))
        store = connect(f"redis+cluster://{fake.where}")
        assert wait_for(lambda: one(store).trouble.step == step, 30, "it is told", gevent.sleep)
        assert fake.asked["EVALSHA"] == 0


def _if_sent(reply: Any) -> Any:
    return None if reply.fate is Fate.UNSENT else reply


def test_a_server_that_talks_without_being_asked(connect: Connect) -> None:
    """It is let go, and nobody else waits for it meanwhile."""

    def flood(words: list[bytes], sock: Any) -> None:
        while True:
            sock.sendall(b"+x\r\n" * 1000)
            gevent.sleep(0)

    with Fake(EVALSHA=flood) as fake:
        store = connected(connect(fake.url))
        one(store)
        wait_for(lambda: "nobody has asked for" in str(store.view().trouble), 30, "it is let go", gevent.sleep)


def test_a_server_that_reads_nothing_gets_no_more_than_one_share(connect: Connect) -> None:
    def stop(words: list[bytes], sock: Any) -> None:
        gevent.sleep(3600)

    with Fake(EVALSHA=stop) as fake:
        store = connected(connect(fake.url))
        big = Call((b"{ga:x}",), (b"x" * 100_000,))
        tracemalloc.start()
        assert {reply.fate for reply in store.call(TRACE, [big] * 20)} == {Fate.LOST}
        for _ in range(50):
            assert {reply.fate for reply in store.call(TRACE, [big] * 20)} == {Fate.UNSENT}
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 10_000_000


@pytest.mark.parametrize(
    ("answers", "step"),
    [
        ({"INFO": b"-NOPERM no\r\n"}, "info"),
        ({"INFO": b":5\r\n"}, "info"),
        ({"INFO": bulk(b"")}, "info"),
        ({"INFO": bulk(INFO.replace(b"run_id", b"x").replace(b"master_replid", b"x"))}, "info"),
        ({"INFO": bulk(INFO.replace(b"run_id", b"x"))}, ""),  # Dragonfly has another one after each start, too
        ({"INFO": bulk(INFO.replace(b"9.0.0", b"9" * 5000))}, ""),
        ({"INFO": bulk(INFO.replace(b"9.0.0", b""))}, "version"),
        ({"INFO": bulk(INFO.replace(b"9.0.0", b"6.0"))}, "version"),
        ({"INFO": bulk(INFO.replace(b"role:master", b"role:slave"))}, "role"),
        ({"INFO": bulk(INFO.replace(b"standalone", b"sentinel"))}, "role"),
        ({"PING": b"-LOADING Redis is loading the dataset in memory\r\n"}, "info"),
        ({"PING": b"-NOAUTH Authentication required.\r\n"}, "auth"),
        ({"PING": b"-NOPERM no\r\n", "CLIENT": b"-ERR unknown subcommand\r\n"}, ""),
        ({"AUTH": b"-WRONGPASS x\r\n"}, "auth"),
        ({"AUTH": f"-ERR unknown command 'AUTH', with args beginning with: '{SECRET}'\r\n".encode()}, "auth"),
        ({"AUTH": then_close(b"-DENIED Redis is running in protected mode\r\n")}, "login"),
        ({"AUTH": then_close(b"")}, "login"),
        ({"AUTH": b"\x15\x03\x01\x00\x02\x02\x28"}, "login"),
        ({"SELECT": b"-ERR DB index is out of range\r\n"}, "select"),
        ({"INFO": None}, "login"),
    ],
)
def test_a_login_that_fails(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], step: str
) -> None:
    """With its step, and without the password, whatever the server repeats of it."""
    monkeypatch.setattr(dial, "WITHIN", 0.3)
    with Fake(**answers) as fake:
        store = connect(f"redis://:{SECRET.replace('&', '%26')}@{fake.where}/3")
        if not step:
            assert connected(store).view().trouble is None
            return
        wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
        trouble = store.view().trouble
        assert trouble is not None
        assert trouble.step == step
        assert SECRET not in f"{trouble} {trouble.reply} {trouble!r}"
        assert one(store).fate is Fate.UNSENT


def test_attempts_become_rarer(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in pauses, which are what is waited for."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        gevent.sleep(0)

    monkeypatch.setattr("proxy.store.node.random.uniform", lambda low, high: high)
    monkeypatch.setattr("proxy.store.node.sleep", pause)
    with Fake(AUTH=b"-WRONGPASS x\r\n") as fake:
        connect(f"redis://:x@{fake.where}")
        wait_for(lambda: len(pauses) >= 10, 30, "it is tried again and again", gevent.sleep)
    assert pauses[:10] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0]


PIECES = st.sampled_from(
    [b"*2\r\n", b":1\r\n", b"$3\r\nabc\r\n", b"-ERR x\r\n", b"-MOVED 1 h:1\r\n", b">1\r\n", b"\r\n"]
)


def test_whatever_comes_is_a_fate_and_the_next_call_is_right(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.store.node.LONGEST_PAUSE", 0.001)
    with Fake() as fake:
        store = connect(fake.url)

        def right() -> bool:
            if store._node is not None and store._node.link is not None and store._node.link.owes(0):
                store._node.give_up(dial.Trouble("call", "-", "it owes an answer"))  # rather than wait for its INFO
            return bool(one(store).value == 4711)

        @settings(max_examples=40)
        @given(st.lists(PIECES | st.binary(max_size=12), max_size=6))
        def run(pieces: list[bytes]) -> None:
            fake.answers["EVALSHA"] = b"".join(pieces)
            connected(store)
            assert isinstance(one(store).fate, Fate)
            fake.answers["EVALSHA"] = b":4711\r\n"
            wait_for(right, 30, "the next call is right", gevent.sleep)

        run()

"""A store on one real server of each kind: calls and their fates, and what a server does to us.

What was said of a call is held against what has run: an answered one has run, one that was refused or never sent has
not, and none has run twice.
"""

from __future__ import annotations

import dataclasses
import select
from typing import Any

import gevent
import pytest
import valkey

from proxy.net.relay import Engine
from proxy.store.calling import Calling
from proxy.store.calls import Call, Fate, Script
from proxy.store.store import of_settings
from tests import engines
from tests.link import Link
from tests.loopback.store.conftest import TRACE, Caller, Connect, clock_ns, connected
from tests.waiting import wait_for


@pytest.fixture
def caller(server: engines.Engine, connect: Connect, request: pytest.FixtureRequest) -> Caller:
    return Caller(connected(connect(server.url())), request.node.name.encode())


def ran(server: engines.Engine, caller: Caller) -> list[bytes]:
    return list(server.client.lrange(caller.key, 0, -1))


def test_calls_go_out_together_and_come_back_in_their_order(server: engines.Engine, caller: Caller) -> None:
    before = clock_ns()
    replies = caller.calls(50)
    after = clock_ns()
    assert [reply.value[1] for reply in replies] == [b"%d" % trace for trace in range(50)]
    assert ran(server, caller) == [b"%d" % trace for trace in range(50)]
    for reply in replies:
        assert before <= reply.sent_ns <= reply.received_ns <= after
        assert (reply.fate, reply.trouble) == (Fate.ANSWERED, None)
        assert reply.identity == caller.store.identity(caller.key) != ""
    (known,) = caller.store.view().servers.values()
    assert (known.kind, known.role) == (server.kind.partition("-")[0], "master")
    assert server.kind.endswith(known.version.rpartition(".")[0])


def test_values_of_all_forms(caller: Caller) -> None:
    script = Script.of(b"return {1, -2, 'text', {}, {3, {ARGV[1]}}, false, 2.9}")
    reply = caller.store.call(script, [Call((caller.key,), (b"a\r\nb\x00",))])[0]
    assert reply.value == [1, -2, b"text", [], [3, [b"a\r\nb\x00"]], None, 2]


def test_that_it_is_only_being_connected_is_no_trouble(connect: Connect) -> None:
    for url in ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1"):
        store = connect(url)
        assert store.call(TRACE, [Call((b"k",), (0,))])[0].fate is Fate.UNSENT
        assert store.view().trouble is None


def test_no_calls(caller: Caller) -> None:
    assert caller.store.call(TRACE, []) == []


def test_the_database_that_was_asked_for(server: engines.Engine, connect: Connect) -> None:
    caller = Caller(connected(connect(server.url(database=3))), b"elsewhere")
    caller.call()
    assert ran(server, caller) == []
    client = server.client
    client.select(3)
    assert client.lrange("elsewhere", 0, -1) == [b"0"]


def test_we_have_a_name_there_and_one_connection(server: engines.Engine, caller: Caller) -> None:
    caller.calls(10)
    ours = [each for each in server.client.client_list() if each["name"] == "greenarrow_proxy"]
    assert len(ours) == 1


@pytest.mark.usefixtures("patient")
def test_a_script_that_was_flushed_is_loaded_anew(server: engines.Engine, caller: Caller) -> None:
    caller.calls(3)
    server.client.script_flush()
    assert {reply.fate for reply in caller.calls(20)} == {Fate.ANSWERED}
    server.client.script_flush()
    assert caller.call().fate is Fate.ANSWERED
    caller.check(ran(server, caller))
    assert len(ran(server, caller)) == 24


def test_a_server_that_is_slow_costs_what_was_under_way_and_no_more(server: engines.Engine, caller: Caller) -> None:
    caller.call()
    admin = server.client
    admin.execute_command("CLIENT PAUSE", 60_000, "WRITE")
    lost = caller.calls(2)
    assert [reply.fate for reply in lost] == [Fate.LOST, Fate.LOST]
    assert "no answer within 100 ms" in str(lost[0].trouble)
    for _ in range(5):
        unsent = caller.call()
        assert unsent.fate is Fate.UNSENT
        assert "owes an answer" in str(unsent.trouble)
    assert caller.store.view().degraded_ns is not None
    admin.execute_command("CLIENT UNPAUSE")
    caller.until(Fate.ANSWERED)
    assert caller.store.view().degraded_ns is None
    caller.check(ran(server, caller))
    assert {b"1", b"2"} <= set(ran(server, caller)), "they ran, only later"
    assert caller.store.view().counts.connects == 1, "late answers come to whom they are for, and to nobody else"


def test_a_frozen_server_is_let_go_and_found_anew(server: engines.Engine, caller: Caller) -> None:
    """Its kernel goes on taking connections; so it is the answer to INFO that is missed."""
    caller.call()
    server.freeze()
    try:
        assert caller.call().fate is Fate.LOST
        wait_for(lambda: not caller.store.view().connected, 30, "it is let go", gevent.sleep)
        assert caller.call().fate is Fate.UNSENT
    finally:
        server.thaw()
    caller.until(Fate.ANSWERED)
    caller.check(ran(server, caller))


def test_a_script_that_never_ends_makes_others_busy(server: engines.Engine, caller: Caller) -> None:
    admin, other = server.client, server.client
    admin.config_set("busy-reply-threshold", 1)
    caller.call()
    spinning = gevent.get_hub().threadpool.spawn(_spin, other)
    busy = caller.until(Fate.REFUSED)
    assert "BUSY" in str(busy.trouble)
    wait_for(lambda: _kill_script(admin), 30, "the script is killed", gevent.sleep)
    spinning.get(timeout=30)
    caller.until(Fate.ANSWERED)
    caller.check(ran(server, caller))


def _spin(client: Any) -> None:
    try:
        client.eval("while true do end", 0)
    except valkey.exceptions.ResponseError:
        return


def _kill_script(client: Any) -> bool:
    try:
        return bool(client.script_kill())
    except valkey.exceptions.ResponseError:
        return False


def test_an_error_in_the_middle_of_a_script_may_have_changed_something(caller: Caller) -> None:
    script = Script.of(b"redis.call('RPUSH', KEYS[1], ARGV[1]) redis.call('HSET', KEYS[1], 'a', 'b')")
    reply = caller.store.call(script, [Call((caller.key,), (0,))])[0]
    assert (reply.fate, reply.changed_nothing) == (Fate.LOST, False)
    assert "WRONGTYPE" in str(reply.trouble)
    assert caller.store.view().connected


@pytest.mark.parametrize(
    ("option", "value", "back", "code"),
    [("maxmemory", 1, 0, "OOM"), ("min-replicas-to-write", 1, 0, "NOREPLICAS")],
)
def test_a_server_that_takes_no_writes(
    server: engines.Engine, caller: Caller, option: str, value: int, back: int, code: str
) -> None:
    """The script does run until its first write, and so it is not certain that nothing has happened."""
    admin = server.client
    admin.config_set(option, value)
    try:
        reply = caller.call()
        assert reply.fate in (Fate.REFUSED, Fate.LOST)
        assert code in str(reply.trouble)
        assert caller.store.view().connected
    finally:
        admin.config_set(option, back)
    caller.until(Fate.ANSWERED)
    caller.check(ran(server, caller))


def test_rights_that_are_taken_away_and_given_back(server: engines.Engine, connect: Connect) -> None:
    admin = server.client
    admin.execute_command("ACL SETUSER some on >pw ~* +@all")
    caller = Caller(connected(connect(server.url("some", "pw"))), b"rights")
    caller.call()
    admin.execute_command("ACL SETUSER some -evalsha")
    refused = caller.call()
    assert (refused.fate, refused.trouble and refused.trouble.reply.split()[0]) == (Fate.REFUSED, "NOPERM")
    admin.execute_command("ACL SETUSER some +evalsha")
    caller.until(Fate.ANSWERED)
    admin.execute_command("ACL DELUSER some")  # and its connections
    wait_for(lambda: "WRONGPASS" in str(caller.store.view().trouble), 30, "it is told", gevent.sleep)
    caller.check(ran(server, caller))


def test_a_killed_connection_is_made_anew_and_the_server_is_the_same(server: engines.Engine, caller: Caller) -> None:
    identity = caller.call().identity
    for _ in range(3):
        server.client.client_kill_filter(_type="normal", skipme=True)
        assert caller.until(Fate.ANSWERED).identity == identity
    assert caller.store.view().counts.connects >= 4
    caller.check(ran(server, caller))


def test_a_reply_that_is_lost_counts_as_spent(server: engines.Engine, connect: Connect) -> None:
    with Link((server.host, server.port)) as link:
        url = server.url().replace(server.where, f"127.0.0.1:{link.endpoint[1]}")
        caller = Caller(connected(connect(url)), b"lost reply")
        caller.call()
        link.lose_replies()
        assert caller.call().fate is Fate.LOST
        assert ran(server, caller) == [b"0", b"1"]
        caller.until(Fate.ANSWERED)
        caller.check(ran(server, caller))


def test_a_network_that_parts_us(server: engines.Engine, connect: Connect) -> None:
    with Link((server.host, server.port)) as link:
        url = server.url().replace(server.where, f"127.0.0.1:{link.endpoint[1]}")
        caller = Caller(connected(connect(url)), b"parted")
        caller.call()
        link.part()
        assert caller.call().fate is Fate.LOST
        assert caller.call().fate is Fate.UNSENT
        link.thaw()
        caller.until(Fate.ANSWERED)
        caller.check(ran(server, caller))


@pytest.mark.parametrize("password", ["", "another"])
def test_a_password_that_is_wrong_or_missing(server: engines.Engine, connect: Connect, password: str) -> None:
    url = server.url(password=password or None) if password else f"redis://{server.where}"
    store = connect(url)
    wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
    trouble = store.view().trouble
    assert trouble is not None
    assert (trouble.step, trouble.where) == ("auth", server.where)
    assert trouble.reply.split()[0] == ("WRONGPASS" if password else "NOAUTH")
    assert store.call(TRACE, [Call((b"k",), (1,))])[0].fate is Fate.UNSENT


def test_it_stops(caller: Caller, server: engines.Engine) -> None:
    caller.store.stop()
    assert caller.call().fate is Fate.UNSENT
    admin = server.client
    wait_for(lambda: all(each["name"] != "greenarrow_proxy" for each in admin.client_list()), 30, "it has gone")


def test_a_reload_with_the_same_address_keeps_the_connection(engine: Engine, caller: Caller) -> None:
    store = caller.store
    assert of_settings(engine, store.settings, None, clock_ns, store) is store
    assert of_settings(engine, None, None, clock_ns, store) is None
    other = dataclasses.replace(store.settings, password="x")
    assert of_settings(engine, other, None, clock_ns, store) is not store


def test_whoever_comes_late_finds_its_answer(caller: Caller) -> None:
    """The program was busy while the answer came: it is read before it is given up."""
    caller.call()
    node = caller.store._node
    assert node is not None
    assert node.link is not None
    calling = Calling(TRACE, [Call((caller.key,), (1,))], clock_ns, lambda key: node, lambda redirect: node)
    assert len(calling.send()) == 1
    assert select.select([node.link._stream.socket], [], [], 30)[0], "and meanwhile nobody else runs"
    calling.take()
    (reply,) = calling.replies()
    assert reply.fate is Fate.ANSWERED


def test_what_was_asked_for_is_counted(caller: Caller) -> None:
    before = caller.store.view().counts.answered
    caller.calls(7)
    counts = caller.store.view().counts
    assert counts.answered - before == 7
    assert (counts.refused, counts.lost, counts.connects) == (0, 0, 1)
    assert counts.seconds > 0


def test_a_server_that_comes_back_empty_is_another_one(connect: Connect) -> None:
    with engines.engine(engines.VALKEY_9) as server:
        caller = Caller(connected(connect(server.url())), b"again")
        first = caller.call().identity
        server.kill()
        assert caller.call().fate in (Fate.LOST, Fate.UNSENT)
        assert caller.store.identity(b"again") == ""
        server.start()
        assert caller.until(Fate.ANSWERED).identity != first


def test_a_server_that_reads_its_data(connect: Connect) -> None:
    """It takes connections meanwhile, and answers LOADING; what it then has may be old."""
    with engines.engine(engines.VALKEY_8) as server:
        caller = Caller(connected(connect(server.url())), b"loading")
        first = caller.call().identity
        admin = server.client
        admin.execute_command("DEBUG", "POPULATE", 1000)
        admin.save()
        caller.call()
        server.kill()
        server.start("key-load-delay 2000", "loading-process-events-interval-bytes 1024", wait=False)
        wait_for(lambda: "LOADING" in str(caller.store.view().trouble), 30, "it is told", gevent.sleep)
        assert caller.call().fate is Fate.UNSENT
        reply = caller.until(Fate.ANSWERED)
        assert reply.identity != first
        assert server.client.lrange("loading", 0, 1) == [b"0", reply.value[1]], "the second call is forgotten"


def test_a_server_that_sleeps(server: engines.Engine, caller: Caller) -> None:
    """DEBUG SLEEP: it does nothing at all for as long as a call may take, and longer."""
    other = server.client
    sleeping = gevent.get_hub().threadpool.spawn(other.execute_command, "DEBUG", "SLEEP", "0.5")
    lost = caller.until(Fate.LOST)
    assert "no answer within 100 ms" in str(lost.trouble)
    assert caller.call().fate is Fate.UNSENT
    sleeping.get(timeout=30)
    caller.until(Fate.ANSWERED)
    assert caller.store.view().counts.connects == 1
    caller.check(ran(server, caller))


def test_a_store_that_was_never_there(connect: Connect) -> None:
    store = connect("redis://127.0.0.1:1")
    wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
    view = store.view()
    assert str(view.trouble) == "connect 127.0.0.1:1: Connection refused"
    assert view.degraded_ns is not None
    assert store.call(TRACE, [Call((b"k",), (1,))])[0].fate is Fate.UNSENT

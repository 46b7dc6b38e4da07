"""Calls while a server is paused, forgets scripts, ends connections, and the network loses replies: by numbers drawn.

Whatever happens, an answered call has run, one that was refused or never sent has not, and none has run twice.
"""

from __future__ import annotations

import random
from typing import Any

import gevent
import pytest

from proxy.store.calls import Fate
from tests import engines
from tests.link import Link
from tests.loopback.store.conftest import Caller, Connect, connected

_STEPS = 60


def disturb(number: int, admin: Any, link: Link, caller: Caller) -> None:
    """One of the things that happen to servers and networks."""
    if number == 0:
        admin.execute_command("CLIENT PAUSE", 150, "WRITE")
    elif number == 1:
        admin.script_flush()
    elif number == 2:
        admin.client_kill_filter(_type="normal", skipme=True)
    elif number == 3:
        link.lose_replies()
    elif number == 4:
        link.part()
        caller.calls(2)
        link.thaw()
    elif number == 5:
        admin.execute_command("CLIENT PAUSE", 30, "ALL")


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_calls_is_true(server: engines.Engine, connect: Connect, seed: int) -> None:
    dice = random.Random(seed)
    admin = server.client
    with Link((server.host, server.port)) as link:
        url = server.url().replace(server.where, f"127.0.0.1:{link.endpoint[1]}")
        caller = Caller(connected(connect(url)), b"chaos %d" % seed)
        for _ in range(_STEPS):
            disturb(dice.randrange(24), admin, link, caller)
            caller.calls(dice.randrange(1, 6))
            gevent.sleep(dice.choice((0, 0, 0.01)))
        caller.until(Fate.ANSWERED)
        caller.check(admin.lrange(caller.key, 0, -1))
    assert Fate.ANSWERED in caller.fates.values()
    assert set(caller.fates.values()) != {Fate.ANSWERED}, "nothing has happened"


@pytest.mark.usefixtures("patient")
def test_several_at_once_share_a_connection(server: engines.Engine, connect: Connect) -> None:
    caller = Caller(connected(connect(server.url())), b"several")
    running = [gevent.spawn(caller.calls, 5) for _ in range(20)]
    gevent.joinall(running, raise_error=True)
    assert {reply.fate for each in running for reply in each.value} == {Fate.ANSWERED}
    ours = [each for each in server.client.client_list() if each["name"] == "greenarrow_proxy"]
    assert len(ours) == 1

"""Sharing under limits, through the running program: who gives way, who inherits, and never a socket too many."""

from __future__ import annotations

import socket
import threading

import pytest

from greenarrow_proxy_client import Limits, ProxyRefused
from tests.mx import Mx, usual
from tests.program import Proxy
from tests.sharing import DEATHS, NAME, PLAIN, arrived, body, cached, instances, send
from tests.waiting import wait_for

ONE = "throttle one {\n    destination 127.0.0.0/8\n    max_concurrent_connections 1\n    wait 20s\n}\n"


class Counting(Mx):
    """Knows how many connections there were at a time, at most: those that the other side had not closed."""

    def __init__(self):
        self.peak = 0
        super().__init__(self._count)

    def _count(self, number):
        self.peak = max(self.peak, 1 + sum(is_established(session.sock) for session in self.sessions[:number]))
        return {}


def is_established(sock):
    """The kernel has got no FIN, whether or not the receiver has read so far."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1
    except OSError:  # closed here
        return False


def both(work):
    """`work(0)` and `work(1)`, at the same time."""
    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_a_backlog_of_two_instances_under_a_limit_of_one_needs_one_connection():
    """Whoever waits for the place waits for the connection, too, and gets both."""
    with Counting() as mx, Proxy(PLAIN + ONE) as proxy, instances(proxy, "server-a", "server-b") as pair:

        def backlog(which):
            for number in range(15):
                send(pair[which], mx, 100 * which + number)

        both(backlog)
        arrived(mx, {100 * which + number: 1 for which in (0, 1) for number in range(15)})
        assert (mx.connects, mx.peak) == (1, 1)


def test_two_keys_under_a_limit_of_one_take_turns():
    """Never two sockets at a time, however they give way to one another."""
    with Counting() as mx, Proxy(PLAIN + ONE) as proxy, instances(proxy, "server-a", "server-b") as pair:

        def backlog(which):
            for number in range(10):
                send(pair[which], mx, 100 * which + number, tenant=str(which))

        both(backlog)
        arrived(mx, {100 * which + number: 1 for which in (0, 1) for number in range(10)})
        assert mx.peak == 1


def test_a_cached_connection_gives_its_place_to_another_key():
    with Mx() as mx, Mx() as other, Proxy(PLAIN + ONE) as proxy, instances(proxy, "server-a", "server-b") as pair:
        send(pair[0], mx, 0)
        cached(proxy, 1, mx)
        send(pair[1], other, 1, deadline=5)  # max_idle is 30 s
        wait_for(lambda: mx.sessions[0].ended)
        assert mx.sessions[0].ended == "quit"
        arrived(other, {1: 1})


def test_in_use_it_is_offered_to_whoever_waits_and_not_kept():
    with Mx() as mx, Mx() as other, Proxy(PLAIN + ONE) as proxy, instances(proxy, "server-a", "server-b") as pair:
        smtp = send(pair[0], mx, 0, release=False)
        waiting = threading.Thread(target=send, args=(pair[1], other, 1))
        waiting.start()
        wait_for(lambda: proxy.open_connections("native") >= 3)
        # The OPEN of the other may still be on its way: then this one is kept, and gives way afterwards.
        assert smtp.release(wait=True) in ("yielded", "kept")
        waiting.join(30)
        arrived(other, {1: 1})
        wait_for(lambda: mx.sessions[0].ended)
        assert mx.sessions[0].ended == "quit"


def test_from_one_path_to_another(proxy, pair, mx):
    """The places of the first path are free as soon as the second has the connection."""
    first = pair[0].throttle("127.0.0.9", Limits("first", max_connections=1))
    second = pair[1].throttle("127.0.0.9", Limits("second", max_connections=1))
    for throttle in (first, second):
        assert throttle.wait_until_registered(30)
    send(pair[0], mx, 0, throttles=[first])
    cached(proxy, 1, mx)
    smtp = send(pair[1], mx, 1, throttles=[second], release=False)
    assert smtp.opened.reused
    fresh = send(pair[0], mx, 2, throttles=[first], deadline=5, release=False)
    assert not fresh.opened.reused
    with pytest.raises(ProxyRefused) as caught:
        send(pair[1], mx, 3, throttles=[second], deadline=0.3)
    assert (caught.value.step, caught.value.throttle) == ("throttle", "second")
    for each in (smtp, fresh):
        assert each.release(wait=True) == "kept"
    cached(proxy, 2, mx)
    assert send(pair[1], mx, 4, throttles=[second]).opened.reused
    arrived(mx, {0: 1, 1: 1, 2: 1, 4: 1})


@pytest.mark.parametrize("death", DEATHS)
def test_a_second_try_needs_no_second_permit(death):
    """The MAIL that a dead connection never answered is no message; its permit goes with the second one."""
    kill = {"mail": [usual, DEATHS[death]]}
    with (
        Mx(lambda number: {} if number else kill) as mx,
        Proxy(PLAIN + "throttle_enforce yes\n") as proxy,
        instances(proxy, "server-a") as (session,),
    ):
        throttle = session.throttle("127.0.0.9", Limits("some", rates=[(1000, 1)], burst=10))
        assert throttle.wait_until_registered(30)
        for number in range(3):
            smtp = session.smtp([mx.endpoint], NAME, tls="none", throttles=[throttle])
            assert smtp.opened.reused == (number > 0)
            smtp.permit = throttle.acquire(30)
            smtp.sendmail(f"{number}@example.com", ["to@example.net"], body(number))
            assert smtp.release(wait=True) == "kept"
            cached(proxy, 1, mx)
        arrived(mx, {0: 1, 1: 1, 2: 1})
        assert mx.connects == 2
    assert not proxy.matching(r"without.*permit|permit.*without")

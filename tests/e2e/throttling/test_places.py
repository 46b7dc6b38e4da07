"""Connections of instances under limits, and messages without a permit: what the library gets from the program."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time

import pytest

from greenarrow_proxy_client import Limits, ProxyFailure, ProxyRefused, Session
from proxy.protocols.native import messages as m
from tests.mx import Mx, Over
from tests.program import ROOT, SECRET, Proxy
from tests.waiting import wait_for

SOURCE = "127.0.0.5"
PLAIN = "listen_tls no\nlisten_status 127.0.0.1:0\n"
NAME = "mta.example.com"


@pytest.fixture(scope="module")
def mx():
    with Mx() as it:
        yield it


@pytest.fixture
def proxy():
    with Proxy(PLAIN) as it:
        yield it


@contextlib.contextmanager
def sessions(proxy, *names):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Session(proxy.native, SECRET, name, tls=False)) for name in names]


def few(session, *names, places=1, **more):
    """A path of throttles with so many places each."""
    throttle = session.throttle(SOURCE, *(Limits(name, max_connections=places, **more) for name in names))
    assert throttle.wait_until_registered(30)
    return throttle


def opens(session, mx, *throttles, deadline=10.0):
    return session.smtp([mx.endpoint], NAME, throttles=throttles, reuse=False, tls="none", deadline=deadline)


class Opening:
    """An OPEN in a thread; `smtp` when it is through."""

    def __init__(self, *args, **options):
        self.smtp = None
        self._thread = threading.Thread(target=self._run, args=args, kwargs=options)
        self._thread.start()

    def _run(self, *args, **options):
        self.smtp = opens(*args, **options)

    def result(self):
        self._thread.join(30)
        assert self.smtp is not None
        return self.smtp


def lines(proxy):
    """How many wait for a place of each throttle; who needs several stands in one line after the other."""
    return {row["name"]: row["waiting"] for row in proxy.throttles()}


def waiting(proxy, count):
    """Until so many connections wait for a place."""
    wait_for(lambda: sum(row["waiting"] for row in proxy.throttles()) == count, what=f"{count} wait")


def test_the_refusal_names_the_throttle_and_when_to_come_back(proxy, mx):
    with sessions(proxy, "a", "b") as (a, b):
        held = opens(a, mx, few(a, "yahoo"))
        with pytest.raises(ProxyRefused) as caught:
            opens(b, mx, few(b, "yahoo"), deadline=0.2)
        error = caught.value
        assert (error.code, error.step, error.throttle, error.retry) == ("throttled", "throttle", "yahoo", True)
        assert error.retry_after == 10
        held.quit()
        opens(b, mx, few(b, "yahoo")).quit()


def test_the_refusal_says_when_by_the_pace_of_the_line(proxy, mx):
    """One who waited got in at once, another one waits still: who comes back in a second has a chance."""
    with sessions(proxy, "a", "b") as (a, b):
        mine, yours = few(a, "yahoo"), few(b, "yahoo")
        held = opens(a, mx, mine)
        openings = [Opening(b, mx, yours) for _ in range(2)]
        waiting(proxy, 2)
        held.quit()
        waiting(proxy, 1)
        with pytest.raises(ProxyRefused) as caught:
            opens(a, mx, mine, deadline=0.1)
        assert 1 <= caught.value.retry_after < 10
        wait_for(lambda: any(each.smtp for each in openings))
        for each in sorted(openings, key=lambda each: each.smtp is None):
            each.result().quit()


def test_a_throttle_of_an_instance_with_a_blocks_name_has_not_the_blocks_wait(mx):
    block = "throttle yahoo {\n    max_concurrent_connections 1\n    destination 198.51.100.0/24\n    wait 0s\n}\n"
    with Proxy(PLAIN + block) as proxy, sessions(proxy, "a", "b") as (a, b):
        held = opens(a, mx, few(a, "yahoo"))
        other = Opening(b, mx, few(b, "yahoo"))
        waiting(proxy, 1)
        held.quit()
        other.result().quit()


@pytest.mark.parametrize(
    ("step", "tls"), [("greeting", "none"), ("ehlo", "none"), ("starttls", "required"), ("tls", "required")]
)
def test_a_session_that_did_not_come_up_holds_its_place_until_the_receiver_has_closed(step, tls):
    """It refuses and hangs up, or says nothing that could be understood; either way it counts the connection on."""
    gate = threading.Event()

    def refuse(session, reply):
        if step == "tls":  # instead of a handshake
            session.sock.sendall(b"no TLS here\r\n")
        else:
            session.send(b"554 no\r\n")
        session.wait_for_gate(gate)
        raise Over("closed")

    def script(number):
        return {step: refuse} if number == 0 else {}

    with (
        Mx(script=script, starttls=tls != "none") as mx,
        Proxy(PLAIN + "throttle_close_timeout 1h\n") as proxy,
        sessions(proxy, "a") as (a,),
    ):
        path = few(a, "yahoo")
        with pytest.raises(ProxyFailure):
            a.smtp([mx.endpoint], NAME, throttles=[path], reuse=False, tls=tls, deadline=10)
        second = Opening(a, mx, path)
        waiting(proxy, 1)
        assert (mx.connects, mx.running) == (1, 1)
        gate.set()
        second.result().quit()


def test_all_places_or_none(proxy, mx):
    """Who waits for `one` does not hold `two` meanwhile."""
    with sessions(proxy, "a", "b", "c") as (a, b, c):
        held = opens(a, mx, few(a, "one"))
        both = Opening(b, mx, few(b, "one", "two"))
        waiting(proxy, 1)
        other = opens(c, mx, few(c, "two"))
        held.quit()
        assert both.smtp is None
        other.quit()
        both.result().quit()


def test_who_needs_two_places_does_not_starve(proxy, mx):
    """z is under both of two rules that a and b keep busy: when one place after the other has been given back, z's turn
    has come. (If that of the second rule comes first, z waits for the next one there.)"""
    with sessions(proxy, "a", "b", "z") as (a, b, z):
        rules = {a: few(a, "one"), b: few(b, "two")}
        held = {each: opens(each, mx, path) for each, path in rules.items()}
        both = Opening(z, mx, few(z, "one", "two"))
        waiting(proxy, 1)
        for each in (a, b):  # each asks anew before it gives its place back, so that none is ever idle
            rules[each] = Opening(each, mx, rules[each])
        waiting(proxy, 3)
        held[a].quit()
        wait_for(lambda: lines(proxy) == {"one": 1, "two": 2}, what="z has one, and is first in the line of two")
        held[b].quit()
        both.result().quit()
        for each in (a, b):
            rules[each].result().quit()


def test_the_line_is_fair_among_instances(proxy, mx):
    """b asks twice before a does: b's first, then a's."""
    with sessions(proxy, "a", "b", "c") as (a, b, c):
        mine, yours = few(a, "yahoo"), few(b, "yahoo")
        held = opens(c, mx, few(c, "yahoo"))
        openings = []
        for session, path in ((b, yours), (b, yours), (a, mine)):
            openings.append(Opening(session, mx, path))
            waiting(proxy, len(openings))
        held.quit()
        for number in (0, 2, 1):
            openings[number].result().quit()


def test_advice_comes_when_places_are_scarce_and_goes_again(proxy, mx):
    with sessions(proxy, "a", "b") as (a, b):
        mine, yours = few(a, "yahoo", places=4), few(b, "yahoo", places=4)
        held = [opens(a, mx, mine) for _ in range(4)]
        other = Opening(b, mx, yours)
        wait_for(lambda: mine.cap == 3 and mine.over_cap, what="four places of which b wants one")
        held.pop().quit()
        other.result().quit()
        wait_for(lambda: mine.cap is None, 30, what="nobody waits")
        for smtp in held:
            smtp.quit()


def test_the_death_of_an_mta_frees_its_places(proxy, mx):
    with sessions(proxy, "a", "b") as (a, b):
        held = opens(a, mx, few(a, "yahoo"))
        other = Opening(b, mx, few(b, "yahoo"))
        waiting(proxy, 1)
        held.sock.close()
        other.result().quit()


def test_a_paused_instance_opens_nothing_until_it_says_so(proxy, mx):
    with sessions(proxy, "a") as (a,):
        path = few(a, "yahoo", paused=True)
        with pytest.raises(ProxyRefused) as caught:
            opens(a, mx, path, deadline=0.2)
        assert "paused" in str(caught.value)
        waits = Opening(a, mx, path)
        waiting(proxy, 1)
        a.change_limits(path, Limits("yahoo", max_connections=1))
        waits.result().quit()


def test_parts_add_up_and_an_orderly_end_takes_its_part_along(proxy):
    with sessions(proxy, "a", "b") as (a, b):
        mine = few(a, "yahoo", places=3, mode="sum")
        few(b, "yahoo", places=4, mode="sum")
        wait_for(lambda: mine.effective[0][1] == 7)
        b.close()
        wait_for(lambda: mine.effective[0][1] == 3)


@pytest.mark.slow
def test_the_part_of_a_lost_session_stays_for_ten_seconds(proxy):
    from tests.mta import Mta

    with sessions(proxy, "a") as (a,):
        mine = a.throttle(SOURCE, Limits("t", ((100, 1),), mode="sum"))
        with Mta(proxy, "b", {"p": [("t", 50, 1, 1)]}, mode="sum") as other:
            wait_for(lambda: mine.effective and mine.effective[0][0] == [(150, 1)])
            other.kill()
            killed = time.monotonic()
        wait_for(lambda: mine.effective[0][0] == [(100, 1)], 30)
        assert time.monotonic() - killed > 8


def test_mixed_modes_are_told(proxy):
    with sessions(proxy, "a", "b") as (a, b):
        mine = few(a, "yahoo", mode="sum")
        few(b, "yahoo", mode="average")
        wait_for(lambda: "disagree" in mine.warning)
        proxy.wait_line(r"notice=mixed_modes")


# -- messages without a permit --


def mail(smtp, count=1):
    for _ in range(count):
        smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: x\r\n\r\nx\r\n")


def rated(session, amount=20, seconds=1):
    throttle = session.throttle(SOURCE, Limits(f"{amount}/{seconds}s", ((amount, seconds),)))
    assert throttle.wait_until_registered(30)
    return throttle


def test_messages_with_permits_are_not_held_against_anybody(proxy, mx):
    with sessions(proxy, "a") as (a,):
        path = rated(a)
        smtp = opens(a, mx, path)
        for _ in range(5):
            smtp.permit = path.acquire(30)
            mail(smtp)
        smtp.quit()
        proxy.wait_line(r"^connection .*instance=a")
    assert not proxy.matching("notice=unpermitted")


def when_permits_are_known():
    """A moment at which a proxy that runs by now knows of all permits that are good: none is longer good than 2 s."""
    at = time.monotonic() + 2.1
    wait_for(lambda: time.monotonic() > at)


def test_messages_without_a_permit_are_told_once(proxy, mx):
    with sessions(proxy, "a") as (a,):
        path = rated(a)
        when_permits_are_known()
        for _ in range(2):
            smtp = opens(a, mx, path)
            mail(smtp, 3)
            smtp.quit()
        line = proxy.wait_line(r"notice=unpermitted").string
        assert "messages without a permit: 1 so far" in line
        assert "instance=a" in line
        opens(a, mx, path).quit()
    assert len(proxy.matching("notice=unpermitted")) == 1


def test_permits_that_lapsed_are_no_credit(mx):
    """Forty permits come and nobody uses one; then 200 messages are sent without."""
    with Proxy(PLAIN + "throttle_enforce yes\n") as proxy, sessions(proxy, "a") as (a,):
        path = rated(a)
        path.backlog(ram=1000)
        wait_for(lambda: path._lease.voided >= 40, 30)
        path.backlog()
        smtp = opens(a, mx, path)
        for _ in range(200):
            smtp.mail("a@example.com")
            smtp.rset()
        smtp.quit()
        proxy.wait_line(r"notice=unpermitted.*instance=a|instance=a.*notice=unpermitted")
        assert proxy.page()["counters"]["messages_without_permit"] >= 100
        with pytest.raises(ProxyRefused) as caught:
            opens(a, mx, path, deadline=0.2)
        assert "were sent without a permit" in str(caught.value)


def test_enforced_they_are_paid_for_before_the_next_connection(mx):
    with Proxy(PLAIN + "throttle_enforce yes\n") as proxy, sessions(proxy, "a", "b") as (a, b):
        path, slow = rated(a), rated(b, 1, 3600)
        when_permits_are_known()
        for session, throttle in ((a, path), (b, slow)):
            smtp = opens(session, mx, throttle)
            mail(smtp, 3)
            smtp.quit()
        wait_for(lambda: len(proxy.matching("notice=unpermitted")) == 2)
        opens(a, mx, path).quit()  # 20 in a second: paid in no time
        with pytest.raises(ProxyRefused) as caught:
            opens(b, mx, slow, deadline=0.3)
        assert re.search(r"3 messages were sent without a permit; try again in \d+", str(caught.value))
        waits = Opening(b, mx, slow)
        waiting(proxy, 1)
        proxy.hup(PLAIN + "throttle_enforce no\n")
        waits.result().quit()


def test_a_reconnect_in_between_is_not_held_against_the_instance(mx):
    """The permit is from the old session, its message goes out in the new one."""
    with Proxy(PLAIN) as proxy, sessions(proxy, "a") as (a,):
        path = rated(a, 100)
        path.backlog(ram=1000)
        assert path.acquire(30)
        link = a._proxies.all[0].control._live.link
        permits = [path.acquire(30) for _ in range(2)]
        path.backlog()
        link.close()
        control = a._proxies.all[0].control
        wait_for(lambda: control._live is not None and control._live.link is not link)
        assert path.wait_until_registered(30)
        smtp = opens(a, mx, path)
        mail(smtp, len(permits))
        smtp.quit()
        proxy.wait_line(r"^connection .*instance=a")
    assert not proxy.matching("notice=unpermitted")


# -- the clock --


def test_nothing_on_the_way_asks_for_the_time_of_day():
    """Whatever happens to the wall clock, no throttle notices: nobody looks at it."""
    folders = ("proxy/throttling", "proxy/egress", "proxy/doors/native", "greenarrow_proxy_client")
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("*.py"))]
    assert len(files) > 35
    for file in files:
        source = file.read_text()
        found = re.findall(r"\btime\.time\b|\btime_ns\b|\bdatetime\b|CLOCK_REALTIME|\blocaltime\b|\bgmtime\b", source)
        assert not found, (file, found)


def test_a_signal_for_the_status_changes_nothing(proxy):
    with sessions(proxy, "a") as (a,):
        few(a, "yahoo")
        manager, session = (line for line in proxy.status() if line.startswith("throttle: "))
        assert "sessions=1" in manager
        assert re.search(r"session\(a\).*forward\(in=0/16 out=0/16 buf=0\) back\(in=0/16 out=0/16 buf=0\)", session)
        proxy.signal(signal.SIGUSR1)


def test_an_open_without_a_source_takes_the_path_of_the_default_one():
    text = f"listen_tls no\ndefault_source_ip {SOURCE}\n"
    with Proxy(text) as proxy, Mx() as mx, Session(proxy.native, SECRET, "a", tls=False) as session:
        throttle = session.throttle(SOURCE, Limits("one", max_connections=1))
        throttle.wait_until_registered(30)
        request = m.Open(None, [m.Address(*mx.endpoint)], "a.example", throttles=[throttle.id])
        _, channel, opened = session._open(request)
        assert opened.local.host == SOURCE
        channel.end(False, 0)
        channel.retire()


def test_what_an_instance_that_was_removed_had_is_not_kept():
    secret = "of its own: " + SECRET[::-1]
    block = f'listen_tls no\ninstance gone {{\n    auth_shared_secret "{secret}"\n}}\n'
    with Proxy(block) as proxy, Mx() as mx, Session(proxy.native, secret, "gone", tls=False) as session:
        smtp = session.smtp([mx.endpoint], "a.example", source_ip=SOURCE)
        proxy.hup("listen_tls no\n")
        assert smtp.release(wait=True) == "disabled"

"""Back-off by what receivers reply, in the real program: three clients under one block, and each door's replies."""

from __future__ import annotations

import contextlib
import datetime
import json
import smtplib
import threading
import urllib.request
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import pytest

from tests import sharing
from tests.clients import Refused, Smtp, socks5
from tests.e2e.control.test_control import ctl
from tests.mx import Mx, Session, close, say, usual
from tests.program import Proxy
from tests.unit.throttling.oracle import Rule
from tests.waiting import wait_for
from tests.witness import Witness, now

NAME = "client.example"
SOURCE = "127.0.0.5"
LIMITED = b"421 4.7.0 rate limited\r\n"
MTAS = ("a", "b", "c")
SMTP = f"mode smtp\nsource here {{\n    ip {SOURCE}\n    ehlo {NAME}\n}}\n"


def block(*lines: str) -> str:
    return "\n".join(["throttle yahoo {", *(f"    {line}" for line in lines), "    wait 40s", "}", ""])


def once(data: bytes) -> tuple[Callable[[Session, bytes], None], Callable[[], None]]:
    """A behaviour that says this one time when it is told to, and what tells it."""
    armed = threading.Event()

    def behave(session: Session, reply: bytes) -> None:
        if armed.is_set():
            armed.clear()
            say(data, close)(session, reply)
        usual(session, reply)

    return behave, armed.set


def deliver(proxy: Proxy, mx: Mx, name: str, messages: int) -> None:
    """One message after the other; what is refused is tried again, as an MTA does."""
    sent = 0
    while sent < messages:
        with (
            contextlib.suppress(smtplib.SMTPException, OSError),
            Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE, user=name)) as smtp,
        ):
            smtp.ehlo()
            while sent < messages:
                smtp.sendmail(f"{name}@example.com", ["to@example.net"], b"Subject: x\r\n\r\nx\r\n")
                sent += 1


def all_deliver(proxy: Proxy, mx: Mx, messages: int) -> None:
    threads = [threading.Thread(target=deliver, args=(proxy, mx, name, messages)) for name in MTAS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_421_slows_down_three_clients() -> None:
    """1,200 a minute, and a quarter of that for all of them from the moment in which one of them has heard it."""
    reply, answer_421 = once(LIMITED)
    witness = Witness(data=reply)
    text = SMTP + block("max_delivery_rate 1200/min", 'backoff on 421, "4.7." { percent 25; return_after 1h }')
    with Mx(witness.script) as mx, Proxy(text) as proxy:
        all_deliver(proxy, mx, 3)
        answer_421()
        deliver(proxy, mx, "b", 1)
        line = proxy.wait_line(r"^WARNING throttle: .*notice=backoff").string
        assert f"yahoo for {SOURCE}: 25 % of each limit, for 3600 s" in line
        assert 'instance=b reply="421 4.7.0 rate limited"' in line
        begin = now()
        all_deliver(proxy, mx, 4)
        witness.check(Rule(300, 60), since=begin)
        assert witness.counts(begin) == dict.fromkeys(MTAS, 4)


@contextlib.contextmanager
def house(mx: Mx, text: str) -> Any:
    with Proxy(text) as proxy:
        yield lambda user="a", source=SOURCE: socks5(proxy.socks5, mx.endpoint, source, user=user), proxy


PAUSE = block("backoff on `5\\.7\\.1 .*blocked` { pause; return_after 6h }")
BLOCKED = b"554 5.7.1 you are blocked\r\n"


def test_a_greeting_in_mode_tcp_pauses_until_it_is_ended_by_hand() -> None:
    path = f"@greenarrow-test-{uuid.uuid4()}"
    script = lambda number: {"greeting": say(BLOCKED, close)} if number == 0 else {}  # noqa: E731
    with Mx(script) as mx, house(mx, PAUSE + f"control_socket {path}\n") as (connect, proxy):
        with connect() as sock:
            assert sock.recv(100) == BLOCKED
        with pytest.raises(Refused):
            connect("b")
        line = proxy.wait_line(r"reason=throttled").string
        assert f"throttle yahoo for {SOURCE}: paused after a reply of the receiver; try again in 21" in line
        with connect(source="127.0.0.6") as other:
            assert other.recv(3) == b"220", "it counts by source"
        assert ctl(path, "backoff", "end", "yaho")[0] != 0
        assert ctl(path, "backoff", "end", "yahoo")[1] == "the back-off of 1 throttles is over\n"
        with connect("b") as sock:
            assert sock.recv(3) == b"220"
        proxy.wait_line(r"^throttle: yahoo for .* was ended by hand")


@pytest.mark.parametrize("step", ["greeting", "ehlo", "mail", "rcpt", "dot"])
def test_mode_smtp_sees_the_reply_to_each_step(step: str) -> None:
    script = lambda number: {step: say(BLOCKED)} if number == 0 else {}  # noqa: E731
    with Mx(script) as mx, house(mx, SMTP + PAUSE) as (connect, proxy):
        with connect() as sock, contextlib.suppress(smtplib.SMTPException):
            Smtp(sock).sendmail("a@example.com", ["to@example.net"], b"x\r\n")
        proxy.wait_line(r'notice=backoff instance=a reply="554 5.7.1 you are blocked"')
        with connect("b") as sock:
            smtp = Smtp(sock)
            smtp.ehlo()
            code, said = smtp.mail("b@example.com")
            assert (code, said[:20]) == (451, b"4.7.1 throttle yahoo")


def test_a_message_under_a_pause_is_told_so_at_once_and_goes_when_it_is_over() -> None:
    """Its connection was there before, and the pause began on another."""
    script = lambda number: {"rcpt": say(b"550 5.7.1 blocked\r\n")} if number == 1 else {}  # noqa: E731
    rules = block("backoff on blocked { pause; return_after 3s }")
    with Mx(script) as mx, house(mx, SMTP + "reuse_connections no\n" + rules) as (connect, proxy):
        with connect("a") as first, connect("b") as second:
            patient, other = Smtp(first), Smtp(second)
            for smtp in (patient, other):
                smtp.ehlo()
            other.mail("b@example.com")
            assert other.rcpt("to@example.net")[0] == 550
            code, said = patient.mail("a@example.com")
            assert (code, said[:20]) == (451, b"4.7.1 throttle yahoo")
            wait_for(lambda: patient.mail("a@example.com")[0] == 250)
        proxy.hup("")
        proxy.wait_line(r"^throttle: yahoo for .* has no rule for a back-off any more")


@pytest.mark.parametrize("step", ["greeting", "ehlo", "mail", "rcpt", "dot"])
def test_a_native_channel_sees_the_reply_to_each_step(step: str) -> None:
    script = lambda number: {step: say(BLOCKED)} if number == 0 else {}  # noqa: E731
    with Mx(script) as mx, Proxy(sharing.PLAIN + PAUSE) as proxy, sharing.instances(proxy, "python") as (python,):
        with contextlib.suppress(*sharing.FAILURES):
            sharing.send(python, mx, 1, release=False, source_ip=SOURCE).close()
        proxy.wait_line(r'notice=backoff instance=python reply="554 5.7.1 you are blocked"')
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint, SOURCE, user="b")


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_the_day_of_a_warm_up_is_that_of_the_calendar(zone: str) -> None:
    """A day may end while this runs, but not two. Of the three zones no two have the same day all the time."""
    yesterday = datetime.datetime.now(zoneinfo.ZoneInfo(zone)).date() - datetime.timedelta(days=1)
    text = (
        f"timezone {zone}\n"
        + block(f"warmup 500000, 600000, 700000, 800000 /day from {yesterday}")
        + "listen_status 127.0.0.1:0\n"
    )
    with Mx() as mx, house(mx, text) as (connect, proxy):
        with connect() as sock:
            assert sock.recv(3) == b"220"
        url = "http://{}:{}/status.json".format(*proxy.door("status"))
        with urllib.request.urlopen(url, timeout=30) as answer:
            (row,) = json.load(answer)["throttles"]
        assert (row["warmup_day"], row["limits"][0]["amount"]) in {(2, 600_000), (3, 700_000)}
        assert (row["warmup_days"], row["limits"][0]["seconds"]) == (4, 86400)

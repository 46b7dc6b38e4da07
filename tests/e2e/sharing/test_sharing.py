"""Sharing of held-open connections through the running program: two instances, one receiver, and what goes wrong.

Here is the way it should be, and what is not kept. Receivers that die are in test_sharing_deaths, throttles in
test_sharing_throttles.
"""

from __future__ import annotations

import re
import smtplib
import threading

import pytest

from greenarrow_proxy_client import MailLimitReached, ProxyRefused
from tests.mx import Mx, mute, say
from tests.program import Proxy
from tests.sharing import NAME, PLAIN, accepted, arrived, body, cached, instances, send
from tests.waiting import wait_for

# -- the way it should be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", ["none", "opportunistic", "required", "implicit"])
def test_the_second_instance_carries_on_with_the_connection_of_the_first(proxy, pair, tls):
    with Mx(starttls=True, implicit_tls=tls == "implicit") as mx:
        first = send(pair[0], mx, 0, tls=tls, source_ip="127.0.0.9")
        assert (first.opened.reused, first.opened.messages, first.verdict) == (False, 0, "kept")
        cached(proxy, 1, mx)
        second = send(pair[1], mx, 1, tls=tls, source_ip="127.0.0.9")
        cached(proxy, 1, mx)
        assert (second.opened.reused, second.opened.messages, second.verdict) == (True, 1, "kept")
        assert second.opened.local == first.opened.local
        assert second.opened.age_ms > 0
        assert (second.opened.greeting, second.opened.ehlo) == (first.opened.greeting, first.opened.ehlo)
        assert second.opened.tls == first.opened.tls
        assert (second.opened.tls is None) == (tls == "none")
        assert (mx.connects, mx.handshakes) == (1, int(tls != "none"))
        arrived(mx, {0: 1, 1: 1})
        assert [message.peer for message in mx.messages] == [("127.0.0.9", first.opened.local.port)] * 2
        hellos = 2 if tls in ("opportunistic", "required") else 1
        assert mx.sessions[0].commands.count(f"EHLO {NAME}".encode()) == hellos
        lines = [
            proxy.wait_line(rf"^connection .*instance={name}.*:{mx.port} .*")[0] for name in ("server-a", "server-b")
        ]
        assert [re.search(r"reused=(\w+)", line)[1] for line in lines] == ["no", "yes"]
        assert all("outcome=kept" in line for line in lines)


def test_one_connection_for_a_hundred_messages_of_two_instances(proxy, pair, mx):
    """What it is for: the receiver sees one connect and one handshake instead of twenty."""
    for number in range(20):
        assert send(pair[number % 2], mx, number, tls="required").opened.reused == (number > 0)
        cached(proxy, 1, mx)
    assert (mx.connects, mx.handshakes) == (1, 1)
    arrived(mx, dict.fromkeys(range(20), 1))


@pytest.mark.parametrize(
    "options",
    [
        {"source_ip": "127.0.0.10"},
        {"tls": "opportunistic"},
        {"tls": "required", "tls_server_name": "other.example.net"},
        {"smtputf8": True},
        {"requiretls": True},
        {"tenant": "somebody else"},
        {"reuse": False},
    ],
)
def test_what_differs_is_not_shared(proxy, pair, mx, options):
    base = {"source_ip": "127.0.0.9", "tls": "required"}
    send(pair[0], mx, 0, **base)
    cached(proxy, 1, mx)
    assert not send(pair[1], mx, 1, **(base | options)).opened.reused
    assert mx.connects == 2


def test_a_connection_that_was_not_verified_never_serves_who_demands_it(proxy, pair, mx):
    """The system does not trust the tests' authority, so a fresh one fails: it is not replaced by the one at hand."""
    send(pair[0], mx, 0, tls="required", tls_server_name="mx.example.net")
    cached(proxy, 1, mx)
    with pytest.raises(ProxyRefused) as caught:
        send(pair[1], mx, 1, tls="required", tls_server_name="mx.example.net", tls_verify=True)
    assert caught.value.step == "tls"
    arrived(mx, {0: 1})


def test_several_race_for_one_connection(proxy, pair, mx):
    send(pair[0], mx, 0)
    cached(proxy, 1, mx)
    barrier, sent = threading.Barrier(8), []

    def race(number):
        barrier.wait(30)
        sent.append(send(pair[number % 2], mx, number).opened.reused)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(sent) == 8
    assert sent.count(True) >= 1
    assert sent.count(False) == mx.connects - 1
    arrived(mx, dict.fromkeys(range(9), 1))


# -- what is not kept, and what its user is told -----------------------------------------------------------------------


def spoiled(smtp, what):
    """Leave the connection in a state in which nobody else may have it."""
    if what == "replies_outstanding":
        smtp.putcmd("noop")
    elif what == "in_data":
        smtp.mail("a@example.com")
        smtp.rcpt("b@example.net")
        assert smtp.docmd("data")[0] == 354
    elif what == "bdat_seen":
        smtp.docmd("bdat 0 last")
    elif what == "unknown_verb_seen":
        smtp.docmd("turn")
    else:
        smtp.docmd(what.removesuffix("_seen"))


@pytest.mark.parametrize(
    "what",
    ["replies_outstanding", "in_data", "quit_seen", "auth_seen", "bdat_seen", "xclient_seen", "unknown_verb_seen"],
)
def test_a_dialogue_that_is_not_clean_is_not_kept(proxy, pair, what):
    with Mx({"noop": mute}) as mx:
        smtp = pair[0].smtp([mx.endpoint], NAME, tls="none")
        spoiled(smtp, what)
        # A receiver that closes after QUIT may have done so by then.
        assert smtp.release(wait=True) in ((what, "peer_closed") if what == "quit_seen" else (what,))
        wait_for(lambda: mx.sessions[0].ended)
        # Whose receiver waits for a command hears QUIT, whatever was said before.
        assert mx.sessions[0].ended == ("eof" if what in ("replies_outstanding", "in_data") else "quit")
        assert mx.sessions[0].commands.count(b"QUIT") + mx.sessions[0].commands.count(b"quit") <= 1
        assert not send(pair[1], mx, 1).opened.reused
        assert b"RSET" not in mx.sessions[0].commands


def test_a_sender_that_gives_up_after_a_refusal_leaves_no_rude_end(proxy, pair):
    """A `with` block that ends in a 550: the library offers nothing, and the proxy says QUIT for it."""
    with Mx({"rcpt": say(b"550 5.1.1 who?\r\n")}) as mx:
        with pytest.raises(smtplib.SMTPRecipientsRefused), pair[0].smtp([mx.endpoint], NAME, tls="none") as smtp:
            smtp.sendmail("a@example.com", ["to@example.net"], body(0))
        wait_for(lambda: mx.sessions[0].ended)
        assert (mx.sessions[0].ended, mx.sessions[0].commands[-1]) == ("quit", b"QUIT")


@pytest.mark.parametrize(("refused", "kept"), [(4, True), (5, False)])
def test_errors_do_not_travel(proxy, pair, refused, kept):
    """Receivers count the 5xx of a connection: the next user would pay for them. They add up over its users."""
    with Mx(lambda number: {"rcpt": [say(b"550 5.1.1 who?\r\n")] * refused} if number == 0 else {}) as mx:
        for share in (refused // 2, refused - refused // 2):
            smtp = pair[0].smtp([mx.endpoint], NAME, tls="none")
            smtp.mail("a@example.com")
            assert [smtp.rcpt("b@example.net")[0] for _ in range(share)] == [550] * share
            assert smtp.release(wait=True) == "kept"
            wait_for(lambda: b"RSET" in mx.sessions[0].commands)
            cached(proxy, int(kept or share == refused // 2))
        if not kept:
            wait_for(lambda: mx.sessions[0].ended == "quit")
        assert send(pair[1], mx, 1).opened.reused is kept


def test_only_what_is_offered_is_kept(proxy, pair, mx):
    for end in (smtplib.SMTP.close, smtplib.SMTP.quit):
        end(send(pair[0], mx, 0, release=False))
    assert send(pair[0], mx, 2, reuse=False).verdict == "not_offered"
    wait_for(lambda: len(mx.sessions) == 3 and all(session.ended for session in mx.sessions))
    cached(proxy, 0)


def test_a_sender_that_dies_in_the_middle_leaves_nothing_to_share(proxy, pair, mx):
    """Bare ends of connections never mean keep: what comes next would become part of the message."""
    smtp = pair[0].smtp([mx.endpoint], NAME, tls="none")
    smtp.mail("a@example.com")
    smtp.rcpt("b@example.net")
    smtp.docmd("data")
    smtp.sock.sendall(b"Subject: half\r\n")
    smtp.sock._channel.close()
    wait_for(lambda: mx.sessions[0].ended)
    assert not send(pair[1], mx, 1).opened.reused
    arrived(mx, {1: 1})
    smtp.sock = None


def test_the_number_of_messages_is_limited_by_us_and_by_the_receiver(proxy, pair):
    proxy.hup(PLAIN + "reuse_connections_max_messages 3\n")
    with Mx(extensions=()) as patient, Mx(extensions=("LIMITS MAILMAX=2",)) as strict:
        for number in range(6):
            for mx, most in ((patient, 3), (strict, 2)):
                smtp = send(pair[number % 2], mx, number)
                assert (smtp.opened.reused, smtp.opened.messages) == (number % most > 0, number % most)
                assert smtp.mails_left == (None if mx is patient else most - 1 - number % most)
            last = [(number + 1) % 3 == 0, (number + 1) % 2 == 0]
            cached(proxy, 2 - sum(last), patient, strict)
        assert (patient.connects, strict.connects) == (2, 3)
        wait_for(lambda: [session.ended for session in patient.sessions + strict.sessions] == ["quit"] * 5)
    with Mx(extensions=("LIMITS MAILMAX=1",)) as mx:
        smtp = send(pair[0], mx, 0, release=False)
        with pytest.raises(MailLimitReached):
            smtp.sendmail("1@example.com", ["to@example.net"], body(1))
        smtp.release()
        arrived(mx, {0: 1})


def test_age_and_idleness(proxy, pair, mx):
    proxy.hup(PLAIN + "reuse_connections_max_idle 1s\n")
    send(pair[0], mx, 0)
    wait_for(lambda: mx.sessions[0].ended)
    proxy.hup(PLAIN + "reuse_connections_max_age 1s\n")
    send(pair[0], mx, 1)
    wait_for(lambda: mx.sessions[1].ended)
    assert [session.ended for session in mx.sessions] == ["quit", "quit"]


def test_caps(proxy, pair, mx):
    proxy.hup(PLAIN + "reuse_connections_max_cached 2\nreuse_connections_max_cached_per_destination 1\n")
    with Mx() as second, Mx() as third:
        for number, each in enumerate((mx, second, third)):
            send(pair[0], each, number)
            cached(proxy, min(number + 1, 2), mx, second, third)
        send(pair[0], third, 3, tenant="another key")
        cached(proxy, 2, mx, second, third)
        ended = [[session.ended for session in each.sessions] for each in (mx, second, third)]
    assert ended == [["quit"], [None], ["quit", None]]


def test_a_reload_that_turns_it_off_says_quit_and_tells_so(proxy, pair, mx):
    send(pair[0], mx, 0)
    cached(proxy, 1, mx)
    smtp = send(pair[1], mx, 1, tenant="in use", release=False)
    proxy.hup("reuse_connections no\n" + PLAIN)
    cached_then_used = [session.ended for session in wait_for(lambda: mx.sessions[0].ended and mx.sessions)]
    assert cached_then_used == ["quit", None]
    assert smtp.release(wait=True) == "disabled"
    wait_for(lambda: mx.sessions[1].ended)
    assert mx.sessions[1].ended == "quit"


def test_what_an_instance_gives_back_that_a_reload_removed_is_not_kept(proxy, pair, mx):
    """It may not come here any more: no session of its making is for the others."""
    smtp = send(pair[0], mx, 0, release=False)
    proxy.hup(PLAIN + "instance server-a {\n    allow_from 127.0.0.77\n}\n")
    assert smtp.release(wait=True) == "disabled"
    wait_for(lambda: mx.sessions[0].ended)
    assert mx.sessions[0].ended == "quit"
    assert not send(pair[1], mx, 1).opened.reused
    proxy.hup(PLAIN)


def test_a_drain_says_quit_to_all():
    with Mx() as mx, Mx() as other, Proxy(PLAIN) as proxy, instances(proxy, "server-a") as (session,):
        for number in range(3):
            send(session, mx, number, tenant=str(number))
        smtp = send(session, other, 3, release=False)
        wait_for(lambda: proxy.status()[-1].endswith("(active=1 cached=3)"))
        proxy.term()
        wait_for(lambda: all(each.ended for each in mx.sessions))
        assert [each.ended for each in mx.sessions] == ["quit"] * 3
        assert smtp.release(wait=True) == "draining"
        wait_for(lambda: other.sessions[0].ended)
        assert other.sessions[0].ended == "quit"
        proxy.wait_exit()


def test_short_of_descriptors_cached_connections_go_first():
    """With so few, the cache alone takes all that there are; whoever comes is served all the same."""
    with (
        Mx() as mx,
        Proxy(PLAIN + "max_connections 90\n", before="ulimit -n 140") as proxy,
        instances(proxy, "server-a") as (session,),
    ):
        refused = []
        for number in range(130):
            try:
                send(session, mx, number, tenant=str(number))
            except ProxyRefused as error:
                refused.append(error.code)
        assert len(refused) <= 5
        assert set(refused) <= {"overloaded"}
        wait_for(lambda: len(accepted(mx)) == 130 - len(refused))
        assert any(each.ended for each in mx.sessions)

"""Receivers that die under the second user of their connection, through the running program.

Wherever a receiver dies, a message that its sender believes accepted was accepted once, and one that its sender
believes failed was not accepted: the second try of the library included.
"""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.mx import Mx, mute, usual
from tests.sharing import DEATHS, FAILURES, NAME, accepted, arrived, body, cached, send
from tests.waiting import wait_for


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("step", ["idle", "handed over", "mail", "rcpt", "data", "body", "dot"])
@pytest.mark.parametrize("tls", ["none", "required"])
def test_a_receiver_that_dies_under_its_second_user(proxy, pair, step, death, tls):
    kill = DEATHS[death]
    script = {} if step in ("idle", "handed over") else {step: [usual, kill]}
    with Mx(lambda number: {} if number else script, starttls=True) as mx:
        send(pair[0], mx, 0, tls=tls)
        cached(proxy, 1, mx)
        if step == "idle":
            mx.sessions[0].act(kill)
        smtp = pair[1].smtp([mx.endpoint], NAME, tls=tls)
        if step == "handed over":
            mx.sessions[0].act(kill)
        try:
            smtp.sendmail("1@example.com", ["to@example.net"], body(1))
        except FAILURES:
            assert step in ("rcpt", "data", "body", "dot")
            smtp.close()
            arrived(mx, {0: 1})
            assert mx.connects == 1, "nobody but the sender may try again when a message may have been taken"
            assert sum(b"<1@" in message.mail for message in mx.messages) == (step == "dot")
            send(pair[1], mx, 1, tls=tls)  # as an MTA does, later
        else:
            assert step in ("idle", "handed over", "mail")
            smtp.release()
        arrived(mx, {0: 1, 1: 1})
        assert [message.session for message in mx.messages if message.accepted] == [0, 1]
        assert mx.connects == 2


@pytest.mark.parametrize("late", [b"250 2.0.0 late\r\n", b"250-2.0.0 la", b"354 go\r\n"])
def test_a_word_out_of_turn_at_the_hand_over_does_not_become_an_answer(proxy, pair, mx, late):
    """It would be read as the answer to MAIL, and each later one as that to the command after: mail lost silently."""
    send(pair[0], mx, 0)
    cached(proxy, 1, mx)
    smtp = pair[1].smtp([mx.endpoint], NAME, tls="none")
    assert smtp.opened.reused
    said = threading.Event()
    mx.sessions[0].act(lambda session, reply: (session.send(late), said.set()))
    assert said.wait(30)
    wait_for(lambda: mx.sessions[0].peer and proxy.fds())  # the proxy's loop has had a turn
    smtp.sendmail("1@example.com", ["to@example.net"], body(1))
    smtp.release()
    arrived(mx, {0: 1, 1: 1})
    assert [message.session for message in mx.messages] == [0, 1]


def test_two_answers_for_one_command(proxy, pair):
    """The tracker sees it at the end, RSET at the latest: never the next user."""
    with Mx(lambda number: {} if number else {"dot": lambda session, reply: session.send(reply * 2)}) as mx:
        send(pair[0], mx, 0)
        wait_for(lambda: mx.sessions[0].ended)
        assert not send(pair[1], mx, 1).opened.reused
        arrived(mx, {0: 1, 1: 1})


def test_a_silent_receiver_is_not_replaced(proxy, pair):
    """Silence is no death: the message may be on its way. The sender decides."""
    with Mx(lambda number: {} if number else {"mail": [usual, mute]}) as mx:
        send(pair[0], mx, 0)
        cached(proxy, 1, mx)
        with pytest.raises(FAILURES):
            send(pair[1], mx, 1, timeout=0.3)
        assert mx.connects == 1
        arrived(mx, {0: 1})


PLANS = st.lists(
    st.dictionaries(
        st.sampled_from(["mail", "rcpt", "data", "body", "dot", "rset", "ehlo", "greeting"]),
        st.tuples(st.integers(0, 3), st.sampled_from(sorted(DEATHS))),
        max_size=2,
    ),
    max_size=6,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans=PLANS)
@example(plans=[{"rset": (0, "close")}, {"mail": (1, "421")}, {"dot": (1, "reset")}])
def test_no_message_is_lost_or_doubled_wherever_the_receiver_dies(proxy, pair, plans):
    """Each session of the receiver dies as planned; two senders take turns, and send again what did not go."""

    def script(number):
        plan = plans[number] if number < len(plans) else {}
        return {step: [usual] * times + [DEATHS[death]] for step, (times, death) in plan.items()}

    with Mx(script) as mx:
        for number in range(6):
            for attempt in range(20):
                try:
                    send(pair[(number + attempt) % 2], mx, number)
                    break
                except FAILURES:
                    assert accepted(mx)[number] == 0, "its sender believes that it did not go"
            wait_for(lambda number=number: accepted(mx)[number] == 1)
        arrived(mx, dict.fromkeys(range(6), 1))
        assert mx.connects <= 1 + len(plans) + 6  # a connection that is being cleaned serves nobody yet

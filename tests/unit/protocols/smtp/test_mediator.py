"""Mode smtp's dialogue without sockets: who says what, in which order, whatever happens in between."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import Overloaded, Step, UpstreamError
from proxy.model import Discard
from proxy.protocols.smtp.course import MOST_IDLE_COMMANDS, MOST_MISTAKES
from proxy.protocols.smtp.mediator import MOST_INPUT, MOST_OUTSTANDING
from proxy.protocols.smtp.states import State, Want
from proxy.protocols.smtp.tracker import MAX_COMMAND_LINE, Tracker
from tests.unit.protocols.smtp.world import GREETING, HELLO, NAME, World, message, opened, throttled, unreachable

EHLO = b"EHLO %s\r\n" % NAME.encode()
SHOWN = b"250-mx.example.net\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250 8BITMIME\r\n"


def codes(data: bytes) -> list[int]:
    """The codes of whole replies, in order."""
    return [int(line[:3]) for line in data.split(b"\r\n") if line and line[3:4] != b"-"]


# --- greeting and EHLO ---


def test_the_receivers_greeting_and_its_keywords_less_the_hidden_ones():
    world = World()
    world.settle()
    assert world.client_sees == GREETING.encode() + b"\r\n"
    assert world.say(EHLO) == SHOWN
    assert (world.wants, world.names, world.state) == ([Want.GREETING, Want.HELLO], [NAME], State.READY)
    assert not world.mxs[0].received, "the bring-up is the egress's"


def test_a_greeting_of_several_lines():
    world = World(greeting="220 mx.example.net\nno spam\n")
    world.settle()
    assert world.client_sees == b"220-mx.example.net\r\n220-no spam\r\n220 \r\n"


@pytest.mark.parametrize("greeting", ["554 5.7.1 not you", "421 4.3.2 too busy\nlater"])
def test_a_greeting_that_is_none_passes_and_it_is_over(greeting):
    world = World(greeting=greeting)
    world.settle()
    assert codes(world.client_sees) == [int(greeting[:3])]
    assert world.over


def test_no_greeting_at_all():
    world = World()
    world.refuse = UpstreamError("192.0.2.25:25 closed the connection", Step.GREETING)
    world.settle()
    assert world.client_sees == b"421 4.4.1 proxy.example 192.0.2.25:25 closed the connection\r\n"
    assert world.over


def test_a_client_that_pipelines_behind_its_request_waits_for_the_greeting():
    world = World(automatic=False)
    world.give(EHLO + message(1))
    assert world.client_sees == b""
    world.automatic = True
    world.settle()
    assert codes(world.client_sees) == [220, 250, 250, 250, 354, 250]
    assert world.mxs[0].messages == [b"..1\r\n.x\r\n\r\n"]


def test_a_megabyte_before_the_greeting_is_not_read():
    world = World(automatic=False)
    world.give(b"NOOP\r\n" * 200_000)
    assert not world.mediator.reads_client
    assert not world.mediator.unread


def test_a_refusal_of_ehlo_passes_as_it_is_and_helo_gets_it_again():
    world = World()
    world.settle()
    world.refuse = UpstreamError("refused", Step.EHLO, smtp_reply="550 5.7.1 your name\nis bad")
    assert world.say(EHLO) == b"550-5.7.1 your name\r\n550 is bad\r\n"
    assert not world.over
    assert world.say(b"HELO %s\r\n" % NAME.encode()) == b"550-5.7.1 your name\r\n550 is bad\r\n"
    assert codes(world.say(b"MAIL FROM:<>\r\nQUIT\r\n")) == [503, 221]
    assert Want.SLOT not in world.wants


@pytest.mark.parametrize("step", [Step.TLS, Step.STARTTLS])
def test_tls_that_is_required_and_fails_ends_it_so_that_nobody_goes_on_in_clear(step):
    world = World()
    world.settle()
    world.refuse = UpstreamError("certificate not accepted", step, smtp_reply=None)
    assert codes(world.say(EHLO + b"HELO x\r\n")) == [421]
    assert world.over


def test_helo_shows_no_keywords():
    world = World()
    world.settle()
    assert world.say(b"HELO %s\r\n" % NAME.encode()) == b"250 mx.example.net\r\n"
    assert codes(world.say(message(1))) == [250, 250, 354, 250]


def test_ehlo_again_is_answered_from_memory():
    world = opened()
    assert world.say(EHLO) == SHOWN
    assert world.say(b"ehlo MAIL.example.com\r\n") == SHOWN
    assert world.names == [NAME]


def test_ehlo_in_the_middle_of_a_transaction_ends_it():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\n")
    assert world.say(EHLO) == SHOWN
    assert (world.state, world.verdicts) == (State.DETACHED, [None])
    assert codes(world.say(b"RCPT TO:<a@b.example>\r\n")) == [503]
    assert len(world.mxs) == 1


def test_another_name_later_has_another_connection():
    world = opened()
    assert world.say(b"EHLO [10.0.0.5]\r\n") == SHOWN
    assert world.names == [NAME, "[10.0.0.5]"]
    assert (len(world.mxs), world.verdicts) == (2, [None])


@pytest.mark.parametrize("name", [b"", b" ", b"caf\xc3\xa9.example", b"x" * 256])
def test_what_is_no_name(name):
    world = World()
    world.settle()
    assert codes(world.say(b"EHLO " + name + b"\r\n")) == [501]
    assert world.say(EHLO) == SHOWN


def test_a_client_that_never_says_ehlo():
    world = World()
    world.settle()
    assert codes(world.say(b"MAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nDATA\r\nVRFY x\r\nXFOO\r\n")) == [503] * 5
    assert world.mxs[0].received == b""


def test_a_kept_connection_dies_while_the_client_thinks_about_its_name():
    world = World([{}], reused=True)
    world.settle()
    world.mxs[0].closed = True
    world.settle()
    assert not world.over
    assert world.say(EHLO + message(1))[-len(b"250 1.4\r\n") :] == b"250 1.4\r\n"
    assert world.mxs[1].messages


# --- STARTTLS with the client ---


def test_starttls_is_offered_where_configured_and_the_client_says_ehlo_again():
    world = World(offer_starttls=True)
    world.settle()
    assert world.say(EHLO) == SHOWN.replace(b"250 8BITMIME", b"250-8BITMIME") + b"250 STARTTLS\r\n"
    assert world.say(b"STARTTLS\r\nMAIL FROM:<injected@example.com>\r\n") == b"220 2.0.0 ready to start TLS\r\n"
    assert world.wants[-1] is Want.START_TLS
    assert codes(world.say(b"MAIL FROM:<>\r\n")) == [503], "it has to introduce itself again"
    assert world.say(EHLO) == SHOWN
    assert codes(world.say(b"STARTTLS\r\n")) == [502]
    assert codes(world.say(message(1))) == [250, 250, 354, 250]


def test_starttls_although_not_offered():
    world = opened()
    assert codes(world.say(b"STARTTLS\r\n")) == [502]
    assert codes(world.say(message(1))) == [250, 250, 354, 250]


# --- messages ---


def test_a_group_goes_out_in_one_write_as_it_came():
    world = opened()
    group = b"MAIL FROM:<a@b.example> SIZE=3\r\nrcpt to:<c@d.example>\r\nRCPT TO:<e@f.example>\r\nDATA\r\n"
    world.mediator.client(group)
    world.do()
    assert world.wants[-1] is Want.SLOT
    assert world.mxs[0].received == group


def test_the_body_is_what_it_was():
    world = opened()
    body = bytes(range(1, 256)).replace(b"\r", b"").replace(b"\n", b"") * 50 + b"\r\n"
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    world.say(body + b".\r\n", 7)
    assert world.mxs[0].messages == [body]


@pytest.mark.parametrize("cut", range(1, len(message(1) + message(2))))
def test_every_cut_of_two_messages_in_one_write(cut):
    data = message(1) + message(2) + b"QUIT\r\n"
    world = opened()
    world.say(data[:cut])
    world.say(data[cut:])
    assert codes(world.client_sees) == [250, 250, 354, 250, 250, 250, 354, 250, 221]
    assert world.mxs[0].messages == [b"..1\r\n.x\r\n\r\n", b"..2\r\n.x\r\n\r\n"]
    assert world.verdicts == [None]


def test_a_second_mail_in_the_same_write_needs_a_second_slot():
    world = opened(slots=[None, throttled()])
    replies = world.say(message(1) + message(2) + b"NOOP\r\n")
    assert codes(replies)[:7] == [250, 250, 354, 250, 451, 503, 503]
    assert world.wants.count(Want.SLOT) == 2
    assert world.mxs[0].messages == [b"..1\r\n.x\r\n\r\n"]


def test_mail_pipelined_behind_the_final_dot_waits_for_its_reply():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    world.mediator.client(b"x\r\n.\r\nMAIL FROM:<second@b.example>\r\n")
    assert world.mediator.want is None, "the reply to the dot comes first"
    world.settle()
    assert codes(world.client_sees) == [250, 250, 354, 250, 250]


def test_our_451_in_a_pipelined_group_swallows_the_group():
    world = opened(slots=[throttled(7.2)])
    group = b"RSET\r\nMAIL FROM:<a@b.example>\r\n" + b"RCPT TO:<c@d.example>\r\n" * 3 + b"DATA\r\n"
    replies = world.say(group)
    assert replies.split(b"\r\n")[1] == b"451 4.7.1 throttle yahoo: again in 8 s"
    assert codes(replies) == [250, 451, 503, 503, 503, 503]
    assert world.mxs[0].received == b""
    assert world.mediator.refused == 1
    assert codes(world.say(b"RSET\r\n" + message(2))) == [250, 250, 250, 354, 250]


def test_a_reset_that_the_receiver_owes_comes_before_our_451():
    world = opened(slots=[None, throttled()])
    group = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRSET\r\nMAIL FROM:<e@f.example>\r\n"
    replies = world.say(group)
    assert [line for line in replies.split(b"\r\n") if b"451" in line or b"0.3" in line] == [
        b"250 0.3",
        b"451 4.7.1 throttle yahoo: again in 8 s",
    ]


def test_the_receivers_refusal_of_a_message_is_its_own():
    world = opened(scripts=[{b"MAIL": [b"452 4.2.2 full\r\n"]}])
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    assert codes(replies) == [452, 503, 503]
    assert world.mediator.idle, "nothing is in progress"
    assert codes(world.say(message(2))) == [250, 250, 354, 250]
    assert (world.mediator.tracker.deferred, world.mediator.tracker.rejected) == (1, 0)


def test_data_that_is_refused_is_followed_by_commands():
    world = opened(scripts=[{b"RCPT": [b"550 no\r\n"], b"DATA": [b"554 no valid recipients\r\n"]}])
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nRSET\r\n" + message(2))
    assert codes(replies) == [250, 550, 554, 250, 250, 250, 354, 250]
    assert world.mxs[0].messages == [b"..2\r\n.x\r\n\r\n"]


def test_rset_and_noop_between_messages_are_ours():
    world = opened()
    assert world.say(b"RSET\r\nnoop foo\r\n") == b"250 2.0.0 OK\r\n" * 2
    world.say(message(1))
    assert codes(world.say(b"RSET\r\nNOOP\r\n")) == [250, 250]
    assert b"RSET" not in world.mxs[0].commands


def test_noop_and_rset_in_a_transaction_are_the_receivers():
    world = opened()
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nNOOP\r\nRSET\r\nNOOP\r\n")
    assert re.findall(rb"^250 0\.\d", replies, re.MULTILINE) == [b"250 0.1", b"250 0.2", b"250 0.3"]
    assert replies.endswith(b"250 2.0.0 OK\r\n")
    assert world.state is State.READY


def test_reply_lines_of_2_kb_8_bit_and_bare_line_feeds_pass_as_they_are():
    long = b"250-" + b"x" * 2040 + b"\r\n250 \xe9\xff\r\n"
    world = opened(scripts=[{b"MAIL": [long], b"RCPT": [b"250 bare\n"]}])
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRSET\r\n")
    assert replies.startswith(long + b"250 bare\n250-RSET")
    world.say(b"QUIT\r\n")
    assert world.verdicts == [Discard.PROTOCOL_ERROR], "passed on, and shared with nobody"


def test_a_command_with_a_bare_line_feed_reaches_the_receiver_as_a_proper_one():
    world = opened()
    assert codes(world.say(b"MAIL FROM:<a@b.example>\nRCPT TO:<c@d.example>\nDATA\n")) == [250, 250, 354]
    assert world.mxs[0].received == b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"


@pytest.mark.parametrize("junk", [b"\rMAIL FROM:<a@b.example>", b"NO\0OP", b""])
def test_commands_that_receivers_would_read_differently_are_not_passed_on(junk):
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\n")
    assert codes(world.say(junk + b"\r\n")) == [500]
    assert world.mxs[0].commands == [b"MAIL FROM:<a@b.example>"]


def test_a_mail_within_a_message_is_a_mistake_and_takes_no_slot():
    world = opened()
    group = b"MAIL FROM:<a@b.example>\r\nMAIL FROM:<e@f.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"
    assert codes(world.say(group)) == [250, 503, 250, 354]
    assert world.wants.count(Want.SLOT) == 1


def test_bdat_although_hidden_is_swallowed_whole():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n")
    chunk = b"QUIT\r\n.\r\n"
    assert codes(world.say(b"BDAT %d LAST\r\n%sRSET\r\n" % (len(chunk), chunk), 3)) == [503, 250]
    assert world.mxs[0].commands[-1] == b"RSET"


def test_auth_is_passed_on_and_makes_the_session_the_clients_own():
    world = opened(scripts=[{b"DXNLCG==": [b"235 ok\r\n"]}], show_auth=True)
    assert b"AUTH PLAIN" in world.say(EHLO)
    assert codes(world.say(b"AUTH LOGIN\r\n")) == [334]
    assert codes(world.say(b"dXNlcg==\r\n")) == [235]
    assert codes(world.say(message(1))) == [250, 250, 354, 250]
    assert not world.mediator.idle
    world.mxs[0].closed = True
    world.settle()
    assert world.over, "no other connection can stand in for it"


def test_an_unknown_verb_goes_to_the_receiver_and_the_limits_still_hold():
    world = opened(slots=[throttled()])
    assert codes(world.say(b"XFOO bar\r\n")) == [502]
    assert codes(world.say(b"MAIL FROM:<>\r\n")) == [451]
    world.say(b"QUIT\r\n")
    assert world.verdicts == [Discard.UNKNOWN_VERB]


# --- the connection changes ---


def test_the_receiver_closes_between_messages_and_nobody_notices():
    world = opened()
    world.say(message(1))
    world.mxs[0].closed = True
    world.settle()
    assert (world.state, world.client_sees[-3:]) == (State.DETACHED, world.client_sees[-3:])
    assert codes(world.say(message(2))) == [250, 250, 354, 250]
    assert [mx.messages for mx in world.mxs] == [[b"..1\r\n.x\r\n\r\n"], [b"..2\r\n.x\r\n\r\n"]]


def test_a_421_while_idle_is_not_for_the_client():
    world = opened()
    world.say(message(1))
    before = world.client_sees
    world.mediator.receiver(b"421 4.4.2 idle\r\n")
    world.settle()
    assert (world.client_sees, world.verdicts) == (before, [Discard.SAID_421])
    assert codes(world.say(message(2))) == [250, 250, 354, 250]


@pytest.mark.parametrize("death", [None, b"421 4.3.2 bye\r\n", b"421-4.3.2\r\n421 bye\r\n"])
@pytest.mark.parametrize(
    "group", [b"MAIL FROM:<a@b.example>\r\n", b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d>\r\nDATA\r\n"]
)
def test_a_shared_connection_that_was_dead_is_replaced_once(death, group):
    world = opened(scripts=[{b"MAIL": [death]}], reused=True)
    assert codes(world.say(group)) == ([250] if b"DATA" not in group else [250, 250, 354])
    assert world.mxs[1].received == group
    assert world.wants.count(Want.SLOT) == 1, "it has its slot"
    if b"DATA" not in group:
        assert codes(world.say(b"RCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n")) == [250, 354, 250]
    else:
        assert codes(world.say(b"x\r\n.\r\n")) == [250]


@pytest.mark.parametrize(
    ("death", "told"), [(b"421 4.3.2 bye\r\n", "421 4.3.2 bye"), (b"421-4.3.2\r\n421 bye\r\n", "421 4.3.2"), (None, "")]
)
def test_the_421_of_a_connection_that_is_replaced_is_told_all_the_same(death, told):
    """It came when MAIL was said, and its client does not see it."""
    refusals = []
    world = opened(scripts=[{b"MAIL": [death]}], reused=True, tracker=lambda: Tracker(refusals.append))
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\n")) == [250]
    assert refusals == [told] * bool(told)


def test_refusals_are_told_once_and_an_idle_receivers_goodbye_is_none():
    refusals = []
    world = opened(scripts=[{b"RCPT": [b"450 4.2.0 later\r\n"]}], tracker=lambda: Tracker(refusals.append))
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRSET\r\n")
    world.mediator.receiver(b"421 4.4.2 idle\r\n")
    world.settle()
    assert refusals == ["450 4.2.0 later"]


def test_it_is_replaced_once_only():
    world = opened(scripts=[{b"MAIL": [None]}, {b"MAIL": [None]}], reused=True)
    world.say(b"MAIL FROM:<a@b.example>\r\n")
    assert (len(world.mxs), world.over, world.client_sees) == (2, True, b"")


def test_another_421_is_the_clients_and_the_last():
    world = opened(scripts=[{b"RCPT": [b"421 4.3.2 bye\r\n"]}], reused=True)
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")) == [250, 421]
    assert (len(world.mxs), world.over) == (1, True)


def test_a_new_connection_that_says_421_to_its_first_mail_means_it():
    world = opened(scripts=[{b"MAIL": [b"421 4.7.0 too fast\r\n"]}])
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\n")) == [421]
    assert len(world.mxs) == 1


def test_nothing_is_said_again_after_a_whole_message():
    world = opened(scripts=[{b".": [None]}], reused=True)
    assert codes(world.say(message(1))) == [250, 250, 354]
    assert (len(world.mxs), world.over) == (1, True)
    assert world.verdicts == [Discard.PEER_CLOSED]


def test_no_connection_for_the_replacement():
    world = opened(scripts=[{b"MAIL": [None]}], reused=True)
    world.refuse = unreachable()
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    assert codes(replies) == [421]
    assert b"Connection refused" in replies
    assert world.over


def test_no_place_for_the_replacement_refuses_the_whole_group():
    world = opened(scripts=[{b"MAIL": [None]}], reused=True)
    world.refuse = throttled()
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    assert codes(replies) == [451, 503, 503]
    assert codes(world.say(b"RSET\r\n" + message(1))) == [250, 250, 250, 354, 250]


def detached(**options):
    """A world whose client has said EHLO and has no receiver any more."""
    world = opened(**options)
    world.mxs[0].closed = True
    world.settle()
    world.wants.clear()
    return world


def test_a_connection_that_comes_too_late_for_its_slot_waits_for_another():
    world = detached(late=1)
    assert codes(world.say(message(1))) == [250, 250, 354, 250]
    assert world.wants == [Want.SLOT, Want.LINE, Want.SLOT]
    assert len(world.mxs) == 2, "it keeps the connection"
    assert len(world.mxs[1].messages) == 1


def test_no_other_slot_in_time_is_said_to_this_message_alone():
    world = detached(late=1, slots=[None, throttled()])
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRSET\r\n")) == [451, 503, 250]
    assert world.mxs[1].commands == []
    assert codes(world.say(message(2))) == [250, 250, 354, 250]
    assert len(world.mxs) == 2


def test_what_is_said_again_too_late_waits_for_another_slot():
    """The receiver had closed behind our back; what is pipelined waits with its MAIL."""
    world = opened(scripts=[{b"MAIL": [None]}], reused=True, late=1)
    world.wants.clear()
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n")) == [250, 250]
    assert world.wants == [Want.SLOT, Want.LEAVE, Want.LINE, Want.SLOT]
    assert world.mxs[1].commands == [b"MAIL FROM:<a@b.example>", b"RCPT TO:<c@d.example>"]


def test_what_would_be_said_again_and_gets_no_other_slot_is_refused_whole():
    world = opened(scripts=[{b"MAIL": [None]}], reused=True, late=1, slots=[None, throttled()])
    group = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRCPT TO:<e@d.example>\r\n"
    assert codes(world.say(group + b"RSET\r\n")) == [451, 503, 503, 250]
    assert codes(world.say(message(2))) == [250, 250, 354, 250]
    assert world.mxs[1].commands[0].startswith(b"MAIL FROM:<2@")


def test_only_a_mail_has_a_slot_that_can_be_late():
    world = detached(late=1)
    assert codes(world.say(b"VRFY x\r\n")) == [252]
    assert world.wants == [Want.LINE]


def test_a_detached_client_that_finds_no_receiver():
    world = opened()
    world.mxs[0].closed = True
    world.settle()
    world.refuse = UpstreamError("refused", Step.GREETING, smtp_reply="554 5.7.1 not you")
    replies = world.say(b"MAIL FROM:<a@b.example>\r\n")
    assert codes(replies) == [421], "as the answer to MAIL a 554 would bounce the message"
    assert world.over


def test_out_of_descriptors_is_not_the_messages_fault():
    world = opened()
    world.mxs[0].closed = True
    world.settle()
    world.refuse = Overloaded("no outgoing socket")
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\n")) == [421]


def test_a_connection_that_offers_less_than_was_shown_is_not_used():
    world = opened(hello=[HELLO, ("mx2.example.net", "PIPELINING", "SIZE 999", "8BITMIME")])
    world.mxs[0].closed = True
    world.settle()
    assert codes(world.say(b"MAIL FROM:<a@b.example>\r\n")) == [421]
    assert world.mxs[1].received == b""
    assert world.verdicts[-1] is None, "it is as good as new for others"


def test_taken_while_idle_then_quit():
    world = opened()
    world.say(message(1))
    assert world.mediator.idle
    world.mediator.taken()
    world.settle()
    assert (world.state, world.verdicts) == (State.DETACHED, [None])
    assert codes(world.say(b"NOOP\r\nRSET\r\nQUIT\r\n")) == [250, 250, 221]
    assert (len(world.mxs), world.over) == (1, True)


def test_taken_while_idle_then_mail():
    world = opened()
    world.mediator.taken()
    world.settle()
    assert codes(world.say(message(1))) == [250, 250, 354, 250]
    assert world.wants[-2:] == [Want.SLOT, Want.LINE], "no connection is taken before there is a slot"
    assert [bool(mx.messages) for mx in world.mxs] == [False, True]


def test_not_taken_in_the_middle():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\n")
    world.mediator.taken()
    assert world.mediator.want is None


def test_a_connection_that_has_carried_its_share_is_changed():
    world = opened(left=2)
    replies = world.say(message(1) + message(2) + message(3))
    assert codes(replies) == [250, 250, 354, 250] * 3
    assert [len(mx.messages) for mx in world.mxs] == [2, 1]


def test_limits_mailmax_is_what_is_left():
    world = World(left=3, hello=[("mx", "LIMITS MAILMAX=10 RCPTMAX=5")])
    world.settle()
    assert world.say(EHLO) == b"250-mx\r\n250 LIMITS MAILMAX=3 RCPTMAX=5\r\n"


# --- ends ---


@pytest.mark.parametrize("end", ["QUIT", "FIN"])
@pytest.mark.parametrize(
    ("dialogue", "verdict"),
    [
        (b"", None),
        (message(1), None),
        (b"MAIL FROM:<a@b.example>\r\n", None),
        (b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n", None),
        (b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRSET\r\n", None),
    ],
)
def test_the_client_leaves_between_commands_and_the_connection_is_clean(dialogue, verdict, end):
    world = opened()
    world.say(dialogue)
    if end == "QUIT":
        assert world.say(b"QUIT\r\n") == b"221 2.0.0 proxy.example closing\r\n"
    else:
        world.mediator.client_done()
        world.settle()
    assert (world.over, world.verdicts) == (True, [verdict])
    assert b"QUIT" not in world.mxs[0].commands


def test_the_client_ends_in_a_message_and_no_dot_is_added():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nhalf a mess")
    world.mediator.client_done()
    world.settle()
    assert (world.over, world.verdicts) == (True, [Discard.IN_DATA])
    assert world.mxs[0].received.endswith(b"half a mess")


def test_the_client_ends_while_data_is_asked():
    world = opened()
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    world.mediator.client_done()
    world.settle()
    assert (world.over, world.verdicts) == (True, [Discard.IN_DATA])
    assert codes(world.client_sees) == [250, 250, 354]


def test_a_client_that_says_all_and_shuts_its_side_gets_all_replies():
    world = World()
    world.settle()
    world.mediator.client(EHLO)
    world.settle()
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    world.settle()
    world.mediator.client(b"x\r\n.\r\nQUIT\r\n")
    world.mediator.client_done()
    world.settle()
    assert codes(world.client_sees) == [220, 250, 250, 250, 354, 250, 221]
    assert world.verdicts == [None]


@pytest.mark.parametrize(
    ("behind", "hopeless"),
    [
        (b"", True),
        (b"RCPT TO:<c@d.example>\r\nDATA\r\n", True),
        (b"RCPT TO:<c@d.example>\r\nDATA\r\nhalf a mess\r\n.. \r\n quit\r\n", True),
        (b"RCPT TO:<c@d.example>\r\nDATA\r\nx\r\n.\r\n", False),
        (b"RCPT TO:<c@d.example>\r\nquit\r\n", False),
        (b"RSET\nQUIT \n", False),
        (b"x" * MOST_INPUT, False),
    ],
    ids=["nothing", "no message", "half a message", "a message", "a question", "bare line feeds", "not all is known"],
)
def test_whether_anything_can_come_of_a_mail_whose_client_has_closed_its_side(behind, hopeless):
    world = opened()
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\n")
    assert world.mediator.want is Want.SLOT
    assert world.mediator.hears_client
    world.mediator.client(behind)
    if world.mediator.hears_client:
        assert not world.mediator.hopeless
        world.mediator.client_done()
    assert not world.mediator.hears_client
    assert world.mediator.hopeless == hopeless


@pytest.mark.parametrize("said_first", [b"", EHLO], ids=["greeting", "session"])
@pytest.mark.parametrize(
    ("behind", "hopeless"),
    [
        (b"", True),
        (b"MAIL FROM:<a@b.example>\r\n", True),
        (b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nx\r\n.\r\n", False),
        (b"QUIT\r\n", False),
    ],
    ids=["nothing", "no message", "a message", "a question"],
)
def test_whether_anything_can_come_of_a_session_whose_client_has_closed_its_side(said_first, behind, hopeless):
    world = World()
    if said_first:
        world.settle()
        world.mediator.client(said_first)
    assert world.mediator.want is (Want.HELLO if said_first else Want.GREETING)
    world.mediator.client(behind)
    assert not world.mediator.hopeless
    world.mediator.client_done()
    assert world.mediator.hopeless == hopeless


def test_half_a_command_before_the_end_is_no_command():
    world = opened()
    world.say(b"MAIL FROM:<a@b.exam")
    world.mediator.client_done()
    world.settle()
    assert (world.over, world.verdicts, world.mxs[0].received) == (True, [None], b"")


def test_a_reset_with_replies_outstanding_is_never_kept():
    world = opened()
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\n")
    world.do()
    world.mediator.client_gone()
    world.settle()
    assert world.verdicts == [Discard.OUTSTANDING]


def test_garbage_of_the_receiver_passes_and_from_then_on_all_bytes_do():
    world = opened(scripts=[{b"RCPT": [b"\x00\xffgarbage\r\n"]}])
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n")
    assert replies.endswith(b"\x00\xffgarbage\r\n")
    assert world.state is State.RAW
    assert world.say(b"anything") == b""
    assert world.mxs[0].received.endswith(b"anything")
    world.mediator.client_done()
    world.settle()
    assert (world.over, world.verdicts) == (True, [Discard.PROTOCOL_ERROR])


def test_a_reply_line_without_an_end_is_passed_on_and_not_kept_in_memory():
    world = opened()
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\n")
    world.do()
    world.towards_mediator = b""
    for _ in range(100):
        world.mediator.receiver(b"x" * 1000)
    assert sum(map(len, world.mediator.to_client)) >= 91_000


def test_an_early_reply_in_the_middle_of_a_message_passes():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\npart")
    before = len(world.client_sees)
    world.mediator.receiver(b"552 5.3.4 too big\r\n")
    world.say(b"rest")
    assert world.client_sees[before:] == b"552 5.3.4 too big\r\n"
    assert world.mxs[0].received.endswith(b"partrest")


def test_drain_between_messages_is_421_and_in_a_message_later():
    world = opened()
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\npart\r\n")
    world.mediator.drain()
    world.settle()
    assert not world.over
    assert codes(world.say(b".\r\n")) == [250, 421]
    assert (world.over, world.verdicts) == (True, [None])


def test_idle_for_too_long():
    world = opened()
    world.mediator.time_is_up()
    world.settle()
    assert codes(world.client_sees) == [421]
    assert world.verdicts == [None]


# --- bad clients ---


def test_a_line_without_an_end():
    world = opened()
    world.say(b"x" * (MAX_COMMAND_LINE + 5), 1000)
    assert codes(world.client_sees) == [500, 421]
    assert world.over


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: y\r\nAccept: */*\r\n\r\n" * 5,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 100,
        b"\xff" * 100_000,
        b"\r\n" * 100,
    ],
)
def test_http_tls_and_garbage_get_a_reply_of_smtp_and_are_closed(junk):
    world = World()
    world.settle()
    before = len(world.client_sees)
    world.say(junk, 999)
    assert world.over
    replies = world.client_sees[before:]
    assert set(codes(replies)) <= {500, 503, 421}
    assert codes(replies)[-1] == 421
    assert len(codes(replies)) <= MOST_MISTAKES + 1
    assert world.mxs[0].received == b""


@pytest.mark.parametrize("flood", [EHLO, b"NOOP\r\n", b"RSET\r\n"])
def test_floods_of_what_costs_the_client_nothing(flood):
    world = opened()
    world.say(flood * (MOST_IDLE_COMMANDS + 10))
    assert world.over
    assert codes(world.client_sees)[-1] == 421
    assert len(codes(world.client_sees)) <= MOST_IDLE_COMMANDS + 1


def test_pipelined_commands_are_taken_as_fast_as_they_are_answered():
    world = opened()
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\n")
    world.do()
    taken = 0
    while world.mediator.reads_client:
        world.mediator.client(b"RCPT TO:<c@d.example>\r\n" * 100)
        taken += 1
    assert len(world.mediator.unread) < MOST_INPUT + 2400
    assert len(world.mediator.group.verbs) == MOST_OUTSTANDING
    world.settle()
    assert len(codes(world.client_sees)) == 1 + taken * 100


# --- any cut, any order ---

COMMANDS = st.sampled_from(
    [
        message(1),
        message(2, 3),
        message(3) + message(4),
        b"RSET\r\n",
        b"NOOP\r\n",
        EHLO,
        b"MAIL FROM:<a@b.example>\r\n",
        b"RCPT TO:<c@d.example>\r\n",
        b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n",
        b"VRFY x\r\n",
        b"STARTTLS\r\n",
        b"BDAT 5 LAST\r\nQUIT\r",
        b"XFOO\r\n",
        b"EHLO other.example.com\r\n",
        b"DATA\r\n",
        b"bad\rline\r\n",
    ]
)
SLOTS = st.lists(st.sampled_from([None, None, None, "no"]), max_size=4)
SCRIPTS = st.lists(
    st.dictionaries(
        st.sampled_from([b"MAIL", b"RCPT", b"DATA", b".", b"RSET"]),
        st.lists(st.sampled_from([b"", b"", b"450 4.2.1 later\r\n", b"550-5.1.1\r\n550 no\r\n"]), max_size=2),
        max_size=2,
    ),
    max_size=2,
)


def world_of(slots, scripts):
    said = [{verb: list(replies) for verb, replies in script.items()} for script in scripts]
    world = World(said, slots=[throttled() if slot else None for slot in slots])
    world.settle()
    return world


def outcome(world):
    return (
        world.client_sees,
        [mx.received for mx in world.mxs],
        [mx.messages for mx in world.mxs],
        [want for want in world.wants if want in (Want.SLOT, Want.LINE, Want.LEAVE, Want.END)],
        world.verdicts,
        world.state,
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(COMMANDS, max_size=6), SLOTS, SCRIPTS, st.data())
@example([message(1), b"RSET\r\n", message(2)], [None, "no"], [], None)
def test_any_cut_and_any_order_gives_the_same_dialogue(commands, slots, scripts, data):
    """Against a client that waits after each line: nothing of ours overtakes, nothing is lost or said twice."""
    stream = EHLO + b"".join(commands) + b"QUIT\r\n"
    slow = world_of(slots, scripts)
    for line in stream.splitlines(keepends=True):
        slow.say(line)
    fast = world_of(slots, scripts)
    at = 0
    while True:
        choice = data.draw(st.integers(0, 2)) if data is not None else 1
        if choice == 0 and at < len(stream):
            size = data.draw(st.integers(1, 40))
            fast.give(stream[at : at + size])
            at += size
        elif not fast.step(choice * 3 or None):
            if at >= len(stream):
                break
            fast.give(stream[at : at + 11])
            at += 11
    assert outcome(fast) == outcome(slow)


def test_a_connection_that_is_taken_while_its_mail_is_held():
    world = opened()
    world.automatic = False
    world.mediator.client(message(1))
    assert world.mediator.want is Want.SLOT
    assert world.mediator.may_lend
    world.mediator.left()
    assert world.mediator.want is Want.SLOT, "it waits on"
    assert not world.mediator.may_lend
    world.automatic = True
    world.settle()
    assert codes(world.client_sees) == [250, 250, 354, 250]
    assert [bool(mx.messages) for mx in world.mxs] == [False, True]


@pytest.mark.parametrize("words", [b"421 4.4.2 idle for too long\r\n", b"250 2.0.0 what?\r\n", b"nonsense\r\n", None])
@pytest.mark.parametrize("refused", [False, True])
def test_what_the_receiver_says_while_a_mail_is_held_is_no_answer_to_it(words, refused):
    """It was asked nothing: its connection is lost, and the message goes on another."""
    world = opened()
    world.automatic = False
    group = message(1) if not refused else b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"
    world.mediator.client(group)
    assert world.mediator.want is Want.SLOT
    if words is None:
        world.mediator.receiver_done()
    else:
        world.mediator.receiver(words)
        world.mediator.receiver(b"250 and more\r\n")
    assert (world.mediator.want, world.mediator.to_client) == (Want.SLOT, [])
    assert world.mediator.death is not None
    world.slots = [throttled()] if refused else []
    world.automatic = True
    world.settle()
    assert codes(world.client_sees) == ([451, 503, 503] if refused else [250, 250, 354, 250])
    assert not world.mxs[0].messages


def test_after_auth_it_stays_while_a_mail_is_held():
    world = opened(scripts=[{b"AUTH": [b"235 ok\r\n"]}])
    world.say(b"AUTH PLAIN x\r\n")
    world.automatic = False
    world.mediator.client(b"MAIL FROM:<a@b.example>\r\n")
    assert world.mediator.want is Want.SLOT
    assert not world.mediator.may_lend


# --- what a hostile side may try ---


@pytest.mark.parametrize("verb", [b"XEXCH50", b"VRFY", b"MAIL", b"RCPT", b"RSET"])
def test_a_reply_that_asks_for_more_where_none_can_ends_our_part(verb):
    """What the client sends then is no command: a MAIL in it must not be held, or answered by us (XEXCH50's blob)."""
    world = opened(scripts=[{verb: [b"354 send it\r\n"]}])
    if verb in (b"RCPT", b"RSET"):
        world.say(b"MAIL FROM:<a@b.example>\r\n")
    world.say(
        {b"MAIL": b"MAIL FROM:<a@b.example>\r\n", b"RCPT": b"RCPT TO:<c@d.example>\r\n"}.get(verb, verb + b" 5 2\r\n")
    )
    slots = world.wants.count(Want.SLOT)
    assert world.state is State.RAW
    world.mediator.client(b"QUIT\r\nMAIL FROM:<in@the.blob>\r\n")
    world.settle()
    assert world.wants.count(Want.SLOT) == slots
    assert not world.over
    world.mediator.client_gone()
    world.settle()
    assert world.verdicts[-1] is not None, "nobody else has it"


@pytest.mark.parametrize("line", [b"*\rMAIL FROM:<a@b.example>\r\n", b"AGEAYg\0\r\n"])
def test_a_line_of_auth_that_receivers_would_read_differently_is_not_passed_on(line):
    world = opened()
    world.say(b"AUTH LOGIN\r\n")
    assert world.state is State.AUTH
    world.say(line)
    assert world.over
    assert b"\r" not in world.mxs[0].received.replace(b"\r\n", b"")
    assert b"\0" not in world.mxs[0].received
    assert codes(world.client_sees)[-2:] == [500, 421]


def test_a_client_whose_mail_we_refused_may_lose_its_connection_to_who_waits():
    world = opened(slots=[throttled()])
    group = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"
    assert codes(world.say(group)) == [451, 503, 503]
    assert world.mediator.idle
    world.mediator.taken()
    world.settle()
    assert world.verdicts == [None]
    assert codes(world.say(b"RCPT TO:<c@d.example>\r\nRSET\r\n" + message(1))) == [503, 250, 250, 250, 354, 250]
    assert [len(mx.messages) for mx in world.mxs] == [0, 1]


@pytest.mark.parametrize("flood", [b"RCPT TO:<c@d.example>\r\n", b"DATA\r\n"])
def test_a_flood_of_parts_of_no_message(flood):
    world = opened()
    world.say(flood * (MOST_IDLE_COMMANDS + 10))
    assert world.over
    assert len(codes(world.client_sees)) <= MOST_IDLE_COMMANDS + 1


def test_a_refused_group_is_swallowed_however_many_recipients_it_has():
    world = opened(slots=[throttled()])
    many = MOST_IDLE_COMMANDS + 10
    assert codes(world.say(message(1, many)[: -len(b"x")]))[: many + 2] == [451, *[503] * (many + 1)]


def test_what_was_pipelined_before_the_receivers_garbage_goes_to_it_too():
    """Else the client waits for a reply to what nobody has read."""
    world = opened(scripts=[{b"RCPT": [b"what?\r\n"]}])
    world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nQUIT\r\n")
    assert world.state is State.RAW
    assert world.mxs[0].commands[-1] == b"QUIT"


# --- no place at the start ---

FORESEEN = ("mx.example.net", "SIZE 1000", "8BITMIME", "SMTPUTF8", "CHUNKING")


def test_without_a_place_the_client_is_told_what_the_receiver_is_thought_to_say():
    world = World(preview=FORESEEN)
    world.settle()
    assert world.client_sees == GREETING.encode() + b"\r\n"
    assert world.say(EHLO) == b"250-mx.example.net\r\n250-SIZE 1000\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"
    assert world.say(b"EHLO another.example\r\n").startswith(b"250-mx.example.net\r\n"), "another name, too"
    assert world.say(b"HELO another.example\r\n") == b"250 mx.example.net\r\n"
    assert world.say(b"NOOP\r\nRSET\r\n") == b"250 2.0.0 OK\r\n" * 2
    assert world.say(b"QUIT\r\n").startswith(b"221 ")
    assert (world.wants, world.mxs, world.over) == ([Want.GREETING, Want.END], [], True)


def test_its_first_message_has_its_slot_and_then_its_connection():
    world = World(preview=FORESEEN)
    replies = world.say(EHLO + message(1))
    assert codes(replies)[-4:] == [250, 250, 354, 250]
    assert world.wants == [Want.GREETING, Want.SLOT, Want.LINE]
    assert world.names == [NAME]
    assert world.mxs[0].messages == [b"..1\r\n.x\r\n\r\n"]
    assert world.say(message(2))[:3] == b"250", "as any other from then on"
    assert len(world.mxs) == 1


def test_no_place_for_the_first_message_is_said_to_it_alone():
    world = World(preview=FORESEEN)
    world.settle()
    world.say(EHLO)
    world.refuse = throttled(7.2)
    replies = world.say(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    assert codes(replies) == [451, 503, 503]
    assert replies.startswith(b"451 4.7.1 throttle yahoo: again in 8 s\r\n")
    assert codes(world.say(b"RSET\r\n" + message(1))) == [250, 250, 250, 354, 250]


@pytest.mark.parametrize(
    ("offered", "mail", "code"),
    [
        (FORESEEN, b"BODY=8BITMIME SMTPUTF8", 250),
        (("mx", "SIZE 1000"), b"", 250),
        (("mx", "SIZE 1000"), b"SIZE=10 BODY=7BIT", 250),
        (("mx", "SIZE 1000"), b"body=8bitmime", 421),
        (("mx", "SIZE 1000", "8BITMIME"), b"BODY=8BITMIME SMTPUTF8", 421),
        (("mx", "SIZE 999", "8BITMIME", "SMTPUTF8"), b"", 421),
        (("mx", "8BITMIME", "SMTPUTF8"), b"", 421),
    ],
)
def test_what_was_foreseen_has_to_be_there_if_it_is_used(offered, mail, code):
    """Never passed on to a receiver that would refuse it for good."""
    world = World(preview=FORESEEN, hello=[offered])
    world.settle()
    world.say(EHLO)
    assert codes(world.say(b"MAIL FROM:<a@b.example> %s\r\n" % mail)) == [code]
    assert world.over == (code == 421)
    assert bool(world.mxs[0].commands) == (code == 250)


def test_a_place_that_is_gone_when_the_client_says_its_name():
    """Another name than the kept connection's: that one goes back, and there is none for this client."""
    world = World(reused=True, automatic=False)
    world.do()
    world.give(EHLO)
    assert world.mediator.want is Want.HELLO
    world.mediator.put_off(FORESEEN)
    world.automatic = True
    world.settle()
    assert codes(world.client_sees) == [220, 250]
    assert world.state is State.DETACHED
    assert codes(world.say(message(1))) == [250, 250, 354, 250]


# --- TLS in front of the greeting ---


@pytest.mark.parametrize(
    ("said", "tls"),
    [(b"\x16\x03\x01\x02\x00\x01", True), (b"\x16", False), (b"EHLO x\r\n", False), (b"\x15\x03\x01", False)],
)
def test_who_speaks_tls_before_it_was_greeted(said, tls):
    world = World(automatic=False)
    world.mediator.client(said)
    assert world.mediator.begins_tls == tls


def test_from_then_on_bytes_pass_both_ways():
    world = World(automatic=False)
    world.mediator.client(b"\x16\x03\x01rest")
    world.mediator.pass_through()
    world.mediator.client(b"\nmore")
    world.mediator.receiver(b"\x16\x03\x03hello")
    assert b"".join(world.mediator.to_receiver) == b"\x16\x03\x01rest\nmore"
    assert b"".join(world.mediator.to_client) == b"\x16\x03\x03hello"
    assert world.mediator.state is State.RAW
    assert not world.mediator.begins_tls
    world.mediator.client_done()
    assert world.mediator.want is Want.END


@pytest.mark.parametrize("parameters", [b"REQUIRETLS", b"SIZE=1 RequireTLS"])
def test_requiretls_is_not_offered(parameters):
    world = opened()
    replies = world.say(b"MAIL FROM:<a@b.example> %s\r\nRCPT TO:<c@d.example>\r\nDATA\r\n" % parameters)
    assert codes(replies) == [555, 503, 503]
    assert codes(world.say(message(1))) == [250, 250, 354, 250]
    assert codes(world.say(b"MAIL FROM:<requiretls@b.example>\r\n")) == [250]

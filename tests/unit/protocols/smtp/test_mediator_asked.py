"""What a caller asks the mediator, condition by condition: may it read, is it idle, may it lend, is there any hope."""

from collections.abc import Callable

import pytest

from proxy.model import Discard
from proxy.protocols.smtp.course import MOST_IDLE_COMMANDS, MOST_MISTAKES
from proxy.protocols.smtp.fates import FateTracker
from proxy.protocols.smtp.mediator import MOST_INPUT, Mediator
from proxy.protocols.smtp.states import State, Want
from proxy.stats import Fate
from tests.unit.protocols.smtp.world import HELLO, HOST, opened, throttled, unreachable

Change = Callable[[Mediator], object]


def at_rest() -> Mediator:
    """Between two messages, on a connection that may change."""
    made = Mediator(HOST)
    made.greeted("220 mx", False)
    made.name = "client"
    made.attached_to(HELLO, None, True, False)
    made.to_client.clear()
    assert (made.state, made.want) == (State.READY, None)
    return made


def group(made: Mediator) -> None:
    made.group.add(b"NOOP", b"NOOP\r\n")


def unread(octets: int) -> Change:
    return lambda made: made.unread.extend(b"x" * octets)


def put(**fields: object) -> Change:
    return lambda made: [setattr(made, name, value) for name, value in fields.items()]


def changed(*changes: Change) -> Mediator:
    made = at_rest()
    for change in changes:
        change(made)
    return made


@pytest.mark.parametrize(
    ("change", "reads", "hears"),
    [
        (put(), True, True),
        (put(want=Want.SLOT), False, True),
        (put(_client_done=True), False, False),
        (unread(MOST_INPUT - 1), True, True),
        (unread(MOST_INPUT), False, False),
        *[(put(state=state), False, True) for state in (State.GREET, State.HELD, State.DATA_ASKED, State.OVER)],
        *[(put(state=state), True, True) for state in (State.DATA, State.RAW, State.SWALLOW, State.DETACHED)],
    ],
)
def test_when_the_client_is_read(change, reads, hears):
    made = changed(change)
    assert (made.reads_client, made.hears_client) == (reads, hears)


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ([put()], True),
        ([put(state=State.SWALLOW)], True),
        ([put(want=Want.SLOT)], False),
        ([unread(1)], False),
        ([put(may_change=False)], False),
        ([put(state=State.TRANSACTION)], True),
        ([put(state=State.TRANSACTION), group], False),
        ([put(state=State.TRANSACTION, open=True)], False),
        ([put(state=State.DETACHED)], False),
        ([put(state=State.DATA)], False),
    ],
)
def test_when_nothing_is_in_progress(changes, idle):
    made = changed(*changes)
    assert made.idle is idle
    made.taken()
    assert (made.want is Want.LEAVE) is idle


def test_what_is_not_there_cannot_be_taken():
    made = changed(put(attached=False))
    made.taken()
    assert made.want is None


@pytest.mark.parametrize(
    ("change", "may"),
    [
        (put(), True),
        (put(want=Want.LINE), False),
        (put(attached=False), False),
        (put(may_change=False), False),
        (put(open=True), False),
    ],
)
def test_when_a_connection_may_be_lent(change, may):
    assert changed(put(want=Want.SLOT, state=State.HELD), change).may_lend is may


@pytest.mark.parametrize(
    ("state", "pending", "said", "mail"),
    [
        (State.HELD, b"MAIL FROM:<>", b"", True),
        (State.HELD, b"mail from:<>", b"", True),
        (State.HELD, b"VRFY x", b"", False),
        (State.HELD, b"", b"MAIL FROM:<>\r\n", True),
        (State.HELD, b"", b"RSET\r\n", False),
        (State.HELD, b"", b"", False),
        (State.READY, b"MAIL FROM:<>", b"", False),
    ],
)
def test_what_is_heard_first(state, pending, said, mail):
    made = changed(put(state=state, pending=pending))
    if said:
        made.group.begin(True)
        made.group.add(said[:4], said)
    assert made.says_mail is mail


@pytest.mark.parametrize(
    ("fields", "unsaid", "hopeless"),
    [
        ({"state": State.HELD, "pending": b"MAIL FROM:<>"}, b"", True),
        ({"state": State.GREET}, b"", True),
        ({"state": State.HELLO}, b"EHLO x\r\n", True),
        ({"state": State.READY}, b"", False),
        ({"state": State.HELD, "pending": b"VRFY x"}, b"", False),
        ({"state": State.GREET}, b"DATA\r\nx\r\n.\r\n", False),
        ({"state": State.GREET}, b"NOOP\r\nquit\r\n", False),
        ({"state": State.GREET}, b"QUITE\r\n..\r\n", True),
    ],
)
def test_when_there_is_no_hope(fields, unsaid, hopeless):
    made = changed(put(**fields), put(want=Want.SLOT), lambda each: each.unread.extend(unsaid))
    assert not made.hopeless, "the client may say more"
    made._client_done = True
    assert made.hopeless is hopeless


def test_what_was_said_in_vain_is_what_is_said_again():
    assert not changed(put()).in_vain
    assert not changed(put(fresh=True)).in_vain
    assert not changed(put(death=Discard.PEER_CLOSED)).in_vain
    assert changed(put(fresh=True, death=Discard.PEER_CLOSED)).in_vain


def test_a_death_speaks_louder_than_the_dialogue():
    made = changed(put(death=Discard.PEER_CLOSED))
    assert made.verdict is Discard.PEER_CLOSED
    made = at_rest()
    made.tracker.client_bytes(b"XFOO\r\n")
    assert made.verdict is made.tracker.verdict() is not None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([put()], True),
        ([put(state=State.TRANSACTION)], True),
        ([put(want=Want.SLOT)], False),
        ([put(state=State.TRANSACTION), group], False),
        ([put(state=State.DATA)], False),
        ([put(state=State.RAW)], False),
    ],
)
def test_who_is_idle_for_too_long_is_told_so_where_it_is_its_turn(changes, told):
    made = changed(*changes)
    made.time_is_up()
    assert made.want is Want.END
    assert [each[:9] for each in made.to_client] == [b"421 4.4.2"] * told


# --- what comes of what was wanted ---


@pytest.mark.parametrize(
    ("attached", "death", "want"),
    [
        (True, None, None),
        (True, Discard.PEER_CLOSED, Want.LEAVE),
        (False, Discard.PEER_CLOSED, None),
        (False, None, None),
    ],
)
def test_a_slot_that_does_not_come_gives_up_a_connection_that_died(attached, death, want):
    made = changed(put(state=State.HELD, want=Want.SLOT, pending=b"MAIL FROM:<>", attached=attached, death=death))
    made.failed(throttled())
    assert (made.want, made.state, made.refused) == (want, State.SWALLOW, 1)
    assert made.to_client[0].startswith(b"451 ")


def test_a_connection_that_cannot_be_had_for_a_message_ends_it():
    made = changed(put(state=State.HELD, want=Want.LINE, pending=b"MAIL FROM:<>"))
    made.failed(unreachable())
    assert (made.attached, made.want) == (False, Want.END)
    assert made.to_client[0].startswith(b"421 4.4.1")


@pytest.mark.parametrize(
    ("attached", "may_change", "left", "death", "want"),
    [
        (False, True, None, None, Want.LINE),
        (True, True, 0, None, Want.LEAVE),
        (True, True, None, Discard.PEER_CLOSED, Want.LEAVE),
        (True, False, None, Discard.PEER_CLOSED, Want.END),
        (True, False, 0, None, None),
        (True, True, None, None, None),
        (True, True, 1, None, None),
    ],
)
def test_a_slot_that_comes_finds_a_connection_or_asks_for_one(attached, may_change, left, death, want):
    fields = {"attached": attached, "may_change": may_change, "mails_left": left, "death": death}
    made = changed(put(state=State.HELD, want=Want.SLOT, pending=b"MAIL FROM:<>", **fields))
    made.slot_granted(False)
    assert made.want is want
    assert bool(made.to_receiver) is (want is None)


@pytest.mark.parametrize(("waited", "old"), [(False, False), (True, True)])
def test_a_receiver_that_was_out_of_sight_may_have_closed(waited, old):
    made = changed(put(state=State.HELD, want=Want.SLOT, pending=b"MAIL FROM:<>"))
    made.slot_granted(waited)
    assert made.old is old
    made.state, made.want, made.old = State.HELD, Want.SLOT, True
    made.slot_granted(False)
    assert made.old, "nothing has proved the contrary"


def test_what_a_receiver_that_left_owed_is_nobodys():
    made = changed(put(state=State.TRANSACTION, begun=True, open=True, death=Discard.PEER_CLOSED, want=Want.LEAVE))
    made.to_receiver.append(b"RSET\r\n")
    made.left()
    assert (made.attached, made.death, made.begun, made.open, made.to_receiver) == (False, None, False, False, [])
    assert (made.state, made.want) == (State.DETACHED, None)


@pytest.mark.parametrize(
    ("state", "name", "was", "want"),
    [
        (State.HELD, "client", Want.SLOT, Want.SLOT),
        (State.HELD, "client", Want.LEAVE, Want.LINE),
        (State.HELLO, "client", Want.LEAVE, Want.LINE),
        (State.HELLO, None, Want.LEAVE, None),
    ],
)
def test_a_receiver_that_left_is_wanted_anew_by_who_waits_for_one(state, name, was, want):
    made = changed(put(state=state, name=name, want=was))
    made.left()
    assert (made.state, made.want) == (state, want)


def test_a_connection_is_judged_by_a_tracker_of_its_own():
    world = opened()
    first = world.mediator.tracker
    world.say(b"EHLO another.example\r\n")
    assert world.mediator.tracker is not first


def test_what_the_client_pipelines_behind_what_is_wanted_is_served_when_that_is_done():
    made = changed(put(want=Want.START_TLS))
    made.client(b"NOOP\r\n")
    assert made.to_client == []
    made.tls_started()
    assert made.secured
    assert len(made.to_client) == 1


def test_a_stop_waits_for_what_the_receiver_owes():
    made = changed(group)
    made.drain()
    assert (made.to_client, made.want) == ([], None)
    made.group.clear()
    made.drain()
    assert made.want is Want.END
    assert made.to_client[0].startswith(b"421 4.3.2")


@pytest.mark.parametrize("again", [False, True])
def test_a_connection_that_offers_less_than_was_promised_serves_no_message_that_needs_it(again):
    mail = b"MAIL FROM:<> BODY=8BITMIME"
    made = changed(put(state=State.HELD, want=Want.LINE, pending=b"" if again else mail, promised=["mx", "8BITMIME"]))
    if again:
        made.group.begin(True)
        made.group.add(b"MAIL", mail + b"\r\n")
    made.attached_to(("mx",), None, True, False)
    assert made.want is Want.END
    assert made.to_client[0].startswith(b"421 4.3.2")


# --- what is said again ---


def replaced(left: int | None = None) -> Mediator:
    """Its MAIL and RCPT found a dead connection, and are to be said on a fresh one."""
    made = changed(put(old=True, may_change=True))
    made.begin(b"MAIL FROM:<>")
    made.send(b"RCPT TO:<a@b.example>", b"RCPT")
    made.lines._rest = b"half a li"
    made.replace(Discard.PEER_CLOSED)
    assert (made.state, made.want, made.fresh, made.in_vain) == (State.HELD, Want.LEAVE, True, True)
    made.to_receiver.clear()
    made.left()
    assert made.want is Want.LINE
    made.attached_to(HELLO, left, True, False)
    return made


@pytest.mark.parametrize(("left", "then"), [(None, None), (3, 2), (1, 0)])
def test_what_is_said_again_counts_on_the_fresh_connection_and_is_judged_there(left, then):
    made = replaced(left)
    assert made.to_receiver == [b"MAIL FROM:<>\r\n", b"RCPT TO:<a@b.example>\r\n"]
    assert (made.mails_left, made.fresh, made.begun, made.state) == (then, False, True, State.TRANSACTION)
    assert (made.tracker.mails, made.tracker.owes) == (1, True)
    made.receiver(b"250 ok\r\n250 ok\r\n")
    assert b"".join(made.to_client) == b"250 ok\r\n250 ok\r\n", "the half line was the dead one's"


@pytest.mark.parametrize(("old", "may_change"), [(False, True), (True, False), (True, True)])
def test_only_what_may_have_found_a_dead_connection_can_be_said_again(old, may_change):
    made = changed(put(old=old, may_change=may_change))
    made.begin(b"MAIL FROM:<>")
    assert made.group.repeatable is (old and may_change)
    made.send(b"XFOO", b"XFOO")  # from now on the session is its own
    assert not made.group.repeatable


def test_a_command_that_was_held_is_held_no_more():
    made = changed(put(state=State.HELD, pending=b"MAIL FROM:<>"))
    made.go_on()
    assert (made.pending, made.state) == (b"", State.TRANSACTION)


def test_what_stands_behind_a_command_is_forgotten_from_the_next_line_on():
    made = at_rest()
    made.unread += b"STARTTLS\r\nNOOP\r\nQUIT\r\n"
    made.discard_input()
    assert made.unread == b"STARTTLS\r\n"


@pytest.mark.parametrize(
    ("offer", "secured", "helo", "shown"),
    [(True, False, False, True), (False, False, False, False), (True, True, False, False), (True, False, True, False)],
)
def test_to_whom_starttls_is_shown(offer, secured, helo, shown):
    made = changed(put(offer_starttls=offer, secured=secured, helo=helo, hello=HELLO))
    made.answer_hello()
    assert (b"STARTTLS" in b"".join(made.to_client)) is shown


def test_how_many_commands_without_a_message_and_how_many_mistakes():
    """A MAIL begins the count of the first anew; nothing does that of the second."""
    made = at_rest()
    for _ in range(2):
        assert all(made.count_idle() for _ in range(MOST_IDLE_COMMANDS - 1))
        assert made.want is None
        made.ask_slot(b"MAIL FROM:<>")
        made.state, made.want = State.READY, None
    assert all(made.count_idle() for _ in range(MOST_IDLE_COMMANDS - 1))
    assert not made.count_idle()
    assert made.want is Want.END
    made = at_rest()
    for _ in range(MOST_MISTAKES - 1):
        made.mistake(b"500 no\r\n")
    assert made.want is None
    made.mistake(b"500 no\r\n")
    assert made.want is Want.END


@pytest.mark.parametrize(
    ("state", "then"), [(State.DETACHED, State.HELD), (State.HELD, State.HELD), (State.HELLO, State.HELLO)]
)
def test_who_asks_for_a_connection_is_held_unless_it_has_only_said_its_name(state, then):
    made = changed(put(state=state))
    made.ask_line()
    assert (made.state, made.want) == (then, Want.LINE)


@pytest.mark.parametrize("again", [False, True])
def test_a_refusal_of_ours_is_told_to_the_judge_with_all_that_the_client_said(again):
    """Whether it was held before it was said, or after its connection was found dead."""
    told = []
    made = changed(put(state=State.HELD, pending=b"" if again else b"MAIL FROM:<>", fresh=again, begun=again))
    if again:
        made.group.begin(True)
        made.group.add(b"MAIL", b"MAIL FROM:<>\r\n")
        made.group.add(b"RCPT", b"RCPT TO:<a@b.example>\r\n")
    made.unread += b"DATA\r\n"
    made.tracker = FateTracker(told.append)
    made.refuse(b"451 later\r\n")
    assert told == [Fate("", ("b.example",) if again else (), int(again), 0, "451 later", False)]
    assert (made.state, made.fresh, made.pending, made.begun, made.refused) == (State.SWALLOW, False, b"", False, 1)
    assert [reply[:3] for reply in made.to_client] == [b"451", b"503"][: 1 + again]


# --- replies ---


@pytest.mark.parametrize(
    ("verb", "code", "state"),
    [
        (b"MAIL", 299, State.TRANSACTION),
        (b"NOOP", 300, State.RAW),  # what the client says next may be no command
        (b"NOOP", 399, State.RAW),
        (b"NOOP", 400, State.READY),
        (b"NOOP", 299, State.READY),
        (b"AUTH", 334, State.AUTH),
        (b"AUTH", 335, State.RAW),
        (b"AUTH", 235, State.READY),
        (b"NOOP", 421, State.OVER),
        (b"NOOP", 420, State.READY),
        (b"NOOP", 422, State.READY),
    ],
)
def test_what_a_reply_makes_of_the_dialogue(verb, code, state):
    made = changed()
    made.send(verb + b" x", verb)
    made.receiver(b"%d x\r\n" % code)
    assert made.state is state
    assert made.death is (Discard.SAID_421 if code == 421 else None)


@pytest.mark.parametrize(("code", "is_open"), [(250, True), (450, False), (400, False)])
def test_a_mail_is_open_when_it_was_accepted(code, is_open):
    made = changed()
    made.send(b"MAIL FROM:<>", b"MAIL")
    made.receiver(b"%d x\r\n" % code)
    assert made.open is is_open


def test_a_receiver_that_has_had_its_say_may_close_behind_our_back():
    made = changed()
    made.send(b"NOOP", b"NOOP")
    assert not made.old
    made.receiver(b"250 ok\r\n")
    assert made.old

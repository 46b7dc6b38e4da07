"""What domains mean: the questions of one look-up, what answers mean, when to ask again. No DNS here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.directory import LONGEST, MOST_ADDRESSES, MOST_HOSTS, SHORTEST, Answer, Book, Host, Reply, look_up


def conduct(domain, says):
    """The answer to `domain` where `says` is question → reply (else: nothing of the kind), and what was asked."""
    course, asked, reply = look_up(domain), [], None
    while True:
        try:
            question = next(course) if reply is None else course.send(reply)
        except StopIteration as end:
            return end.value, asked
        asked.append(tuple(question))
        reply = says.get(tuple(question), Reply())


def good(*addresses, ttl=300.0, host="mx.example"):
    return Answer((Host(host, addresses),), ttl)


FAILED = Answer(None, 0.0, "MX of a.example: SERVFAIL")


@pytest.fixture
def book():
    book = Book()
    book.want(["a.example"], 0.0)
    assert book.next(0.0) == "a.example"
    return book


# --- one look-up ---


def test_mx_then_both_kinds_of_address_of_each_host():
    answer, asked = conduct(
        "a.example",
        {
            ("a.example", "MX"): Reply(("mx1.example", "mx2.example"), 600.0),
            ("mx1.example", "A"): Reply(("192.0.2.1",), 200.0),
            ("mx2.example", "AAAA"): Reply(("2001:db8::1",), 100.0),
        },
    )
    assert [kind for _, kind in asked] == ["MX", "A", "AAAA", "A", "AAAA"]
    assert answer == Answer((Host("mx1.example", ("192.0.2.1",)), Host("mx2.example", ("2001:db8::1",))), 100.0)


def test_without_mx_the_domain_is_its_own_host():
    answer, _ = conduct("a.example", {("a.example", "A"): Reply(("192.0.2.1",))})
    assert answer.hosts == (Host("a.example", ("192.0.2.1",)),)


def test_a_null_mx_means_no_host():
    answer, asked = conduct("a.example", {("a.example", "MX"): Reply(("",), 60.0)})
    assert answer == Answer((), 60.0)
    assert asked == [("a.example", "MX")]


def test_without_an_answer_for_mx_nothing_more_is_asked():
    answer, asked = conduct("a.example", {("a.example", "MX"): Reply(failure="NXDOMAIN")})
    assert (answer.hosts, answer.doubt, len(asked)) == (None, "NXDOMAIN", 1)


def test_a_host_that_cannot_be_had_is_told_apart_from_one_without_addresses():
    says = {("a.example", "MX"): Reply(("x.example", "y.example")), ("x.example", "AAAA"): Reply(failure="no")}
    answer, _ = conduct("a.example", says)
    assert answer.hosts == (Host("x.example", None), Host("y.example", ()))
    assert answer.doubt == "no"


def test_bounds():
    hosts = tuple(f"mx{n}.example" for n in range(MOST_HOSTS + 1))
    many = tuple(f"192.0.2.{n}" for n in range(MOST_ADDRESSES + 5))
    answer, asked = conduct("a.example", {("a.example", "MX"): Reply(hosts), ("mx3.example", "A"): Reply(many)})
    assert (len(answer.hosts), len(asked)) == (MOST_HOSTS, 1 + 2 * MOST_HOSTS)
    assert len(answer.hosts[3].addresses) == MOST_ADDRESSES
    assert "31 MX hosts, 30 count" in answer.doubt


# --- the book ---


def test_whose_an_address_is(book):
    assert book.learn("a.example", good("192.0.2.1", "192.0.2.2"), 0.0)
    assert (book.hosts("192.0.2.2"), book.domains("192.0.2.2")) == (("mx.example",), ("a.example",))
    assert (book.hosts("192.0.2.3"), book.domains("192.0.2.3")) == ((), ())


@pytest.mark.parametrize(("ttl", "pause"), [(0.0, SHORTEST), (5.0, SHORTEST), (300.0, 300.0), (1e6, LONGEST)])
def test_an_answer_is_renewed_at_its_ttl_within_bounds(book, ttl, pause):
    book.learn("a.example", good("192.0.2.1", ttl=ttl), 100.0)
    assert book.idle(100.0) == pause
    assert book.next(100.0 + pause - 0.1) is None
    assert book.next(100.0 + pause) == "a.example"
    assert book.next(1e9) is None, "it is being asked"


def test_a_failure_keeps_the_last_good_answer_and_is_retried_ever_later(book):
    book.learn("a.example", good("192.0.2.1"), 0.0)
    now, pauses = 300.0, []
    for _ in range(7):
        assert book.next(now) == "a.example"
        assert not book.learn("a.example", FAILED, now)
        pauses.append(book.idle(now))
        now += pauses[-1]
    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    assert book.domains("192.0.2.1") == ("a.example",)
    assert book.entries["a.example"].doubt == FAILED.doubt
    assert book.next(now) == "a.example"
    book.learn("a.example", good("192.0.2.1"), now)
    assert (book.entries["a.example"].doubt, book.idle(now)) == ("", 300.0)


def test_of_one_host_that_fails_the_last_addresses_are_kept(book):
    book.learn("a.example", Answer((Host("x", ("192.0.2.1",)), Host("y", ("192.0.2.2",))), 300.0), 0.0)
    assert book.learn("a.example", Answer((Host("x", None), Host("y", ("192.0.2.3",))), 300.0, "A of x: SERVFAIL"), 1.0)
    assert book.entries["a.example"].known == {"x": ("192.0.2.1",), "y": ("192.0.2.3",)}


def test_the_same_in_another_order_is_no_change(book):
    assert book.learn("a.example", good("192.0.2.1", "192.0.2.2"), 0.0)
    assert not book.learn("a.example", good("192.0.2.2", "192.0.2.1"), 1.0)


def test_who_is_wanted_no_more_is_forgotten(book):
    book.learn("a.example", good("192.0.2.1"), 0.0)
    assert book.want(["b.example"], 1.0)
    assert book.domains("192.0.2.1") == book.hosts("192.0.2.1") == ()
    assert not book.learn("a.example", good("192.0.2.1"), 2.0), "an answer that comes too late"
    assert book.next(300.0) == "b.example"
    assert book.next(1e9) is None


ANSWERS = st.dictionaries(st.sampled_from("xyz"), st.lists(st.sampled_from("1234"), max_size=3).map(tuple), max_size=3)


@given(st.lists(st.tuples(st.sampled_from("abc"), ANSWERS), max_size=12), st.sets(st.sampled_from("abc")))
def test_the_tables_say_what_the_entries_say(answers, kept):
    book = Book()
    book.want("abc", 0.0)
    for domain, hosts in answers:
        book.learn(domain, Answer(tuple(Host(*item) for item in hosts.items()), 60.0), 0.0)
    book.want(kept, 1.0)
    for address in "1234":
        naming = [
            (entry.domain, host)
            for entry in book.entries.values()
            for host, addresses in entry.known.items()
            if address in addresses
        ]
        assert set(book.domains(address)) == {domain for domain, _ in naming}
        assert book.hosts(address) == tuple(sorted({host for _, host in naming}))


def test_a_doubt_that_is_known_stays_and_exactly_enough_is_none():
    """The first host fails, and the second has too many addresses: the failure is what is told last of its own host."""
    many = tuple(f"192.0.2.{n}" for n in range(MOST_ADDRESSES))
    says = {("a.example", "MX"): Reply(("mx1.example",)), ("mx1.example", "A"): Reply(many)}
    assert conduct("a.example", says)[0].doubt == ""
    says["mx1.example", "AAAA"] = Reply(("2001:db8::1",))
    answer, _ = conduct("a.example", says)
    assert answer.doubt == f"mx1.example has {MOST_ADDRESSES + 1} addresses, {MOST_ADDRESSES} count"
    assert answer.hosts == (Host("mx1.example", many),)
    hosts = tuple(f"mx{n}.example" for n in range(MOST_HOSTS))
    assert conduct("a.example", {("a.example", "MX"): Reply(hosts)})[0].doubt == ""
    failing = {("a.example", "A"): Reply((), 60.0, "A: SERVFAIL"), ("a.example", "AAAA"): Reply(("2001:db8::1",))}
    answer, _ = conduct("a.example", failing)
    assert (answer.doubt, answer.hosts) == ("A: SERVFAIL", (Host("a.example", None),))


def test_too_many_hosts_are_told_before_too_many_addresses():
    hosts = tuple(f"mx{n}.example" for n in range(MOST_HOSTS + 1))
    many = tuple(f"192.0.2.{n}" for n in range(MOST_ADDRESSES + 1))
    answer, _ = conduct("a.example", {("a.example", "MX"): Reply(hosts), ("mx0.example", "A"): Reply(many)})
    assert answer.doubt == f"has {MOST_HOSTS + 1} MX hosts, {MOST_HOSTS} count"


def test_which_domains_nothing_was_heard_of(book):
    assert book.unheard == {"a.example"}
    book.learn("a.example", FAILED, 0.0)
    assert book.unheard == set()
    assert not book.entries["a.example"].answered
    book.learn("a.example", good("192.0.2.1"), 0.0)
    assert book.entries["a.example"].answered
    book.want(["a.example", "b.example"], 0.0)
    assert book.unheard == {"b.example"}
    assert book.want([], 0.0)
    assert book.unheard == set()
    assert not book.want([], 0.0)


def test_nothing_is_left_of_addresses_that_nobody_has(book):
    book.want(["a.example", "b.example"], 0.0)
    book.learn("a.example", good("192.0.2.1"), 0.0)
    book.learn("b.example", good("192.0.2.1"), 0.0)
    assert book.domains("192.0.2.1") == ("a.example", "b.example")
    assert book.hosts_of("192.0.2.1", ["b.example", "c.example"]) == ("mx.example",)
    assert book.hosts_of("192.0.2.2", ["b.example"]) == ()
    book.want(["b.example"], 0.0)
    assert (book.domains("192.0.2.1"), book.hosts("192.0.2.1")) == (("b.example",), ("mx.example",))
    book.want([], 0.0)
    assert (book._domains, book._hosts) == ({}, {})


def test_another_server_is_asked_for_all_and_for_none_twice(book):
    book.learn("a.example", good("192.0.2.1"), 0.0)
    assert (book.idle(0.0), book.idle(300.5)) == (300.0, 0.0)
    book.renew(5.0)
    assert book.next(4.0) is None
    book.renew(5.0)
    assert book.next(5.0) == "a.example"
    assert book.next(10**6) is None, "it is not given again before its answer has come"


def test_one_host_without_an_answer_is_a_failure_of_the_look_up(book):
    half = Answer((Host("mx1.example", ("192.0.2.1",)), Host("mx2.example", None)), 3000.0, "SERVFAIL")
    book.learn("a.example", half, 0.0)
    assert (book.entries["a.example"].failures, book.hosts("192.0.2.1")) == (1, ("mx1.example",))
    first = book.idle(0.0)
    assert book.next(first) == "a.example"
    book.learn("a.example", half, 0.0)
    assert (book.entries["a.example"].failures, book.idle(0.0)) == (2, 2 * first)

"""Three MTAs that send under throttles which they share: what each gets, by the receiver's count."""

from __future__ import annotations

import time

import pytest

from greenarrow_proxy_client import Limits
from tests.e2e.throttling.senders import Sender, more, sending
from tests.mx import Mx, usual
from tests.mx import Session as Connection
from tests.program import Proxy
from tests.unit.throttling.oracle import Rule
from tests.waiting import wait_for
from tests.witness import Witness, now

PLAIN = "listen_tls no\n"
#: Seconds of the limit that are counted.
SECONDS = 3

ADDRESS, RULE = Limits("address", [(30, 1)]), Limits("rule", [(20, 1)])
FIRST, SECOND_RULE = Limits("r1", [(40, 1)]), Limits("r2", [(40, 1)])
#: Whose messages pass which throttles, and what all together send in a second.
CROSSING = {
    "a-rule-below-an-address": ({"a": (RULE, ADDRESS), "b": (ADDRESS,), "z": (RULE, ADDRESS)}, 30),
    "under-two-rules": ({"a": (FIRST,), "b": (SECOND_RULE,), "z": (FIRST, SECOND_RULE)}, 60),
}


@pytest.mark.parametrize("topology", CROSSING)
def test_nobody_starves_where_paths_share_throttles(topology: str) -> None:
    """Each gets half of the least of its fair shares, as is told; under all of its throttles no window has too much."""
    members, rate = CROSSING[topology]
    witness = Witness()
    with Mx(witness.script) as mx, Proxy(PLAIN) as proxy:
        senders = [Sender(proxy.native, mx, name, *limits) for name, limits in members.items()]
        with sending(witness, *senders):
            begin = now()
            more(witness, SECONDS * rate, begin)
            counts = witness.counts(begin)
        for limit in {limit.name: limit for limits in members.values() for limit in limits}.values():
            under = [sender for sender in senders if limit in sender.path.limits]
            amount, seconds = limit.rates[0]
            rule = Rule(amount, seconds, latest=max(sender.slack for sender in under))
            witness.check(rule, *(sender.instance for sender in under))
    shares = {
        name: min(limit.rates[0][0] / sum(limit in each for each in members.values()) for limit in limits)
        for name, limits in members.items()
    }
    assert all(counts[name] >= SECONDS * share / 2 for name, share in shares.items()), (counts, shares)


def two_places(name: str) -> Limits:
    return Limits(name, max_connections=2)


def test_who_needs_two_places_does_not_starve() -> None:
    """Each of a and b would keep the two places of its rule busy, and z is under both."""
    witness = Witness()
    members = {"a": ("rule-a",), "b": ("rule-b",), "z": ("rule-a", "rule-b")}
    with Mx(witness.script) as mx, Proxy(PLAIN) as proxy:
        senders = [
            Sender(proxy.native, mx, name, *map(two_places, rules), threads=4, each=1)
            for name, rules in members.items()
        ]
        with sending(witness, *senders):
            begin = now()
            more(witness, 300, begin)
            counts = witness.counts(begin)
    assert counts["z"] >= 300 / 3 / 3, "a third of what is fair, as is told"
    assert witness.most <= 4


def linger(session: Connection, reply: bytes) -> None:
    """A receiver whose end is 20 ms behind its answer to QUIT; until then it counts the connection."""
    usual(session, reply)
    time.sleep(0.02)


def test_few_places_are_shared_by_weight() -> None:
    """Six at 2:1:1 are 3, 1.5 and 1.5. Comparing what each has, and not what it would have, gave 2.4, 2.0 and 1.6."""
    witness = Witness(quit=linger)
    with Mx(witness.script) as mx, Proxy(PLAIN + "instance a {\n    weight 2\n}\n") as proxy:
        limit = Limits("few", max_connections=6)
        senders = [Sender(proxy.native, mx, name, limit, threads=7, each=1) for name in "abc"]
        with sending(witness, *senders):
            begin = now()
            more(witness, 300, begin)
            counts = witness.counts(begin)
    assert counts["a"] >= 300 * 2.7 / 6, counts
    assert min(counts["b"], counts["c"]) >= 300 * 1.2 / 6, counts


@pytest.mark.parametrize("places", [1, 3])
def test_a_receiver_that_closes_late_counts_no_more_connections_than_there_are_places(places: int) -> None:
    witness = Witness(quit=linger)
    with Mx(witness.script) as mx, Proxy(PLAIN) as proxy:
        limit = Limits("few", max_connections=places)
        senders = [Sender(proxy.native, mx, name, limit, threads=4, each=1) for name in "abc"]
        with sending(witness, *senders):
            more(witness, 60, now())
    assert witness.most == places


def test_what_an_instance_with_hanging_senders_cannot_use_the_others_get() -> None:
    """It has mail without end and nobody who sends it, so its permits lapse: of three, the other two get 95 %."""
    rate = 60
    witness = Witness()
    limit = Limits("rule", [(rate, 1)])
    with Mx(witness.script) as mx, Proxy(PLAIN) as proxy:
        a, b, hanging = (Sender(proxy.native, mx, name, limit, threads=2 * (name != "c")) for name in "abc")
        with hanging, sending(witness, a, b):
            hanging.path.backlog(ram=100_000)
            wait_for(lambda: hanging.path._lease.voided > rate / 6, what="it lets permits lapse")
            begin = now()
            wait_for(lambda: witness.busiest(2, begin) >= 0.95 * 2 * rate, 60)
            hanging.path.backlog()
        witness.check(Rule(rate, 1, latest=a.slack))

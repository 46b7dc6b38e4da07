"""Where TLSA records come from: RFC 7672 section 2.2, as a table of what DNS says. No DNS here."""

import pytest

from proxy.policy.certificates import Tlsa
from proxy.policy.dane import MOST_RECORDS, look_up
from proxy.policy.directory import Reply

HOST = "mx.example.net"
AT = "_25._tcp.mx.example.net"
DIGEST = "ab" * 32
RECORD = Tlsa(3, 1, 1, bytes.fromhex(DIGEST))
ADDRESS = Reply(("192.0.2.1",), 300.0, secure=True)
RECORDS = Reply((f"3 1 1 {DIGEST}",), 60.0, secure=True)
NOTHING = Reply((), 30.0, secure=True)
UNKNOWN = Reply(failure="NXDOMAIN", nxdomain=True)
FAILED = Reply(failure="SERVFAIL")


def conduct(says, host=HOST, port=25):
    """What is found where `says` is (name, kind) → reply; a question that it does not expect is an error."""
    course, asked = look_up(host, port), []
    try:
        question = next(course)
        while True:
            asked.append(tuple(question))
            question = course.send(says[tuple(question)])
    except StopIteration as end:
        return end.value, asked


def test_records_under_the_host_and_port_when_all_is_signed():
    found, asked = conduct({(HOST, "A"): ADDRESS, (AT, "TLSA"): RECORDS})
    assert found == ((RECORD,), HOST, 60.0, "", "")
    assert asked == [(HOST, "A"), (AT, "TLSA")]
    found, _ = conduct({(HOST, "A"): ADDRESS, ("_2525._tcp." + HOST, "TLSA"): RECORDS}, port=2525)
    assert found.records == (RECORD,)


def test_a_host_of_an_unsigned_zone_is_not_asked_for_tlsa():
    """Section 2.1.1: servers of unsigned zones fail at kinds that they do not know, and no mail would go there."""
    found, asked = conduct({(HOST, "A"): ADDRESS._replace(secure=False)})
    assert (found.records, found.failure) == ((), "")
    assert "not signed" in found.why
    assert asked == [(HOST, "A")]


def test_a_host_that_has_ipv6_only():
    found, _ = conduct({(HOST, "A"): NOTHING, (HOST, "AAAA"): ADDRESS, (AT, "TLSA"): RECORDS})
    assert found.records == (RECORD,)


@pytest.mark.parametrize("nothing", [NOTHING, UNKNOWN])
def test_no_address_no_records(nothing):
    found, _ = conduct({(HOST, "A"): nothing, (HOST, "AAAA"): nothing})
    assert (found.records, found.failure) == ((), "")
    assert "unknown" in found.why


@pytest.mark.parametrize("nothing", [NOTHING, UNKNOWN, RECORDS._replace(secure=False)])
def test_none_or_unsigned_ones_are_none(nothing):
    found, _ = conduct({(HOST, "A"): ADDRESS, (AT, "TLSA"): nothing})
    assert (found.records, found.failure) == ((), "")
    assert "no signed TLSA" in found.why


@pytest.mark.parametrize(
    "says",
    [
        {(HOST, "A"): FAILED},
        {(HOST, "A"): NOTHING, (HOST, "AAAA"): FAILED},
        {(HOST, "A"): ADDRESS, (AT, "TLSA"): FAILED},
    ],
)
def test_what_cannot_be_had_is_a_failure_and_not_the_absence_of_records(says):
    found, _ = conduct(says)
    assert (found.records, found.failure) == ((), "SERVFAIL")


def test_an_alias_is_looked_up_under_its_real_name_first():
    """Section 2.2.2."""
    real = Reply(("192.0.2.1",), 300.0, secure=True, name="host.example.org")
    found, _ = conduct({(HOST, "A"): real, ("_25._tcp.host.example.org", "TLSA"): RECORDS})
    assert (found.records, found.base) == ((RECORD,), "host.example.org")
    found, _ = conduct({(HOST, "A"): real, ("_25._tcp.host.example.org", "TLSA"): NOTHING, (AT, "TLSA"): RECORDS})
    assert (found.records, found.base, found.ttl) == ((RECORD,), HOST, 30.0)
    found, _ = conduct({(HOST, "A"): real, ("_25._tcp.host.example.org", "TLSA"): FAILED})
    assert (found.records, found.failure) == ((), "SERVFAIL")


def test_records_are_bounded_and_unreadable_ones_left_out():
    texts = ["x", *(f"3 1 1 {number:064x}" for number in range(MOST_RECORDS + 5))]
    found, _ = conduct({(HOST, "A"): ADDRESS, (AT, "TLSA"): Reply(tuple(texts), secure=True)})
    assert len(found.records) == MOST_RECORDS

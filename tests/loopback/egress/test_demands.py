"""What a client wishes, joined with what blocks say: a table; TLSA records come from here instead of DNS."""

from __future__ import annotations

import pytest

from proxy.egress.demands import Demands
from proxy.egress.receiver import Wish
from proxy.errors import UpstreamError
from proxy.model import Endpoint, Names, TlsMode
from proxy.policy.certificates import Demand, Tlsa
from proxy.policy.dane import Found
from proxy.policy.tls_rules import TlsRules
from proxy.settings import TlsSettings

MX = Endpoint("198.51.100.7", 25)
HOST = "mx.example.net"
RECORD = Tlsa(3, 1, 1, b"x" * 32)
NONE, WELCOME, REQUIRED, IMPLICIT = TlsMode.NONE, TlsMode.OPPORTUNISTIC, TlsMode.REQUIRED, TlsMode.IMPLICIT


def join(wish: Wish, level: str | None, said: bool = False, mx: str = HOST, found: Found | None = None, **more) -> Wish:  # type: ignore[no-untyped-def]
    rules = TlsRules([TlsSettings(name="t", level=level, **more)])  # type: ignore[arg-type]
    records = found or Found()
    demands = Demands(rules, lambda *_: records, lambda domains, seconds: None, lambda source: None)
    return demands.join(wish, "", "192.0.2.1", MX, 5.0, Names(mx), said)


@pytest.mark.parametrize(
    ("level", "of_none", "of_welcome", "of_required"),
    [
        (None, NONE, WELCOME, REQUIRED),
        ("none", NONE, NONE, NONE),
        ("opportunistic", WELCOME, WELCOME, WELCOME),
        ("required", REQUIRED, REQUIRED, REQUIRED),
        ("verify", REQUIRED, REQUIRED, REQUIRED),
        ("dane", WELCOME, WELCOME, WELCOME),
    ],
)
def test_in_mode_smtp_the_block_goes_before_smtp_tls(level, of_none, of_welcome, of_required):
    assert [join(Wish("x", mode), level).tls for mode in (NONE, WELCOME, REQUIRED)] == [
        of_none,
        of_welcome,
        of_required,
    ]


@pytest.mark.parametrize(
    ("level", "of_welcome"),
    [(None, WELCOME), ("none", NONE), ("opportunistic", WELCOME), ("required", REQUIRED), ("verify", REQUIRED)],
)
def test_a_client_s_own_word_is_only_raised(level, of_welcome):
    got = [join(Wish("x", mode), level, said=True).tls for mode in (NONE, WELCOME, REQUIRED, IMPLICIT)]
    assert got == [NONE, of_welcome, REQUIRED, IMPLICIT]


@pytest.mark.parametrize(
    "wish",
    [
        Wish("x", WELCOME, demand=Demand(("a.example",), authority=True)),
        Wish("x", WELCOME, demand=Demand(tlsa=(RECORD,))),
        Wish("x", WELCOME, minimum="TLSv1.3"),
        Wish("x", WELCOME, ciphers="HIGH"),
        Wish(None, NONE),
    ],
)
def test_who_demands_something_itself_is_left_alone(wish):
    assert join(wish, "verify", said=True, names=("b.example",)) == wish


def test_whose_name_is_compared():
    def compared(server_name="", **more):
        return join(Wish("x", WELCOME, server_name), "verify", **more).demand

    assert compared(names=("*.b.example",)) == Demand(("*.b.example",), authority=True)
    assert compared() == Demand((HOST,), authority=True)
    assert compared("sni.example") == Demand(("sni.example",), authority=True)
    assert compared(mx="") == Demand((MX.host,), authority=True), "something has to be compared"


def test_what_was_demanded_is_in_the_key_of_a_shared_connection():
    words = [
        join(Wish("x", REQUIRED), "required").proof,
        join(Wish("x", REQUIRED), "verify").proof,
        join(Wish("x", REQUIRED), "verify", names=("b.example",)).proof,
        join(Wish("x", REQUIRED), "required", min="TLSv1.3").proof,
        join(Wish("x", REQUIRED), "required", ciphers="HIGH").proof,
        join(Wish("x", REQUIRED), "dane", found=Found((RECORD,), HOST)).proof,
    ]
    assert len(set(words)) == len(words)


def test_records_are_demanded_and_leave_no_way_back():
    wish = join(Wish("x", WELCOME), "dane", found=Found((RECORD,), "real.example.net"), names=("b.example",))
    assert (wish.tls, wish.tls_server_name) == (REQUIRED, "real.example.net")
    assert wish.demand == Demand(("b.example", "real.example.net", HOST), tlsa=(RECORD,))
    assert join(Wish("x", IMPLICIT), "dane", said=True, found=Found((RECORD,), HOST)).tls is IMPLICIT


def test_no_records_and_no_answer_are_two_things():
    none = Found(why="mx.example.net has no signed TLSA record")
    assert join(Wish("x", WELCOME), "dane", found=none) == Wish("x", WELCOME, HOST, Demand((HOST,)))
    for level, found, word in (
        ("dane", Found(failure="SERVFAIL"), "dnssec-invalid"),
        ("dane-only", Found(failure="SERVFAIL"), "dnssec-invalid"),
        ("dane-only", none, "dane-required"),
    ):
        with pytest.raises(UpstreamError) as caught:
            join(Wish("x", WELCOME), level, found=found)
        assert (caught.value.step, caught.value.tls_result) == ("tls", word)


def test_dane_of_a_receiver_whose_name_nobody_knows():
    assert join(Wish("x", WELCOME), "dane", mx="") == Wish("x", WELCOME)
    with pytest.raises(UpstreamError, match="not known which MX host"):
        join(Wish("x", WELCOME), "dane-only", mx="")

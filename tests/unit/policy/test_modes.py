"""Which mode holds for whom, and what follows from it."""

import pytest

from proxy.model import Endpoint, TlsMode
from proxy.policy.modes import Modes
from proxy.settings import ListenerSettings, SourceSettings
from tests.unit.feeding import instance, networks, settings

HERE, THERE = Endpoint("10.0.0.1", 1080), Endpoint("10.0.0.1", 808)
MX = Endpoint("192.0.2.25", 25)


def modes(**changes):
    return Modes(settings(**changes))


@pytest.mark.parametrize("everywhere", ["tcp", "smtp"])
@pytest.mark.parametrize("listener", [None, "tcp", "smtp"])
@pytest.mark.parametrize("block", [None, "tcp", "smtp"])
def test_the_most_particular_word_wins(everywhere, listener, block):
    rules = modes(
        mode=everywhere,
        listener=(ListenerSettings(name=str(HERE), mode=listener),),
        instance=(instance("kumo", mode=block),),
    )
    assert rules.is_smtp("kumo", HERE, MX) == ((block or listener or everywhere) == "smtp")
    assert rules.is_smtp("other", HERE, MX) == ((listener or everywhere) == "smtp")
    assert rules.is_smtp("", THERE, MX) == (everywhere == "smtp")
    assert rules.any_smtp == ("smtp" in (everywhere, listener, block))


def test_implicit_tls_hides_the_dialogue():
    assert not modes(mode="smtp").is_smtp("", HERE, Endpoint("192.0.2.25", 465))


def test_terms_are_the_instances_else_the_global_ones():
    rules = modes(
        mode_smtp_starttls=True,
        instance=(instance("a", smtp_tls="required", share_with="pool"), instance("b")),
        source=(SourceSettings(name="v", ip=networks("192.0.2.1", "2001:db8::1"), ehlo="mail.example.com"),),
    )
    a = rules.terms("a", "10.0.0.9", "192.0.2.1", MX)
    assert (a.ehlo_name, a.tls, a.group, a.offer_starttls, a.show_auth) == (
        *("mail.example.com", TlsMode.REQUIRED, ":pool", True, False),
    )
    assert rules.terms("b", "10.0.0.9", "2001:db8::1", MX).ehlo_name == "mail.example.com"
    assert rules.terms("b", "10.0.0.9", "192.0.2.2", MX)[3:5] == (None, TlsMode.OPPORTUNISTIC)


def test_who_is_in_no_group_shares_with_itself_alone():
    rules = modes(instance=(instance("a", share_with="x"), instance("b", share_with="x"), instance("c")))
    groups = {name: rules.terms(name, "10.0.0.9", "192.0.2.1", MX).group for name in ("a", "b", "c", "x", "")}
    assert groups["a"] == groups["b"] == rules.group("a")
    assert len(set(groups.values())) == 4
    assert rules.terms("", "10.0.0.8", "192.0.2.1", MX).group != groups[""], "without a name it is the address"
    assert rules.group("c") == "", "native channels of such instances share with each other"

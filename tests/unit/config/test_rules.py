"""Rules between directives: which listeners collide, and that looking for it costs no more than there are of them."""

import dataclasses
from itertools import product

import pytest

from proxy.config import rules
from proxy.model import Endpoint
from tests.unit.feeding import instance, settings

HOSTS = ["0.0.0.0", "127.0.0.1", "127.0.0.2", "::", "::1"]


def collisions(*endpoints):
    """The listeners that are told to be taken."""
    found = rules.broken(settings(listen_proxy_protocol=endpoints), {"listen_proxy_protocol", "allow_from"})
    return [value for directive, value, message in found if "is taken by" in message]


def would_fail(one, other):
    """Whether Linux refuses to listen on both; two of port 0 are told apart by their addresses only."""
    if one == other:
        return True
    if one.port != other.port or one.port == 0 or one.is_ipv6 != other.is_ipv6:
        return False
    return one.host == other.host or one.host in ("0.0.0.0", "::") or other.host in ("0.0.0.0", "::")


@pytest.mark.parametrize("one", [Endpoint(*pair) for pair in product(HOSTS, (0, 25, 26))])
@pytest.mark.parametrize("other", [Endpoint(*pair) for pair in product(HOSTS, (0, 25, 26))])
def test_two_listeners_collide_where_the_kernel_says_so(one, other):
    assert collisions(one, other) == [other] * would_fail(one, other)


def test_the_message_names_the_earlier_one():
    wanted = settings(listen=(Endpoint("127.0.0.1", 25),), listen_status=Endpoint("0.0.0.0", 25))
    assert [finding for finding in rules.broken(wanted, {"listen", "allow_from"}) if "taken" in finding[2]] == [
        (
            "listen_status",
            Endpoint("0.0.0.0", 25),
            "0.0.0.0:25 is taken by listen 127.0.0.1:25: every listener needs its own port",
        )
    ]


class Counted(Endpoint):
    """An endpoint that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other):
        Counted.comparisons += 1
        return tuple.__eq__(self, other)

    def __hash__(self):
        Counted.comparisons += 1
        return tuple.__hash__(self)


@pytest.mark.parametrize("address", [lambda n: ("127.0.0.1", 1 + n), lambda n: (f"127.{n >> 8}.{n & 255}.1", 25)])
def test_the_work_grows_with_the_number_of_listeners_and_not_with_its_square(address):
    counts = []
    for number in (500, 1000):
        Counted.comparisons = 0
        assert collisions(*(Counted(*address(n)) for n in range(number))) == []
        counts.append(Counted.comparisons)
    assert counts[1] <= 2.1 * counts[0]
    assert counts[0] <= 4 * 500


@pytest.mark.parametrize("secret", sorted(rules.PUBLISHED_SECRETS))
def test_the_secrets_of_the_documents_are_refused_wherever_they_stand(secret):
    """Whoever read the documents could send mail from here."""
    base = settings(auth_shared_secret=(b"drawn-at-random-by-the-operator-1", secret))
    (found,) = [f for f in rules.broken(base, {"listen", "allow_from"}) if "everybody knows" in f[2]]
    assert found[:2] == ("auth_shared_secret", secret)
    block = dataclasses.replace(instance("a"), auth_shared_secret=(secret,))
    (found,) = [
        f for f in rules.broken(settings(auth_shared_secret=(), instance=(block,)), set()) if "everybody knows" in f[2]
    ]
    assert found[:2] == ("instance", "a")
    assert secret.decode() not in found[2]
    agent = settings(auth_shared_secret=(), via_secret=secret)
    (found,) = [f for f in rules.broken(agent, set()) if "everybody knows" in f[2]]
    assert found[:2] == ("via_secret", None)

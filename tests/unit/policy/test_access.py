"""The rules of access: who may connect, log in, leave from where, go where. Tables follow the documented directives."""

from __future__ import annotations

import gc
from hashlib import sha256
from ipaddress import IPv4Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadCredentials, DestinationNotAllowed, FamilyMismatch, ProxyError, SourceNotAllowed
from proxy.model import Endpoint
from proxy.policy.access import Access, place_within
from proxy.settings import ListenerSettings
from tests.unit.feeding import alive, instance, networks, settings

GLOBAL = b"g" * 32
ROTATED = b"r" * 32
OWN = b"o" * 32


def access(own: frozenset[str] = frozenset(), **changes: object) -> Access:
    return Access(settings(**changes), own)


def allows(check: object, *arguments: object) -> bool:
    """Whether a check passes, asked twice: what is remembered must be what was found."""

    def once() -> bool:
        try:
            check(*arguments)  # type: ignore[operator]
        except ProxyError:
            return False
        return True

    first, second = once(), once()
    assert first == second
    return first


def reaches(rules: Access, host: str, port: int = 25) -> bool:
    return allows(rules.check_route, "", None, Endpoint(host, port))


# --- who may connect


@pytest.mark.parametrize(
    ("door", "inside", "outside"),
    [
        ("native", "10.1.1.1", "192.0.2.1"),
        ("socks5", "10.1.1.1", "192.0.2.1"),
        ("proxy_protocol", "10.2.0.1", "10.1.1.1"),
        ("status", "10.3.0.1", "10.2.0.1"),
        ("native", "2001:db8::1", "2001:db9::1"),
        ("native", "::ffff:10.1.1.1", "::ffff:192.0.2.1"),
        ("native", "127.0.0.255", "127.0.1.0"),
    ],
)
def test_each_door_has_its_list(door: str, inside: str, outside: str) -> None:
    rules = access(
        allow_from=networks("127.0.0.0/24", "10.0.0.0/8", "2001:db8::/32"),
        listen_proxy_protocol_allow_from=networks("10.2.0.0/16"),
        listen_status_allow_from=networks("10.3.0.0/16"),
    )
    assert rules.client_allowed(inside, door)  # type: ignore[arg-type]
    assert not rules.client_allowed(outside, door)  # type: ignore[arg-type]


def test_nobody_is_allowed_without_a_list() -> None:
    rules = access(allow_from=())
    assert not rules.client_allowed("127.0.0.1", "native")
    assert not rules.client_allowed("::1", "native")


# --- which instance an address is


@pytest.mark.parametrize(
    ("ip", "name"),
    [
        ("10.1.2.3", "host"),
        ("10.1.2.4", "rack"),
        ("10.9.9.9", "site"),
        ("192.0.2.1", ""),
        ("2001:db8::1", "six"),
        ("10.7.0.1", "first"),
    ],
)
def test_longest_prefix_names_the_instance(ip: str, name: str) -> None:
    rules = access(
        instance=(
            instance("site", allow_from=networks("10.0.0.0/8")),
            instance("nobody"),
            instance("host", allow_from=networks("172.16.0.1", "10.1.2.3")),
            instance("rack", allow_from=networks("10.1.2.0/24")),
            instance("six", allow_from=networks("2001:db8::/32")),
            instance("first", allow_from=networks("10.7.0.0/16")),
            instance("second", allow_from=networks("10.7.0.0/16")),
        )
    )
    assert rules.instance_of_address(ip) == name


# --- secrets


def digest(secret: bytes) -> bytes:
    return sha256(secret).digest()


NAMED = (
    instance("own", auth_shared_secret=(OWN,)),
    instance("plain"),
    instance("near", allow_from=networks("10.1.0.0/16")),
)


@pytest.mark.parametrize(
    ("name", "secret", "good"),
    [
        ("own", OWN, True),
        ("own", GLOBAL, False),
        ("own", ROTATED, False),
        ("plain", GLOBAL, True),
        ("plain", ROTATED, True),
        ("plain", OWN, False),
        ("unknown", GLOBAL, True),
        ("unknown", ROTATED, True),
        ("unknown", OWN, False),
        ("unknown", b"", False),
        ("unknown", GLOBAL[:-1], False),
        ("unknown", GLOBAL + b"\0", False),
        ("unknown", GLOBAL.upper(), False),
    ],
)
@pytest.mark.parametrize("socks5_auth", ["required", "none"])
def test_secret(name: str, secret: bytes, good: bool, socks5_auth: str) -> None:
    rules = access(auth_shared_secret=(GLOBAL, ROTATED), instance=NAMED, socks5_auth=socks5_auth)
    assert allows(rules.authenticate, name, digest(secret)) == good
    assert (secret in rules.secrets_of(name)) == good


def test_one_wording_for_every_failure() -> None:
    rules = access(auth_shared_secret=(GLOBAL,), instance=NAMED)
    words = set()
    for name, secret, client in (("own", GLOBAL, None), ("ghost", OWN, None), ("near", GLOBAL, "10.2.0.1")):
        with pytest.raises(BadCredentials) as caught:
            rules.authenticate(name, digest(secret), client)
        words.add(str(caught.value))
    assert len(words) == 1


def test_no_secret_configured() -> None:
    for secret in (b"", b"x"):
        assert not allows(access(auth_shared_secret=()).authenticate, "a", digest(secret))
        # Without a secret and a duty to log in, a name is taken as it is; an instance's own secret still counts.
        rules = access(auth_shared_secret=(), socks5_auth="none", instance=NAMED)
        assert allows(rules.authenticate, "a", digest(secret))
        assert not allows(rules.authenticate, "own", digest(secret))


def test_instance_comes_from_its_addresses_only() -> None:
    rules = access(auth_shared_secret=(GLOBAL,), instance=NAMED)
    assert allows(rules.authenticate, "near", digest(GLOBAL), "10.1.0.1")
    assert not allows(rules.authenticate, "near", digest(GLOBAL), "10.2.0.1")
    assert allows(rules.authenticate, "plain", digest(GLOBAL), "10.2.0.1")
    assert rules.instance_allowed("near", "10.1.0.1")
    assert not rules.instance_allowed("near", "10.2.0.1")
    assert rules.instance_allowed("unknown", "10.2.0.1")


# --- sources


@pytest.mark.parametrize(
    ("source_ip", "inside", "outside"),
    [
        # The default: any address but loopback, unspecified (and multicast, which nothing can leave from).
        (
            (),
            ["192.0.2.9", "10.0.0.1", "2001:db8::9", "fe80::1", "::ffff:192.0.2.9"],
            [
                "127.0.0.1",
                "127.9.9.9",
                "::1",
                "0.0.0.0",
                "::",
                "224.0.0.1",
                "ff02::1",
                "::ffff:127.0.0.1",
                "::ffff:0.0.0.0",
            ],
        ),
        (
            ("192.0.2.0/28", "2001:db8::/64"),
            ["192.0.2.0", "192.0.2.15", "2001:db8::ffff", "::ffff:192.0.2.9"],
            ["192.0.2.16", "2001:db8:0:1::", "127.0.0.1", "::1", "10.0.0.1"],
        ),
        (("127.0.0.5",), ["127.0.0.5"], ["127.0.0.1", "192.0.2.1", "::1"]),
        (("127.0.0.0/8", "::1"), ["127.0.0.5", "127.255.0.1", "::1"], ["192.0.2.1", "::2"]),
        # Loopback must be listed as such, and binding to 0.0.0.0 would leave the choice to the system: never.
        (("0.0.0.0/0", "::/0"), ["192.0.2.9", "2001:db8::9"], ["127.0.0.1", "::1", "0.0.0.0", "::", "239.1.1.1"]),
        (("0.0.0.0", "::"), [], ["0.0.0.0", "::"]),
    ],
)
def test_source(source_ip: tuple[str, ...], inside: list[str], outside: list[str]) -> None:
    rules = access(source_ip=networks(*source_ip))
    assert [ip for ip in inside if not allows(rules.check_source, "", ip)] == []
    assert [ip for ip in outside if allows(rules.check_source, "any", ip)] == []


def test_instance_narrows_the_sources() -> None:
    rules = access(
        source_ip=networks("192.0.2.0/24"),
        instance=(instance("a", source_ip=networks("192.0.2.9", "198.51.100.1")), instance("b")),
    )
    assert allows(rules.check_source, "a", "192.0.2.9")
    assert not allows(rules.check_source, "a", "192.0.2.10")
    assert not allows(rules.check_source, "a", "198.51.100.1"), "never wider than the global list"
    assert allows(rules.check_source, "b", "192.0.2.10")
    assert allows(rules.check_source, "unknown", "192.0.2.10")


def test_instance_lists_loopback_where_there_is_no_global_list() -> None:
    rules = access(instance=(instance("a", source_ip=networks("127.0.0.5")),))
    assert allows(rules.check_source, "a", "127.0.0.5")
    assert not allows(rules.check_source, "b", "127.0.0.5")


MX4, MX6 = Endpoint("198.51.100.7", 25), Endpoint("2001:db8:1::25", 25)


@pytest.mark.parametrize(
    ("default", "destination", "dialled", "source"),
    [
        ((), MX4, "192.0.2.1", None),
        (("192.0.2.9",), MX4, "192.0.2.1", "192.0.2.9"),
        (("192.0.2.9",), MX6, "192.0.2.1", None),
        (("192.0.2.9", "2001:db8::9"), MX6, "192.0.2.1", "2001:db8::9"),
        (("2001:db8::9", "192.0.2.9"), MX4, "2001:db8::1", "192.0.2.9"),
        (("same",), MX4, "192.0.2.1", "192.0.2.1"),
        (("same",), MX4, "::ffff:192.0.2.1", "192.0.2.1"),
        (("same",), MX6, "2001:db8::1", "2001:db8::1"),
        (("same",), MX6, "192.0.2.1", None),
    ],
)
def test_default_source(default: tuple[str, ...], destination: Endpoint, dialled: str, source: str | None) -> None:
    assert access(default_source_ip=default).default_source("", destination, dialled) == source


def test_a_listeners_own_default_goes_before_the_global_one_and_behind_an_instances() -> None:
    here, there = Endpoint("10.0.0.1", 1081), Endpoint("10.0.0.1", 1082)
    rules = access(
        default_source_ip=("192.0.2.1", "2001:db8::1"),
        listener=(
            ListenerSettings(name=str(here), mode=None, default_source_ip=("192.0.2.2",)),
            ListenerSettings(name="10.0.0.1:1083", mode="smtp"),
        ),
        instance=(instance("one", source_ip=networks("192.0.2.9")),),
    )
    assert [rules.default_source("", MX4, "", listener) for listener in (here, there, None)] == [
        *("192.0.2.2", "192.0.2.1", "192.0.2.1")
    ]
    assert rules.default_source("", MX6, "", here) == "2001:db8::1", "the family decides"
    assert rules.default_source("one", MX4, "", here) == "192.0.2.9"
    assert list(rules.listener_sources) == [str(here)]
    same = access(listener=(ListenerSettings(name=str(here), mode=None, default_source_ip=("same",)),))
    assert same.default_source("", MX4, "192.0.2.5", here) == "192.0.2.5"


def test_single_source_of_an_instance_is_its_default() -> None:
    rules = access(
        default_source_ip=("192.0.2.1", "2001:db8::1"),
        instance=(
            instance("one", source_ip=networks("192.0.2.9")),
            instance("two", source_ip=networks("192.0.2.9", "192.0.2.10", "2001:db8::9")),
            instance("range", source_ip=networks("192.0.2.8/31")),
        ),
    )
    found = {
        name: (rules.default_source(name, MX4, ""), rules.default_source(name, MX6, ""))
        for name in ("one", "two", "range", "x")
    }
    assert found == {
        "one": ("192.0.2.9", "2001:db8::1"),
        "two": ("192.0.2.1", "2001:db8::9"),
        "range": ("192.0.2.1", "2001:db8::1"),
        "x": ("192.0.2.1", "2001:db8::1"),
    }


# --- destinations


@pytest.mark.parametrize(
    ("port", "good"),
    [(25, True), (465, True), (587, True), (24, False), (26, False), (0, False), (80, False), (65535, False)],
)
def test_default_ports(port: int, good: bool) -> None:
    assert reaches(access(), "198.51.100.7", port) == good


@pytest.mark.parametrize(
    ("port", "good"), [(2499, False), (2500, True), (2550, True), (2599, True), (2600, False), (25, False)]
)
def test_port_range_is_inclusive(port: int, good: bool) -> None:
    assert reaches(access(destination_port=((2500, 2599),)), "198.51.100.7", port) == good


DENIED_V4 = [
    *("127.0.0.1", "127.255.255.255", "0.0.0.0", "169.254.169.254", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
    *("192.168.1.1", "100.64.0.1", "224.0.0.1", "239.255.255.255", "255.255.255.255"),
]
ALLOWED_V4 = ["198.51.100.7", "8.8.8.8", "172.32.0.1", "192.169.0.1", "100.128.0.1", "11.0.0.1", "126.255.255.255"]


def disguises(ip: str) -> list[str]:
    """The IPv6 addresses that lead to an IPv4 address: by RFC 4291, 6052, 8215, 2765, 5214, 4380 and 3056."""
    a, b, c, d = IPv4Address(ip).packed
    high, low = f"{a:02x}{b:02x}", f"{c:02x}{d:02x}"
    return [
        f"::ffff:{ip}",  # RFC 4291 section 2.5.5.2
        f"64:ff9b::{ip}",  # RFC 6052 section 2.1
        f"64:ff9b:1::{ip}",  # RFC 8215, a /96 out of its /48
        f"64:ff9b:1:{high}:{c:x}:{d:02x}00::",  # RFC 6052 section 2.2, prefix of 48 bits
        f"64:ff9b:1:{high}:{c:x}:{d:02x}00::1",  # … whose suffix is not zero, which translators ignore
        f"64:ff9b:1:00{a:02x}:{b:x}:{low}::",  # prefix of 56 bits
        f"64:ff9b:1:0:{a:x}:{b:02x}{c:02x}:{d:02x}00:0",  # prefix of 64 bits
        f"::ffff:0:{ip}",  # RFC 2765 section 2.1
        f"2001:db8::5efe:{ip}",  # RFC 5214 section 6.1, a private address
        f"2001:db8:1:2:200:5efe:{ip}",  # … a public one
        f"2001:0:{high}:{low}:8000:63bf:3fff:fdd2",  # RFC 4380 section 4, behind this server
        f"2001:0:4136:e378:8000:63bf:{a ^ 255:02x}{b ^ 255:02x}:{c ^ 255:02x}{d ^ 255:02x}",  # … this client
        f"2002:{high}:{low}::1",  # RFC 3056 section 2
    ]


@pytest.mark.parametrize("ip", DENIED_V4)
def test_denied_range_in_every_disguise(ip: str) -> None:
    rules = access()
    assert not reaches(rules, ip)
    # 0.0.0.0 inside of a local translator's prefix is only its zeros.
    hidden = [form for form in disguises(ip) if not (ip == "0.0.0.0" and form.startswith("64:ff9b:1:"))]
    assert [form for form in hidden if reaches(rules, form)] == []


@pytest.mark.parametrize("ip", ALLOWED_V4)
def test_allowed_address_in_its_usual_disguises(ip: str) -> None:
    rules = access()
    assert reaches(rules, ip)
    usual = [f"::ffff:{ip}", f"64:ff9b::{ip}", f"64:ff9b:1::{ip}", *disguises(ip)[-6:]]
    assert [form for form in usual if not reaches(rules, form)] == []


@pytest.mark.parametrize(
    "ip", ["::", "::1", "fe80::1", "febf::1", "fc00::1", "fdff::1", "ff02::1", "::127.0.0.1", "::10.0.0.1"]
)
def test_denied_ipv6(ip: str) -> None:
    assert not reaches(access(), ip)


@pytest.mark.parametrize(
    "ip",
    [
        "2001:db8::25",
        "2001:db8::5eff:7f00:1",
        "2001:db8::1:5efe:7f00:1",
        "::fffe:0:7f00:1",
        "2a00:1450::1",
        "64:ff9a::7f00:1",
        "64:ff9b:2::7f00:1",
        "2003:7f00:1::1",
        "64:ff9b:0:1::7f00:1",
    ],
)
def test_ipv6_that_only_looks_like_a_disguise(ip: str) -> None:
    assert reaches(access(), ip)


def test_exceptions_hold_for_what_they_name() -> None:
    rules = access(allow_destination=networks("10.0.0.25", "127.0.0.0/8"))
    assert reaches(rules, "10.0.0.25")
    assert reaches(rules, "::ffff:10.0.0.25")
    assert reaches(rules, "64:ff9b::10.0.0.25")
    assert not reaches(rules, "10.0.0.26")
    assert not reaches(rules, "64:ff9b::10.0.0.26")
    assert reaches(rules, "127.0.0.2")
    assert not reaches(rules, "::1")


def test_all_of_ipv6_allowed_does_not_allow_what_hides_in_it() -> None:
    rules = access(allow_destination=networks("::/0"))
    assert not reaches(rules, "fd00::1")  # the default names it more closely
    assert [form for form in disguises("10.0.0.1") if reaches(rules, form)] == []


def test_translator_named_as_such_is_allowed_whole() -> None:
    # With a prefix of 48 bits this reads as 10.0.0.0: refused, unless the operator names the translator's range.
    ambiguous = "64:ff9b:1:a00::8.8.8.8"
    assert not reaches(access(), ambiguous)
    assert not reaches(access(allow_destination=networks("64:ff9b::/32")), ambiguous)
    rules = access(allow_destination=networks("64:ff9b:1:a00::/96"))
    assert reaches(rules, ambiguous)
    assert reaches(rules, "64:ff9b:1:a00::10.0.0.1")
    assert not reaches(rules, "64:ff9b:1:a01::8.8.8.8")


def test_denied_beside_the_default() -> None:
    rules = access(deny_destination=networks("203.0.113.0/24", "2001:db8:bad::/48"))
    assert not reaches(rules, "203.0.113.5")
    assert not reaches(rules, "64:ff9b::203.0.113.5")
    assert not reaches(rules, "2001:db8:bad::1")
    assert reaches(rules, "203.0.114.5")


def test_of_denied_and_allowed_the_longer_prefix_decides() -> None:
    rules = access(allow_destination=networks("10.0.0.0/8"), deny_destination=networks("10.0.0.0/8", "10.9.0.0/16"))
    assert reaches(rules, "10.1.1.1")  # equal: the exception was meant
    assert not reaches(rules, "10.9.1.1")
    assert not reaches(rules, "64:ff9b::10.9.1.1")


def test_refusal_names_address_and_disguise() -> None:
    with pytest.raises(DestinationNotAllowed, match=r"^\[64:ff9b::a00:1\]:25 is in a denied range \(as 10\.0\.0\.1\)$"):
        access().check_route("", None, Endpoint("64:ff9b::a00:1", 25))


# --- this proxy itself

EVERYTHING = networks("0.0.0.0/8", "127.0.0.0/8", "::/128", "::1/128", "64:ff9b::/96", "2002::/16")
MACHINE = frozenset({"127.0.0.1", "::1", "192.0.2.1", "192.0.2.2", "2001:db8::1"})


def test_wildcard_listener_is_every_own_address() -> None:
    rules = access(MACHINE, listen=(Endpoint("0.0.0.0", 25),), allow_destination=EVERYTHING)
    own = [
        "192.0.2.1",
        "192.0.2.2",
        "127.0.0.1",
        "127.5.5.5",
        "0.0.0.0",
        "::",
        "::ffff:192.0.2.1",
        "64:ff9b::192.0.2.2",
        "2002:c000:201::1",
    ]
    assert [ip for ip in own if reaches(rules, ip)] == []
    assert [ip for ip in ("192.0.2.3", "2001:db8::1", "64:ff9b::192.0.2.3") if not reaches(rules, ip)] == []
    assert reaches(rules, "192.0.2.1", 587)


def test_ipv6_wildcard_listener() -> None:
    rules = access(MACHINE, listen_socks5=(Endpoint("::", 25),), allow_destination=EVERYTHING)
    assert [ip for ip in ("2001:db8::1", "::1", "::", "0.0.0.0", "192.0.2.1") if reaches(rules, ip)] == []
    assert reaches(rules, "2001:db8::2")


@pytest.mark.parametrize("directive", ["listen", "listen_socks5", "listen_proxy_protocol", "listen_redirect"])
def test_listener_on_one_address(directive: str) -> None:
    rules = access(MACHINE, **{directive: (Endpoint("192.0.2.1", 25),)}, allow_destination=EVERYTHING)
    assert not reaches(rules, "192.0.2.1")
    assert not reaches(rules, "::ffff:192.0.2.1")
    assert reaches(rules, "192.0.2.2")
    assert reaches(rules, "127.0.0.1")


def test_status_listener_and_inherited_ones() -> None:
    status = access(MACHINE, listen_status=Endpoint("127.0.0.1", 587), allow_destination=EVERYTHING)
    assert not reaches(status, "127.0.0.1", 587)
    inherited = Access(settings(allow_destination=EVERYTHING), MACHINE, [Endpoint("127.0.0.1", 25)])
    assert not reaches(inherited, "127.0.0.1")
    assert reaches(inherited, "127.0.0.2")


def test_addresses_of_the_machine_may_change() -> None:
    now = {"192.0.2.1"}
    rules = Access(settings(listen=(Endpoint("0.0.0.0", 25),)), now)
    assert reaches(rules, "198.51.100.1")
    now.add("198.51.100.1")
    assert not reaches(rules, "198.51.100.1")


# --- the whole route


def test_route() -> None:
    rules = access(source_ip=networks("192.0.2.9", "2001:db8::9"))
    rules.check_route("", "192.0.2.9", MX4)
    rules.check_route("", "2001:db8::9", MX6)
    rules.check_route("", None, MX4)
    for source, destination, error in (
        ("192.0.2.10", MX4, SourceNotAllowed),
        ("192.0.2.9", MX6, FamilyMismatch),
        ("2001:db8::9", MX4, FamilyMismatch),
        ("192.0.2.9", Endpoint("10.0.0.1", 25), DestinationNotAllowed),
        (None, Endpoint("10.0.0.1", 25), DestinationNotAllowed),
        ("192.0.2.9", Endpoint("198.51.100.7", 80), DestinationNotAllowed),
    ):
        with pytest.raises(error):
            rules.check_route("", source, destination)


def test_memory_is_bounded() -> None:
    rules = access(allow_from=networks("10.0.0.0/8"))
    for number in range(5000):
        ip = str(ip_address("198.18.0.0") + number)
        rules.client_allowed(ip, "native")
        rules.instance_of_address(ip)
        allows(rules.check_source, f"instance-{number}", ip)
        allows(rules.check_route, "", None, Endpoint(ip, 25))
    for cache in (rules.client_allowed, rules.instance_of_address, rules._source_verdict, rules._destination_verdict):
        assert cache.cache_info().currsize <= 4096


# --- against the plain definition

v4 = st.builds(lambda a, n: ip_network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32))
v6 = st.builds(
    lambda a, n: ip_network((a.to_bytes(16, "big"), n), strict=False), st.integers(0, 2**128 - 1), st.integers(0, 128)
)


@given(st.lists(v4 | v6, max_size=6), st.data())
def test_membership_is_that_of_ipaddress(nets: list, data: st.DataObject) -> None:
    inside = [st.integers(0, net.num_addresses - 1).map(lambda offset, net=net: net[offset]) for net in nets]
    address = data.draw(st.one_of(st.ip_addresses(), *inside))
    plain = getattr(address, "ipv4_mapped", None) or address
    expected = any(plain.version == net.version and plain in net for net in nets)
    assert access(allow_from=tuple(nets)).client_allowed(str(address), "native") == expected


@given(st.ip_addresses(v=4))
def test_a_disguise_never_helps(address: IPv4Address) -> None:
    rules = access()
    if not reaches(rules, str(address)):
        first_octet_zero = address.packed[0] == 0
        for form in disguises(str(address)):
            assert not reaches(rules, form) or (first_octet_zero and form.startswith("64:ff9b:1:"))


def test_blocks_are_prepared_when_they_are_asked_for() -> None:
    """There may be thousands, and nothing else runs while a reload prepares them."""
    blocks = [
        instance(f"mta-{n}", allow_from=networks(f"10.0.{n}.1"), source_ip=networks("192.0.2.9")) for n in range(9)
    ]
    rules = access(instance=tuple(blocks))
    assert rules.instance_of_address("10.0.5.1") == "mta-5"
    assert rules._instance.cache_info().currsize == 0
    assert allows(rules.check_source, "mta-5", "192.0.2.9")
    assert not allows(rules.check_source, "mta-5", "192.0.2.8")
    assert rules.instance_allowed("mta-5", "10.0.5.1")
    assert rules._instance.cache_info().currsize == 1


def test_rules_that_are_replaced_are_gone_at_once() -> None:
    rules = access(instance=(instance("a", allow_from=networks("10.0.0.1")),), allow_from=networks("10.0.0.0/8"))
    assert rules.client_allowed("10.0.0.1", "native")
    assert rules.instance_of_address("10.0.0.1") == "a"
    allows(rules.check_route, "a", "192.0.2.1", Endpoint("198.51.100.1", 25))
    before = alive(Access)
    gc.disable()
    try:
        del rules
        assert alive(Access) == before - 1
    finally:
        gc.enable()


def test_how_soon_a_client_is_answered_depends_on_door_and_instance() -> None:
    rules = access(instance=(instance("exim", answer_within=240.0), instance("kumo")))
    doors = ("socks5", "proxy_protocol", "redirect")
    assert [rules.answer_within("kumo", door) for door in doors] == [50.0, 50.0, 240.0]
    assert [rules.answer_within("of no block", door) for door in doors] == [50.0, 50.0, 240.0]
    assert [rules.answer_within("exim", door) for door in doors] == [240.0] * 3


def test_who_waits_for_a_place_leaves_time_for_the_connect() -> None:
    assert [place_within(seconds) for seconds in (240.0, 50.0, 20.0, 4.0)] == [230.0, 40.0, 10.0, 2.0]


def test_the_weight_of_an_instance_is_that_of_its_block() -> None:
    rules = access(instance=(instance("a", weight=3.0), instance("b")))
    assert [rules.weight_of(name) for name in ("a", "b", "of no block")] == [3.0, 1.0, 1.0]

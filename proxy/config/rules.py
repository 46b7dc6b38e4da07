"""Rules between directives: what must be given, what goes together, what this version cannot do.

A single value's form is the business of `values`; what the machine says of it, of `check_config`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator
from ipaddress import ip_address

from proxy.model import Breathe, Endpoint, hold_breath
from proxy.settings import Settings, ThrottleSettings, TlsSettings

_WILDCARDS = ("0.0.0.0", "::")
#: Rules of one block, each of which looks at every refusal.
MOST_BACKOFFS = 20
DOORS = (
    *("listen", "listen_socks5", "listen_proxy_protocol", "listen_socks5_tls", "listen_proxy_protocol_tls"),
    "listen_redirect",
)

_CLIENT_PAIR = ("tls_client_certificate_file", "tls_client_private_key_file")
#: RFC 1929: the length of a password is one byte.
LONGEST_SOCKS_PASSWORD = 255

#: Secrets that stand in documents, this program's and that of others: everybody knows them.
PUBLISHED_SECRETS = frozenset((b"0" * 32, b"1" * 32, b"2" * 32, b"PUT-THE-SECRET-OF-THE-PROXY-HERE"))

_OF_THE_STORE = (
    *("throttle_store_members", "throttle_store_password_file", "throttle_store_sentinel_password_file"),
    *("throttle_store_tls_ca_file", "throttle_store_tls_certificate_file", "throttle_store_tls_private_key_file"),
)

Finding = tuple[str, Hashable, str]  # directive, its value if it is about one, what is wrong with it


def broken(settings: Settings, given: Collection[str], breathe: Breathe = hold_breath) -> Iterator[Finding]:
    """The rules that these settings break.

    Args:
        settings: parsed; a default stands where a value was wrong.
        given: the directives that were given, rightly or wrongly: none of them is called missing.
    """
    yield from _required(settings, given, breathe)
    yield from _tls(settings, given)
    yield from _secrets(settings, breathe)
    yield from _listeners(settings, breathe)
    yield from _sources(settings)
    yield from _instances(settings, breathe)
    yield from _listener_blocks(settings)
    yield from _source_blocks(settings, breathe)
    yield from _throttle_blocks(settings, breathe)
    yield from _tls_blocks(settings, breathe)
    yield from _agent(settings, given)
    yield from _store(settings, given)


def _required(settings: Settings, given: Collection[str], breathe: Breathe) -> Iterator[Finding]:
    if not any(door in given for door in DOORS):
        hint = "" if settings.config_filename else " (no file was named: --config-filename=FILE)"
        yield "listen", None, f"no listener: give {', '.join(DOORS[:-1])} or {DOORS[-1]}{hint}"
    if "allow_from" not in given:
        yield "allow_from", None, "required: nothing is allowed without it"
    socks5 = settings.listen_socks5 or (settings.listen_socks5_tls and settings.tls_client_ca_file is None)
    with_password = settings.listen or (socks5 and settings.socks5_auth == "required")
    has_secret = "auth_shared_secret" in given or "auth_shared_secret_file" in given
    if with_password and not has_secret and not any(block.auth_shared_secret for block in settings.instance):
        door = "listen" if settings.listen else "listen_socks5"
        message = f"required with {door}; auth_shared_secret_file and instance blocks may hold it too"
        yield "auth_shared_secret", None, message
    longest = max(map(len, settings.auth_shared_secret), default=0)
    for block in settings.instance:
        breathe()
        longest = max(longest, *map(len, block.auth_shared_secret), 0)
    if (settings.listen_socks5 or settings.listen_socks5_tls) and longest > LONGEST_SOCKS_PASSWORD:
        message = f"listen_socks5 needs secrets of at most {LONGEST_SOCKS_PASSWORD} bytes"
        yield "auth_shared_secret", None, message


def _tls(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    for pair in (("tls_certificate_file", "tls_private_key_file"), _CLIENT_PAIR):
        for one, other in (pair, pair[::-1]):
            if one in given and other not in given:
                yield one, None, f"{other} is missing: the two go together"
    if "tls_client_ca_file" in given and not settings.secure_doors:
        yield "tls_client_ca_file", None, "has no effect without listen_socks5_tls or listen_proxy_protocol_tls"


def _secrets(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """A secret that everybody knows opens the proxy to everybody in allow_from."""
    remedy = "it stands in documents, so everybody knows it; `openssl rand -hex 32` makes a secret"
    for secret in settings.auth_shared_secret:
        if secret in PUBLISHED_SECRETS:
            yield "auth_shared_secret", secret, remedy
    if settings.via_secret in PUBLISHED_SECRETS:
        yield "via_secret", None, remedy
    for block in settings.instance:
        breathe()
        if not PUBLISHED_SECRETS.isdisjoint(block.auth_shared_secret):
            yield "instance", block.name, f"{block.name}: auth_shared_secret: {remedy}"


def listeners(settings: Settings) -> Iterator[tuple[str, Endpoint]]:
    """All listeners with their directives."""
    for door in DOORS:
        for endpoint in getattr(settings, door):
            yield door, endpoint
    if settings.listen_status:
        yield "listen_status", settings.listen_status


def _listeners(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """The kernel would refuse the second of two listeners on one address and port."""
    taken: dict[Hashable, tuple[str, Endpoint]] = {}
    for door, endpoint in listeners(settings):
        breathe()
        port = (endpoint.port, endpoint.is_ipv6)
        everywhere = endpoint.host in _WILDCARDS
        # Port 0 is another port each time; but listeners are known by their addresses, so these must differ.
        same_port = port if everywhere else (*port, "*")
        earlier = taken.get(endpoint) or (taken.get(same_port) if endpoint.port else None)
        if earlier is not None:
            message = f"{endpoint} is taken by {earlier[0]} {earlier[1]}: every listener needs its own port"
            yield door, endpoint, message
        for key in (endpoint, port, (*port, "*")) if everywhere else (endpoint, port):
            taken.setdefault(key, (door, endpoint))


def _sources(settings: Settings) -> Iterator[Finding]:
    for ip, problem in _default_problems(settings, settings.default_source_ip):
        yield "default_source_ip", ip, problem
    for block in settings.listener:
        for _, problem in _default_problems(settings, block.default_source_ip):
            yield "listener", block.name, f"default_source_ip: {problem}"


def _default_problems(settings: Settings, chosen: tuple[str, ...]) -> Iterator[tuple[str | None, str]]:
    """(the address, or None for all of them, what is wrong)."""
    if "same" in chosen:
        if len(chosen) > 1:
            yield None, "`same` stands alone"
        return
    for ipv6, family in ((False, "IPv4"), (True, "IPv6")):
        if sum((":" in ip) == ipv6 for ip in chosen) > 1:
            yield None, f"more than one {family} address"
    # Without source_ip all but loopback may be left from, and loopback where an instance block lists it.
    allowed = settings.source_ip or tuple(network for block in settings.instance for network in block.source_ip)
    for ip in map(ip_address, chosen):
        if not any(ip in network for network in allowed) and (settings.source_ip or ip.is_loopback):
            yield str(ip), f"{ip} is not in source_ip: no connection could leave from it"


def _instances(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    owner: dict[object, str] = {}
    for block in settings.instance:
        for network in block.allow_from:
            breathe()
            if owner.setdefault(network, block.name) != block.name:
                message = f"allow_from {network} is in two blocks, {owner[network]} and {block.name}"
                yield "instance", block.name, message


def _listener_blocks(settings: Settings) -> Iterator[Finding]:
    """A mode is for the doors without a protocol of their own."""
    doors = {str(endpoint) for endpoint in settings.standard_doors}
    for block in settings.listener:
        if block.name not in doors:
            yield (
                "listener",
                block.name,
                f"{block.name} is not in listen_socks5, listen_proxy_protocol, the same with _tls or listen_redirect",
            )


def _source_blocks(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    owner: dict[object, str] = {}
    names: set[str] = set()
    for block in settings.source:
        where = block.block or block.name
        if not block.ip:
            yield "source", where, f"{block.name}: `ip` is missing"
        if block.name in names:
            yield "source", where, f"{block.name} is the name of two sources"
        elif problem := _unfit_name(block.name):
            yield "source", where, f"{block.name}: {problem}"
        names.add(block.name)
        missing = [name for name in _CLIENT_PAIR if getattr(block, name) is None]
        if len(missing) == 1:
            yield "source", where, f"{block.name}: {missing[0]} is missing: the two go together"
        for network in block.ip:
            breathe()
            if owner.setdefault(network, block.name) != block.name:
                message = f"{network.network_address} is in two blocks, {owner[network]} and {block.name}"
                yield "source", where, message


def _throttle_blocks(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    names = _names_of_sources(settings, breathe)
    for block in settings.throttle:
        breathe()
        yield from _unknown_sources("throttle", block, names)
        if "nothing" in block.per and len(set(block.per)) > 1:
            yield "throttle", block.name, f"{block.name}: per: `nothing` stands alone"
        if len(block.backoff) > MOST_BACKOFFS:
            yield "throttle", block.name, f"{block.name}: backoff: more than {MOST_BACKOFFS} rules in one block"
        if block.scope == "cluster" and settings.throttle_store is None:
            message = (
                f"{block.name}: scope cluster needs a throttle_store, which keeps what counts over several proxies"
            )
            yield "throttle", block.name, message


def _tls_blocks(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    if settings.dns_trust_ad and settings.dns_server is None:
        message = "dns_server is missing: which server's answers are to be believed has to be said"
        yield "dns_trust_ad", None, message
    names = _names_of_sources(settings, breathe)
    for block in settings.tls:
        breathe()
        yield from _unknown_sources("tls", block, names)
        if block.level in ("dane", "dane-only") and not settings.dns_trust_ad:
            message = f"{block.name}: level {block.level} needs a dns_server that checks DNSSEC, and dns_trust_ad yes"
            yield "tls", block.name, message
        if block.names and block.level not in ("verify", "dane", "dane-only"):
            yield "tls", block.name, f"{block.name}: names have no effect without level verify, dane or dane-only"
        if block.level == "none" and (block.min or block.ciphers):
            yield "tls", block.name, f"{block.name}: level none, and what TLS has to be"


def _names_of_sources(settings: Settings, breathe: Breathe) -> set[str]:
    names: set[str] = set()
    for block in settings.source:
        breathe()
        names |= {block.name, block.block}
    return names


def _unknown_sources(kind: str, block: ThrottleSettings | TlsSettings, names: Collection[str]) -> Iterator[Finding]:
    for source in block.source:
        if isinstance(source, str) and source not in names:
            message = f"{block.name}: source {source} is neither a network nor the name of a source block"
            yield kind, block.name, message


def _unfit_name(name: str) -> str:
    """A source is named beside instances and addresses: it must not look like either."""
    if not re.fullmatch(r"[A-Za-z0-9_.*-]+", name):
        return "a source's name has letters, digits, hyphens, dots and underscores only"
    try:
        ip_address(name)
    except ValueError:
        return ""
    return "a source's name is no address"


def _agent(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    """A way out through another proxy needs its secret."""
    if not settings.via:
        for name in ("via_secret", "via_instance", "via_tls"):
            if name in given:
                yield name, None, "has no effect without via"
        return
    if "via_secret" not in given:
        yield "via", None, "via_secret is required with it"


def _store(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    """Whoever shares limits must know with how many, and what goes with the store goes nowhere without it."""
    pair = ("throttle_store_tls_certificate_file", "throttle_store_tls_private_key_file")
    for one, other in (pair, pair[::-1]):
        if one in given and other not in given:
            yield one, None, f"{other} is missing: the two go together"
    store = settings.throttle_store
    if store is None:
        # One that is there, and cannot be read, is a mistake of its own.
        for name in _OF_THE_STORE if "throttle_store" not in given else ():
            if name in given:
                yield name, None, "has no effect without throttle_store"
        return
    if "throttle_store_members" not in given:
        message = "throttle_store_members is required with it: how many proxies use it, this one counted"
        yield "throttle_store", None, message
    if store.user is not None and store.password is None and "throttle_store_password_file" not in given:
        message = "a user without a password; a password alone is written redis://:password@host"
        yield "throttle_store", None, message
    for name in ("throttle_store_tls_ca_file", pair[0]):
        if name in given and not store.tls:
            yield name, None, "has no effect without rediss:// in throttle_store"
    if "throttle_store_sentinel_password_file" in given and store.kind != "sentinel":
        yield "throttle_store_sentinel_password_file", None, "has no effect without +sentinel:// in throttle_store"

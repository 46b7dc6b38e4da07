"""Rules between directives: what must be given, what goes together, what this version cannot do.

A single value's form is the business of `values`; what the machine says of it, of `check_config`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from ipaddress import ip_address

from proxy.model import Endpoint
from proxy.settings import Settings

DOORS = ("listen", "listen_socks5", "listen_proxy_protocol", "listen_redirect")

#: RFC 1929: the length of a password is one byte.
LONGEST_SOCKS_PASSWORD = 255

Finding = tuple[str, str]  # directive, what is wrong with it


def broken(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    """The rules that these settings break.

    Args:
        settings: parsed; a default stands where a value was wrong.
        given: the directives that were given, rightly or wrongly: none of them is called missing.
    """
    yield from _required(settings, given)
    yield from _tls(given)
    yield from _listeners(settings)
    yield from _sources(settings)
    yield from _instances(settings)
    yield from _listener_blocks(settings)
    yield from _source_blocks(settings)
    yield from _not_in_this_version(settings)


def _required(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    if not any(door in given for door in DOORS):
        hint = "" if settings.config_filename else " (no file was named: --config-filename=FILE)"
        yield "listen", f"no listener: give {', '.join(DOORS[:-1])} or {DOORS[-1]}{hint}"
    if "allow_from" not in given:
        yield "allow_from", "required: nothing is allowed without it"
    with_password = settings.listen or (settings.listen_socks5 and settings.socks5_auth == "required")
    has_secret = "auth_shared_secret" in given or "auth_shared_secret_file" in given
    if with_password and not has_secret and not any(block.auth_shared_secret for block in settings.instance):
        door = "listen" if settings.listen else "listen_socks5"
        yield "auth_shared_secret", f"required with {door}; auth_shared_secret_file and instance blocks may hold it too"
    secrets = settings.auth_shared_secret + tuple(s for block in settings.instance for s in block.auth_shared_secret)
    if settings.listen_socks5 and any(len(secret) > LONGEST_SOCKS_PASSWORD for secret in secrets):
        yield "auth_shared_secret", f"listen_socks5 needs secrets of at most {LONGEST_SOCKS_PASSWORD} bytes"


def _tls(given: Collection[str]) -> Iterator[Finding]:
    pair = ("tls_certificate_file", "tls_private_key_file")
    for one, other in (pair, pair[::-1]):
        if one in given and other not in given:
            yield one, f"{other} is missing: the two go together"


def _listeners(settings: Settings) -> Iterator[Finding]:
    """The kernel would refuse the second of two listeners on one address and port."""
    taken: list[tuple[Endpoint, str]] = []
    wanted = [(endpoint, door) for door in DOORS for endpoint in getattr(settings, door)]
    if settings.listen_status:
        wanted.append((settings.listen_status, "listen_status"))
    for endpoint, door in wanted:
        for earlier, earlier_door in taken:
            if _overlap(endpoint, earlier):
                yield door, f"{endpoint} is taken by {earlier_door} {earlier}: every listener needs its own port"
                break
        taken.append((endpoint, door))


def _overlap(one: Endpoint, other: Endpoint) -> bool:
    if one == other:  # with port 0 the kernel would not mind, but the listeners are known by their addresses
        return True
    same_port = one.port == other.port != 0 and one.is_ipv6 == other.is_ipv6
    return same_port and (one.host == other.host or bool({"0.0.0.0", "::"} & {one.host, other.host}))


def _sources(settings: Settings) -> Iterator[Finding]:
    chosen = settings.default_source_ip
    if "same" in chosen:
        if len(chosen) > 1:
            yield "default_source_ip", "`same` stands alone"
        return
    for ipv6, family in ((False, "IPv4"), (True, "IPv6")):
        if sum((":" in ip) == ipv6 for ip in chosen) > 1:
            yield "default_source_ip", f"more than one {family} address"
    # Without source_ip all but loopback may be left from, and loopback where an instance block lists it.
    allowed = settings.source_ip or tuple(network for block in settings.instance for network in block.source_ip)
    for ip in map(ip_address, chosen):
        if not any(ip in network for network in allowed) and (settings.source_ip or ip.is_loopback):
            yield "default_source_ip", f"{ip} is not in source_ip: no connection could leave from it"


def _instances(settings: Settings) -> Iterator[Finding]:
    owner: dict[object, str] = {}
    for block in settings.instance:
        for network in block.allow_from:
            if owner.setdefault(network, block.name) != block.name:
                yield "instance", f"allow_from {network} is in two blocks, {owner[network]} and {block.name}"


def _listener_blocks(settings: Settings) -> Iterator[Finding]:
    """A mode is for the doors without a protocol of their own."""
    standard = (*settings.listen_socks5, *settings.listen_proxy_protocol, *settings.listen_redirect)
    doors = {str(endpoint) for endpoint in standard}
    for block in settings.listener:
        if block.name not in doors:
            yield "listener", f"{block.name} is not in listen_socks5, listen_proxy_protocol or listen_redirect"


def _source_blocks(settings: Settings) -> Iterator[Finding]:
    owner: dict[object, str] = {}
    for block in settings.source:
        if not block.ip:
            yield "source", f"{block.name}: `ip` is missing"
        for network in block.ip:
            if network.prefixlen != network.max_prefixlen:
                yield "source", f"{block.name}: {network} is a network: a name is for single addresses"
            elif owner.setdefault(network, block.name) != block.name:
                yield "source", f"{network.network_address} is in two blocks, {owner[network]} and {block.name}"


def _not_in_this_version(settings: Settings) -> Iterator[Finding]:
    if settings.workers != 1:
        yield "workers", "not available in this version: only 1"
    if settings.throttle_store != "memory":
        yield "throttle_store", "not available in this version: only memory"

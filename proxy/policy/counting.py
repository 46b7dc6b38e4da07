"""What `throttle` blocks count, and where; and blocks that never hold for anybody: what `--check-config` says of them.

A delivery rate counts messages where the proxy sees them and connections elsewhere, which depends on the door and on
who comes in there. Pure: sentences about one `Settings`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from proxy.model import Breathe, Endpoint, hold_breath
from proxy.policy.modes import Modes
from proxy.settings import Network, Settings, ThrottleSettings

#: Of each kind of thing that a line would list; the rest is counted.
_MOST_LISTED = 8
#: Blocks that count alike are told together; of many that do not, the first ones.
_MOST_GROUPS = 50
_STANDARD = ("listen_socks5", "listen_proxy_protocol", "listen_redirect")
_SMTP_PORT = 25
_SEEN_BY_OPEN = "messages; connections where an OPEN gives no EHLO name"


def overview(settings: Settings, breathe: Breathe = hold_breath) -> list[str]:
    """What each block counts at each listener, in lines to be read; blocks that count alike stand together."""
    modes = Modes(settings, breathe)
    groups: dict[tuple[str, ...], list[str]] = {}
    for block in settings.throttle:
        breathe()
        shadow = "" if block.enforce else " (shadow mode)"
        groups.setdefault(tuple(_lines(block, settings, modes)), []).append(block.name + shadow)
    lines: list[str] = []
    for told, names in list(groups.items())[:_MOST_GROUPS]:
        lines += [f"throttle {_some(names)} counts" if len(names) == 1 else f"throttles {_some(names)} count", *told]
    if len(groups) > _MOST_GROUPS:
        lines.append(f"and {len(groups) - _MOST_GROUPS} more groups of blocks")
    return lines


def _lines(block: ThrottleSettings, settings: Settings, modes: Modes) -> Iterator[str]:
    if not (block.max_delivery_rate or block.warmup or any(rule.rate is not None for rule in block.backoff)):
        yield "  connections, at every listener"
        return
    where: dict[str, list[str]] = {}
    for endpoint in settings.listen:
        where.setdefault(_SEEN_BY_OPEN, []).append(f"listen {endpoint}")
    for door in _STANDARD:
        for endpoint in getattr(settings, door):
            what = "nothing, since it goes out by via" if settings.via else _what(block, endpoint, settings, modes)
            where.setdefault(what, []).append(f"{door} {endpoint}")
    for what, doors in where.items():
        yield f"  at {_some(doors)}: {what}"


def _what(block: ThrottleSettings, listener: Endpoint, settings: Settings, modes: Modes) -> str:
    """At a door without a protocol of its own: by the mode of who comes."""
    receiver = Endpoint("192.0.2.1", _SMTP_PORT)
    others = modes.is_smtp("", listener, receiver)
    named = block.instance or tuple(each.name for each in settings.instance if each.mode is not None)
    exceptions = [name for name in named if modes.is_smtp(name, listener, receiver) != others]
    if block.instance and len(exceptions) == len(named):
        return _kind(not others)
    if not exceptions:
        return _kind(others)
    return f"{_kind(others)}, but of {_some(exceptions)} {_kind(not others)}"


def _kind(smtp: bool) -> str:
    return "messages (mode smtp)" if smtp else "connections (mode tcp)"


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


# --- blocks that never hold ---


def never(settings: Settings, breathe: Breathe = hold_breath) -> Iterator[tuple[str, str]]:
    """Blocks that no connection can come under as things are configured: their names, and why."""
    reach = _Reach(settings, breathe)
    for block in settings.throttle:
        breathe()
        for why in (reach.instance(block), reach.source(block, breathe), reach.receiver(block, breathe)):
            if why:
                yield block.name, why
                break


class _Reach:
    """Who can come, from where, to where."""

    def __init__(self, settings: Settings, breathe: Breathe) -> None:
        self._settings = settings
        self._sources = _Known(settings.source_ip, breathe)
        self._denied = _Known(settings.deny_destination, breathe)
        self._allowed = _Known(settings.allow_destination, breathe)
        self._instances = {block.name: block for block in settings.instance}
        self._anybody = bool(settings.listen_socks5) and settings.socks5_auth == "none"
        self._by_secret = bool(settings.listen or settings.listen_socks5)
        self._by_address = bool(settings.listen_proxy_protocol or settings.listen_redirect)
        self._looks_up = any(block.domain for block in settings.throttle) or any(block.domain for block in settings.tls)
        self._addresses: dict[str, list[Network]] = {}
        for source in settings.source:
            breathe()
            for name in (source.name, source.block) if source.block else (source.name,):
                self._addresses.setdefault(name, []).extend(source.ip)

    def instance(self, block: ThrottleSettings) -> str:
        if not block.instance or any(self._can_come(name) for name in block.instance):
            return ""
        return f"nobody can come as {_some(list(block.instance))}: neither a secret nor an address proves it"

    def _can_come(self, name: str) -> bool:
        known = self._instances.get(name)
        if self._anybody or (self._by_address and known is not None and bool(known.allow_from)):
            return True
        secrets = self._settings.auth_shared_secret or (known.auth_shared_secret if known else ())
        return self._by_secret and bool(secrets)

    def source(self, block: ThrottleSettings, breathe: Breathe) -> str:
        if not block.source or not self._sources:
            return ""
        for source in block.source:
            for network in self._addresses.get(source, ()) if isinstance(source, str) else (source,):
                breathe()
                if self._sources.length_above(network) >= 0 or self._sources.has_inside(network):
                    return ""
        return "none of its source addresses is in source_ip"

    def receiver(self, block: ThrottleSettings, breathe: Breathe) -> str:
        if block.domain:
            return ""
        if block.mx and not block.destination:
            if self._settings.listen or self._looks_up:
                return ""
            return "nobody knows an MX by name here: there is no native listener, and no block has a domain to look up"
        if not block.destination or block.mx:
            return ""
        for network in block.destination:
            breathe()
            if not self._is_denied(network):
                return ""
        return "all its destinations are denied"

    def _is_denied(self, network: Network) -> bool:
        denied = self._denied.length_above(network)
        return denied > self._allowed.length_above(network) and not self._allowed.has_inside(network)


class _Known:
    """Networks, to ask whether one of them contains another one, or is a part of it."""

    def __init__(self, networks: Iterable[Network], breathe: Breathe) -> None:
        self._lengths: dict[tuple[int, int], set[int]] = {}
        self._first: dict[int, list[int]] = {4: [], 6: []}
        for network in networks:
            breathe()
            first = int(network.network_address)
            self._lengths.setdefault((network.version, network.prefixlen), set()).add(first)
            self._first[network.version].append(first)
        for addresses in self._first.values():
            addresses.sort()

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def length_above(self, network: Network) -> int:
        """The longest prefix among those that contain all of it, or -1."""
        first, longest = int(network.network_address), -1
        for (version, length), known in self._lengths.items():
            if version == network.version and longest < length <= network.prefixlen:
                shift = network.max_prefixlen - length
                if first >> shift << shift in known:
                    longest = length
        return longest

    def has_inside(self, network: Network) -> bool:
        """Whether one of them begins in it."""
        first, addresses = int(network.network_address), self._first[network.version]
        at = bisect_left(addresses, first)
        return at < len(addresses) and addresses[at] < first + network.num_addresses

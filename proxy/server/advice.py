"""Advice on settings that are well-formed and that this machine can have: what an operator may not have meant.

Warnings only, and found in the settings alone. What the machine says of them is `check_config`'s, and rules that make a
configuration wrong stand in `config.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import TypeVar

from proxy.model import Breathe, Endpoint
from proxy.policy import counting, vain
from proxy.policy.access import SHORTEST_ANSWER, place_within
from proxy.policy.modes import Modes, any_smtp
from proxy.server.findings import Finding
from proxy.settings import InstanceSettings, Network, Settings

_AN_MX = Endpoint("192.0.2.1", 25)
#: RFC 5321, section 4.5.3.2.6: a client waits ten minutes for the reply to the final dot.
SHORTEST_IDLE_TIMEOUT = 600.0
#: A random secret of 32 characters has more different ones than this; those in the examples do not.
FEWEST_CHARACTERS = 8
#: In a secret these are a mistake of quoting more often than meant.
_QUOTING = re.compile("[\\s\"'`\u2018-\u201f]|auth_shared_secret")
_Item = TypeVar("_Item")


def advice(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """All of it.

    Args:
        breathe: called after each small piece of the work.
    """
    yield from _secrets(settings, breathe)
    yield from _directives(settings, breathe)
    yield from _dialogues(settings, breathe)
    yield from _blocks(settings, breathe)


def _secrets(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """Secrets that were not drawn at random, or not quoted as they were meant. They are not shown."""
    owned: list[tuple[str, str, bytes]] = [("auth_shared_secret", "", secret) for secret in settings.auth_shared_secret]
    for block in settings.instance:
        owned += [("instance", block.name, secret) for secret in block.auth_shared_secret]
        breathe()
    for directive, owner, secret in owned:
        breathe()
        prefix, value = (f"{owner}: ", owner) if owner else ("", secret)
        if len(set(secret)) < FEWEST_CHARACTERS:
            message = "a secret that can be guessed; `openssl rand -hex 32` makes one"
            yield Finding(False, directive, value, prefix + message)
        if _QUOTING.search(secret.decode()):
            message = (
                "a secret with a quote, a blank or the directive's name in it: is that meant? "
                "In flags, variables and secret files nothing is quoted"
            )
            yield Finding(False, directive, value, prefix + message)


def _directives(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    if settings.idle_timeout < SHORTEST_IDLE_TIMEOUT:
        yield Finding(False, "idle_timeout", None, "below the 10 minutes of RFC 5321: slow receivers will be cut off")
    if settings.via and settings.listen:
        yield Finding(False, "listen", None, "native clients go out from here and not by via: they could connect there")
    if settings.via and settings.throttle:
        yield Finding(False, "throttle", None, "blocks limit nothing that goes out by via: they belong to that proxy")
    if settings.tls and (settings.via or not (settings.listen or any_smtp(settings))):
        yield Finding(
            False, "tls", None, "blocks have no effect: TLS to receivers does not end here in mode tcp or by via"
        )
    if settings.secure_doors and settings.tls_certificate_file is None:
        message = "without it the listeners with TLS show a certificate made in memory, which no client can check"
        yield Finding(False, "tls_certificate_file", None, message)
    if (settings.listen_socks5 or settings.listen_socks5_tls) and settings.socks5_auth == "none":
        yield Finding(False, "socks5_auth", None, "none: whoever is in allow_from may send from here")
    if settings.listen_proxy_protocol and _any(_is_everywhere, settings.listen_proxy_protocol_allow_from, breathe):
        yield Finding(False, "listen_proxy_protocol", None, "everybody may send from here: this door has no password")
    open_tls = settings.listen_proxy_protocol_tls and settings.tls_client_ca_file is None
    if open_tls and _any(_is_everywhere, settings.listen_proxy_protocol_allow_from, breathe):
        message = "everybody may send from here: this door has no password, and no tls_client_ca_file"
        yield Finding(False, "listen_proxy_protocol_tls", None, message)
    if settings.listen_redirect and _any(_is_everywhere, settings.allow_from, breathe):
        yield Finding(False, "listen_redirect", None, "everybody may send from here: this door has no password")
    if not settings.listen_tls and _any(_is_seen, settings.listen, breathe):
        yield Finding(False, "listen_tls", None, "no: mail and its addresses are readable on the way to the proxy")
    if _any(_is_loopback, settings.allow_destination, breathe):
        yield Finding(False, "allow_destination", None, "loopback is in it: services of this machine can be reached")
    if (
        settings.source_ip
        and not settings.default_source_ip
        and not any(block.default_source_ip for block in settings.listener)
        and (settings.listen or settings.listen_socks5 or settings.listen_socks5_tls)
    ):
        message = "given without default_source_ip: who names no source is refused unless the system's choice is in it"
        yield Finding(False, "source_ip", None, message)


def _dialogues(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """Mode smtp: mail that is in clear on its way, and connections that nobody can share."""
    modes = Modes(settings, breathe)
    if not modes.any_smtp:
        return
    breathe()
    names = ["", *(block.name for block in settings.instance if block.mode == "smtp")]
    doors = (*settings.listen_socks5, *settings.listen_proxy_protocol, *settings.listen_redirect)
    for door in doors:
        breathe()
        seen = not ip_address(door.host).is_loopback and any(modes.is_smtp(name, door, _AN_MX) for name in names)
        if seen and not settings.mode_smtp_starttls:
            message = f"smtp on {door}: mail that was encrypted from end to end is in clear on the way to the proxy; "
            yield Finding(
                False, "mode", None, message + "trust that network, or mode_smtp_starttls yes, or an agent (via)"
            )
    if not any(block.ehlo for block in settings.source):
        yield Finding(False, "mode", None, "smtp, and no source block has an ehlo: no connection will be shared")


def _blocks(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    breathe()
    outer = {name: _Within(getattr(settings, name), breathe) for name in ("allow_from", "source_ip")}
    for block in settings.instance:
        for directive, within in outer.items():
            breathe()
            if within and _any(within.lacks, getattr(block, directive), breathe):
                message = f"{block.name}: its {directive} goes beyond the global {directive}, which holds as well"
                yield Finding(False, "instance", block.name, message)
        if _looks_like_a_border(block, settings):
            message = f"{block.name}: no border without an auth_shared_secret of its own"
            yield Finding(
                False, "instance", block.name, f"{message}: who has the global one may take another name, or none"
            )
    for tls_block in settings.tls:
        breathe()
        if not (tls_block.level or tls_block.min or tls_block.ciphers):
            yield Finding(
                False, "tls", tls_block.name, f"{tls_block.name}: nothing is said in it of what TLS has to be"
            )
    for name, why in counting.never(settings, breathe):
        yield Finding(False, "throttle", name, f"{name}: it never holds: {why}")
    for throttle in settings.throttle:
        breathe()
        for message in vain.sentences(throttle, settings):
            yield Finding(False, "throttle", throttle.name, f"{throttle.name}: {message}")
        if throttle.wait is not None and throttle.wait > (longest := place_within(SHORTEST_ANSWER)):
            message = f"{throttle.name}: wait is cut to {longest:.0f} s for clients that must have an answer in time"
            yield Finding(
                False,
                "throttle",
                throttle.name,
                f"{message}; only listen_redirect, answer_within, an OPEN and mode smtp's MAIL allow more",
            )


def _looks_like_a_border(block: InstanceSettings, settings: Settings) -> bool:
    """Whether the block has lists, and clients prove with the global secret that they have its name."""
    proven = bool(settings.auth_shared_secret) and bool(
        settings.listen or settings.listen_socks5 or settings.listen_socks5_tls
    )
    return proven and not block.auth_shared_secret and bool(block.source_ip or block.allow_from)


def _any(what: Callable[[_Item], bool], items: Iterable[_Item], breathe: Breathe) -> bool:
    for item in items:
        breathe()
        if what(item):
            return True
    return False


def _is_everywhere(network: Network) -> bool:
    return network.prefixlen == 0


def _is_loopback(network: Network) -> bool:
    return network.is_loopback


def _is_seen(endpoint: Endpoint) -> bool:
    return not ip_address(endpoint.host).is_loopback


class _Within:
    """Networks, to ask whether another one is a part of one of them, at a look-up for each prefix length."""

    def __init__(self, networks: Iterable[Network], breathe: Breathe) -> None:
        self._known: set[Network] = set()
        self._lengths: set[tuple[int, int]] = set()
        for network in networks:
            breathe()
            self._known.add(network)
            self._lengths.add((network.version, network.prefixlen))

    def __bool__(self) -> bool:
        return bool(self._known)

    def lacks(self, network: Network) -> bool:
        lengths = (length for version, length in self._lengths if version == network.version)
        return not any(network.supernet(new_prefix=n) in self._known for n in lengths if n <= network.prefixlen)

"""`--check-config`: what the machine says of settings that are well-formed.

It looks, and changes nothing: a busy port is left alone, no file is written. What a start would fail on is an error,
what an operator may want to know a warning. Rules that need no machine stand in `config.rules`, all but advice.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import NamedTuple, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from proxy.config.load import Loaded
from proxy.config.origins import Origins
from proxy.config.rules import listeners
from proxy.model import Breathe, Endpoint, hold_breath
from proxy.net import contexts, identities
from proxy.net.addresses import own_addresses
from proxy.policy import counting, vain
from proxy.policy.access import SHORTEST_ANSWER, place_within
from proxy.policy.counting import overview as overview
from proxy.policy.modes import Modes, any_smtp
from proxy.server import calendar
from proxy.server.shown import pairs
from proxy.settings import InstanceSettings, Network, Settings

_AN_MX = Endpoint("192.0.2.1", 25)
#: RFC 5321, section 4.5.3.2.6: a client waits ten minutes for the reply to the final dot.
SHORTEST_IDLE_TIMEOUT = 600.0
#: A random secret of 32 characters has more different ones than this; those in the examples do not.
FEWEST_CHARACTERS = 8
#: Bits; a handshake with 4096 takes 3 to 6 ms, with 2048 1 ms, with P-256 0.2 ms.
LONGEST_RSA_KEY = 2048
#: Descriptors that are neither a client's nor a destination's socket.
OTHER_DESCRIPTORS = 64
_NOT_HERE = "is not an address of this machine"
_ENVIRONMENT = "environment"
#: From bind: it is no address of this machine, or there is no IPv6 here at all. (Others: no descriptor, say.)
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_WILDCARDS = ("0.0.0.0", "::")


#: Of each kind that are told: a list of 8,000 addresses may be wrong altogether.
MOST_TOLD = 200
#: In a secret these are a mistake of quoting more often than meant.
_QUOTING = re.compile("[\\s\"'`\u2018-\u201f]|auth_shared_secret")

_Item = TypeVar("_Item")


class Finding(NamedTuple):
    """`value` is the parsed value that it is about (a block: its name), None for the directive as a whole."""

    error: bool
    directive: str
    value: Hashable
    message: str


def check(loaded: Loaded, now: datetime | None = None) -> list[Finding]:
    """Everything there is to say; `now` is the wall clock."""
    settings = loaded.settings
    unfit = (*unfit_tls_blocks(settings), *unfit_timezone(settings))
    return [*_listeners(settings), *_identity(settings), *unfit, *doubts(loaded, now)]


def doubts(loaded: Loaded, now: datetime | None = None, breathe: Breathe = hold_breath) -> list[Finding]:
    """What a start or a reload takes, and an operator may want to know. All of it are warnings.

    Args:
        breathe: called after each small piece of the work.
    """
    settings = loaded.settings
    findings: list[Finding] = []
    for found in (
        (Finding(False, _ENVIRONMENT, None, doubt) for doubt in loaded.doubts),
        _leaves(settings, now or datetime.now(UTC), breathe),
        _absent(settings, breathe),
        _sources(settings, breathe),
        _descriptors(settings),
        _permissions(loaded, breathe),
        _secrets(settings, breathe),
        _advice(settings, breathe),
        _dialogues(settings, breathe),
        _blocks(settings, breathe),
    ):
        findings += found
    return findings


def sentences(
    findings: Iterable[Finding], origins: Origins, marked: bool = True, breathe: Breathe = hold_breath
) -> list[str]:
    """`file:line: directive: …`, with the line where the value stands; errors first, and of each kind not too many.

    Args:
        marked: a warning says that it is one.
    """
    lines: list[str] = []
    for error, kind in ((True, "errors"), (False, "warnings")):
        these = [finding for finding in findings if finding.error == error]
        for finding in these[:MOST_TOLD]:
            breathe()
            lines.append(_sentence(finding, origins, marked))
        if len(these) > MOST_TOLD:
            lines.append(f"and {len(these) - MOST_TOLD} more {kind}")
    return lines


def _sentence(finding: Finding, origins: Origins, marked: bool) -> str:
    warning = "" if finding.error or not marked else "warning: "
    if finding.directive == _ENVIRONMENT:
        return f"{warning}{finding.directive}: {finding.message}"
    where = origins.place(finding.directive, finding.value)
    return str(where.mistake(f"{warning}{finding.directive}: {finding.message}"))


def _listeners(settings: Settings) -> Iterator[Finding]:
    for door, endpoint in listeners(settings):
        number = _bind_errno(endpoint, socket.SOCK_STREAM)
        if number == errno.EACCES:  # the unit, or another user, may have the right that we have not
            message = f"{endpoint}: ports below 1024 need root or CAP_NET_BIND_SERVICE, which this check does not have"
            yield Finding(False, door, endpoint, message)
        elif number == errno.EADDRINUSE:  # perhaps by the very proxy whose new configuration is looked at
            yield Finding(False, door, endpoint, f"{endpoint} is in use now")
        elif number and number not in _NOT_OURS:  # these are told below
            yield Finding(True, door, endpoint, f"{endpoint}: {os.strerror(number)}")


def _bind_errno(endpoint: Endpoint, kind: socket.SocketKind) -> int:
    family = socket.AF_INET6 if endpoint.is_ipv6 else socket.AF_INET
    try:
        with socket.socket(family, kind) as probe:
            if endpoint.is_ipv6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(endpoint)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


def _is_here(host: str) -> bool:
    """As the program finds it (`upstream.bind`): bind() takes it, and the kernel has it."""
    number = _bind_errno(Endpoint(host, 0), socket.SOCK_DGRAM)
    if number:
        return number not in _NOT_OURS
    return host in _WILDCARDS or host in own_addresses()


def _identity(settings: Settings) -> Iterator[Finding]:
    certificate, key = settings.tls_certificate_file, settings.tls_private_key_file
    if certificate is not None and key is not None:
        try:
            identities.load_identity(certificate, key)
        except identities.UnfitIdentity as error:
            yield Finding(True, error.directive, None, str(error))
    if settings.tls_client_ca_file is not None:
        try:
            identities.door_context(identities.generated_identity("check"), settings.tls_client_ca_file)
        except identities.UnfitIdentity as error:
            yield Finding(True, error.directive, None, str(error))
    for pair in pairs(settings, hold_breath):
        try:
            pair.load()
        except identities.UnfitIdentity as error:
            directive = error.directive if pair.value is None else pair.directive
            yield Finding(True, directive, pair.value, pair.sentence(error))


def unfit_tls_blocks(settings: Settings) -> Iterator[Finding]:
    """What only OpenSSL knows; errors, on which a start and a reload fail."""
    for block in settings.tls:
        try:
            contexts.client_context(contexts.Profile(True, block.min or "", block.ciphers or ""))
        except ValueError as error:
            yield Finding(True, "tls", block.name, f"{block.name}: ciphers: {error}")


def unfit_timezone(settings: Settings) -> Iterator[Finding]:
    """One that is not known here."""
    try:
        calendar.zone(settings.timezone)
    except ValueError as error:
        yield Finding(True, "timezone", None, str(error))


def _leaves(settings: Settings, now: datetime, breathe: Breathe) -> Iterator[Finding]:
    """Certificates that are good for nothing any more, or cost too much."""
    for pair in pairs(settings, breathe):
        leaf = _read_leaf(pair.certificate)
        if leaf is not None and (end := leaf.not_valid_after_utc) < now:
            prefix = f"{pair.value}: " if pair.value else ""
            yield Finding(False, pair.directive, pair.value, f"{prefix}{pair.certificate}: expired on {end:%Y-%m-%d}")
    path = settings.tls_certificate_file
    leaf = _read_leaf(path) if path is not None else None
    if leaf is None:
        return
    key, end = leaf.public_key(), leaf.not_valid_after_utc
    if end < now:
        yield Finding(False, "tls_certificate_file", None, f"{path}: expired on {end:%Y-%m-%d}")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size > LONGEST_RSA_KEY:
        message = (
            f"{path}: an RSA key of {key.key_size} bits costs the proxy milliseconds a handshake, and strangers can "
            "ask for them; a key of 2048 bits or P-256 costs a fraction of that"
        )
        yield Finding(False, "tls_certificate_file", None, message)


def _read_leaf(path: str) -> x509.Certificate | None:
    """None: it is of no use, which is an error of its own."""
    try:
        with open(path, "rb") as file:
            leaf = x509.load_pem_x509_certificate(file.read())
            leaf.public_key()
            return leaf
    except (OSError, ValueError):
        return None


def _absent(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """Listeners on addresses that may come later, or never."""
    for door, endpoint in listeners(settings):
        breathe()
        if not _is_here(endpoint.host):
            yield Finding(False, door, endpoint, f"{endpoint} {_NOT_HERE}: nobody can connect to it before it is")


def _sources(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
    """Single addresses only: a network may well be wider than what the machine has of it."""
    single = ((n, str(n.network_address)) for n in settings.source_ip if n.prefixlen == n.max_prefixlen)
    chosen = ((ip, ip) for ip in settings.default_source_ip if ip != "same")
    for directive, sources in (("source_ip", single), ("default_source_ip", chosen)):
        for value, ip in sources:
            breathe()
            if not _is_here(ip):
                yield Finding(False, directive, value, f"{ip} {_NOT_HERE}")
    absent: dict[str, list[str]] = {}
    for block in settings.source:
        for network in block.ip:
            breathe()
            if not _is_here(str(network.network_address)):
                absent.setdefault(block.block or block.name, []).append(str(network.network_address))
    for name, addresses in absent.items():
        breathe()
        more = f" (nor are {len(addresses) - 1} more of its addresses)" if len(addresses) > 1 else ""
        yield Finding(False, "source", name, f"{name}: {addresses[0]} {_NOT_HERE}{more}")


def _descriptors(settings: Settings) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 2 * (settings.max_connections or 0) + OTHER_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and wanted > limit:
        message = f"{settings.max_connections} connections need {wanted} descriptors; the limit is {limit} (ulimit -Hn)"
        yield Finding(False, "max_connections", None, message)


def _permissions(loaded: Loaded, breathe: Breathe) -> Iterator[Finding]:
    """Secrets in files that every user of the machine can read."""
    settings, secrets = loaded.settings, loaded.origins.of("auth_shared_secret")
    paths: list[tuple[str, Hashable, str]] = []
    paths += [("auth_shared_secret_file", path, path) for path in settings.auth_shared_secret_file]
    holding = {given.file: given.text.encode() for given in secrets if given.file in loaded.files}
    paths += [("auth_shared_secret", secret, path) for path, secret in holding.items()]
    if settings.tls_private_key_file:
        paths.append(("tls_private_key_file", None, settings.tls_private_key_file))
    paths += [(pair.directive, pair.value, pair.key) for pair in pairs(settings, breathe)]
    for directive, value, path in paths:
        breathe()
        try:
            readable = os.stat(path).st_mode & stat.S_IROTH
        except OSError:
            continue
        if readable:
            yield Finding(False, directive, value, f"{path} is readable by every user of this machine")


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


def _advice(settings: Settings, breathe: Breathe) -> Iterator[Finding]:
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
        and (settings.listen or settings.listen_socks5 or settings.listen_socks5_tls)
    ):
        message = "given without default_source_ip: who names no source is refused unless the system's choice is in it"
        yield Finding(False, "source_ip", None, message)


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

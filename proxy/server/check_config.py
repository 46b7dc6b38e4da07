"""`--check-config`: what the machine says of settings that are well-formed.

It looks, and changes nothing: a busy port is left alone, no file is written. What a start would fail on is an error,
what an operator may want to know a warning. Rules that need no machine stand in `config.rules`, and `advice`.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from collections.abc import Hashable, Iterator
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from proxy.config.includes import INCLUDE
from proxy.config.load import Loaded
from proxy.config.rules import listeners
from proxy.egress.clock import clock_ns
from proxy.model import Breathe, Endpoint, hold_breath
from proxy.net import contexts, identities
from proxy.net.addresses import own_addresses
from proxy.net.relay import make_engine
from proxy.policy.counting import overview as overview
from proxy.server import calendar, holders
from proxy.server.advice import advice
from proxy.server.certificates import store_tls
from proxy.server.findings import ENVIRONMENT, Finding
from proxy.server.shown import pairs
from proxy.settings import Settings
from proxy.store.probe import probe

#: Bits; a handshake with 4096 takes 3 to 6 ms, with 2048 1 ms, with P-256 0.2 ms.
LONGEST_RSA_KEY = 2048
#: Descriptors that are neither a client's nor a destination's socket.
OTHER_DESCRIPTORS = 64
_NOT_HERE = "is not an address of this machine"
#: From bind: it is no address of this machine, or there is no IPv6 here at all. (Others: no descriptor, say.)
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_WILDCARDS = ("0.0.0.0", "::")

_SECRETS_OF_THE_STORE = (
    *("throttle_store_password_file", "throttle_store_sentinel_password_file", "throttle_store_tls_private_key_file"),
)

_RELATIVE = ", beside the file that includes it"


def check(loaded: Loaded, now: datetime | None = None) -> list[Finding]:
    """Everything there is to say; `now` is the wall clock."""
    settings = loaded.settings
    unfit = (*unfit_tls_blocks(settings), *unfit_timezone(settings))
    return [*_listeners(settings), *_identity(settings), *unfit, *_store(settings), *doubts(loaded, now)]


def doubts(loaded: Loaded, now: datetime | None = None, breathe: Breathe = hold_breath) -> list[Finding]:
    """What a start or a reload takes, and an operator may want to know. All of it are warnings.

    Args:
        breathe: called after each small piece of the work.
    """
    settings = loaded.settings
    findings: list[Finding] = []
    for found in (
        (Finding(False, ENVIRONMENT, None, doubt) for doubt in loaded.doubts),
        (Finding(False, INCLUDE, each, f"{each}: no file is called so{_RELATIVE}") for each in loaded.unmatched),
        _leaves(settings, now or datetime.now(UTC), breathe),
        _absent(settings, breathe),
        _sources(settings, breathe),
        _descriptors(settings),
        _permissions(loaded, breathe),
        advice(settings, breathe),
    ):
        findings += found
    return findings


def _listeners(settings: Settings) -> Iterator[Finding]:
    running = holders.main_pid(os.environ)
    held = None if running is None else holders.listening(running)
    for door, endpoint in listeners(settings):
        number = _bind_errno(endpoint, socket.SOCK_STREAM)
        if number == errno.EACCES:  # another user, or another unit, may have the right that we have not
            message = f"{endpoint}: ports below 1024 need root or CAP_NET_BIND_SERVICE, which this check does not have"
            yield Finding(False, door, endpoint, message)
        elif number == errno.EADDRINUSE:
            yield from _in_use(door, endpoint, held)
        elif number and number not in _NOT_OURS:  # these are told below
            yield Finding(True, door, endpoint, f"{endpoint}: {os.strerror(number)}")


def _in_use(door: str, endpoint: Endpoint, held: frozenset[Endpoint] | None) -> Iterator[Finding]:
    """
    Args:
        held: by the very proxy whose new configuration is looked at; None: that cannot be seen.
    """
    if held is None:
        yield Finding(False, door, endpoint, f"{endpoint} is in use now")
    elif endpoint not in held:
        message = f"{endpoint} is in use, and not by the proxy that shall listen there"
        yield Finding(True, door, endpoint, f"{message}; 'ss -ltnp sport = :{endpoint.port}' shows by whom")


def _bind_errno(endpoint: Endpoint, kind: socket.SocketKind) -> int:
    family = socket.AF_INET6 if endpoint.is_ipv6 else socket.AF_INET
    try:
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:  # as the listener: what is left of old connections does not count
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


def _store(settings: Settings) -> Iterator[Finding]:
    """A start goes on without it; but what is wrong with it is better known before."""
    if settings.throttle_store is None:
        return
    try:
        tls = store_tls(settings)
    except identities.UnfitIdentity as error:
        yield Finding(True, error.directive, None, str(error))
        return
    engine = make_engine()
    try:
        for found in probe(engine, settings.throttle_store, tls, clock_ns):
            yield Finding(found.error, "throttle_store", None, found.message)
    finally:
        engine.stop()


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
    for at in settings.listener:
        for ip in at.default_source_ip:
            breathe()
            if ip != "same" and not _is_here(ip):
                yield Finding(False, "listener", at.name, f"default_source_ip: {ip} {_NOT_HERE}")
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


def _of_the_store(loaded: Loaded) -> Iterator[tuple[str, Hashable, str]]:
    """Files with its secrets, and the directives that name them."""
    settings = loaded.settings
    for given in loaded.origins.of("throttle_store"):
        if given.file in loaded.files and settings.throttle_store is not None and "@" in given.text:
            yield "throttle_store", None, given.file
    for directive in _SECRETS_OF_THE_STORE:
        path = getattr(settings, directive)
        if path is not None:
            yield directive, None, path


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
    paths += _of_the_store(loaded)
    for directive, value, path in paths:
        breathe()
        try:
            readable = os.stat(path).st_mode & stat.S_IROTH
        except OSError:
            continue
        if readable:
            yield Finding(False, directive, value, f"{path} is readable by every user of this machine")

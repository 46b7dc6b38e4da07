"""`--check-config`: what the machine says of settings that are well-formed.

It looks, and changes nothing: a busy port is left alone, no file is written. What a start would fail on is an error,
what an operator may want to know a warning. Rules that need no machine stand in `config_rules`, all but advice.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import NamedTuple

from cryptography import x509

from proxy.config.load import OPTIONS, Given, Settings
from proxy.config.rules import DOORS
from proxy.model import Endpoint
from proxy.settings import Network

#: RFC 5321, section 4.5.3.2.6: a client waits ten minutes for the reply to the final dot.
SHORTEST_IDLE_TIMEOUT = 600.0
#: A random secret of 32 characters has more different ones than this; those in the examples do not.
FEWEST_CHARACTERS = 8
#: Descriptors that are neither a client's nor a destination's socket.
OTHER_DESCRIPTORS = 64


class Finding(NamedTuple):
    """`value` is the parsed value that it is about, None for the directive as a whole."""

    error: bool
    directive: str
    value: object
    message: str


def check(settings: Settings, origins: Mapping[str, Sequence[Given]], now: datetime | None = None) -> list[Finding]:
    """Everything there is to say; `now` is the wall clock."""
    findings = [*_listeners(settings), *_certificate(settings, now or datetime.now(UTC)), *_sources(settings)]
    findings += [*_descriptors(settings), *_permissions(settings, origins), *_secrets(settings)]
    return [*findings, *_advice(settings)]


def sentence(finding: Finding, origins: Mapping[str, Sequence[Given]]) -> str:
    """`file:line: directive: …`, with the line where the value stands."""
    kinds = {option.name: option.kind for option in OPTIONS}
    given = origins.get(finding.directive, ())
    about = [one for one in given if finding.value is None or kinds[finding.directive].parse(one.text) == finding.value]
    where = ""
    if about:
        where = f"{about[-1].file}:{about[-1].line}: " if about[-1].line else f"{about[-1].file}: "
    return f"{where}{'' if finding.error else 'warning: '}{finding.directive}: {finding.message}"


def _listeners(settings: Settings) -> Iterator[Finding]:
    wanted = [(door, endpoint) for door in DOORS for endpoint in getattr(settings, door)]
    if settings.listen_status:
        wanted.append(("listen_status", settings.listen_status))
    for door, endpoint in wanted:
        number = _bind_errno(endpoint, socket.SOCK_STREAM)
        if number == errno.EACCES:
            message = f"{endpoint}: ports below 1024 need root or CAP_NET_BIND_SERVICE (check as the user that runs it)"
            yield Finding(True, door, endpoint, message)
        elif number == errno.EADDRINUSE:  # perhaps by the very proxy whose new configuration is looked at
            yield Finding(False, door, endpoint, f"{endpoint} is in use now")
        elif number:
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


def _certificate(settings: Settings, now: datetime) -> Iterator[Finding]:
    certificate, key = settings.tls_certificate_file, settings.tls_private_key_file
    if certificate is None or key is None:
        return
    for directive, path in (("tls_certificate_file", certificate), ("tls_private_key_file", key)):
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            yield Finding(True, directive, None, f"{path}: {error.strerror}")
            return
    try:
        # The password: a key that needs one must fail here, not ask on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
        with open(certificate, "rb") as file:
            end = x509.load_pem_x509_certificate(file.read()).not_valid_after_utc
    except ssl.SSLError as error:
        reason = (error.reason or "not readable as PEM").replace("_", " ").lower()
        yield Finding(True, "tls_certificate_file", None, f"{certificate} and {key}: {reason}")
    except (OSError, ValueError):
        yield Finding(True, "tls_certificate_file", None, f"{certificate} and {key}: not readable as PEM")
    else:
        if end < now:
            yield Finding(False, "tls_certificate_file", None, f"{certificate}: expired on {end:%Y-%m-%d}")


def _sources(settings: Settings) -> Iterator[Finding]:
    """Single addresses only: a network may well be wider than what the machine has of it."""
    single = [(n, str(n.network_address)) for n in settings.source_ip if n.prefixlen == n.max_prefixlen]
    chosen = [(ip, ip) for ip in settings.default_source_ip if ip != "same"]
    for directive, pairs in (("source_ip", single), ("default_source_ip", chosen)):
        for value, ip in pairs:
            if _bind_errno(Endpoint(ip, 0), socket.SOCK_DGRAM):
                yield Finding(False, directive, value, f"{ip} is not an address of this machine")


def _descriptors(settings: Settings) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 2 * (settings.max_connections or 0) + OTHER_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and wanted > limit:
        message = f"{settings.max_connections} connections need {wanted} descriptors; the limit is {limit} (ulimit -Hn)"
        yield Finding(False, "max_connections", None, message)


def _permissions(settings: Settings, origins: Mapping[str, Sequence[Given]]) -> Iterator[Finding]:
    """Secrets in files that every user of the machine can read."""
    paths: list[tuple[str, object, str]] = []
    paths += [("auth_shared_secret_file", path, path) for path in settings.auth_shared_secret_file]
    if any(given.line for given in origins.get("auth_shared_secret", ())) and settings.config_filename:
        paths.append(("auth_shared_secret", None, settings.config_filename))
    if settings.tls_private_key_file:
        paths.append(("tls_private_key_file", None, settings.tls_private_key_file))
    for directive, value, path in paths:
        try:
            readable = os.stat(path).st_mode & stat.S_IROTH
        except OSError:
            continue
        if readable:
            yield Finding(False, directive, value, f"{path} is readable by every user of this machine")


def _secrets(settings: Settings) -> Iterator[Finding]:
    """Secrets that were not drawn at random, such as those in the examples. They are not shown."""
    owners = [("auth_shared_secret", "", settings.auth_shared_secret)]
    owners += [("instance", f"{block.name}: ", block.auth_shared_secret) for block in settings.instance]
    for directive, owner, secrets in owners:
        if any(len(set(secret)) < FEWEST_CHARACTERS for secret in secrets):
            yield Finding(
                False, directive, None, f"{owner}a secret that can be guessed; `openssl rand -hex 32` makes one"
            )


def _advice(settings: Settings) -> Iterator[Finding]:
    if settings.idle_timeout < SHORTEST_IDLE_TIMEOUT:
        yield Finding(False, "idle_timeout", None, "below the 10 minutes of RFC 5321: slow receivers will be cut off")
    if settings.listen_socks5 and settings.socks5_auth == "none":
        yield Finding(False, "socks5_auth", None, "none: whoever is in allow_from may send from here")
    if settings.listen_proxy_protocol and any(n.prefixlen == 0 for n in settings.listen_proxy_protocol_allow_from):
        yield Finding(False, "listen_proxy_protocol", None, "everybody may send from here: this door has no password")
    if settings.listen_redirect and any(network.prefixlen == 0 for network in settings.allow_from):
        yield Finding(False, "listen_redirect", None, "everybody may send from here: this door has no password")
    if any(not ip_address(endpoint.host).is_loopback for endpoint in settings.listen) and not settings.listen_tls:
        yield Finding(False, "listen_tls", None, "no: mail and its addresses are readable on the way to the proxy")
    if any(network.is_loopback for network in settings.allow_destination):
        yield Finding(False, "allow_destination", None, "loopback is in it: services of this machine can be reached")
    for block in settings.instance:
        for directive, inner, outer in (
            ("allow_from", block.allow_from, settings.allow_from),
            ("source_ip", block.source_ip, settings.source_ip),
        ):
            if outer and any(not _within(network, outer) for network in inner):
                message = f"{block.name}: its {directive} goes beyond the global {directive}, which holds as well"
                yield Finding(False, "instance", None, message)
    for throttle in settings.throttle:
        if not throttle.max_delivery_rate and not throttle.max_concurrent_connections:
            yield Finding(False, "throttle", None, f"{throttle.name}: no limit is set in it")


def _within(network: Network, others: Sequence[Network]) -> bool:
    return any(network.version == other.version and network.subnet_of(other) for other in others)  # type: ignore[arg-type]

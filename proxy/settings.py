"""What the operator asked for, checked and parsed: one frozen `Settings`.

One attribute per directive, of the same name. Durations are seconds, sizes bytes. How a setting is written, and what it
defaults to, stands in `options`; nothing is parsed here. Secrets never appear in a `repr`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, NamedTuple

from proxy.model import Endpoint

Network = IPv4Network | IPv6Network
Mode = Literal["tcp", "smtp"]
SmtpTls = Literal["none", "opportunistic", "required"]
TlsLevel = Literal["none", "opportunistic", "required", "verify", "dane", "dane-only"]


class Rate(NamedTuple):
    """At most `amount` in any `seconds` seconds; `amount` is at least 1."""

    amount: int
    seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSettings:
    """One `instance NAME { … }` block; an empty tuple means that the block does not say."""

    name: str
    allow_from: tuple[Network, ...]
    source_ip: tuple[Network, ...]
    auth_shared_secret: tuple[bytes, ...] = field(repr=False)
    weight: float
    mode: Mode | None = None  # None of these four: the block does not say
    smtp_tls: SmtpTls | None = None
    share_with: str | None = None
    answer_within: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerSettings:
    """One `listener IP:PORT { … }` block; `name` is the listener's address as `Endpoint` spells it."""

    name: str
    mode: Mode | None
    default_source_ip: tuple[str, ...] = ()  # as the global one, which holds where this is empty


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """One `source NAME { … }` block: addresses, and what is said in EHLO there; None: the client's own name.

    A block with a star in its name (`block`) is one of these for each name that it makes.
    """

    name: str
    ip: tuple[Network, ...]
    ehlo: str | None  # with {ip} for the address
    block: str = ""
    tls_client_certificate_file: str | None = None  # None of these two: the global ones
    tls_client_private_key_file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffSettings:
    """One `backoff on … { … }` rule: which replies slow the throttle down, and to what.

    Args:
        on: patterns; any will do. over: more replies than that; None: the first does it.
        percent: of each limit. rate: instead of that, of messages. pause: instead of both, nothing at all.
        return_after: seconds.
    """

    on: tuple[str, ...]
    over: Rate | None = None
    percent: int = 50
    rate: Rate | None = None
    pause: bool = False
    return_after: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupSettings:
    """`warmup FIGURE, … /day from DATE`: messages, one figure a day; `first_day` is counted from 1970-01-01."""

    figures: tuple[int, ...]
    first_day: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleSettings:
    """One `throttle NAME { … }` block. 0 connections or no rate: unlimited.

    It holds for any source and any instance, if none is given, and any receiver, if no domain, MX or destination is.
    """

    name: str
    source: tuple[Network | str, ...]  # a text is the name of a source
    destination: tuple[Network, ...]
    max_concurrent_connections: int
    max_delivery_rate: tuple[Rate, ...]
    wait: float | None  # None: as long as its door has time, see `Access.answer_within`
    domain: tuple[str, ...] = ()
    mx: tuple[str, ...] = ()  # host names, or *.NAME
    instance: tuple[str, ...] = ()
    per: tuple[Literal["source", "receiver", "nothing"], ...] = ("source",)
    scope: Literal["proxy", "cluster"] = "proxy"
    max_connection_rate: tuple[Rate, ...] = ()
    backoff: tuple[BackoffSettings, ...] = ()
    warmup: WarmupSettings | None = None
    enforce: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """`throttle_store`: the Valkey or Redis that keeps what counts over several proxies.

    Args:
        kind: what `servers` are: the one, some Sentinels, some nodes of a cluster.
        servers: host name or IP address, and port; empty: `path` is a socket on this machine.
        service: as the Sentinels call it. sentinel_password: their own; None: they know `user` and `password`, too, or
            ask for nothing.
    """

    kind: Literal["single", "sentinel", "cluster"]
    tls: bool
    servers: tuple[tuple[str, int], ...]
    path: str | None = None
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    database: int = 0
    service: str = ""
    sentinel_password: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """As it was written, but without user and password."""
        if self.path is not None:
            return f"unix://{self.path}" + (f"?db={self.database}" if self.database else "")
        form = "" if self.kind == "single" else f"+{self.kind}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.servers)
        behind = "/".join(filter(None, (self.service, str(self.database or ""))))
        return f"redis{'s' * self.tls}{form}://{hosts}" + (f"/{behind}" if behind else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """One `tls NAME { … }` block: what TLS with these receivers has to be; for whom, as in a throttle block."""

    name: str
    domain: tuple[str, ...] = ()
    mx: tuple[str, ...] = ()
    destination: tuple[Network, ...] = ()
    source: tuple[Network | str, ...] = ()
    instance: tuple[str, ...] = ()
    level: TlsLevel | None = None  # None: the block does not say
    names: tuple[str, ...] = ()
    min: str | None = None  # the oldest version; None: what is usual
    ciphers: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole configuration. `None` and empty tuples mean what the comments say."""

    config_filename: str | None  # None: no file was given
    listen: tuple[Endpoint, ...]
    listen_socks5: tuple[Endpoint, ...]
    listen_proxy_protocol: tuple[Endpoint, ...]
    listen_socks5_tls: tuple[Endpoint, ...]
    listen_proxy_protocol_tls: tuple[Endpoint, ...]
    listen_redirect: tuple[Endpoint, ...]
    listen_status: Endpoint | None
    listen_status_name: tuple[str, ...]
    control_socket: str | None
    control_socket_mode: str
    control_group: str | None
    allow_from: tuple[Network, ...]
    listen_proxy_protocol_allow_from: tuple[Network, ...]
    listen_status_allow_from: tuple[Network, ...]
    auth_shared_secret: tuple[bytes, ...] = field(repr=False)  # those of the files are among them
    auth_shared_secret_file: tuple[str, ...]
    socks5_auth: Literal["required", "none"]
    listen_tls: bool
    tls_certificate_file: str | None  # None: a certificate is made in memory
    tls_private_key_file: str | None
    tls_client_ca_file: str | None  # None: clients are asked for no certificate
    tls_client_certificate_file: str | None  # None: receivers are shown none
    tls_client_private_key_file: str | None
    via: tuple[Endpoint, ...]
    via_secret: bytes | None = field(repr=False)
    via_instance: str | None  # None: the host name
    via_tls: bool
    source_ip: tuple[Network, ...]  # empty: any address of this machine but loopback and unspecified
    default_source_ip: tuple[str, ...]  # canonical IPs, or ("same",); empty: the system's choice
    destination_port: tuple[tuple[int, int], ...]  # inclusive ranges
    deny_destination: tuple[Network, ...]
    allow_destination: tuple[Network, ...]
    connect_timeout: float
    auth_timeout: float
    idle_timeout: float
    half_close_timeout: float
    drain_timeout: float
    upgrade_timeout: float
    max_connections: int | None  # None: from RLIMIT_NOFILE
    reuse_connections: bool
    reuse_connections_max_idle: float
    reuse_connections_max_age: float
    reuse_connections_max_messages: int
    reuse_connections_max_errors: int
    reuse_connections_max_cached: int
    reuse_connections_max_cached_per_destination: int
    mode: Mode
    mode_smtp_starttls: bool
    mode_smtp_auth: bool
    smtp_tls: SmtpTls
    throttle_enforce: bool
    throttle_close_timeout: float
    dns_server: Endpoint | None  # None: as the system's resolver is configured
    dns_trust_ad: bool
    timezone: str
    throttle_store: StoreSettings | None  # None: this process' memory
    throttle_store_members: int | None
    throttle_store_password_file: str | None  # what is in these two is in `throttle_store`
    throttle_store_sentinel_password_file: str | None
    throttle_store_tls_ca_file: str | None  # None: the system's authorities
    throttle_store_tls_certificate_file: str | None  # None: it is shown none
    throttle_store_tls_private_key_file: str | None
    workers: int | Literal["auto"]
    log_verbose: bool
    log_format: Literal["text", "json"]
    log_connections: Literal["all", "errors", "none"]
    log_messages: bool
    stats_interval: float
    instance: tuple[InstanceSettings, ...]
    listener: tuple[ListenerSettings, ...]
    source: tuple[SourceSettings, ...]
    throttle: tuple[ThrottleSettings, ...]
    tls: tuple[TlsSettings, ...]

    @property
    def secure_doors(self) -> tuple[Endpoint, ...]:
        """The standard doors with TLS."""
        return (*self.listen_socks5_tls, *self.listen_proxy_protocol_tls)

    @property
    def standard_doors(self) -> tuple[Endpoint, ...]:
        """All whose protocol is not ours."""
        clear = (*self.listen_socks5, *self.listen_proxy_protocol, *self.listen_redirect)
        return (*clear, *self.secure_doors)

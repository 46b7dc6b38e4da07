"""The table of options: every directive with its form, default and one line of help.

The command line, the environment, the file and `--help` are made from it, and a test holds the sample file, the manual
page and docs/configuration.md against it. How a value is read stands in `values`, the result in `settings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxy.config.backoff import BACKOFF
from proxy.config.store import STORE
from proxy.config.values import (
    ADDRESSES,
    BOOLEAN,
    CIPHERS,
    DNS_SERVER,
    DOMAIN,
    EHLO,
    ENDPOINT,
    LEAVING,
    MX,
    NAME,
    NETWORK,
    PATH,
    PORTS,
    RATE,
    SECRET,
    SOURCE,
    TIMEZONE,
    WEIGHT,
    WORKERS,
    Kind,
    choice,
    count,
    duration,
)
from proxy.config.warmup import WARMUP

LOOPBACK = "127.0.0.0/8, ::1/128"

#: Where mail never has to go: all that the IANA's registries of special-purpose addresses (RFC 6890) do not call
#: globally reachable, multicast, and site-local addresses (RFC 3879). Translators and tunnels (64:ff9b::/96,
#: 64:ff9b:1::/48, 2002::/16) are judged by what lies behind them; see `policy.access`.
DENIED = (
    "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, 192.0.2.0/24, "
    "192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24, 224.0.0.0/4, 240.0.0.0/4, ::/128, ::1/128, "
    "100::/64, 100:0:0:1::/64, 2001::/23, 2001:db8::/32, 3fff::/20, 5f00::/16, fc00::/7, fe80::/10, fec0::/10, ff00::/8"
)

POSITIVE = duration(minimum=0.001)
MODE = choice("tcp", "smtp")
SMTP_TLS = choice("none", "opportunistic", "required")
TLS_LEVEL = choice("none", "opportunistic", "required", "verify", "dane", "dane-only")
TLS_VERSION = choice("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")


@dataclass(frozen=True, slots=True)
class Option:
    """One directive.

    Args:
        name: as in the file, and as the attribute of `Settings`.
        kind: the form of its value, or of each of its values.
        default: as it would be written in the file; None: nothing, see `help`.
        help: one line.
        repeatable: it is a list; repeating the directive adds to it.
        secret: its value is never shown.
        extends: what is given adds to the default instead of replacing it.
    """

    name: str
    kind: Kind
    default: str | None
    help: str
    metavar: str
    repeatable: bool = False
    secret: bool = False
    extends: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "GREENARROW_PROXY_" + self.name.upper()

    def default_value(self) -> object:
        """The parsed default: a tuple for a list, else the value or None."""
        if not self.repeatable:
            return None if self.default is None else self.kind.parse(self.default)
        return self.default_items()

    def default_items(self) -> tuple[Any, ...]:
        """The parsed default of a list."""
        texts = self.default.split(", ") if self.default else ()
        return tuple(value for text in texts for value in self.kind.values(text))


def _one(name: str, kind: Kind, default: str | None, metavar: str, text: str, secret: bool = False) -> Option:
    return Option(name, kind, default, text, metavar, secret=secret)


def _many(name: str, kind: Kind, default: str | None, metavar: str, text: str, secret: bool = False) -> Option:
    return Option(name, kind, default, text, metavar, repeatable=True, secret=secret)


OPTIONS: tuple[Option, ...] = (
    _many("listen", ENDPOINT, None, "IP:PORT", "listen for the native protocol"),
    _many("listen_socks5", ENDPOINT, None, "IP:PORT", "listen for SOCKS5"),
    _many("listen_proxy_protocol", ENDPOINT, None, "IP:PORT", "listen for the PROXY protocol, outbound sense"),
    _many("listen_socks5_tls", ENDPOINT, None, "IP:PORT", "listen for SOCKS5 in TLS"),
    _many("listen_proxy_protocol_tls", ENDPOINT, None, "IP:PORT", "listen for the PROXY protocol in TLS"),
    _many("listen_redirect", ENDPOINT, None, "IP:PORT", "listen for connections that nftables redirected to us"),
    _one("listen_status", ENDPOINT, None, "IP:PORT", "listen for HTTP: status page, metrics, health"),
    _many("listen_status_name", DOMAIN, None, "NAME", "other host names under which it may be asked"),
    _one("control_socket", PATH, None, "PATH", "Unix socket for greenarrow_proxy ctl; @NAME: an abstract one"),
    _one("control_socket_mode", choice("0600", "0660", "0666"), "0660", "MODE", "who may open it, and so look"),
    _one("control_group", NAME, None, "GROUP", "whose members may change something there, too"),
    _many("allow_from", NETWORK, None, "NETWORK", "who may connect, on every listener; required"),
    _many(
        "listen_proxy_protocol_allow_from", NETWORK, None, "NETWORK", "who may connect there instead (as allow_from)"
    ),
    _many("listen_status_allow_from", NETWORK, LOOPBACK, "NETWORK", "who may read the status"),
    _many("auth_shared_secret", SECRET, None, "SECRET", "shared secret; visible in ps when given as a flag", True),
    _many("auth_shared_secret_file", PATH, None, "FILE", "file with shared secrets, one a line"),
    _one("socks5_auth", choice("required", "none"), "required", "WORD", "whether SOCKS5 clients need the secret"),
    _one("listen_tls", BOOLEAN, "yes", "YES|NO", "TLS on the native listener"),
    _one("tls_certificate_file", PATH, None, "FILE", "certificate chain, PEM (made in memory)"),
    _one("tls_private_key_file", PATH, None, "FILE", "private key of that certificate, PEM"),
    _one(
        "tls_client_ca_file", PATH, None, "FILE", "authorities of clients' certificates on the two TLS listeners, PEM"
    ),
    _one("tls_client_certificate_file", PATH, None, "FILE", "certificate chain for receivers that ask for one, PEM"),
    _one("tls_client_private_key_file", PATH, None, "FILE", "private key of that certificate, PEM"),
    _many("via", ENDPOINT, None, "IP:PORT", "go out through the proxy with this native listener; several: in order"),
    _one("via_secret", SECRET, None, "SECRET", "shared secret of that proxy; visible in ps when given as a flag", True),
    _one("via_instance", NAME, None, "NAME", "our name there (this machine's)"),
    _one("via_tls", BOOLEAN, "yes", "YES|NO", "TLS to that proxy, as its listen_tls says"),
    _many("source_ip", NETWORK, None, "NETWORK", "local addresses to leave from (all of this machine but loopback)"),
    _many("default_source_ip", SOURCE, None, "IP|same", "for clients that name none (the system's choice)"),
    _many("destination_port", PORTS, "25, 465, 587", "PORTS", "ports that may be connected to"),
    Option(
        "deny_destination",
        NETWORK,
        DENIED,
        "more destinations that are refused, beside private, loopback and other special ones",
        "NETWORK",
        repeatable=True,
        extends=True,
    ),
    _many("allow_destination", NETWORK, None, "NETWORK", "exceptions; of both lists the longer prefix decides"),
    _one("connect_timeout", POSITIVE, "30s", "DURATION", "limit for connecting to a destination"),
    _one("auth_timeout", POSITIVE, "10s", "DURATION", "limit for a client's TLS, login and request together"),
    _one("idle_timeout", POSITIVE, "15m", "DURATION", "a connection that moves no byte for so long is closed"),
    _one("half_close_timeout", POSITIVE, "1m", "DURATION", "the same, where one side has closed and the other has not"),
    _one("drain_timeout", duration(), "60s", "DURATION", "how long a stop waits for active connections"),
    _one("upgrade_timeout", duration(), "15m", "DURATION", "how long a process that was replaced waits for them"),
    _one("max_connections", count(1), None, "NUMBER", "accepted connections (from RLIMIT_NOFILE)"),
    _one("reuse_connections", BOOLEAN, "yes", "YES|NO", "keep the connections that clients offer"),
    _one("reuse_connections_max_idle", POSITIVE, "30s", "DURATION", "a kept connection is closed after so long unused"),
    _one("reuse_connections_max_age", POSITIVE, "5m", "DURATION", "no connection is kept for longer, from its connect"),
    _one("reuse_connections_max_messages", count(1), "100", "NUMBER", "messages that one connection may carry"),
    _one("reuse_connections_max_errors", count(1), "5", "NUMBER", "a connection with so many replies 5xx is not kept"),
    _one("reuse_connections_max_cached", count(0), "1000", "NUMBER", "kept connections altogether"),
    _one("reuse_connections_max_cached_per_destination", count(0), "10", "NUMBER", "kept connections a destination"),
    _one("mode", MODE, "tcp", "WORD", "tcp: bytes pass untouched; smtp: the proxy takes part in the dialogue"),
    _one("mode_smtp_starttls", BOOLEAN, "no", "YES|NO", "mode smtp: offer STARTTLS to clients"),
    _one("mode_smtp_auth", BOOLEAN, "no", "YES|NO", "mode smtp: show a receiver's AUTH to clients"),
    _one("smtp_tls", SMTP_TLS, "opportunistic", "WORD", "mode smtp: TLS to receivers"),
    _one("throttle_enforce", BOOLEAN, "no", "YES|NO", "an instance that sent without a permit waits"),
    _one("throttle_close_timeout", duration(), "1s", "DURATION", "how long a place waits for a receiver to close, too"),
    _one("timezone", TIMEZONE, "UTC", "ZONE", "whose calendar days warm-ups follow"),
    _one("throttle_store", STORE, "memory", "STORE", "what limits of several proxies live in: redis://HOST", True),
    _one("throttle_store_members", count(1, 1000), None, "NUMBER", "how many proxies use it; required with it"),
    _one("throttle_store_password_file", PATH, None, "FILE", "file with its password"),
    _one("throttle_store_sentinel_password_file", PATH, None, "FILE", "file with the Sentinels' own password"),
    _one("throttle_store_tls_ca_file", PATH, None, "FILE", "authorities of its certificate, PEM (the system's)"),
    _one("throttle_store_tls_certificate_file", PATH, None, "FILE", "certificate chain that it is shown, PEM"),
    _one("throttle_store_tls_private_key_file", PATH, None, "FILE", "private key of that certificate, PEM"),
    _one("dns_server", DNS_SERVER, None, "IP[:PORT]", "who is asked for the domains of blocks (the system's)"),
    _one("dns_trust_ad", BOOLEAN, "no", "YES|NO", "dns_server checks DNSSEC: believe the AD bit of its answers"),
    _one("workers", WORKERS, "1", "NUMBER", "processes of the standard listeners, 1 to 64, or auto: one a core"),
    _one("log_verbose", BOOLEAN, "no", "YES|NO", "log details for debugging"),
    _one("log_format", choice("text", "json"), "text", "WORD", "text, or one JSON object a line"),
    _one("log_connections", choice("all", "errors", "none"), "all", "WORD", "whose closing lines are logged"),
    _one("log_messages", BOOLEAN, "no", "YES|NO", "one line a message where the proxy sees the dialogue"),
    _one("stats_interval", POSITIVE, "10s", "DURATION", "time between two sets of status lines"),
)

#: What may stand in the blocks. Blocks exist in the file only.
BLOCKS: dict[str, tuple[Option, ...]] = {
    "instance": (
        _many("allow_from", NETWORK, None, "NETWORK", "addresses that this instance comes from (any)"),
        _many("source_ip", NETWORK, None, "NETWORK", "local addresses that this instance may leave from (any)"),
        _many(
            "auth_shared_secret", SECRET, None, "SECRET", "this instance's own secret instead of the global one", True
        ),
        _one("weight", WEIGHT, "1", "WEIGHT", "share of throttles relative to other instances"),
        _one("mode", MODE, None, "WORD", "tcp or smtp for this instance (its listener's)"),
        _one("smtp_tls", SMTP_TLS, None, "WORD", "mode smtp: TLS to receivers (the global one)"),
        _one("share_with", NAME, None, "GROUP", "instances of one group share connections (with itself)"),
        _one("answer_within", duration(), None, "DURATION", "how soon this instance must be answered (by its door)"),
    ),
    "listener": (
        _one("mode", MODE, None, "WORD", "tcp or smtp for clients of this listener (the global one)"),
        _many("default_source_ip", SOURCE, None, "IP|same", "for its clients that name none (the global one)"),
    ),
    "source": (
        _many("ip", ADDRESSES, None, "IP", "the addresses of this name"),
        _one("ehlo", EHLO, None, "NAME", "the name that is said in EHLO when leaving from them (the client's)"),
        _one("tls_client_certificate_file", PATH, None, "FILE", "certificate for receivers that ask (the global one)"),
        _one("tls_client_private_key_file", PATH, None, "FILE", "private key of that certificate, PEM"),
    ),
    "throttle": (
        _many("domain", DOMAIN, None, "DOMAIN", "recipient domains: all addresses of their MXs"),
        _many("mx", MX, None, "HOST", "MX hosts: NAME, or *.NAME"),
        _many("destination", NETWORK, None, "NETWORK", "addresses of receivers (any, if no domain or mx is given)"),
        _many("source", LEAVING, None, "SOURCE", "local addresses, or names of sources, that it applies to (any)"),
        _many("instance", NAME, None, "INSTANCE", "instances that it applies to (any)"),
        _many("per", choice("source", "receiver", "nothing"), "source", "WORD", "what counts by itself"),
        _one(
            "scope",
            choice("proxy", "cluster"),
            "proxy",
            "WORD",
            "over which proxies it counts: this one, or all of throttle_store",
        ),
        _one("max_concurrent_connections", count(0), "0", "NUMBER", "connections at a time; 0 is no limit"),
        _many("max_delivery_rate", RATE, None, "RATE", "messages, or connections, in a time; all listed limits hold"),
        _many("max_connection_rate", RATE, None, "RATE", "new connections in a time; all listed limits hold"),
        _one("warmup", WARMUP, None, "DAYS", "messages a day while it lasts: FIGURE, ... /day from DATE"),
        _many("backoff", BACKOFF, None, "RULE", "replies that slow it down, and to what: on PATTERN, ... { ... }"),
        _one("wait", duration(), None, "DURATION", "how long a request may wait for its turn (while there is time)"),
        _one("enforce", BOOLEAN, "yes", "YES|NO", "no: shadow mode, which counts what would have waited"),
    ),
    "tls": (
        _many("domain", DOMAIN, None, "DOMAIN", "recipient domains: all addresses of their MXs"),
        _many("mx", MX, None, "HOST", "MX hosts: NAME, or *.NAME"),
        _many("destination", NETWORK, None, "NETWORK", "addresses of receivers (any, if no domain or mx is given)"),
        _many("source", LEAVING, None, "SOURCE", "local addresses, or names of sources, that it applies to (any)"),
        _many("instance", NAME, None, "INSTANCE", "instances that it applies to (any)"),
        _one("level", TLS_LEVEL, None, "WORD", "what TLS with them has to be (what smtp_tls or the client says)"),
        _many("names", MX, None, "HOST", "of which the certificate has to carry one (the MX host's)"),
        _one("min", TLS_VERSION, None, "VERSION", "the oldest version of TLS (what the level takes)"),
        _one("ciphers", CIPHERS, None, "CIPHERS", "OpenSSL's words for ciphers of TLS 1.2 (what the level takes)"),
    ),
}

"""The address of the throttle store, as Redis' and Valkey's clients spell it: `redis://user:pass@host:port/db`.

`redis` and `valkey` are the same; `rediss` and `valkeys` speak TLS. With `+sentinel` the hosts are Sentinels, and the
path begins with the name of the service; with `+cluster` they are some nodes of a cluster, which has no databases.
`unix:///path?db=0` is a socket on this machine. In user and password, what has a meaning in an address is written with
a percent sign (RFC 3986 section 2.1). No message shows any of it.
"""

from __future__ import annotations

import re
from typing import Literal

from proxy.config.values import Kind
from proxy.protocols.server_name import server_name
from proxy.settings import StoreSettings

MEMORY = "memory"
PORT, SENTINEL_PORT = 6379, 26379
MOST_SERVERS = 64
MOST_DATABASES = 65536
_SCHEME = re.compile(r"(redis|valkey)(s?)(?:\+(sentinel|cluster))?|(unix)")
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})?")


def parse_store(text: str) -> StoreSettings | None:
    """`memory` (None), or an address.

    Raises:
        ValueError: with words that show nothing of the address.
    """
    if text == MEMORY:
        return None
    # Between servers a comma may have a blank behind it; a blank that is meant is written with a percent sign.
    scheme, colon, rest = text.replace(", ", ",").partition("://")
    match = _SCHEME.fullmatch(scheme)
    if not colon or match is None:
        raise ValueError
    if re.search(r"[\x00-\x20\x7f#]", rest):
        raise ValueError("a blank, a control character or a # is written with a percent sign")
    if match[4]:
        return _unix(rest)
    kind = _kind(match[3])
    before, at, after = rest.rpartition("@")
    user, password = _credentials(before) if at else (None, None)
    hosts, _, path = after.partition("/")
    port = SENTINEL_PORT if kind == "sentinel" else PORT
    servers = tuple(dict.fromkeys(_server(host, port) for host in hosts.split(",")))
    if kind == "single" and len(servers) > 1:
        raise ValueError("several servers are for +sentinel and +cluster")
    if len(servers) > MOST_SERVERS:
        raise ValueError(f"at most {MOST_SERVERS} servers")
    service, database = _path(kind, path)
    return StoreSettings(
        kind=kind,
        tls=bool(match[2]),
        servers=servers,
        user=user,
        password=password,
        database=database,
        service=service,
    )


def _kind(word: str | None) -> Literal["single", "sentinel", "cluster"]:
    if word == "sentinel":
        return "sentinel"
    return "cluster" if word == "cluster" else "single"


def _credentials(text: str) -> tuple[str | None, str | None]:
    """`user:password`, `:password`, or `user`, whose password is in a file."""
    user, _, password = text.partition(":")
    if not user and not password:
        raise ValueError("before the @ stands user:password, :password or user")
    return (_unescaped(user) or None), (_unescaped(password) or None)


def _unescaped(text: str) -> str:
    """RFC 3986 section 2.1."""
    if any(match[1] is None for match in _PERCENT.finditer(text)):
        raise ValueError("a percent sign without two hex digits; the sign itself is %25")
    pieces = re.split(r"%([0-9A-Fa-f]{2})", text)
    joined = b"".join(
        bytes.fromhex(piece) if number % 2 else piece.encode("utf-8", "surrogateescape")
        for number, piece in enumerate(pieces)
    )
    try:
        return joined.decode()
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None


def _server(text: str, default_port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/?@]+)(?::([0-9]{1,5}))?", text)
    if match is None:
        raise ValueError("a server is HOST, HOST:PORT or [IPv6]:PORT")
    port = int(match[2]) if match[2] else default_port
    if not 1 <= port <= 65535:
        raise ValueError("a port is 1 to 65535")
    try:
        return server_name(match[1]), port
    except ValueError:
        raise ValueError("a server's name is a host name or an IP address") from None


def _path(kind: str, path: str) -> tuple[str, int]:
    """The service and the database."""
    if kind == "cluster":
        if path:
            raise ValueError("a cluster has no databases: nothing stands behind its servers")
        return "", 0
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        service = _unescaped(service)
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", service):
            raise ValueError("the name of the service stands behind Sentinels: host:26379/mymaster")
    return service, _database(path)


def _database(text: str) -> int:
    if not re.fullmatch(r"[0-9]{0,5}", text) or int(text or 0) >= MOST_DATABASES:
        raise ValueError("a database is a number")
    return int(text or 0)


def _unix(rest: str) -> StoreSettings:
    """`[user:password@]/path[?db=0]`"""
    before, at, after = rest.rpartition("@")
    user, password = _credentials(before) if at else (None, None)
    path, question, query = after.partition("?")
    if not path.startswith("/") or len(path) < 2:
        raise ValueError("a socket's path begins with a slash: unix:///run/valkey/valkey.sock")
    if question and not query.startswith("db="):
        raise ValueError("behind the path only ?db=NUMBER may stand")
    return StoreSettings(
        kind="single",
        tls=False,
        servers=(),
        path=_unescaped(path),
        user=user,
        password=password,
        database=_database(query.removeprefix("db=")),
    )


STORE = Kind(
    "store",
    parse_store,
    "memory, or an address such as redis://:password@host:6379/0 or unix:///path",
    verbatim=True,
    line=True,
)

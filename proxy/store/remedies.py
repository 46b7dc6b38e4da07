"""What an operator can do about a `Trouble`: one sentence, from its step and what server or system said. Pure."""

from __future__ import annotations

import errno
from collections.abc import Callable

from proxy.store.servers import Trouble

#: Troubles that time may mend: a server that is away or starts, and no mistake in the configuration.
_PASSING = frozenset(("resolve", "connect", "call", "login"))


RIGHTS = "docs/configuration.md has the line for ACL SETUSER"


def passes(trouble: Trouble) -> bool:
    """Whether it may be over by itself, without another configuration here or there."""
    if trouble.reply:
        return trouble.reply.split(" ")[0] in ("LOADING", "NOQUORUM", "MASTERDOWN", "BUSY", "TRYAGAIN", "CLUSTERDOWN")
    return trouble.step in _PASSING or (trouble.step == "sentinel" and trouble.number != 0)


def remedy(trouble: Trouble) -> str:
    """What to do about it; "" if there is nothing to say beyond what happened."""
    for known in (_of_reply, _BY_STEP.get(trouble.step, _nothing)):
        found = known(trouble)
        if found:
            return found
    return ""


def sentence(trouble: Trouble) -> str:
    """What happened and what to do about it, with the server's address and without a secret."""
    found = remedy(trouble)
    return f"{trouble.where}: {trouble.reason}" + (f": {found}" if found else "")


def _nothing(trouble: Trouble) -> str:
    return ""


#: What a reply begins with → what to do.
_REPLIES = (
    ("WRONGPASS", "user or password is another one there"),
    ("NOAUTH", "it wants a password: redis://:password@host, or throttle_store_password_file"),
    ("ERR AUTH <password> called without any password", "it has none: leave it out here, or set requirepass there"),
    ("ERR Client sent AUTH, but no password is set", "it has none: leave it out here, or set requirepass there"),
    ("DENIED", "set a password there (requirepass, or ACL SETUSER), or bind it to the address that proxies come to"),
    ("ERR max number of clients", "raise maxclients there, or find out who has so many connections"),
    ("ERR DB index is out of range", "it has fewer databases: name a lower one behind the last slash"),
    ("ERR SELECT is not allowed in cluster mode", "it is one node of a cluster: write redis+cluster://"),
    ("ERR This instance has cluster support disabled", "it is no cluster: write redis:// without +cluster"),
    ("ERR No such master with that name", "SENTINEL MASTERS lists the names that they know"),
    (
        "NOQUORUM",
        "most of the Sentinels are away, or a network is broken: there may be another master on its other side",
    ),
    ("LOADING", "it reads its data, and will be there soon"),
    ("MASTERDOWN", "it is a replica without its master"),
    ("READONLY", "it is a replica: name its master, or its Sentinels with redis+sentinel://"),
    ("MOVED", "it is one node of a cluster: write redis+cluster://"),
    ("CLUSTERDOWN", "its cluster is not whole: CLUSTER INFO there says what is missing"),
    ("OOM", "it has no memory left: raise maxmemory there"),
    ("MISCONF", "it cannot write to its disk, and so takes nothing"),
    ("NOREPLICAS", "fewer replicas follow it than min-replicas-to-write wants"),
)


def _of_reply(trouble: Trouble) -> str:
    for beginning, text in _REPLIES:
        if trouble.reply.startswith(beginning):
            return text
    if trouble.reply.startswith("NOPERM"):
        return f"its user lacks a right: {RIGHTS}"
    if trouble.reply.startswith("ERR unknown command") and "SENTINEL" in trouble.reply.upper():
        return "it is no Sentinel: write redis:// without +sentinel, or name their port, 26379"
    if trouble.reply.startswith("ERR unknown command"):
        return "a command that is needed is disabled or renamed there"
    return ""


def _resolve(trouble: Trouble) -> str:
    return "is it spelled right, and does this machine know it (getent hosts)?"


def _connect(trouble: Trouble) -> str:
    return {
        errno.ECONNREFUSED: "nobody listens there: does it run, and is this address in its `bind`?",
        errno.ENOENT: "there is no such socket: does it run, and is this its `unixsocket`?",
        errno.EACCES: "we may not open this socket: see its `unixsocketperm`",
        errno.ENETUNREACH: "there is no route to it",
        errno.EHOSTUNREACH: "there is no such machine, or a firewall says so",
        0: "is there a firewall between, or is it frozen?",
    }.get(trouble.number, "")


def _sentinel(trouble: Trouble) -> str:
    return _connect(trouble) if trouble.number else ""


def _tls(trouble: Trouble) -> str:
    reason = trouble.reason.lower().replace("_", " ")
    for word, text in (
        ("hostname mismatch", "name it as its certificate does"),
        ("ip address mismatch", "name it as its certificate does, or put the address into the certificate"),
        ("expired", "renew its certificate"),
        ("certificate is not accepted", "throttle_store_tls_ca_file says whose certificates are"),
        ("wrong version number", "it speaks no TLS at this port: write redis:// without the second s"),
        ("certificate required", "it wants to see a certificate: throttle_store_tls_certificate_file"),
        ("unknown ca", "it does not accept our certificate: see its tls-ca-cert-file"),
    ):
        if word in reason:
            return text
    return "does it speak TLS at this port (tls-port)?"


def _login(trouble: Trouble) -> str:
    """It took the connection, and said nothing that makes sense."""
    return "does it want TLS (rediss://), or is another program there?"


_BY_STEP: dict[str, Callable[[Trouble], str]] = {
    "resolve": _resolve,
    "connect": _connect,
    "sentinel": _sentinel,
    "tls": _tls,
    "login": _login,
}

"""What a server says of itself, and what is wrong when it says no. Pure.

A `Trouble` names the step, the server, and the errno or the reply. It never holds a password, though a reply may: an
unknown command is answered with its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from proxy.store.wire import ErrorReply

OLDEST_VALKEY = (7, 2)
OLDEST_REDIS = (6, 2)
_LONGEST_REPLY = 200


class Server(NamedTuple):
    """What INFO says.

    Args:
        kind: `valkey` or `redis`. version: as it says it. role: `master` or `slave` (Valkey says so, too).
        run_id: another one after each start. replication_id: another one after each promotion.
        master: of a replica, `host:port`, else "". mode: `standalone`, `sentinel` or `cluster`.
        evicting: the policy by which it throws keys away when its memory is full, "": it does not, and says so then.
        fenced: it takes no writes while no replica follows it (min-replicas-to-write).
    """

    kind: str
    version: str
    role: str
    run_id: str
    replication_id: str
    mode: str = ""
    master: str = ""
    evicting: str = ""
    fenced: bool = False

    @property
    def identity(self) -> str:
        """Another text after whatever may have changed the data behind our back, but for commands."""
        return f"{self.run_id}:{self.replication_id}"

    @property
    def is_master(self) -> bool:
        return self.role == "master"

    @property
    def too_old(self) -> str:
        """What is too old about it, or ""."""
        least = OLDEST_VALKEY if self.kind == "valkey" else OLDEST_REDIS
        found = tuple(int(part) for part in re.findall(r"[0-9]{1,9}", self.version)[:2])
        if found >= least:
            return ""
        return f"{self.kind} {self.version or 'of an unknown version'} is too old: Valkey 7.2 or Redis 6.2 is needed"


class Trouble(Exception):
    """Why there is no connection, or none of use.

    Args:
        step: what we were at: resolve, connect, tls, auth, select, info, role, version, sentinel, cluster, call.
        where: the server, `host:port`. reason: in words. number: the errno, or 0. reply: the server's error, or "".
    """

    def __init__(self, step: str, where: str, reason: str, number: int = 0, reply: str = "") -> None:
        super().__init__(f"{step} {where}: {reason}")
        self.step, self.where, self.reason, self.number, self.reply = step, where, reason, number, reply


def info_fields(text: bytes) -> dict[str, str]:
    """INFO's `name:value` lines."""
    lines = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def server_of(fields: Mapping[str, str]) -> Server:
    """Of the sections `server`, `replication` and `memory`."""
    valkey = fields.get("valkey_version")
    host, port = fields.get("master_host", ""), fields.get("master_port", "")
    policy = fields.get("maxmemory_policy", "")
    evicts = policy not in ("", "noeviction") and fields.get("maxmemory", "0") != "0"
    mode = fields.get("server_mode") or fields.get("redis_mode", "")
    return Server(
        "valkey" if valkey or fields.get("server_name") == "valkey" else "redis",
        valkey or fields.get("redis_version", ""),
        fields.get("role", ""),
        fields.get("run_id", ""),
        fields.get("master_replid", ""),
        mode,
        f"{host}:{port}" if host else "",
        policy if evicts else "",
        "min_slaves_good_slaves" in fields,
    )


def refusal(step: str, where: str, reply: Any, secrets: Sequence[str]) -> Trouble:
    """What an unexpected reply means, in words for an operator, without the secrets that it may show."""
    if not isinstance(reply, ErrorReply):
        return Trouble(step, where, "an answer that is none")
    text = printable(reply.text, secrets)
    return Trouble(step, where, text, reply=text)


def printable(text: str, secrets: Sequence[str]) -> str:
    """Fit for a log line: without secrets, and not endless."""
    for secret in secrets:
        text = text.replace(secret, "(secret)")
    return "".join(sign if sign.isprintable() else "?" for sign in text[:_LONGEST_REPLY]).rstrip(". ")


#: Errors that come before a script begins. All others may come out of the middle of one.
_BEFORE = frozenset(
    (
        *("NOSCRIPT", "LOADING", "BUSY", "READONLY", "MASTERDOWN", "NOAUTH", "NOPERM", "MOVED", "ASK", "CLUSTERDOWN"),
        *("TRYAGAIN", "CROSSSLOT", "OOM", "MISCONF", "NOREPLICAS"),
    )
)
#: A script's error names the script and its line.
_INSIDE = re.compile(r"\bscript: |user_script|Error running script")


def ran_nothing(reply: ErrorReply) -> bool:
    """Whether the script has certainly not begun."""
    return reply.code in _BEFORE and not _INSIDE.search(reply.text)

"""What `--check-config` asks of the throttle store: all that a start would need, and each right that the script uses.

It writes one key of its own, `{ga:check:…}`, and takes it away again. A start does not do this: it takes the store as
it is, and goes on without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from proxy.net.identities import StoreTls
from proxy.net.relay import Engine
from proxy.settings import StoreSettings
from proxy.store.calls import Script
from proxy.store.cluster import map_of
from proxy.store.dial import WITHIN, Dialler, dialler_of, towards_sentinels
from proxy.store.finding import Sentinels, usable
from proxy.store.link import Link
from proxy.store.remedies import RIGHTS, passes, sentence
from proxy.store.servers import Server, Trouble
from proxy.store.slots import Map, slot_of
from proxy.store.wire import ErrorReply, command, script_call

#: Each command that `lease.lua` uses, as it uses it.
COMMANDS = ("TIME", "HSET", "HGETALL", "HDEL", "PEXPIRE", "DEL")
#: What came of each of them: "" or an error.
_SCRIPT = Script.of(
    b"""
local said = {}
local function try(...)
  local reply = redis.pcall(...)
  said[#said + 1] = type(reply) == 'table' and reply.err or ''
end
try('TIME')
try('HSET', KEYS[1], 'field', '1')
try('HGETALL', KEYS[1])
try('HDEL', KEYS[1], 'other')
try('PEXPIRE', KEYS[1], 1000)
try('DEL', KEYS[1])
return said
"""
)


class Found(NamedTuple):
    """Something to say; no error: time may mend it, or it is only unwise."""

    error: bool
    message: str


def probe(engine: Engine, settings: StoreSettings, tls: StoreTls | None, clock: Callable[[], int]) -> list[Found]:
    """Everything there is to say; waits, some seconds for each server at the most."""
    dialler = dialler_of(engine, settings, tls, clock)
    try:
        if settings.kind == "cluster":
            found = _cluster(dialler, settings)
        elif settings.kind == "sentinel":
            found = _sentinels(dialler, settings)
        else:
            found = _server(dialler, settings.path or settings.servers[0])
        return list(dict.fromkeys(found))
    except Trouble as trouble:
        return [_found(trouble)]


def _found(trouble: Trouble) -> Found:
    return Found(not passes(trouble), sentence(trouble))


def _server(dialler: Dialler, server: tuple[str, int] | str) -> Iterator[Found]:
    link, known = usable(dialler.connect(server))
    try:
        if known.mode == "cluster":
            yield Found(True, f"{link.where}: it is one node of a cluster: write redis+cluster://")
            return
        yield from _look(link, known, _key(lambda slot: True))
    finally:
        _leave(link)


def _sentinels(dialler: Dialler, settings: StoreSettings) -> Iterator[Found]:
    """Each of them shall know the service, since each may be the last one; then who they name."""
    towards = towards_sentinels(dialler, settings)
    for server in settings.servers:
        try:
            alone = Sentinels(towards, dialler, [server], settings.service)
            try:
                alone.ask()
            finally:
                alone.stop()
        except Trouble as trouble:
            yield _found(trouble)._replace(error=False)
    together = Sentinels(towards, dialler, settings.servers, settings.service)
    try:
        link, known = together.find()
    finally:
        together.stop()
    try:
        yield from _look(link, known, _key(lambda slot: True))
        if not known.fenced:
            text = "min-replicas-to-write 1 there keeps a master that is cut off from granting beside its successor"
            yield Found(False, f"{link.where}: {text}")
    finally:
        _leave(link)


def _cluster(dialler: Dialler, settings: StoreSettings) -> Iterator[Found]:
    """Each server that is named shall know the cluster, since each may be the last one; then all masters."""
    found: Map | None = None
    troubles: list[Trouble] = []
    for seed in settings.servers:
        try:
            link, _ = dialler.connect(seed)
            try:
                found = map_of(link)
            finally:
                _leave(link)
        except Trouble as trouble:
            troubles.append(trouble)
    if found is None:
        raise troubles[0]
    yield from (_found(each)._replace(error=False) for each in troubles)
    if found.uncovered:
        yield Found(True, f"cluster: {found.uncovered} of its 16384 slots are on no server: see CLUSTER INFO")
    for server in found.servers:
        try:
            yield from _master(dialler, server, found)
        except Trouble as trouble:
            yield _found(trouble)


def _master(dialler: Dialler, server: tuple[str, int], slots: Map) -> Iterator[Found]:
    link, known = usable(dialler.connect(server))
    try:
        yield from _look(link, known, _key(lambda slot: slots[slot] == server))
    finally:
        _leave(link)


def _key(fits: Callable[[int], bool]) -> bytes:
    """One that nobody else has, in a slot that fits."""
    while True:
        key = b"{ga:check:%b}" % os.urandom(12).hex().encode()
        if fits(slot_of(key)):
            return key


def _leave(link: Link) -> None:
    link.close(Trouble("call", link.where, "not wanted any more"))


def _look(link: Link, server: Server, key: bytes) -> Iterator[Found]:
    """What a master lets us do, and may do to us."""
    loaded, replies = link.ask(
        [command(b"SCRIPT", b"LOAD", _SCRIPT.source), script_call(_SCRIPT.digest, [key], [])], WITHIN, "call"
    )
    for reply in (loaded, replies):
        if isinstance(reply, ErrorReply):
            raise link.refusal("call", reply)
    if not isinstance(replies, list) or len(replies) != len(COMMANDS):
        yield Found(True, f"{link.where}: a script is answered with something else")
        return
    for name, reply in zip(COMMANDS, replies, strict=True):
        if reply:
            text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)
            said = link.refusal("call", ErrorReply(text.encode())).reason
            yield Found(True, f"{link.where}: a script may not use {name}: {said}: {RIGHTS}")
    if server.evicting:
        yield Found(
            True,
            f"{link.where}: with maxmemory-policy {server.evicting} it forgets limits when its memory is full, and "
            "more is sent than they allow: CONFIG SET maxmemory-policy noeviction",
        )

"""What the program says about connections, and the few other lines that have a shape or a limit of their own.

`connection`, the one line of each ended connection, is on the hot path: it is made here in one go, past `logging`. All
else goes through `note`, which every file has from here, with the events and levels. What anybody can cause at will is
limited here; deciding what else is worth a line does not belong here, nor does counting.
"""

from __future__ import annotations

import errno as _errno
import time
from collections.abc import Iterable
from logging import DEBUG, ERROR, INFO, WARNING

import msgspec

from proxy.errors import (
    BadCredentials,
    ClientNotAllowed,
    Overloaded,
    PeerError,
    ProxyError,
    Refused,
    SourceMissing,
    UpstreamError,
)
from proxy.log import outputs
from proxy.log.events import Event
from proxy.log.formats import clock, where
from proxy.log.outputs import note, step
from proxy.log.spelling import FIELD_LIMIT, printable, quoted, word
from proxy.model import Ending, Endpoint, TlsSeen, owner_of
from proxy.stats import Fate, Limiter, Outcomes, StatusLine

__all__ = [
    "DEBUG",
    "ERROR",
    "INFO",
    "WARNING",
    "Event",
    "connection",
    "internal_error",
    "message",
    "note",
    "refused",
    "slowed",
    "status",
    "step",
    "store_back",
    "store_lost",
]

_limiter = Limiter()
#: A missing source address: told once a minute for each, since every connection from it fails.
_sources = Limiter(lines=1)
_slowed = Limiter(lines=1)


def internal_error(message: str, error: BaseException) -> None:
    """An error that is a mistake in this program: one line with the places it came through."""
    note(Event.INTERNAL, ERROR, message, **where(error))


def status(lines: Iterable[StatusLine]) -> None:
    """Write the documented status lines (`stats.Snapshot.lines`), and what the limiter has left out meanwhile."""
    for line in lines:
        note(Event.STATUS, INFO, line.text, **line.fields)
    _tell_suppressed(time.monotonic())


def connection(
    id: int,
    instance: str,
    protocol: str,
    client: Endpoint,
    source: str,
    destination: Endpoint | None,
    reused: bool,
    tls: str,
    bytes_up: int,
    bytes_down: int,
    seconds: float,
    outcome: Ending,
    messages: Outcomes | None = None,
    reply: str = "",
    seen: TlsSeen | None = None,
) -> None:
    """The closing line of a connection that was relayed. Hot path: a few microseconds, no `logging`.

    Args:
        id: names the connection in all lines of this run.
        instance: the name it proved or that its address stands for, or "".
        protocol: native, socks5 or proxy_protocol.
        source: the local address it left from.
        reused: served by a connection that was held open.
        tls: TLS version towards the receiver, "" when the proxy did none. seen: more about it.
        bytes_up: client to receiver; `bytes_down` the other way.
        seconds: from accept (native: OPEN) to the end.
        messages: what became of them; None: the dialogue was not seen.
        reply: the receiver's last refusal, as it said it; "": none was seen.
    """
    out, wanted = outputs.out, outputs.connections
    if out is None or wanted == "none" or (wanted == "errors" and outcome.is_clean):
        return
    if outputs.is_json:
        entry: dict[str, object] = {"time": clock.stamp()} if outputs.is_stamped else {}
        entry |= {"level": "info", "event": "connection", "id": id, "instance": printable(instance)}
        entry["protocol"], entry["client"], entry["source"] = protocol, str(client), source
        if name := outputs.name_of_source(source):
            entry["source_name"] = name
        entry["destination"] = str(destination or "")
        entry |= {"reused": reused, "tls": tls, "up": bytes_up, "down": bytes_down}
        entry["seconds"], entry["outcome"] = round(seconds, 3), outcome
        _add_what_was_seen(entry, messages, reply, seen)
        out.put(msgspec.json.encode(entry).decode())
        return
    stamp = clock.stamp() + " " if outputs.is_stamped else ""
    named = f" source_name={name}" if (name := outputs.name_of_source(source)) else ""
    said = "" if messages is None else _outcomes(messages)
    if reply:
        said += f" reply={quoted(reply, FIELD_LIMIT)}"
    if seen is not None:
        said += _of_tls(seen)
    out.put(
        f"{stamp}connection id={id} instance={word(instance)} protocol={protocol} client={client} "
        f"source={source or '-'}{named} destination={destination or '-'} reused={'yes' if reused else 'no'} "
        f"tls={tls or '-'} up={bytes_up} down={bytes_down} seconds={seconds:.3f} outcome={outcome}{said}"
    )


def _outcomes(messages: Outcomes) -> str:
    return (
        f" messages={messages.messages} accepted={messages.accepted} deferred={messages.deferred} "
        f"rejected={messages.rejected} waited={messages.waited:.3f}"
    )


def _of_tls(seen: TlsSeen) -> str:
    return (
        f" cipher={seen.cipher} certificate={seen.certificate} key={word(seen.key)} subject={word(seen.subject)}"
        f" resumed={'yes' if seen.resumed else 'no'}"
    )


def _add_what_was_seen(entry: dict[str, object], messages: Outcomes | None, reply: str, seen: TlsSeen | None) -> None:
    """In JSON: what became of the messages, the last refusal, and TLS, each where there is one."""
    if messages is not None:
        entry |= {"messages": messages.messages, "accepted": messages.accepted, "deferred": messages.deferred}
        entry |= {"rejected": messages.rejected, "waited": round(messages.waited, 3)}
    if reply:
        entry["reply"] = printable(reply)
    if seen is not None:
        entry |= {"cipher": seen.cipher, "certificate": seen.certificate, "key": seen.key}
        entry |= {"subject": printable(seen.subject), "resumed": seen.resumed}


def message(
    id: int, instance: str, source: str, destination: Endpoint, local: Endpoint | None, tls: str, fate: Fate
) -> None:
    """The line of one message, for `log_messages`.

    Args:
        id: of its connection's line. instance, source, destination, tls: as in `connection`.
        local: of the connection to the receiver that carried it; said only if one did.
    """
    note(
        Event.MESSAGE,
        INFO,
        fate.reply,
        id=id,
        instance=instance,
        source=source,
        destination=destination,
        local=local or "" if fate.carried else "",
        tls=tls if fate.carried else "",
        sender=fate.sender,
        recipients=",".join(fate.recipients),
        rcpts=fate.rcpts,
        size=fate.size,
    )


#: What anybody can cause at will: these lines are limited.
_CHEAP = (ClientNotAllowed, BadCredentials, Overloaded, PeerError)


def refused(
    id: int,
    instance: str,
    protocol: str,
    client: Endpoint,
    source: str,
    destination: Endpoint | None,
    seconds: float,
    error: ProxyError,
) -> None:
    """The one line of a connection that never got to its relay, whoever was the reason.

    `refused` when we said no, `failed` when the network or the receiver did. A no that only its administrator can turn
    into a yes is a warning, and so is a source address that this machine does not have, once a minute. Lines that cost
    a stranger nothing to cause are limited per address.
    """
    now = time.monotonic()
    _tell_suppressed(now)
    if outputs.connections == "none" or (isinstance(error, _CHEAP) and not _limiter.admit(owner_of(client.host), now)):
        return
    if isinstance(error, SourceMissing):
        source = error.source
        if not _sources.admit(source, now):
            return
    fields: dict[str, object] = {"id": id, "instance": instance, "protocol": protocol, "client": client}
    fields |= {"source": source, "destination": destination or "", "seconds": round(seconds, 3), "reason": error.code}
    for_administrators = (isinstance(error, Refused) and not error.retry) or isinstance(error, SourceMissing)
    event, level = Event.REFUSED, WARNING if for_administrators else INFO
    if isinstance(error, UpstreamError):
        event = Event.FAILED
        fields |= {"step": error.step, "errno": _errno.errorcode.get(error.errno, "-")}
        if error.smtp_reply is not None:
            fields["reply"] = error.smtp_reply
        if error.tls_result:
            fields["tls_result"] = error.tls_result
    note(event, level, str(error), **fields)


def slowed(host: str) -> None:
    """An address has given too many wrong secrets; told once a minute for each address, and each /64."""
    now = time.monotonic()
    _slowed.expired(now)
    if _slowed.admit(owner_of(host), now):
        note(Event.REFUSED, WARNING, "too many wrong secrets: answers to further ones are slowed", client=host)


def store_lost(address: str, why: str, members: int) -> None:
    """The throttle store does not answer: each limit that it holds goes on with one of `members` parts."""
    text = "the throttle store does not answer: its limits go on with this proxy's share"
    note(Event.STORE, WARNING, text, store=address, share=f"1/{members}", reason=why)


def store_back(address: str, seconds: float, lost: int) -> None:
    """It answers again.

    Args:
        seconds: that it did not. lost: calls without a reply in that time.
    """
    text = "the throttle store answers again"
    note(Event.STORE, INFO, text, store=address, seconds=round(seconds, 3), calls_lost=lost)


def _tell_suppressed(now: float) -> None:
    for key, count in _limiter.expired(now):
        note(Event.SUPPRESSED, WARNING, "lines about refused connections left out", client=key, lines=count)
    for key, count in _sources.expired(now):
        note(Event.SUPPRESSED, WARNING, "lines about a missing source address left out", source=key, lines=count)

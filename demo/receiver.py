"""The receiving side of the demonstration: an SMTP server that remembers who connected and what arrived."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP as SMTPServer

MX_ADDRESS = "127.0.0.2"


@dataclass
class Arrival:
    """One message as the MX saw it: from which address and port, in which TLS, with which bytes."""

    client: str
    port: int
    tls: bool
    content: bytes


class Mailbox:
    """The MX's memory.

    Attributes:
        arrived: by Message-ID, in the order of arrival.
        most_connections: client address → how many connections it had open at a time, at most.
    """

    def __init__(self) -> None:
        self.arrived: dict[str, Arrival] = {}
        self.most_connections: dict[str, int] = {}
        self._open: set[tuple[str, int]] = set()

    def opened(self, peer: tuple[str, int]) -> None:
        self._open.add(peer)
        now = sum(host == peer[0] for host, _ in self._open)
        self.most_connections[peer[0]] = max(now, self.most_connections.get(peer[0], 0))

    def closed(self, peer: tuple[str, int]) -> None:
        self._open.discard(peer)

    async def handle_DATA(self, server: SMTPServer, session: Any, envelope: Any) -> str:
        content = bytes(envelope.original_content)
        match = re.search(rb"^Message-ID: <(.+)>\r$", content, re.MULTILINE)
        name = match[1].decode() if match else "(no Message-ID)"
        self.arrived[name] = Arrival(*session.peer[:2], session.ssl is not None, content)
        return "250 2.0.0 accepted"


class Server(SMTPServer):
    """Tells the mailbox who is connected."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # again after STARTTLS
        self._peer = transport.get_extra_info("peername")[:2]
        self.event_handler.opened(self._peer)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.event_handler.closed(self._peer)
        super().connection_lost(error)


class MailExchanger(Controller):
    def factory(self) -> Server:
        return Server(self.handler, **self.SMTP_kwargs)


@contextlib.contextmanager
def mail_exchanger(mailbox: Mailbox) -> Iterator[int]:
    """An SMTP server on MX_ADDRESS that offers STARTTLS; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("mx.receiver.example").configure_cert(context)
    with socket.create_server((MX_ADDRESS, 0)) as probe:
        port = int(probe.getsockname()[1])
    mx = MailExchanger(mailbox, hostname=MX_ADDRESS, port=port, data_size_limit=0, tls_context=context)
    mx.start()
    try:
        yield port
    finally:
        mx.stop()

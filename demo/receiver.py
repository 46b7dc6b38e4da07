"""The receiving side of the demonstration: an SMTP server that remembers who connected and what arrived."""

from __future__ import annotations

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
    """The MX's memory, by Message-ID."""

    def __init__(self) -> None:
        self.arrived: dict[str, Arrival] = {}

    async def handle_DATA(self, server: SMTPServer, session: Any, envelope: Any) -> str:
        content = bytes(envelope.original_content)
        match = re.search(rb"^Message-ID: <(.+)>\r$", content, re.MULTILINE)
        name = match[1].decode() if match else "(no Message-ID)"
        self.arrived[name] = Arrival(*session.peer[:2], session.ssl is not None, content)
        return "250 2.0.0 accepted"


@contextlib.contextmanager
def mail_exchanger(mailbox: Mailbox) -> Iterator[int]:
    """An SMTP server on MX_ADDRESS that offers STARTTLS; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("mx.receiver.example").configure_cert(context)
    with socket.create_server((MX_ADDRESS, 0)) as probe:
        port = int(probe.getsockname()[1])
    mx = Controller(mailbox, hostname=MX_ADDRESS, port=port, data_size_limit=0, tls_context=context)
    mx.start()
    try:
        yield port
    finally:
        mx.stop()

#!/usr/bin/env python3
"""Random bytes for all that takes a stranger's bytes apart, and what it makes of them: one line a case.

    python tests/fuzz/forms.py [--seed N] [--cases N]

The first line names the compiled modules that have run. With GREENARROW_PROXY_PURE=1 the rest must be the same: events,
replies, errors and their words.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from proxy.errors import PeerError, UpstreamError  # noqa: E402
from proxy.model import Accepted, Endpoint, Handshake, TlsMode  # noqa: E402
from proxy.protocols.native import frames  # noqa: E402
from proxy.protocols.proxy_protocol import ProxyProtocol  # noqa: E402
from proxy.protocols.recognise import wrong_door  # noqa: E402
from proxy.protocols.server_name import server_name  # noqa: E402
from proxy.protocols.smtp.dialogue import BadReply, ClientDialogue, ReplyParser, Then  # noqa: E402
from proxy.protocols.smtp.tracker import Tracker  # noqa: E402
from proxy.protocols.socks5 import Socks5  # noqa: E402

_TABLES = (
    *(frames.FIRST, frames.ANSWER, frames.TO_HELLO, frames.TO_AUTH, frames.CHANNEL_FROM_CLIENT),
    *(frames.CHANNEL_FROM_PROXY, frames.SESSION_FROM_CLIENT, frames.SESSION_FROM_PROXY),
)
_SOCKS = (
    b"\5\1\0",
    b"\5\1\2",
    b"\5\2\0\2",
    b"\1\3mta\6secret",
    b"\1\0\0",
    b"\5\1\0\1\xc0\0\2\1\0\x19",
    b"\5\2\0\1\x7f\0\0\5\0\0",
)
_SOCKS += (
    b"\5\1\0\4" + bytes(10) + b"\xff\xff\x7f\0\0\1\0\x19",
    b"\5\1\0\3\2mx\0\x19",
    b"\5\3\0\1\0\0\0\0\0\0",
    b"\4\1\0\x19",
)
_PROXY = (
    b"PROXY TCP4 127.0.0.5 127.0.0.9 1 25\r\n",
    b"PROXY TCP6 ::1 ::2 1 25\r\n",
    b"PROXY UNKNOWN\r\n",
    b"PROXY ",
    b"TCP4 ",
)
_PROXY += (
    b"\r\n\r\n\0\r\nQUIT\n",
    b"\x21\x11\0\x0c\x7f\0\0\5\x7f\0\0\x09\0\1\0\x19",
    b"\x20\0\0\0",
    b"\x21\x21\0\x24" + bytes(36),
)
_CLIENT = (
    b"MAIL FROM:<a@example.com>\r\n",
    b"RCPT TO:<b@example.net>\r\n",
    b"DATA\r\n",
    b"BDAT 5 LAST\r\nhello",
    b"RSET\r\n",
    b"NOOP\r\n",
)
_CLIENT += (
    b"QUIT\r\n",
    b"STARTTLS\r\n",
    b"AUTH PLAIN AA==\r\n",
    b".\r\n",
    b"\r\n.\r\n",
    b"..\r\n",
    b"x" * 300,
    b"EHLO a\r\n",
    b"mail from:<>\n",
)
_SERVER = (
    b"250 ok\r\n",
    b"250-more\r\n",
    b"354 go\r\n",
    b"421 bye\r\n",
    b"450 4.2.0 later\r\n",
    b"550 no\r\n",
    b"220 mx ESMTP\r\n",
    b"250\r\n",
)
_SERVER += (
    b"250-STARTTLS\r\n250 LIMITS MAILMAX=5\r\n",
    b"999 what\n",
    b"25",
    b"0 ok\r\n",
    "250 ü\r\n".encode(),
    b"x" * 600,
)
_NAMES = (
    "example",
    "com",
    ".",
    "..",
    "mx-1",
    "-a",
    "_dmarc",
    "1",
    "127.0.0.1",
    "[::1]",
    "::1",
    "bücher",
    "straße",
    "ß",
    "a" * 63,
    "a" * 64,
)


class Cases:
    """Of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pieces(self, words: tuple[bytes, ...]) -> list[bytes]:
        """Some of the words, sometimes damaged, cut anywhere."""
        data = bytearray(b"".join(self.random.choices(words, k=self.random.randrange(1, 9))))
        for _ in range(self.random.choice((0, 0, 0, 1, 3))):
            data[self.random.randrange(len(data))] = self.random.choice(
                (0, 10, 13, 32, 46, 255, self.random.randrange(256))
            )
        size = self.random.choice((1, 3, 7, 40, len(data)))
        return [bytes(data[at : at + size]) for at in range(0, len(data), size)]


def _handshake(handshake: Handshake, pieces: list[bytes]) -> Iterator[object]:
    """Each event is granted."""
    for piece in pieces:
        handshake.receive(piece)
        try:
            while (event := handshake.next_event()) is not None:
                yield event
                yield handshake.send(Accepted(Endpoint("127.0.0.7", 40001)))
        except PeerError as error:
            yield error
            yield handshake.send(error)
            break
    yield handshake.trailing
    yield wrong_door(b"".join(pieces)[:64], handshake.protocol)


def socks5(cases: Cases) -> Iterator[object]:
    yield from _handshake(Socks5(cases.random.random() < 0.5), cases.pieces(_SOCKS))


def proxy_protocol(cases: Cases) -> Iterator[object]:
    yield from _handshake(ProxyProtocol("proxy.example"), cases.pieces(_PROXY))


def native(cases: Cases) -> Iterator[object]:
    """Frames, and what each situation makes of them."""
    kinds = sorted({kind for table in _TABLES for kind in table} | {frames.DATA, 0, 0x99})
    heads = tuple(frames.frame_bytes(kind, b"\x90") for kind in kinds)
    fields = (b"\x93\1\2\3", b"\xc0", b"\xa3mta", b"\xc4\3abc", b"\x91\x92\xa9127.0.0.1\x19", b"\xff")
    payload = b"".join(cases.random.choices(fields, k=cases.random.randrange(6)))
    whole = frames.frame_bytes(cases.random.choice(kinds), payload)
    decoder = frames.FrameDecoder(200)
    for piece in cases.pieces((*heads, whole, whole, frames.encode_data(b"data"))):
        try:
            decoder.receive(piece)
            while (frame := decoder.next_frame()) is not None:
                yield frame[0], bytes(frame[1]), decoder.unread
                yield from (_decoded(frame, table) for table in _TABLES)
        except PeerError as error:
            yield error
            return


def _decoded(frame: frames.Frame, table: frames.Table) -> object:
    try:
        message = frames.decode(frame, table)
    except PeerError as error:
        return error
    return message, frames.encode(message)


def tracker(cases: Cases) -> Iterator[object]:
    refusals: list[str] = []
    seen = Tracker(refusals.append)
    seen.mails_allowed = cases.random.choice((None, None, 0, 1))
    client, server = cases.pieces(_CLIENT), cases.pieces(_SERVER)
    while client or server:
        if client and (not server or cases.random.random() < 0.5):
            left = seen.client_bytes(client.pop(0))
            yield left
            if left:
                seen.mails_allowed = (seen.mails_allowed or 0) + 1
                client.insert(0, left)
        else:
            seen.server_bytes(server.pop(0))
        yield seen.verdict(), seen.at_rest, seen.owes, seen.may_answer, seen.lost, seen.in_data
        yield seen.mails, seen.accepted, seen.deferred, seen.rejected, seen.errors, seen.said
    yield refusals


def replies(cases: Cases) -> Iterator[object]:
    parser = ReplyParser(cases.random.random() < 0.5)
    for piece in cases.pieces(_SERVER):
        parser.receive(piece)
        try:
            while (reply := parser.next_reply()) is not None:
                yield reply, parser.unread
        except BadReply as error:
            yield error
            return


def dialogue(cases: Cases) -> Iterator[object]:
    talk = ClientDialogue("mta.example.org", cases.random.choice(list(TlsMode)), "192.0.2.25:25")
    action = talk.begin()
    for piece in cases.pieces(_SERVER):
        yield action
        if action.then is Then.DONE:
            break
        try:
            action = talk.tls_started() if action.then is Then.START_TLS else talk.receive(piece)
        except UpstreamError as error:
            yield error
            return
    yield talk.step, talk.hello


def names(cases: Cases) -> Iterator[object]:
    name = "".join(cases.random.choices(_NAMES, k=cases.random.randrange(6)))
    try:
        yield name, server_name(name)
    except ValueError as error:
        yield name, error


SUBJECTS: tuple[Callable[[Cases], Iterator[object]], ...] = (
    *(socks5, proxy_protocol, native, tracker, replies, dialogue, names),
)


def compiled() -> list[str]:
    """Modules of ours that are no Python."""
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if name.startswith("proxy.") and str(getattr(module, "__file__", "")).endswith(".so")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=300)
    options = parser.parse_args()
    print("compiled:", *compiled())
    for subject in SUBJECTS:
        cases = Cases(options.seed)
        for number in range(options.cases):
            print(subject.__name__, number, *map(repr, subject(cases)))


if __name__ == "__main__":
    main()

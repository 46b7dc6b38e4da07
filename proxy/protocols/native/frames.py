"""Native protocol: bytes to frames to messages and back. Normative text: docs/protocol.md.

`FrameDecoder` cuts a byte stream into frames and holds at most one control frame of bounded length; DATA is handed out
as it arrives, without waiting for its frame to be whole and without a copy. `decode` validates a control frame against
the table of what is allowed where it was received; `encode` builds one. Everything wrong is a `PeerError`.
Not here: the messages (`native_messages`, `native_session`), proofs and handshakes (`native_auth`), sockets, time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from struct import Struct as Layout
from typing import Any, Final

import msgspec

from proxy.errors import PeerError, ProxyError, Step, Throttled, UpstreamError
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s

#: Versions of the protocol that this code speaks, lowest and highest.
VERSIONS: Final[tuple[int, int]] = (1, 1)
#: Bytes before a payload: its length (32 bits, big-endian), then the frame type (8 bits).
HEADER: Final = 5
#: Longest payload of any frame.
MAX_PAYLOAD: Final = 65_536
#: Longest payload before the peer is authenticated.
MAX_HANDSHAKE_PAYLOAD: Final = 4_096
#: Frame type of raw bytes; the only type without MessagePack.
DATA: Final = 0x13

_LAYOUT: Final = Layout(">IB")
_EMPTY: Final = memoryview(b"")
_encoder = msgspec.msgpack.Encoder()
#: See `decode_again`: frames of a channel's clients, whose messages nobody changes.
_remembered: dict[tuple[int, bytes], m.Message] = {}
_LONGEST_REMEMBERED: Final = 256
_MOST_REMEMBERED: Final = 2048

Frame = tuple[int, memoryview | bytes]
#: What may be received in one situation: frame type → decoder of its payload.
Table = Mapping[int, msgspec.msgpack.Decoder[Any]]


def _table(*types: type[m.Message]) -> Table:
    return {kind.TYPE: msgspec.msgpack.Decoder(kind) for kind in types}


#: What the proxy accepts as the first frame, and as the answer to its CHALLENGE.
FIRST: Final = _table(m.Hello, m.ChannelAuth)
ANSWER: Final = _table(m.Auth)
#: What the client accepts after HELLO, and after AUTH.
TO_HELLO: Final = _table(m.Challenge, m.Error)
TO_AUTH: Final = _table(m.Welcome, m.Error)
#: What comes in on an authenticated connection, besides DATA on channels.
CHANNEL_FROM_CLIENT: Final = _table(m.Open, m.Eof, m.End)
CHANNEL_FROM_PROXY: Final = _table(m.Opened, m.Failed, m.Eof, m.Aborted, m.Ended, m.Probe, m.Goaway, m.Error)
SESSION_FROM_CLIENT: Final = _table(s.Ping, s.Pong, s.Reg, s.Demand, s.Return, s.Outcome, s.Bye, s.List)
SESSION_FROM_PROXY: Final = _table(s.Ping, s.Pong, s.Cert, s.Grant, s.Cap, s.Limit, s.Cached, m.Goaway, m.Error)


class FrameDecoder:
    """Cuts bytes into frames.

    Use: `receive` a chunk, then `next_frame` until it returns None. A payload may be a view into the chunk: it is valid
    until the next `receive`. A chunk that the caller will overwrite must be taken to the None before that; what is left
    over is then copied. DATA comes in pieces as they arrive, `(DATA, piece)`, so a frame of it may give several.

    Args:
        limit: longest payload in bytes; may be raised between two frames.
    """

    __slots__ = ("_at", "_left", "_partial", "_view", "limit")

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self.limit = limit
        self._view = _EMPTY
        self._at = 0
        self._left = 0  # bytes of the current DATA frame still to come
        self._partial = bytearray()  # the beginning of a control frame, or of a header

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take over what was read; frames not yet taken stay first in line."""
        view = memoryview(data)
        if self._at < len(self._view):
            view = memoryview(bytes(self._view[self._at :]) + bytes(view))
        self._view, self._at = view, 0

    @property
    def unread(self) -> bool:
        """Whether something was received that `next_frame` has not looked at."""
        return self._at < len(self._view)

    def lend(self) -> int:
        """Let somebody else cut what comes next: how much of a DATA frame is still to come, to be said to `resume`;
        -1: not now, since the beginning of a frame is held here."""
        return -1 if self._partial or self.unread else self._left

    def resume(self, left: int, data: bytes) -> None:
        """Go on behind who cut frames meanwhile. `left`: of a DATA frame; `data`: what was read and not cut."""
        self._left = left
        if data:
            self.receive(data)

    def next_frame(self) -> Frame | None:
        """The next frame or piece of DATA, or None when more bytes are needed.

        Raises:
            PeerError: a frame longer than allowed, or DATA without a byte; the stream is of no use any more.
        """
        if self._left:
            return self._piece()
        if self._partial:
            return self._resume()
        view, at = self._view, self._at
        body = at + HEADER
        if body <= len(view):
            length, kind = _LAYOUT.unpack_from(view, at)
            if length > self.limit or not length:
                self._check(length, kind)
            end = body + length
            if end <= len(view):
                self._at = end
                return kind, view[body:end]
            if kind == DATA:
                self._at, self._left = body, length
                return self._piece()
        if at < len(view):
            self._partial += view[at:]
        self._view, self._at = _EMPTY, 0
        return None

    def _piece(self) -> Frame | None:
        at = self._at
        piece = self._view[at : at + self._left]
        if not piece:
            self._view, self._at = _EMPTY, 0
            return None
        self._at = at + len(piece)
        self._left -= len(piece)
        return DATA, piece

    def _resume(self) -> Frame | None:
        partial = self._partial
        if not self._fill(HEADER):
            return None
        length, kind = _LAYOUT.unpack_from(partial)
        self._check(length, kind)
        if kind == DATA:
            partial.clear()
            self._left = length
            return self._piece()
        if not self._fill(HEADER + length):
            return None
        payload = bytes(memoryview(partial)[HEADER:])
        partial.clear()
        return kind, payload

    def _fill(self, size: int) -> bool:
        """Complete the partial frame to `size` bytes from the chunk; False: the chunk is used up before."""
        missing = size - len(self._partial)
        if missing > 0:
            at = self._at
            self._partial += self._view[at : at + missing]
            self._at = min(at + missing, len(self._view))
        if len(self._partial) >= size:
            return True
        self._view, self._at = _EMPTY, 0
        return False

    def _check(self, length: int, kind: int) -> None:
        if length > self.limit:
            raise PeerError(f"frame of type 0x{kind:02x} with {length} bytes, at most {self.limit} are allowed here")
        if kind == DATA and not length:
            raise PeerError("DATA frame without a byte")


def decode(frame: Frame, table: Table) -> Any:
    """The message in a control frame.

    Args:
        frame: as `FrameDecoder.next_frame` gave it.
        table: what is allowed here, one of the tables above.

    Raises:
        PeerError: a type that is not allowed here, bad MessagePack, a field of the wrong type or out of its range.
    """
    kind, payload = frame
    decoder = table.get(kind)
    if decoder is None:
        raise PeerError(f"frame of type 0x{kind:02x} is not allowed here")
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        # Text that the peer chose may be part of what msgspec says: cut, and no line breaks.
        detail = " ".join(str(error).split())[:200]
        raise PeerError(f"bad payload in a frame of type 0x{kind:02x}: {detail}") from None


def decode_again(frame: Frame, table: Table) -> Any:
    """As `decode`, for what clients say again and again, word for word: what is short is remembered.

    Args:
        table: always the same one.
    """
    kind, payload = frame
    if len(payload) > _LONGEST_REMEMBERED:
        return decode(frame, table)
    said = kind, bytes(payload)
    message = _remembered.get(said)
    if message is None:
        message = decode(frame, table)
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        _remembered[said] = message
    return message


def encode(message: m.Message) -> bytes:
    """A control message as a frame.

    Raises:
        ValueError: longer than a frame may be; a mistake of the caller, who has to split the list in it.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{type(message).__name__} of {len(payload)} bytes does not fit in a frame")
    return frame_bytes(message.TYPE, payload)


def encode_fields(kind: int, fields: tuple[object, ...]) -> bytes:
    """As `encode`, of a message's fields in their order, records in it as tuples: the same bytes, for fewer objects.

    Raises:
        ValueError: as there.
    """
    payload = _encoder.encode(fields)
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame of type 0x{kind:02x} and {len(payload)} bytes is too long")
    return _LAYOUT.pack(len(payload), kind) + payload


def frame_bytes(kind: int, payload: bytes | memoryview) -> bytes:
    """Header and payload: a frame as it is on the wire."""
    return _LAYOUT.pack(len(payload), kind) + payload


def encode_data(payload: bytes | memoryview) -> bytes:
    """Raw bytes as DATA frames, as many as are needed; nothing for no bytes."""
    size = len(payload)
    if size <= MAX_PAYLOAD:
        return _LAYOUT.pack(size, DATA) + payload if size else b""
    view = memoryview(payload)
    return b"".join(encode_data(view[at : at + MAX_PAYLOAD]) for at in range(0, size, MAX_PAYLOAD))


def error_frame(error: ProxyError) -> bytes:
    """The ERROR frame that tells a client why its connection ends."""
    return encode(m.Error(error.code, _sentence(error), error.retry, _retry_after_ms(error)))


def failed(error: ProxyError, attempts: Iterable[tuple[m.Address, UpstreamError]] = ()) -> m.Failed:
    """The FAILED message for an outcome of OPEN.

    Args:
        error: what decided; an `UpstreamError` gives step, errno and SMTP reply.
        attempts: the destinations that were tried, in order, and what each one ended with.
    """
    upstream = error if isinstance(error, UpstreamError) else None
    throttled = error if isinstance(error, Throttled) else None
    return m.Failed(
        step=upstream.step if upstream else Step.THROTTLE if throttled else None,
        code=error.code,
        message=_sentence(error),
        errno=upstream.errno if upstream else 0,
        smtp_reply=_reply(upstream) if upstream else None,
        retry=error.retry,
        retry_after_ms=_retry_after_ms(error),
        throttle=throttled.throttle if throttled else None,
        # 32 attempts with the longest texts still fit in one frame.
        attempts=attempts_of(attempts, 200, 1024),
        tls_result=upstream.tls_result if upstream else "",
    )


def attempts_of(
    attempts: Iterable[tuple[m.Address, UpstreamError]], longest_message: int, longest_reply: int
) -> list[m.Attempt]:
    """The destinations that were tried in vain; texts are cut, in characters and in bytes."""
    return [
        m.Attempt(a, e.step, e.errno, _reply(e, longest_reply), str(e)[:longest_message], e.tls_result)
        for a, e in attempts
    ]


def _retry_after_ms(error: ProxyError) -> int:
    """Milliseconds, for the outcomes that know when to come back."""
    return min(max(int(getattr(error, "retry_after", 0.0) * 1000), 0), 2**32 - 1)


def _sentence(error: ProxyError) -> str:
    return str(error)[:512]


def _reply(error: UpstreamError, longest: int = 1024) -> bytes | None:
    if error.smtp_reply is None:
        return None
    return error.smtp_reply.encode("utf-8", "surrogateescape")[:longest]

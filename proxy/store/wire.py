"""The bytes of the engine's protocol: commands out, replies in (RESP2 and RESP3). Pure.

Own code, since a reply may come from whoever sits at that address: hiredis allocates what an array says it will hold
(`*100000000` is 763 MB in one go), and returns what the server sends of itself (`>`) as if it were an answer, after
which every call would get its neighbour's. Here a reply is bounded in bytes, in items and in depth before anything is
made of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from proxy.errors import PeerError

#: Bytes, items and depth of one reply. A long answer of ours has some thousand items in a list of lists; the whole of
#: CLUSTER SLOTS of a thousand nodes has 100 KB.
MOST_BYTES = 1 << 20
MOST_ITEMS = 1 << 16
DEEPEST = 8
#: Of the line that begins each item.
_LONGEST_LINE = 4096
_CRLF = b"\r\n"
_STRING, _ERROR, _INTEGER, _NULL, _BOOLEAN, _DOUBLE, _BIG = b"+-:_#,("
_BULK_STRING, _BULK_ERROR, _VERBATIM = b"$!="
_ARRAY, _MAP, _SET, _PUSH, _ATTRIBUTE = b"*%~>|"
_BULK = frozenset((_BULK_STRING, _BULK_ERROR, _VERBATIM))
#: Items that each element of these has.
_AGGREGATES = {_ARRAY: 1, _MAP: 2, _SET: 1, _PUSH: 1, _ATTRIBUTE: 2}


class MalformedReply(PeerError):
    """What came is not this protocol, or more of it than we take."""


class ErrorReply:
    """An answer that says no; a value and no exception, since it may stand inside of a list."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = text.decode("utf-8", "replace")

    @property
    def code(self) -> str:
        """Its first word: ERR, NOSCRIPT, READONLY."""
        return self.text.split(" ", 1)[0]

    def __repr__(self) -> str:
        return f"ErrorReply({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ErrorReply) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


class Push:
    """What the server says of itself; it answers nothing."""

    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __repr__(self) -> str:
        return f"Push({self.items!r})"


class _Nothing:
    """More bytes are needed."""

    def __bool__(self) -> bool:
        return False


#: What `Replies.next` returns while no reply is whole.
NOTHING = _Nothing()


def command(*words: bytes | int) -> bytes:
    """One command, as an array of bulk strings."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        text = b"%d" % word if isinstance(word, int) else word
        parts.append(b"$%d\r\n%b\r\n" % (len(text), text))
    return b"".join(parts)


def script_call(digest: bytes, keys: Iterable[bytes], arguments: Iterable[bytes | int]) -> bytes:
    """EVALSHA, see https://valkey.io/commands/evalsha/."""
    keys = tuple(keys)
    return command(b"EVALSHA", digest, len(keys), *keys, *arguments)


class _Frame:
    """An aggregate that is not whole yet."""

    __slots__ = ("items", "kind", "missing")

    def __init__(self, kind: int, missing: int) -> None:
        self.kind = kind
        self.missing = missing
        self.items: list[Any] = []


class Replies:
    """Bytes in, replies out, in their order."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_items: int = MOST_ITEMS) -> None:
        self._most_bytes, self._most_items = most_bytes, most_items
        self._buffer = b""
        self._at = 0
        self._stack: list[_Frame] = []
        self._bytes = 0  # of this reply, before `_at`
        self._items = 0
        self._bulk: tuple[int, int] | None = None  # kind and length of one whose line was read

    def feed(self, data: bytes) -> None:
        self._buffer = self._buffer[self._at :] + data
        self._at = 0

    def next(self) -> Any:
        """The next whole reply, or `NOTHING`.

        Raises:
            MalformedReply: the connection is of no more use.
        """
        while True:
            item = self._item()
            if item is NOTHING:
                if self._bytes + len(self._buffer) - self._at > self._most_bytes + _LONGEST_LINE:
                    raise MalformedReply(f"a reply of more than {self._most_bytes} bytes")
                return NOTHING
            if item.__class__ is _Frame:
                self._stack.append(item)
                if item.missing:
                    continue
                item = self._close()
            while item is not NOTHING and self._stack:
                top = self._stack[-1]
                top.items.append(item)
                top.missing -= 1
                if top.missing:
                    break
                item = self._close()
            else:
                if item is NOTHING:  # an attribute: what it is about comes behind it
                    continue
                self._bytes = self._items = 0
                return item

    def _close(self) -> Any:
        """The whole value of the innermost aggregate; NOTHING: it is none."""
        frame = self._stack.pop()
        items, kind = frame.items, frame.kind
        if kind == _PUSH:
            return Push(items)
        if kind == _ATTRIBUTE:
            return NOTHING
        if kind == _MAP:
            return list(zip(items[::2], items[1::2], strict=True))
        return items

    def _item(self) -> Any:
        """A whole item, the beginning of an aggregate, or NOTHING."""
        if self._bulk is not None:
            return self._rest_of_bulk(*self._bulk)
        end = self._buffer.find(_CRLF, self._at, self._at + _LONGEST_LINE)
        if end < 0:
            if len(self._buffer) - self._at >= _LONGEST_LINE:
                raise MalformedReply(f"a line of more than {_LONGEST_LINE} bytes")
            return NOTHING
        if end == self._at:
            raise MalformedReply("an empty line in the place of a reply")
        kind, text = self._buffer[self._at], self._buffer[self._at + 1 : end]
        self._count(end + 2 - self._at, 1)
        self._at = end + 2
        if kind == _INTEGER:
            return _number(text)
        if kind in _BULK:
            length = _number(text)
            if length < 0:
                return None
            if length > self._most_bytes:
                raise MalformedReply(f"a text of {length} bytes")
            self._bulk = (kind, length)
            return self._rest_of_bulk(kind, length)
        if kind in _AGGREGATES:
            return self._begin(kind, _number(text))
        return _simple(kind, text)

    def _begin(self, kind: int, number: int) -> Any:
        if number < 0:
            return None
        if number * _AGGREGATES[kind] > self._most_items - self._items:
            raise MalformedReply(f"a reply of more than {self._most_items} items")
        if len(self._stack) >= DEEPEST:
            raise MalformedReply("a reply of lists in lists without an end")
        if kind == _PUSH and self._stack:
            raise MalformedReply("a push in the middle of a reply")
        return _Frame(kind, number * _AGGREGATES[kind])

    def _rest_of_bulk(self, kind: int, length: int) -> Any:
        end = self._at + length
        if len(self._buffer) < end + 2:
            return NOTHING
        if self._buffer[end : end + 2] != _CRLF:
            raise MalformedReply("a text that does not end where it should")
        text = self._buffer[self._at : end]
        self._count(length + 2, 0)
        self._at, self._bulk = end + 2, None
        if kind == _BULK_ERROR:
            return ErrorReply(text)
        return text[4:] if kind == _VERBATIM else text

    def _count(self, size: int, items: int) -> None:
        self._bytes += size
        self._items += items
        if self._bytes > self._most_bytes:
            raise MalformedReply(f"a reply of more than {self._most_bytes} bytes")
        if self._items > self._most_items:
            raise MalformedReply(f"a reply of more than {self._most_items} items")


def _simple(kind: int, text: bytes) -> Any:
    """What is whole in one line."""
    if kind == _STRING:
        return text
    if kind == _ERROR:
        return ErrorReply(text)
    if kind == _NULL:
        return None
    if kind == _BOOLEAN and text in (b"t", b"f"):
        return text == b"t"
    if kind in (_DOUBLE, _BIG):
        return text  # doubles and big numbers: nothing of ours has any, and what they say is for others to read
    raise MalformedReply("bytes that are no reply; is this port an engine's, and TLS as configured?")


def _number(text: bytes) -> int:
    digits = text if text.isdigit() else text[1:]
    if not digits.isdigit() or len(digits) > 19 or (digits is not text and text[0] not in b"+-"):
        raise MalformedReply("a number that is none")
    return int(text)

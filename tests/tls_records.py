"""TLS 1.3 records made by hand, to say what no TLS library lets a peer say: any number of tickets and key updates.

The handshake is `ssl`'s; its secrets come out through a key log (NSS key log format), and from then on whoever has a
`Records` sends with that and reads with `ssl`. RFC 8446: records section 5, keys section 7, messages section 4.6.
"""

from __future__ import annotations

import ssl
import struct
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

#: Cipher suite → hash, length of the key, cipher.
_SUITES: dict[str, tuple[HashAlgorithm, int, type[AESGCM] | type[ChaCha20Poly1305]]] = {
    "TLS_AES_128_GCM_SHA256": (SHA256(), 16, AESGCM),
    "TLS_AES_256_GCM_SHA384": (SHA384(), 32, AESGCM),
    "TLS_CHACHA20_POLY1305_SHA256": (SHA256(), 32, ChaCha20Poly1305),
}
_HANDSHAKE, _DATA = 22, 23


class Records:
    """What one side sends from the end of the handshake on, when it has sent nothing else yet.

    Args:
        secret: its application traffic secret. suite: the cipher suite's name.
    """

    def __init__(self, secret: bytes, suite: str) -> None:
        self._hash, self._key_size, self._cipher = _SUITES[suite]
        self._take(secret)

    def _take(self, secret: bytes) -> None:
        self._secret, self._count = secret, 0
        self._aead = self._cipher(self._expand(b"key", self._key_size))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack(">HB", size, len(label)) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)

    def _record(self, kind: int, content: bytes) -> bytes:
        inner = content + bytes((kind,))
        header = b"\x17\x03\x03" + struct.pack(">H", len(inner) + 16)
        nonce = (self._iv ^ self._count).to_bytes(12, "big")
        self._count += 1
        return header + self._aead.encrypt(nonce, inner, header)

    def data(self, plaintext: bytes) -> bytes:
        """Up to 16 KB in one record."""
        return self._record(_DATA, plaintext)

    def key_updates(self, count: int, answer: bool = False) -> bytes:
        """That many changes of the key, each in a record of its own; with `answer` the peer is to change its own."""
        sent = bytearray()
        for _ in range(count):
            sent += self._record(_HANDSHAKE, b"\x18\0\0\1" + bytes((answer,)))
            self._take(self._expand(b"traffic upd", self._hash.digest_size))
        return bytes(sent)

    def tickets(self, count: int, at_a_time: int = 500) -> bytes:
        """That many session tickets, as small as they can be; several share a record."""
        ticket = struct.pack(">II", 7200, 0) + b"\1n" + b"\0\1t" + b"\0\0"
        message = b"\4" + len(ticket).to_bytes(3, "big") + ticket
        numbers = range(0, count, at_a_time)
        return b"".join(self._record(_HANDSHAKE, message * min(at_a_time, count - at)) for at in numbers)


class KeyLog:
    """The secrets of one context's handshakes; a context manager around them."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._path = Path(self._directory.name) / "keys"
        context.keylog_filename = str(self._path)

    def __enter__(self) -> KeyLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def records(self, sock: ssl.SSLSocket | ssl.SSLObject, side: str) -> Records:
        """For the `CLIENT` or the `SERVER` of the handshake that was finished last, which was this one's."""
        lines = [line.split() for line in self._path.read_text().splitlines()]
        secrets = [bytes.fromhex(line[2]) for line in lines if line[:1] == [f"{side}_TRAFFIC_SECRET_0"]]
        cipher = sock.cipher()
        assert cipher is not None
        return Records(secrets[-1], cipher[0])

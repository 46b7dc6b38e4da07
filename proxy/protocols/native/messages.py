"""The messages of the native protocol as typed records, with the range of every field: handshake and channel.

One class per frame type, in the order of docs/protocol.md, which is the normative text. A message travels as a
MessagePack array of its fields in the order written here; a field with a default may be missing at the end, and fields
that a later version appends are ignored. Not here: the messages of a session (`native_session`), framing and
which side may say what (`native`), proofs (`native_auth`).
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from proxy.errors import Step
from proxy.model import Endpoint, TlsMode, canonical_ip

_U32 = 2**32 - 1
_U63 = 2**63 - 1

U32 = Annotated[int, Meta(ge=0, le=_U32)]
#: Microseconds or milliseconds of somebody's own clock; a signed 64-bit integer holds it in every language.
U63 = Annotated[int, Meta(ge=0, le=_U63)]
Incarnation = U32
PathId = U32
Port = Annotated[int, Meta(ge=1, le=65535)]
Version = Annotated[int, Meta(ge=1, le=255)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]
RunId = Annotated[bytes, Meta(min_length=16, max_length=16)]
#: No control characters. `\Z` and not `$`: the latter lets a final line feed pass.
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
LongName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
#: Goes into an EHLO line or a TLS extension: visible ASCII, so that nothing can be injected behind it.
HostName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"\A[!-~]+\Z")]
Word = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[a-z][a-z0-9_]*\Z")]
Sentence = Annotated[str, Meta(max_length=512)]
Reply = Annotated[bytes, Meta(max_length=4096)]
TlsMinimum = Literal["", "TLSv1.2", "TLSv1.3"]
#: A result type of RFC 8460 section 4.3; empty: nothing was wrong.
TlsResult = Annotated[str, Meta(max_length=64, pattern=r"\A[a-z-]*\Z")]
Errno = Annotated[int, Meta(ge=0, le=65535)]

canonical_host = lru_cache(maxsize=4096)(canonical_ip)


class Kind(enum.IntEnum):
    """What a connection to the proxy is for (HELLO.kind)."""

    SESSION = 1
    CHANNEL = 2


class Message(Struct, array_like=True, frozen=True, gc=False):
    """Base of all messages; `TYPE` is the frame type."""

    TYPE: ClassVar[int]


class Part(Struct, array_like=True, frozen=True, gc=False):
    """Base of the records inside messages."""


class Address(Part, frozen=True):
    """An IP address, kept in canonical text form, and a TCP port."""

    host: Annotated[str, Meta(max_length=45)]
    port: Port

    def __post_init__(self) -> None:
        canonical = canonical_host(self.host)
        if canonical != self.host:
            msgspec.structs.force_setattr(self, "host", canonical)

    @property
    def endpoint(self) -> Endpoint:
        return _endpoint(self.host, self.port)


@lru_cache(maxsize=2048)
def _endpoint(host: str, port: int) -> Endpoint:
    return Endpoint(host, port)


class Local(Address, frozen=True):
    """The local address of a connection; port 0: there is none yet."""

    port: Annotated[int, Meta(ge=0, le=65535)]


# --- handshake ---


class Hello(Message, frozen=True):
    """Client: what I speak and who I say I am."""

    TYPE = 0x01
    kind: Kind
    min_version: Version
    max_version: Version
    instance: Name
    run_id: RunId
    nonce: Nonce


class Challenge(Message, frozen=True):
    """Proxy: the version chosen, and my nonce."""

    TYPE = 0x02
    version: Version
    nonce: Nonce


class Auth(Message, frozen=True):
    """Client: proof that I know the secret."""

    TYPE = 0x03
    proof: Proof


class Welcome(Message, frozen=True):
    """Proxy: proof that I know it too, and what the client needs from now on.

    `key_id` and `key` authenticate channels in one flight; both empty: not on this connection. `reuse_max_idle_ms`: how
    long an offered SMTP connection is kept, 0: not at all.
    """

    TYPE = 0x04
    proof: Proof
    incarnation: Incarnation
    key_id: Annotated[bytes, Meta(max_length=8)] = b""
    key: Annotated[bytes, Meta(max_length=32)] = b""
    reuse_max_idle_ms: U32 = 0
    software: Annotated[str, Meta(max_length=64)] = ""


class ChannelAuth(Message, frozen=True):
    """Client: a channel of a live session, authenticated in one flight."""

    TYPE = 0x05
    version: Version
    key_id: Annotated[bytes, Meta(min_length=8, max_length=8)]
    counter: Annotated[int, Meta(ge=1, le=_U63)]
    proof: Proof


class Error(Message, frozen=True):
    """Proxy: the last frame of a connection that it ends for cause."""

    TYPE = 0x06
    code: Word
    message: Sentence
    retry: bool = False
    retry_after_ms: U32 = 0


class Goaway(Message, frozen=True):
    """Proxy: finish what runs on this connection within the deadline, then close it. `code`: why, for programs."""

    TYPE = 0x07
    deadline_ms: U32
    reason: Sentence = ""
    code: Word = "draining"


# --- channel ---


class TlsaRecord(Part, frozen=True):
    """One TLSA record (RFC 6698 section 2.1) as the DNS has it."""

    usage: Annotated[int, Meta(ge=0, le=255)]
    selector: Annotated[int, Meta(ge=0, le=255)]
    matching: Annotated[int, Meta(ge=0, le=255)]
    data: Annotated[bytes, Meta(min_length=1, max_length=4096)]


class Open(Message, frozen=True):
    """Client: open an SMTP session; the first destination that works is taken.

    `tls_names`, `tlsa`: what the receiver's certificate has to prove (`policy.certificates.Demand`); `tls_min`,
    `tls_ciphers`: what TLS has to be (`net.contexts.Profile`). `probes`: I take PROBE.
    """

    TYPE = 0x10
    source_ip: Annotated[str, Meta(max_length=45)] | None
    destinations: Annotated[list[Address], Meta(min_length=1, max_length=32)]
    ehlo_name: HostName | None = None
    tls: TlsMode = TlsMode.NONE
    tls_server_name: LongName | None = None
    tls_verify: bool = False
    reuse: bool = False
    throttles: Annotated[list[PathId], Meta(max_length=8)] = []
    deadline_ms: Annotated[int, Meta(ge=1, le=600_000)] = 50_000
    smtputf8: bool = False
    requiretls: bool = False
    tenant: LongName | None = None
    fresh: bool = False
    dialogue: bool = False
    source: Name | None = None
    mx: LongName | None = None
    domain: LongName | None = None
    tls_names: Annotated[list[LongName], Meta(max_length=32)] = []
    tlsa: Annotated[list[TlsaRecord], Meta(max_length=32)] = []
    tls_min: TlsMinimum = ""
    tls_ciphers: Annotated[str, Meta(max_length=255, pattern=r"\A[A-Za-z0-9:!+_-]*\Z")] = ""
    probes: bool = False

    def __post_init__(self) -> None:
        if self.source_ip is not None:
            msgspec.structs.force_setattr(self, "source_ip", canonical_host(self.source_ip))
            if self.source is not None:
                raise ValueError("source_ip and source: one of them names it")
        if self.ehlo_name is None and self.tls is not TlsMode.NONE:
            raise ValueError("tls without ehlo_name")
        if self.tls is TlsMode.NONE and (self.tlsa or self.tls_names):
            raise ValueError("tls none, and what its certificate has to prove")


class TlsInfo(Part, frozen=True):
    """The TLS connection between proxy and receiver. `verdict` says why `verified` is what it is.

    `result`: the same in a word of RFC 8460. `key`, `subject`: of the certificate; `issuers`: the DER forms of those
    that came with it.
    """

    version: Annotated[str, Meta(max_length=16)]
    cipher: Annotated[str, Meta(max_length=64)]
    verified: bool
    verdict: Sentence
    certificate: Annotated[bytes, Meta(max_length=32_768)]
    result: TlsResult = ""
    proven_by: Literal["", "authority", "dane"] = ""
    key: Annotated[str, Meta(max_length=64)] = ""
    subject: Sentence = ""
    issuers: Annotated[list[Annotated[bytes, Meta(max_length=16_384)]], Meta(max_length=10)] = []


class Attempt(Part, frozen=True):
    """Why one destination did not work."""

    destination: Address
    step: Step
    errno: Errno
    smtp_reply: Reply | None
    message: Sentence
    tls_result: TlsResult = ""


class Opened(Message, frozen=True):
    """Proxy: the SMTP session is up; from here on DATA flows both ways.

    `attempts`: the destinations that did not work before. `tls_failure`: why the session is in clear, where TLS was
    offered and would have been welcome.
    """

    TYPE = 0x11
    reused: bool
    destination: Address
    local: Local
    messages: U32 = 0
    age_ms: U32 = 0
    greeting: Reply | None = None
    ehlo: Annotated[list[Reply], Meta(max_length=256)] = []
    tls: TlsInfo | None = None
    attempts: Annotated[list[Attempt], Meta(max_length=32)] = []
    tls_failure: Sentence = ""
    tls_result: TlsResult = ""


class Failed(Message, frozen=True):
    """Proxy: no SMTP session; the channel is ready for the next OPEN. `step` nil: refused before any step."""

    TYPE = 0x12
    step: Step | None
    code: Word
    message: Sentence
    errno: Errno = 0
    smtp_reply: Reply | None = None
    retry: bool = False
    retry_after_ms: U32 = 0
    throttle: LongName | None = None
    attempts: Annotated[list[Attempt], Meta(max_length=32)] = []
    tls_result: TlsResult = ""


class Eof(Message, frozen=True):
    """Both: I send no more DATA in this SMTP session (as a TCP FIN)."""

    TYPE = 0x14


class Aborted(Message, frozen=True):
    """Proxy: the SMTP session broke (reset, TLS error, time-out); the client answers with END."""

    TYPE = 0x15
    code: Word
    errno: Errno = 0
    message: Sentence = ""


class End(Message, frozen=True):
    """Client: I am done with this SMTP session; `keep` offers it to the next one. `quit`: the receiver waits for a
    command, and is to hear QUIT."""

    TYPE = 0x16
    keep: bool
    messages: U32 = 0
    quit: bool = False


class Ended(Message, frozen=True):
    """Proxy: the SMTP session is gone from this channel; `reason` says why it was not kept, or is "kept"."""

    TYPE = 0x17
    kept: bool
    reason: Word


class Probe(Message, frozen=True):
    """Proxy: nothing. Whose socket is dead answers it with a reset; sent while a receiver holds back what the client
    sent."""

    TYPE = 0x18

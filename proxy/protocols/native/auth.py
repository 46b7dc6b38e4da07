"""Native protocol: who is at the other end? Both sides of the handshake as state machines without I/O.

Normative text and argument: docs/protocol.md, "Authentication". In short: challenge and response over the shared
secret, in both directions, over a transcript that holds every byte both sides said and the certificate that the client
really saw. Nonces, keys and run ids are arguments: no randomness is made here. `Fences` and `ReplayWindow` are the two
memories that go with it. Not here: which instance has which secret (`access`), messages after the handshake.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from proxy.errors import BadCredentials, NameInUse, PeerError, ProxyError, StaleKey, VersionMismatch
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

CLIENT_LABEL = b"greenarrow-proxy/1 client\0"
SERVER_LABEL = b"greenarrow-proxy/1 server\0"
CHANNEL_LABEL = b"greenarrow-proxy/1 channel\0"
#: Stands for the certificate on a connection without TLS.
NO_CERTIFICATE = bytes(32)

#: Proofs computed for every client at least: how many secrets an instance has is not to be told by a stopwatch.
_MIN_PROOFS = 4
_NO_SECRET = b"no secret at all: a proof made with this one is never accepted"


def certificate_hash(der: bytes) -> bytes:
    """SHA-256 of a leaf certificate's DER form, as the transcript and CERT carry it."""
    return hashlib.sha256(der).digest()


def _mac(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def channel_proof(key: bytes, certificate: bytes, version: int, key_id: bytes, counter: int) -> bytes:
    """The proof in CHANNEL_AUTH: HMAC-SHA256 over label, certificate hash, version, key id and counter."""
    return _mac(key, CHANNEL_LABEL, certificate, bytes((version,)), key_id, counter.to_bytes(8, "big"))


def channel_auth(key: bytes, certificate: bytes, version: int, key_id: bytes, counter: int) -> bytes:
    """The CHANNEL_AUTH frame; the first OPEN may follow in the same flight.

    Args:
        key, key_id: from the session's WELCOME.
        certificate: SHA-256 of the certificate that this channel showed; must be one that CERT announced.
        version: the session's.
        counter: 1 or more, never used before with this key.
    """
    return frames.encode(
        m.ChannelAuth(version, key_id, counter, channel_proof(key, certificate, version, key_id, counter))
    )


class ReplayWindow:
    """Which counters of a key have been seen; they may come out of order by up to `SIZE`."""

    SIZE: Final = 1024
    __slots__ = ("_highest", "_seen")

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 0  # bit i: counter `_highest - i` was seen

    def accept(self, counter: int) -> bool:
        """Whether `counter` is new and not too old; it is then taken as seen."""
        ahead = counter - self._highest
        if ahead > 0:
            kept = self._seen << ahead if ahead < self.SIZE else 0
            self._seen = (kept | 1) & ((1 << self.SIZE) - 1)
            self._highest = counter
            return True
        if -ahead >= self.SIZE or counter < 1:
            return False
        bit = 1 << -ahead
        if self._seen & bit:
            return False
        self._seen |= bit
        return True


@dataclass(slots=True)
class ChannelKey:
    """What a live session handed out for its channels; kept by the proxy as long as the session lives.

    Args:
        secret: the one that the session proved itself with.
    """

    instance: str
    run_id: bytes
    version: int
    key: bytes = field(repr=False)
    secret: bytes = field(default=b"", repr=False)
    window: ReplayWindow = field(default_factory=ReplayWindow)


class Fences:
    """Which run of each instance name holds the name. A new run fences the old one, which stays fenced.

    Two machines cloned with the same name would otherwise throw each other out for ever: so the older one is refused
    for good, and told where the name is in use. Names without a session are forgotten when many others have come since.
    """

    #: Fenced runs remembered for each name; a name restarted more often than this has forgotten its oldest runs.
    REMEMBERED: Final = 64
    #: Names without a session that are remembered; the one whose last session ended first goes first.
    MOST_IDLE: Final = 1024

    def __init__(self) -> None:
        self._current: dict[str, tuple[bytes, str]] = {}
        self._sessions: Counter[str] = Counter()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._fenced: dict[str, dict[bytes, None]] = {}

    def check(self, instance: str, run_id: bytes) -> None:
        """Let a channel of this run pass or not.

        Raises:
            NameInUse: a newer run holds the name; says at which address.
        """
        if run_id in self._fenced.get(instance, ()):
            raise NameInUse(f"name in use by {self._current[instance][1]}")

    def claim(self, instance: str, run_id: bytes, address: str) -> bytes | None:
        """A session of this run has authenticated from `address`; `release` follows when it is over.

        Returns:
            The run that is fenced by it from now on, whose session and channels are to be closed; None: there is none.

        Raises:
            NameInUse: as `check`.
        """
        self.check(instance, run_id)
        previous = self._current.get(instance, (run_id, ""))[0]
        self._current[instance] = run_id, address
        self._sessions[instance] += 1
        self._idle.pop(instance, None)
        if previous == run_id:
            return None
        fenced = self._fenced.setdefault(instance, {})
        fenced[previous] = None
        if len(fenced) > self.REMEMBERED:
            del fenced[next(iter(fenced))]
        return previous

    def release(self, instance: str) -> None:
        """A session that has claimed the name is over."""
        self._sessions[instance] -= 1
        if self._sessions[instance]:
            return
        del self._sessions[instance]
        self._idle[instance] = None
        if len(self._idle) > self.MOST_IDLE:
            forgotten, _ = self._idle.popitem(last=False)
            del self._current[forgotten]
            self._fenced.pop(forgotten, None)

    def __len__(self) -> int:
        """Names remembered."""
        return len(self._current)


@dataclass(frozen=True, slots=True)
class Peer:
    """A client that has proven who it is.

    Args:
        one_flight: by CHANNEL_AUTH; no WELCOME is due then.
        secret: the one that proved it, directly or through its session; a reload may have taken it back meanwhile.
    """

    kind: m.Kind
    instance: str
    run_id: bytes
    version: int
    one_flight: bool
    secret: bytes = field(default=b"", repr=False)


class ServerHandshake:
    """The proxy's side. Feed it with `receive` until `peer` is set; then go on with `decoder`.

    Args:
        secrets_of: the secrets that an instance name may prove itself with, none for one that is not known.
        channel_key_of: the key with that id of a live session, or None.
        nonce: 32 fresh random bytes.
        certificate: SHA-256 of the leaf certificate that this connection showed, `NO_CERTIFICATE` without TLS.
        versions: lowest and highest version spoken.
    """

    def __init__(
        self,
        secrets_of: Callable[[str], Sequence[bytes]],
        channel_key_of: Callable[[bytes], ChannelKey | None],
        *,
        nonce: bytes,
        certificate: bytes = NO_CERTIFICATE,
        versions: tuple[int, int] = frames.VERSIONS,
    ) -> None:
        if len(nonce) != 32 or len(certificate) != 32:
            raise ValueError("nonce and certificate hash have 32 bytes each")
        self.decoder = frames.FrameDecoder(frames.MAX_HANDSHAKE_PAYLOAD)
        self.peer: Peer | None = None
        self._secrets_of = secrets_of
        self._channel_key_of = channel_key_of
        self._nonce = nonce
        self._certificate = certificate
        self._versions = versions
        self._hello: m.Hello | None = None
        self._version = 0
        self._transcript = b""
        self._server_proof = b""

    @property
    def claimed_instance(self) -> str:
        """The name that the client gave, proven or not; empty before it gave one."""
        return self._hello.instance if self._hello else ""

    def receive(self, data: bytes) -> bytes:
        """Take bytes, give the bytes to answer with, perhaps none.

        Frames behind the handshake stay in `decoder`.

        Raises:
            PeerError: bytes that the protocol does not allow, or no common version.
            BadCredentials, StaleKey: not who it says.
        """
        self.decoder.receive(data)
        out = b""
        while self.peer is None and (frame := self.decoder.next_frame()) is not None:
            if self._hello is not None:
                self._answer(frame, self._hello)
                continue
            message = frames.decode(frame, frames.FIRST)
            if isinstance(message, m.Hello):
                out += self._challenge(message, frame)
            else:
                self._channel(message)
        return out

    def welcome(
        self,
        incarnation: int,
        *,
        key_id: bytes = b"",
        key: bytes = b"",
        reuse_max_idle_ms: int = 0,
        software: str = "",
    ) -> bytes:
        """The WELCOME frame for a peer that has authenticated in full; keys for sessions over TLS only."""
        if not self._server_proof:
            raise ValueError("no WELCOME is due")
        if key and self._certificate == NO_CERTIFICATE:
            raise ValueError("a channel key must not cross the wire in clear")
        return frames.encode(m.Welcome(self._server_proof, incarnation, key_id, key, reuse_max_idle_ms, software))

    def _challenge(self, hello: m.Hello, frame: frames.Frame) -> bytes:
        low, high = self._versions
        version = min(high, hello.max_version)
        if hello.min_version > hello.max_version:
            raise PeerError("HELLO with an empty version range")
        if version < max(low, hello.min_version):
            older = "proxy" if hello.min_version > high else "client"
            raise VersionMismatch(
                f"proxy speaks {low}..{high}, client wants {hello.min_version}..{hello.max_version}: "
                f"upgrade the {older} first"
            )
        answer = frames.encode(m.Challenge(version, self._nonce))
        self._hello, self._version = hello, version
        self._transcript = self._certificate + frames.frame_bytes(*frame) + answer
        return answer

    def _answer(self, frame: frames.Frame, hello: m.Hello) -> None:
        auth: m.Auth = frames.decode(frame, frames.ANSWER)
        secrets = list(self._secrets_of(hello.instance))
        matched = _NO_SECRET
        for secret in secrets + [_NO_SECRET] * (_MIN_PROOFS - len(secrets)):
            proof = _mac(secret, CLIENT_LABEL, self._transcript)
            if hmac.compare_digest(proof, auth.proof):
                matched = secret
        # Made in any case: the time until the refusal does not tell how far the client got.
        server_proof = _mac(matched, SERVER_LABEL, self._transcript, frames.frame_bytes(*frame))
        if matched is _NO_SECRET:
            raise BadCredentials("unknown instance or wrong secret")
        self._server_proof = server_proof
        self._accept(Peer(hello.kind, hello.instance, hello.run_id, self._version, one_flight=False, secret=matched))

    def _channel(self, auth: m.ChannelAuth) -> None:
        known = self._channel_key_of(auth.key_id)
        key = known.key if known else _NO_SECRET
        proof = channel_proof(key, self._certificate, auth.version, auth.key_id, auth.counter)
        proven = hmac.compare_digest(proof, auth.proof)
        if (
            known is None
            or not proven
            or self._certificate == NO_CERTIFICATE
            or auth.version != known.version
            or not known.window.accept(auth.counter)
        ):
            raise StaleKey("channel key, counter or proof is not valid: authenticate in full")
        peer = Peer(m.Kind.CHANNEL, known.instance, known.run_id, known.version, one_flight=True, secret=known.secret)
        self._accept(peer)

    def _accept(self, peer: Peer) -> None:
        self.peer = peer
        self.decoder.limit = frames.MAX_PAYLOAD


class RefusedByProxy(ProxyError):
    """The proxy ended the connection with an ERROR frame.

    Args:
        error: as it came; `error.code` is a code of docs/protocol.md.
    """

    code = "refused_by_proxy"

    def __init__(self, error: m.Error) -> None:
        super().__init__(error.message)
        self.error = error


class ClientHandshake:
    """The MTA's side of a full authentication. Send `start()`, then feed it with `receive` until `welcome` is set.

    Args:
        kind: session or channel.
        instance: this MTA's name.
        secret: the shared secret.
        run_id: 16 random bytes, drawn once in the life of the process.
        nonce: 32 fresh random bytes.
        certificate: SHA-256 of the leaf certificate that the proxy showed, `NO_CERTIFICATE` without TLS.
        versions: lowest and highest version spoken.
    """

    def __init__(
        self,
        kind: m.Kind,
        instance: str,
        secret: bytes,
        *,
        run_id: bytes,
        nonce: bytes,
        certificate: bytes = NO_CERTIFICATE,
        versions: tuple[int, int] = frames.VERSIONS,
    ) -> None:
        if len(nonce) != 32 or len(certificate) != 32 or len(run_id) != 16:
            raise ValueError("nonce and certificate hash have 32 bytes each, a run id 16")
        self.decoder = frames.FrameDecoder(frames.MAX_HANDSHAKE_PAYLOAD)
        self.welcome: m.Welcome | None = None
        self.version = 0
        self._secret = secret
        self._versions = versions
        self._certificate = certificate
        self._hello = frames.encode(m.Hello(kind, *versions, instance, run_id, nonce))
        self._expected = b""

    def start(self) -> bytes:
        """The HELLO frame."""
        return self._hello

    def receive(self, data: bytes) -> bytes:
        """Take bytes, give the bytes to answer with, perhaps none. Frames behind the handshake stay in `decoder`.

        Raises:
            PeerError: bytes that the protocol does not allow, or a proxy that does not know the secret.
            RefusedByProxy: the proxy said why it does not want us.
        """
        self.decoder.receive(data)
        out = b""
        while self.welcome is None and (frame := self.decoder.next_frame()) is not None:
            message = frames.decode(frame, frames.TO_AUTH if self._expected else frames.TO_HELLO)
            if isinstance(message, m.Error):
                raise RefusedByProxy(message)
            if isinstance(message, m.Challenge):
                out += self._auth(message, frame)
            else:
                self._check(message)
        return out

    def _auth(self, challenge: m.Challenge, frame: frames.Frame) -> bytes:
        low, high = self._versions
        if not low <= challenge.version <= high:
            raise VersionMismatch(f"proxy chose version {challenge.version}, client speaks {low}..{high}")
        self.version = challenge.version
        transcript = self._certificate + self._hello + frames.frame_bytes(*frame)
        auth = frames.encode(m.Auth(_mac(self._secret, CLIENT_LABEL, transcript)))
        self._expected = _mac(self._secret, SERVER_LABEL, transcript, auth)
        return auth

    def _check(self, welcome: m.Welcome) -> None:
        if not hmac.compare_digest(self._expected, welcome.proof):
            raise PeerError("the proxy does not know the secret, or somebody sits between it and us")
        self.welcome = welcome
        self.decoder.limit = frames.MAX_PAYLOAD

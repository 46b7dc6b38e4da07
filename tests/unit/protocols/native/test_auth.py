"""Who gets in and who does not: both sides of the handshake against each other and against everything in between."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadCredentials, NameInUse, PeerError, ProxyError, StaleKey, VersionMismatch
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import (
    NO_CERTIFICATE,
    ChannelKey,
    ClientHandshake,
    Fences,
    RefusedByProxy,
    ReplayWindow,
    ServerHandshake,
    channel_auth,
)

GLOBAL, OLD, OWN, WRONG = (letter * 32 for letter in (b"g", b"o", b"i", b"w"))
CERT, OTHER_CERT = b"c" * 32, b"d" * 32
RUN = b"r" * 16
KEY, KEY_ID = b"K" * 32, b"k" * 8


def secrets_of(instance: str) -> list[bytes]:
    """As `access` decides it: an instance with its own secret does not accept the global ones."""
    return {"own": [OWN], "nobody": []}.get(instance, [GLOBAL, OLD])


def server(certificate=CERT, versions=(1, 1), nonce=b"N" * 32, keys=None) -> ServerHandshake:
    return ServerHandshake(
        secrets_of, (keys or {}).get, nonce=nonce, certificate=certificate, versions=versions
    )  # fmt: skip


def client(secret=GLOBAL, instance="server-a", certificate=CERT, versions=(1, 1), kind=m.Kind.SESSION, nonce=b"n" * 32):
    return ClientHandshake(
        kind, instance, secret, run_id=RUN, nonce=nonce, certificate=certificate, versions=versions
    )  # fmt: skip


def converse(c: ClientHandshake, s: ServerHandshake) -> m.Welcome:
    """A whole exchange; what a side raises, comes out."""
    s.receive(c.receive(s.receive(c.start())))
    c.receive(s.welcome(7))
    assert c.welcome is not None
    return c.welcome


@pytest.mark.parametrize("kind", list(m.Kind))
def test_both_sides_agree(kind):
    c, s = client(kind=kind), server()
    welcome = converse(c, s)
    assert s.peer is not None
    assert (s.peer.kind, s.peer.instance, s.peer.run_id, s.peer.version) == (kind, "server-a", RUN, 1)
    assert not s.peer.one_flight
    assert (c.version, welcome.incarnation) == (1, 7)


def test_byte_by_byte_and_with_frames_behind():
    c, s = client(kind=m.Kind.CHANNEL), server()
    answer = b""
    for at in range(len(c.start())):
        answer += s.receive(c.start()[at : at + 1])
    auth = b""
    for at in range(len(answer)):
        auth += c.receive(answer[at : at + 1])
    extra = frames.encode(m.End(False)) + frames.encode_data(b"x")
    assert s.receive(auth + extra) == b""
    assert s.peer is not None
    assert s.decoder.next_frame() is not None
    assert s.decoder.next_frame() == (frames.DATA, b"x")
    c.receive(s.welcome(7) + frames.encode(m.Goaway(1)))
    assert c.welcome is not None
    frame = c.decoder.next_frame()
    assert frame is not None
    assert frames.decode(frame, frames.SESSION_FROM_PROXY) == m.Goaway(1)


def test_large_frames_are_allowed_only_after_authentication():
    c, s = client(), server()
    large = frames.frame_bytes(0x23, bytes(frames.MAX_HANDSHAKE_PAYLOAD + 1))
    with pytest.raises(PeerError, match="at most 4096"):
        server().receive(large)
    s.receive(c.receive(s.receive(c.start())) + large)
    assert s.decoder.next_frame() is not None


@pytest.mark.parametrize("secret", [GLOBAL, OLD])
def test_rotation_every_listed_secret_is_accepted_and_answered_with_itself(secret):
    converse(client(secret), server())


def test_an_instances_own_secret_replaces_the_global_one():
    converse(client(OWN, "own"), server())
    with pytest.raises(BadCredentials):
        converse(client(GLOBAL, "own"), server())
    with pytest.raises(BadCredentials):
        converse(client(OWN, "server-a"), server())


@pytest.mark.parametrize(
    ("secret", "instance"),
    [(WRONG, "server-a"), (WRONG, "own"), (GLOBAL, "nobody"), (WRONG, "nobody"), (GLOBAL + b"g", "server-a")],
)
def test_unknown_instance_and_wrong_secret_get_the_same_words(secret, instance):
    with pytest.raises(BadCredentials) as caught:
        converse(client(secret, instance), server())
    assert str(caught.value) == "unknown instance or wrong secret"


def test_unknown_instance_and_wrong_secret_cost_the_same_work(monkeypatch):
    """Not the clock: the number of proofs computed."""
    import hmac

    counts = {"proofs": 0}
    costs = set()
    real = hmac.digest

    def count(*args):
        counts["proofs"] += 1
        return real(*args)

    monkeypatch.setattr(hmac, "digest", count)
    for secret, instance in ((WRONG, "server-a"), (WRONG, "own"), (GLOBAL, "nobody")):
        c, s = client(secret, instance), server()
        auth = c.receive(s.receive(c.start()))
        before = counts["proofs"]
        with pytest.raises(BadCredentials):
            s.receive(auth)
        costs.add(counts["proofs"] - before)
    assert costs == {5}


def test_the_stand_in_for_no_secret_does_not_let_anybody_in():
    from proxy.protocols.native import auth as native_auth

    with pytest.raises(BadCredentials):
        converse(client(native_auth._NO_SECRET, "nobody"), server())


def test_another_certificate_in_between():
    """The interceptor ends TLS with a certificate of its own and passes the frames on."""
    with pytest.raises(BadCredentials):
        converse(client(certificate=OTHER_CERT), server())
    with pytest.raises(BadCredentials):
        converse(client(certificate=NO_CERTIFICATE), server())
    with pytest.raises(BadCredentials):
        converse(client(), server(certificate=NO_CERTIFICATE))


def test_a_recorded_exchange_is_of_no_use():
    c = client()
    first = server(nonce=b"1" * 32)
    auth = c.receive(first.receive(c.start()))
    first.receive(auth)
    second = server(nonce=b"2" * 32)
    second.receive(c.start())
    with pytest.raises(BadCredentials):
        second.receive(auth)
    # Nor towards a client: a new nonce of its own makes the old answers worthless.
    fresh = client(nonce=b"m" * 32)
    fresh.receive(server(nonce=b"1" * 32).receive(c.start()))
    with pytest.raises(PeerError):
        fresh.receive(first.welcome(7))


def test_a_reflected_proof_is_of_no_use():
    """A false proxy without the secret sends the client's own proof back."""
    c = client()
    auth = c.receive(server().receive(c.start()))
    proof = auth[-32:]
    with pytest.raises(PeerError):
        c.receive(frames.encode(m.Welcome(proof, 7)))
    assert c.welcome is None


def test_a_proxy_that_does_not_know_the_secret():
    c = client()
    c.receive(frames.encode(m.Challenge(1, b"N" * 32)))
    with pytest.raises(PeerError, match="does not know the secret"):
        c.receive(frames.encode(m.Welcome(bytes(32), 7)))


def test_welcome_without_challenge():
    with pytest.raises(PeerError):
        client().receive(frames.encode(m.Welcome(bytes(32), 7)))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_on_the_way_is_noticed(position, change):
    """Bytes of HELLO, CHALLENGE, AUTH and WELCOME's proof; either side notices before it trusts the other."""
    c, s = client(), server()

    def tampered(data: bytes, start: int, size: int) -> bytes:
        at = position % total - start
        if not 0 <= at < min(size, len(data)):
            return data
        return data[:at] + bytes((data[at] ^ change,)) + data[at + 1 :]

    total = 70 + 41 + 40 + 40
    try:
        challenge = s.receive(tampered(c.start(), 0, 70))
        auth = c.receive(tampered(challenge, 70, 41))
        s.receive(tampered(auth, 111, 40))
        if s.peer is not None:
            c.receive(tampered(s.welcome(7)[:40], 151, 40) + s.welcome(7)[40:])
    except ProxyError:
        return
    assert c.welcome is None, "neither refused nor still waiting for a frame whose length was changed"


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 2), (1, 9), 2), ((1, 9), (1, 1), 1)],
)
def test_the_highest_common_version(ours, theirs, chosen):
    c, s = client(versions=theirs), server(versions=ours)
    converse(c, s)
    assert c.version == chosen
    assert s.peer is not None
    assert s.peer.version == chosen


def test_no_common_version_says_who_has_to_be_upgraded():
    with pytest.raises(VersionMismatch) as caught:
        converse(client(versions=(2, 3)), server())
    assert str(caught.value) == "proxy speaks 1..1, client wants 2..3: upgrade the proxy first"
    with pytest.raises(VersionMismatch, match=r"proxy speaks 3\.\.4, client wants 1\.\.2: upgrade the client first"):
        converse(client(versions=(1, 2)), server(versions=(3, 4)))
    with pytest.raises(PeerError, match="empty version range"):
        converse(client(versions=(2, 1)), server())


def test_downgrade_in_between():
    """The interceptor lowers the client's range, or the proxy's choice."""
    c, s = client(versions=(1, 2)), server(versions=(1, 2))
    lowered = client(versions=(1, 1)).start()
    with pytest.raises(BadCredentials):
        s.receive(c.receive(s.receive(lowered)))
    c, s = client(versions=(1, 2)), server(versions=(1, 2))
    s.receive(c.start())
    with pytest.raises(BadCredentials):
        s.receive(c.receive(frames.encode(m.Challenge(1, b"N" * 32))))
    with pytest.raises(VersionMismatch):
        client().receive(frames.encode(m.Challenge(2, b"N" * 32)))


def test_refusal_reaches_the_client_with_its_code():
    c, s = client(WRONG), server()
    with pytest.raises(BadCredentials) as caught:
        s.receive(c.receive(s.receive(c.start())))
    with pytest.raises(RefusedByProxy) as told:
        c.receive(frames.error_frame(caught.value))
    assert told.value.error.code == "bad_credentials"
    with pytest.raises(RefusedByProxy):
        client(versions=(2, 3)).receive(frames.error_frame(VersionMismatch("too new")))


@pytest.mark.parametrize(
    "data", [frames.encode(m.Auth(bytes(32))), frames.encode(m.End(True)), frames.encode_data(b"x")]
)
def test_nothing_else_before_hello(data):
    with pytest.raises(PeerError, match="not allowed here"):
        server().receive(data)


def test_nothing_else_after_hello():
    for data in (client().start(), frames.encode(m.End(True)), channel_auth(KEY, CERT, 1, KEY_ID, 1)):
        s = server()
        s.receive(client().start())
        with pytest.raises(PeerError, match="not allowed here"):
            s.receive(data)


# --- channels in one flight ---


def keys() -> dict[bytes, ChannelKey]:
    return {KEY_ID: ChannelKey("server-a", RUN, 1, KEY)}


def test_one_flight_with_the_first_open_behind():
    s = server(keys=keys())
    open_ = m.Open(None, [m.Address("198.51.100.7", 25)])
    assert s.receive(channel_auth(KEY, CERT, 1, KEY_ID, 1) + frames.encode(open_)) == b""
    assert s.peer is not None
    assert s.peer.one_flight
    assert (s.peer.kind, s.peer.instance, s.peer.run_id) == (m.Kind.CHANNEL, "server-a", RUN)
    frame = s.decoder.next_frame()
    assert frame is not None
    assert frames.decode(frame, frames.CHANNEL_FROM_CLIENT) == open_
    with pytest.raises(ValueError, match="no WELCOME"):
        s.welcome(7)


@pytest.mark.parametrize(
    "frame",
    [
        channel_auth(b"x" * 32, CERT, 1, KEY_ID, 1),
        channel_auth(KEY, OTHER_CERT, 1, KEY_ID, 1),
        channel_auth(KEY, CERT, 2, KEY_ID, 1),
        channel_auth(KEY, CERT, 1, b"?" * 8, 1),
        frames.encode(m.ChannelAuth(1, KEY_ID, 2, channel_auth(KEY, CERT, 1, KEY_ID, 1)[-32:])),
    ],
    ids=["wrong key", "other certificate", "other version", "unknown key id", "counter changed"],
)
def test_one_flight_refused_with_the_same_words(frame):
    s = server(keys=keys())
    with pytest.raises(StaleKey) as caught:
        s.receive(frame)
    assert s.peer is None
    assert str(caught.value) == "channel key, counter or proof is not valid: authenticate in full"


def test_one_flight_never_without_tls():
    s = server(certificate=NO_CERTIFICATE, keys=keys())
    with pytest.raises(StaleKey):
        s.receive(channel_auth(KEY, NO_CERTIFICATE, 1, KEY_ID, 1))


def test_a_key_is_never_handed_out_without_tls():
    c, s = client(certificate=NO_CERTIFICATE), server(certificate=NO_CERTIFICATE)
    s.receive(c.receive(s.receive(c.start())))
    with pytest.raises(ValueError, match="in clear"):
        s.welcome(7, key_id=KEY_ID, key=KEY)
    c.receive(s.welcome(7))
    assert c.welcome is not None
    assert c.welcome.key == b""


def test_one_flight_replay():
    shared = keys()
    frame = channel_auth(KEY, CERT, 1, KEY_ID, 5)
    server(keys=shared).receive(frame)
    with pytest.raises(StaleKey):
        server(keys=shared).receive(frame)
    server(keys=shared).receive(channel_auth(KEY, CERT, 1, KEY_ID, 4))


def test_a_false_proof_does_not_use_up_a_counter():
    shared = keys()
    with pytest.raises(StaleKey):
        server(keys=shared).receive(frames.encode(m.ChannelAuth(1, KEY_ID, 2**62, bytes(32))))
    server(keys=shared).receive(channel_auth(KEY, CERT, 1, KEY_ID, 1))


@given(st.lists(st.one_of(st.integers(1, 60), st.integers(1, 3000), st.integers(1, 2**63 - 1)), max_size=80))
def test_replay_window_against_a_set(counters):
    """Never twice; always once unless it is too old to be known."""
    window, seen = ReplayWindow(), set()
    for counter in counters:
        too_old = bool(seen) and max(seen) - counter >= ReplayWindow.SIZE
        assert window.accept(counter) is (counter not in seen and not too_old)
        if not too_old:
            seen.add(counter)


def test_replay_window_edges():
    window = ReplayWindow()
    assert not window.accept(0)
    assert window.accept(1)
    assert not window.accept(0)
    assert window.accept(1024)
    assert not window.accept(1)
    assert window.accept(2)
    assert window.accept(1025)
    assert not window.accept(1)
    assert window.accept(5000)
    assert not window.accept(5000 - 1024)
    assert window.accept(5000 - 1023)


# --- runs ---


def test_a_new_run_fences_the_old_one_for_good():
    fences = Fences()
    assert fences.claim("a", b"1" * 16, "192.0.2.10") is None
    assert fences.claim("a", b"1" * 16, "192.0.2.10") is None, "the same run reconnects"
    fences.check("a", b"1" * 16)
    assert fences.claim("a", b"2" * 16, "192.0.2.20") == b"1" * 16
    for _ in range(2):
        with pytest.raises(NameInUse, match=r"name in use by 192\.0\.2\.20"):
            fences.claim("a", b"1" * 16, "192.0.2.10")
    with pytest.raises(NameInUse):
        fences.check("a", b"1" * 16)
    fences.check("a", b"2" * 16)
    assert fences.claim("b", b"1" * 16, "192.0.2.10") is None, "names do not touch one another"


def test_a_channel_of_a_run_without_session_passes():
    Fences().check("a", b"1" * 16)


def test_names_without_a_session_are_forgotten_when_there_are_many():
    fences = Fences()
    fences.claim("lives", b"1" * 16, "192.0.2.1")
    fences.claim("lives", b"1" * 16, "192.0.2.1")
    fences.release("lives")  # one of two sessions of this run
    fences.claim("clone", b"1" * 16, "192.0.2.1")
    fences.claim("clone", b"2" * 16, "192.0.2.2")
    fences.release("clone")
    fences.release("clone")
    for number in range(Fences.MOST_IDLE + 50):
        with contextlib.suppress(NameInUse):
            fences.claim("back", b"3" * 16, "192.0.2.3")
        name = f"name-{number}"
        fences.claim(name, b"4" * 16, "192.0.2.4")
        fences.release(name)
        assert len(fences) <= Fences.MOST_IDLE + 2
    assert fences.claim("lives", b"5" * 16, "192.0.2.5") == b"1" * 16, "who is connected is not forgotten"
    assert fences.claim("clone", b"1" * 16, "192.0.2.1") is None, "who has long been gone is"


def test_fences_remember_a_bounded_number():
    fences = Fences()
    runs = [bytes((i,)) * 16 for i in range(Fences.REMEMBERED + 3)]
    for run in runs:
        fences.claim("a", run, "192.0.2.1")
    refused = 0
    for run in runs[:-1]:
        try:
            fences.check("a", run)
        except NameInUse:
            refused += 1
    assert refused == Fences.REMEMBERED
    with pytest.raises(NameInUse):
        fences.check("a", runs[-2])

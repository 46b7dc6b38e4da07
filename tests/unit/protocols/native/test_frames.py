"""The codec: any chunking gives the same frames, and nothing but PeerError ever comes out of bad bytes."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import (
    DestinationNotAllowed,
    Draining,
    PeerError,
    Step,
    Throttled,
    UpstreamError,
)
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s

TABLES = {
    name: getattr(native, name)
    for name in (
        "FIRST",
        "ANSWER",
        "TO_HELLO",
        "TO_AUTH",
        "CHANNEL_FROM_CLIENT",
        "CHANNEL_FROM_PROXY",
        "SESSION_FROM_CLIENT",
        "SESSION_FROM_PROXY",
    )
}
END = native.encode(m.End(True, 1))
OPEN = m.Open("192.0.2.1", [m.Address("198.51.100.7", 25)], "mta.example.com", throttles=[7])


def collect(decoder: native.FrameDecoder, chunks: list[bytes]) -> list[tuple[int, bytes]]:
    """All frames, with the pieces of DATA that follow one another joined."""
    out: list[tuple[int, bytes]] = []
    for chunk in chunks:
        decoder.receive(chunk)
        while (frame := decoder.next_frame()) is not None:
            kind, payload = frame[0], bytes(frame[1])
            if kind == native.DATA and out and out[-1][0] == native.DATA:
                out[-1] = (kind, out[-1][1] + payload)
            else:
                out.append((kind, payload))
    return out


def cut(data: bytes, points: list[int]) -> list[bytes]:
    at = [0, *sorted(p % (len(data) + 1) for p in points), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


anything = st.one_of(
    st.binary(min_size=1, max_size=300).map(lambda data: (native.DATA, data)),
    st.tuples(st.integers(0, 255).filter(lambda kind: kind != native.DATA), st.binary(max_size=300)),
)


@given(st.lists(anything, max_size=8), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_chunking_gives_the_same_frames(frames, points):
    stream = b"".join(native.frame_bytes(*frame) for frame in frames)
    whole = collect(native.FrameDecoder(), [stream])
    assert collect(native.FrameDecoder(), cut(stream, points)) == whole
    assert b"".join(payload for _, payload in whole) == b"".join(payload for _, payload in frames)
    assert [kind for kind, _ in whole if kind != native.DATA] == [kind for kind, _ in frames if kind != native.DATA]


@given(st.lists(anything, max_size=8), st.lists(st.integers(0, 10_000), max_size=10))
def test_a_caller_may_reuse_its_buffer_once_it_has_taken_everything(frames, points):
    stream = b"".join(native.frame_bytes(*frame) for frame in frames)
    buffer = bytearray(max(len(stream), 1))
    decoder, out = native.FrameDecoder(), b""
    for chunk in cut(stream, points):
        buffer[: len(chunk)] = chunk
        decoder.receive(memoryview(buffer)[: len(chunk)])
        while (frame := decoder.next_frame()) is not None:
            out += bytes(frame[1])
        buffer[:] = bytes(len(buffer))
    assert out == b"".join(payload for _, payload in frames)


def test_frames_not_taken_stay_first_in_line():
    decoder = native.FrameDecoder()
    decoder.receive(END + native.encode_data(b"abc"))
    assert decoder.next_frame() is not None
    decoder.receive(END)
    assert [kind for kind, _ in collect(decoder, [b""])] == [native.DATA, m.End.TYPE]


def test_who_cuts_frames_meanwhile_goes_on_where_the_decoder_was():
    decoder = native.FrameDecoder()
    assert decoder.lend() == 0
    decoder.receive(native.encode_data(b"abcdef")[:8])
    assert decoder.lend() == -1, "what was received is not taken yet"
    assert collect(decoder, [b""]) == [(native.DATA, b"abc")]
    assert decoder.lend() == 3
    decoder.resume(2, b"")  # somebody else had the d
    assert decoder.lend() == 2
    decoder.resume(1, b"f" + END)  # and the e, and read on
    assert [kind for kind, _ in collect(decoder, [b""])] == [native.DATA, m.End.TYPE]
    decoder.receive(END[:3])
    assert collect(decoder, [b""]) == []
    assert decoder.lend() == -1, "a header has begun"


def test_data_does_not_wait_for_its_frame():
    decoder = native.FrameDecoder()
    decoder.receive(native.encode_data(bytes(1000))[:5] + b"abc")
    frame = decoder.next_frame()
    assert frame == (native.DATA, b"abc")
    assert isinstance(frame[1], memoryview)
    assert decoder.next_frame() is None
    decoder.receive(b"d" * 997)
    assert decoder.next_frame() == (native.DATA, b"d" * 997)
    assert decoder.next_frame() is None


@pytest.mark.parametrize("limit", [0, 10, native.MAX_PAYLOAD])
def test_limit_is_exact_and_checked_before_the_payload_comes(limit):
    decoder = native.FrameDecoder(limit)
    assert collect(decoder, [native.frame_bytes(0x20, bytes(limit))]) == [(0x20, bytes(limit))]
    for header in (struct.pack(">IB", limit + 1, 0x20), struct.pack(">IB", 2**32 - 1, 0x20)):
        for chunks in ([header], [header[:2], header[2:]]):
            with pytest.raises(PeerError, match=f"at most {limit}"):
                collect(native.FrameDecoder(limit), chunks)


def test_limit_may_be_raised_between_two_frames():
    decoder = native.FrameDecoder(10)
    decoder.receive(native.frame_bytes(0x20, bytes(10)) + native.frame_bytes(0x20, bytes(11)))
    assert decoder.next_frame() is not None
    decoder.limit = 11
    assert decoder.next_frame() is not None


def test_data_longer_than_a_frame_is_split():
    payload = bytes(range(256)) * 600
    stream = native.encode_data(payload)
    assert len(stream) == len(payload) + 3 * native.HEADER
    assert collect(native.FrameDecoder(), [stream]) == [(native.DATA, payload)]
    assert native.encode_data(b"") == b""


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
@settings(max_examples=300)
def test_random_streams_raise_only_peer_errors(data, points):
    decoder = native.FrameDecoder(200)
    try:
        for frame in collect(decoder, cut(data, points)):
            for table in TABLES.values():
                native.decode(frame, table)
    except PeerError:
        return


@given(st.sampled_from([(name, kind) for name, table in TABLES.items() for kind in table]), st.binary(max_size=100))
@settings(max_examples=500)
def test_random_payloads_raise_only_peer_errors(where, payload):
    name, kind = where
    try:
        native.decode((kind, payload), TABLES[name])
    except PeerError:
        return


EXAMPLES = [
    OPEN,
    m.Opened(True, m.Address("198.51.100.7", 25), m.Address("192.0.2.1", 40112), 1, 2, b"220 x", [b"250 x"]),
    s.Grant(1, 2, 3, [s.SlotGrant(7, 1, -5, 6)] * 3),
    s.Reg(1, [s.Path(7, "192.0.2.1", [s.Throttle("yahoo", [s.Rate(1, 60)], 2, s.Mode.SUM)])]),
]


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500)
def test_damaged_messages_raise_only_peer_errors(message, data):
    frame = bytearray(native.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(native.HEADER, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for table in TABLES.values():
        if message.TYPE in table:
            try:
                decoded = native.decode((message.TYPE, bytes(frame[native.HEADER :])), table)
            except PeerError:
                continue
            # What gets through can be said again: nothing half-valid enters the program.
            again = native.encode(decoded)
            assert native.decode((again[4], again[native.HEADER :]), table) == decoded


def test_addresses_get_one_name():
    long = m.Open("2001:DB8:0::1", [m.Address("::ffff:192.0.2.1", 25)])
    assert long.source_ip == "2001:db8::1"
    assert long.destinations[0].endpoint == ("192.0.2.1", 25)


def test_peer_text_in_an_error_is_cut_and_on_one_line():
    hostile = native.encode(OPEN)[5:].replace(b"\xa4none", b"\xda\x02\x00" + b"a\n\rb" * 128)
    with pytest.raises(PeerError) as caught:
        native.decode((m.Open.TYPE, hostile), native.CHANNEL_FROM_CLIENT)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_encode_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        native.encode(s.Grant(1, 2**60, 3, [s.SlotGrant(2**32 - 1, 2**31, 2**30, 2**31)] * 4096))


def test_error_frame():
    frame = collect(native.FrameDecoder(), [native.error_frame(Draining("shutting down"))])[0]
    assert native.decode(frame, native.CHANNEL_FROM_PROXY) == m.Error("draining", "shutting down", True, 0)


def test_failed_says_what_each_outcome_knows():
    first, second = m.Address("198.51.100.7", 25), m.Address("198.51.100.8", 25)
    busy = UpstreamError("greeting 421", Step.GREETING, smtp_reply="421 4.3.2 b\u00fcsy")
    refused = UpstreamError("connect: refused", Step.CONNECT, errno=111)
    message = native.failed(refused, [(first, busy), (second, refused)])
    assert (message.step, message.code, message.errno, message.retry) == (Step.CONNECT, "upstream_failed", 111, True)
    assert message.smtp_reply is None
    assert message.attempts[0] == m.Attempt(first, Step.GREETING, 0, "421 4.3.2 b\u00fcsy".encode(), "greeting 421")
    assert message.attempts[1].errno == 111

    waited = native.failed(Throttled("no place under yahoo", "yahoo", 2.5))
    assert (waited.step, waited.throttle, waited.retry_after_ms, waited.retry) == (Step.THROTTLE, "yahoo", 2500, True)

    policy = native.failed(DestinationNotAllowed("port 80 is not allowed"))
    assert (policy.step, policy.code, policy.retry) == (None, "destination_not_allowed", False)
    for each in (message, waited, policy):
        frame = collect(native.FrameDecoder(), [native.encode(each)])[0]
        assert native.decode(frame, native.CHANNEL_FROM_PROXY) == each


def test_failed_with_the_longest_texts_fits_in_a_frame():
    address = m.Address("2001:db8:1111:2222:3333:4444:5555:6666", 25)
    worst = UpstreamError("\U0001f4e7" * 600, Step.GREETING, smtp_reply="5" * 5000)
    frame = native.encode(native.failed(worst, [(address, worst)] * 32))
    assert native.decode(collect(native.FrameDecoder(), [frame])[0], native.CHANNEL_FROM_PROXY)

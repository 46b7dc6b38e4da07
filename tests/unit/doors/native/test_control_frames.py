"""What a session is sent always fits in frames that a client can read."""

from __future__ import annotations

import pytest

from proxy.doors.native import control_frames
from proxy.protocols.native import frames as native
from proxy.protocols.native import session_messages as s
from proxy.protocols.native.messages import Address
from proxy.throttling.limits import Effective, Mode
from proxy.throttling.session import GrantRecord, LimitRecord, Output, PongRecord
from proxy.throttling.throttle import Limit

BIG = 2**32 - 1


def read(frames: list[bytes]) -> list[object]:
    """The messages, as a client takes them."""
    decoder = native.FrameDecoder()
    decoder.receive(b"".join(frames))
    messages = []
    while (frame := decoder.next_frame()) is not None:
        messages.append(native.decode(frame, native.SESSION_FROM_PROXY))
    return messages


def output(**fields: list[object]) -> Output:
    empty = {"pongs": [], "limits": [], "grants": [], "caps": []}
    return Output(ping=None, ping_t=2**63 - 1, hold_us=BIG, **(empty | fields))  # type: ignore[arg-type]


def test_the_longest_grants_and_caps() -> None:
    grants = [GrantRecord(BIG - number, BIG, -(2**31), BIG, BIG) for number in range(10_000)]
    messages = read(control_frames.frames(output(grants=grants, caps=[(BIG, BIG)] * 10_000), BIG))
    assert [r.id for m in messages if isinstance(m, s.Grant) for r in m.records] == [g.id for g in grants]
    assert sum(len(m.records) for m in messages if isinstance(m, s.Cap)) == 10_000


def test_limits_of_any_size() -> None:
    """Short ones many to a frame, long ones few; all arrive, in order."""
    limits = tuple(Limit(BIG, 31 * 86400, BIG) for _ in range(4))
    long = [LimitRecord(n, (Effective(limits, BIG),) * 8, BIG, BIG, True, "\U0001f4ec" * 512) for n in range(200)]
    short = [LimitRecord(n, (Effective((Limit(1, 1),), 0),), 0, 0, False, "") for n in range(200, 3000)]
    messages = read(control_frames.frames(output(limits=long + short), BIG))
    assert [r.id for m in messages if isinstance(m, s.Limit) for r in m.records] == list(range(3000))
    assert len(messages) < 30


def test_of_too_many_windows_those_that_hold_up_most() -> None:
    limits = tuple(Limit(amount, seconds) for amount, seconds in ((9, 1), (1, 2), (9, 3), (1, 4), (9, 5)))
    (message,) = read(control_frames.frames(output(limits=[LimitRecord(1, (Effective(limits),), 0, 0, False, "")]), 1))
    assert isinstance(message, s.Limit)
    assert sorted(rate.seconds for rate in message.records[0].throttles[0].rates) == [2, 3, 4, 5]


def test_refusals() -> None:
    messages = read(control_frames.refusals(dict.fromkeys(range(1024), "📬" * 2000), 1))
    records = [record for m in messages if isinstance(m, s.Limit) for record in m.records]
    assert [record.id for record in records] == list(range(1024))
    assert {len(record.warning) for record in records} == {512}


def test_the_longest_list_of_cached_connections() -> None:
    address = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    entry = s.CachedEntry(address, Address(address, 65535), "h" * 255, "opportunistic", BIG)
    message = s.Cached(BIG, [entry] * control_frames.MAX_CACHED, True)
    (found,) = read([native.encode(message)])
    assert isinstance(found, s.Cached)
    assert len(found.entries) == control_frames.MAX_CACHED


def test_pings_are_frames_of_their_own() -> None:
    frames = control_frames.urgent_frames(output(pongs=[PongRecord(5, 6)])._replace(ping=7), 1)
    assert read(frames) == [s.Pong(1, 5, 6), s.Ping(1, 7)]


def test_what_an_instance_says() -> None:
    throttle = s.Throttle("t", [s.Rate(5, 60), s.Rate(0, 1)], 3, s.Mode.SUM, True, s.Backoff(50, s.Rate(1, 60), 30, 10))
    part = control_frames.part_of(throttle)
    assert (part.limits, part.places, part.mode, part.paused) == ((Limit(5, 60, 1),), 3, Mode.SUM, True)
    assert part.backoff is not None
    assert part.backoff.rate == Limit(1, 60, 1)
    with pytest.raises(ValueError, match="two rates"):
        control_frames.part_of(s.Throttle("t", [s.Rate(5, 60), s.Rate(6, 60)]))

"""Between the wire's records and the throttle manager's: what an instance says of its throttles, what it is to be told.

Lists are cut so that each frame fits. Nothing here has a state; sending and receiving are `control`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.throttling.limits import BackoffRule, Mode, Part
from proxy.throttling.session import LimitRecord, Output
from proxy.throttling.throttle import SECOND, Limit

#: Grants of at most 30 bytes, and entries of CACHED of at most 376, that fit in a frame.
MAX_RECORDS: Final = 2000
MAX_CACHED: Final = 170
#: LIMIT may hold no more. Its records differ in size by a factor of 100.
_MAX_LIMITS: Final = 1000
_MAX_WARNING: Final = 512
_MAX_RATES: Final = 4
_LATEST: Final = 2**63 - 1

Record = TypeVar("Record")


def part_of(throttle: s.Throttle) -> Part:
    """What an instance says of a throttle, as the manager takes it.

    Raises:
        ValueError: two rates for one length of window.
    """
    limits = [_limit(rate) for rate in throttle.rates if rate.amount]
    if len({limit.seconds for limit in limits}) < len(limits):
        raise ValueError(f"throttle {throttle.name}: two rates for one length of window")
    rule = None
    if throttle.backoff is not None:
        slow = throttle.backoff
        rate = _limit(slow.rate) if slow.rate is not None and slow.rate.amount else None
        rule = BackoffRule(slow.percent, rate, slow.return_after_s * SECOND, slow.threshold)
    mode = Mode.SUM if throttle.mode is s.Mode.SUM else Mode.AVERAGE
    cluster = throttle.scope is s.Scope.CLUSTER
    return Part(tuple(limits), throttle.max_connections, mode, throttle.paused, rule, cluster)


def _limit(rate: s.Rate) -> Limit:
    return Limit(rate.amount, rate.seconds, rate.burst or 1)


def urgent_frames(output: Output, incarnation: int) -> list[bytes]:
    """Answers to pings, and our own ping: before whatever else waits."""
    frames = [native.encode(s.Pong(incarnation, pong.t, pong.hold_us)) for pong in output.pongs]
    if output.ping is not None:
        frames.append(native.encode(s.Ping(incarnation, output.ping)))
    return frames


def frames(output: Output, incarnation: int) -> list[bytes]:
    """The rest of what a session is to be sent."""
    made: list[bytes] = []
    if output.limits:
        limits = [_path_limit(record) for record in output.limits]
        made += _fitting(lambda part: s.Limit(incarnation, part), limits, _MAX_LIMITS)
    if output.grants:
        made += _grants(output, incarnation)
    if output.caps:
        caps = [s.Share(*cap) for cap in output.caps]
        made += _fitting(lambda part: s.Cap(incarnation, part), caps, MAX_RECORDS)
    return made


def _grants(output: Output, incarnation: int) -> list[bytes]:
    """Each with the end of its use on the client's own clock, which its ping told.

    Most of what a session is sent are these: without a record of the protocol each, see `frames.encode_fields`.
    """
    ping_t, hold_us = output.ping_t, output.hold_us
    at = ping_t + hold_us
    grants = [
        (id, n, offset_us, step_us, min(max(1, at + offset_us + slack_us), _LATEST))
        for id, n, offset_us, step_us, slack_us in output.grants
    ]
    if len(grants) <= MAX_RECORDS:
        return [native.encode_fields(s.Grant.TYPE, (incarnation, ping_t, hold_us, grants))]
    return [
        native.encode_fields(s.Grant.TYPE, (incarnation, ping_t, hold_us, grants[first : first + MAX_RECORDS]))
        for first in range(0, len(grants), MAX_RECORDS)
    ]


def refusals(reasons: dict[int, str], incarnation: int) -> list[bytes]:
    """LIMITs without throttles, for paths that are not bound: id → why."""
    records = [s.PathLimit(id, [], warning=reason[:_MAX_WARNING]) for id, reason in reasons.items()]
    return list(_fitting(lambda part: s.Limit(incarnation, part), records, _MAX_LIMITS))


def _fitting(build: Callable[[list[Record]], m.Message], records: Sequence[Record], most: int) -> Iterator[bytes]:
    """Frames of at most `most` records, of fewer where these are long; one record always fits."""
    for at in range(0, len(records), most):
        part = list(records[at : at + most])
        try:
            yield native.encode(build(part))
        except ValueError:
            yield from _fitting(build, part, -(-len(part) // 2))


def _path_limit(record: LimitRecord) -> s.PathLimit:
    throttles = [s.Effective(_rates(effective.limits), effective.places) for effective in record.throttles]
    return s.PathLimit(record.id, throttles, record.slack_us, record.backoff_ms, record.paused, record.warning)


def _rates(limits: tuple[Limit, ...]) -> list[s.Rate]:
    """Instances may have different windows, so that there are more than fit: then those that hold up most."""
    if len(limits) > _MAX_RATES:
        limits = tuple(sorted(limits, key=lambda limit: limit.amount / limit.seconds)[:_MAX_RATES])
    return [s.Rate(limit.amount, limit.seconds, limit.burst) for limit in limits]

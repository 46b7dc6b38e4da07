"""Messages against permits: does an instance send more than it was allowed?

The proxy counts MAIL commands where it tracks the dialogue. A flow's `balance` is its permits minus its messages; below
zero it sent without a permit, unless a session of it broke a moment ago, whose permits it may still use. Counted
always; with `throttle_enforce` the excess becomes a fine, paid with slots of the instance's own share before its next
connection.
"""

from __future__ import annotations

from proxy.throttling.flows import Flow
from proxy.throttling.registry import Notice, Remark
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND

#: An instance is told of in the log this often.
NOTICE_EVERY = 60 * SECOND


class Audit:
    """Counts messages without a permit; `remarks` are for the log."""

    def __init__(self) -> None:
        self.unpermitted = 0
        self.remarks: list[Remark] = []

    def sent(self, flow: Flow, messages: int, enforce: bool, now: int) -> int:
        """`messages` were begun on a connection of `flow`; how many of them had no permit (0 without a rate limit)."""
        flow.balance -= messages
        if flow.balance < 0:
            flow.balance += _spare(flow, -flow.balance - flow.fine)
        if flow.balance >= 0:
            return 0
        if not any(throttle.windows for throttle in flow.path.throttles):
            flow.balance = 0
            return 0
        excess = max(0, -flow.balance - flow.fine)
        if enforce:
            flow.fine += excess
            flow.want += excess
        else:
            flow.balance = 0
        if excess:
            self._count(flow, excess, now)
        return excess

    def _count(self, flow: Flow, excess: int, now: int) -> None:
        self.unpermitted += excess
        session = flow.receiver
        if not isinstance(session, Session):
            return
        session.unpermitted += excess
        if session.warned_at is None or now - session.warned_at >= NOTICE_EVERY:
            session.warned_at = now
            detail = f"{session.unpermitted} messages without a permit so far"
            self.remarks.append(Remark(Notice.UNPERMITTED, session.name, detail))


def _spare(flow: Flow, most: int) -> int:
    """Take up to `most` of the permits of sessions that broke, from every throttle of the path."""
    stakes = [
        stake
        for throttle in flow.path.throttles
        if throttle.terms is not None and (stake := throttle.terms.stake(flow.receiver.name)) is not None
    ]
    spare = max(0, min([most, *[stake.spare for stake in stakes]])) if stakes else 0
    for stake in stakes:
        stake.spare -= spare
    return spare

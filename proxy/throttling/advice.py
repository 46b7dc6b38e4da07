"""How many connections each session should have, while there are too few: the advice of CAP.

Advice only: places are taken and freed in `places`, and nothing here closes a connection. A session above its share
gives back at its next message boundary; one that does not comes last in every line anyway.
"""

from __future__ import annotations

from proxy.throttling.flows import Flow, Throttle
from proxy.throttling.share import integer_max_min
from proxy.throttling.throttle import SECOND, TICK
from proxy.throttling.wheel import Wheel

#: "As many as you like": the advice is lifted.
NO_CAP = 2**32 - 1
#: A change by one place is not worth a message more often than this; it is also the pace of the rotation.
PATIENCE = 10 * SECOND


class Adviser:
    """Collects throttles that are crowded and works out the shares, at most once a tick each.

    Attributes:
        given: flows whose advice (`flow.cap`) has changed and must be sent.
    """

    def __init__(self) -> None:
        self.wheel: Wheel[Throttle] = Wheel(TICK)
        self.given: dict[Flow, None] = {}
        self._soon: set[Throttle] = set()  # a line changes often within a tick

    def crowded(self, throttle: Throttle, now: int) -> None:
        """The line or the number of places has changed; without anybody there, there is nothing to advise."""
        if throttle in self._soon:
            return
        terms = throttle.terms
        if throttle.used or throttle.line is not None or (terms is not None and terms.advice is not None):
            self._soon.add(throttle)
            self.wheel.arm_earlier(throttle, now)

    def expire(self, now: int, most: int) -> None:
        for throttle in self.wheel.expire(now, most):
            self._soon.discard(throttle)
            self._advise(throttle, now)

    def _advise(self, throttle: Throttle, now: int) -> None:
        terms = throttle.terms
        if terms is None:
            return
        old = terms.advice or {}
        scarce = throttle.cap > 0 and (throttle.line is not None or throttle.used > throttle.cap)
        terms.advice = _shares(throttle, now) if scarce else None
        for flow in {**old, **(terms.advice or {})}:
            self._tell(flow, throttle, now)
        if scarce:
            self.wheel.arm_earlier(throttle, now + PATIENCE)

    def _tell(self, flow: Flow, throttle: Throttle, now: int) -> None:
        cap = min(
            [
                each.terms.advice[flow]
                for each in flow.path.throttles
                if each.terms is not None and each.terms.advice is not None and flow in each.terms.advice
            ],
            default=NO_CAP,
        )
        last, at = flow.cap or (NO_CAP, now - PATIENCE)
        if cap == last:
            return
        if abs(cap - last) <= 1 and now - at < PATIENCE:
            self.wheel.arm_earlier(throttle, at + PATIENCE)
            return
        flow.cap = (cap, now)
        self.given[flow] = None


def _shares(throttle: Throttle, now: int) -> dict[Flow, int]:
    """The fair share of each owner, divided among the owner's flows."""
    demands = dict(throttle.held or {})
    weights: dict[str, float] = {}
    if throttle.line is not None:
        for owner, (waiting, weight) in throttle.line.waiting().items():
            demands[owner] = demands.get(owner, 0) + waiting
            weights[owner] = weight
    flows: dict[str, dict[str, Flow]] = {}
    users = throttle.terms.users if throttle.terms is not None else None
    for flow in users or ():
        weights[flow.receiver.name] = flow.receiver.weight
        flows.setdefault(flow.receiver.name, {})[f"{flow.id:010}"] = flow
    rotation = now // PATIENCE
    shares = integer_max_min(throttle.cap, demands, weights, rotation)
    advice = {}
    for owner, own in flows.items():
        wants = {id: flow.places + flow.waiting_places for id, flow in own.items()}
        for id, cap in integer_max_min(shares.get(owner, 0), wants, None, rotation).items():
            advice[own[id]] = cap
    return advice

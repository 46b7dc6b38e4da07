"""To ask an office for a place or a slot, and wait for it in the running greenlet.

Whatever ends the waiting from outside, a kill, a time-out or a client that goes away, calls off what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from proxy.egress.office import Applicant, Office, Slot
from proxy.spans import SPANS, Histogram
from proxy.throttling.flows import Places


class Told:
    """What the greenlet that makes it waits to be told. `what` and `more` are there when it has `come`."""

    __slots__ = ("_greenlet", "come", "more", "what")

    def __init__(self) -> None:
        self._greenlet: Any = getcurrent()
        self.come = False
        self.what: Any = None
        self.more: Any = None

    def tell(self, what: Any, more: Any = None) -> None:
        """In the hub, once."""
        self.what, self.more, self.come = what, more, True
        self._greenlet.switch()

    def wait(self) -> None:
        hub: Any = get_hub()
        while not self.come:
            hub.switch()


def wait_for_place(office: Office, who: Applicant, seconds: float, key: Hashable = None) -> Places | None:
    """`Office.ask_place`, and its answer.

    Raises:
        Throttled: not in time; says which throttle, and when to come back.
    """
    told = Told()
    ticket = office.ask_place(who, seconds, told.tell, key)
    if ticket is None:
        return None
    if isinstance(ticket, Places):
        SPANS.place.observe(0.0)
        return ticket
    _wait(told, SPANS.place, partial(office.cancel_place, ticket))
    places: Places | None = told.more
    return places


def wait_for_slot(office: Office, who: Applicant, seconds: float, waits: Callable[[], object]) -> Slot | None:
    """`Office.ask_slot`, and its answer.

    Args:
        waits: called when the slot is not there at once; must not wait.

    Returns:
        None: nothing limits the message. Else a ticket for `put_off`, if the message does not go at once.

    Raises:
        Throttled: not in time.
    """
    told = Told()
    slot = office.ask_slot(who, seconds, told.tell)
    if slot is None or slot.granted:
        SPANS.slot.observe(0.0)
        return slot
    _wait(told, SPANS.slot, partial(office.cancel_message, slot), waits)
    return slot


def _wait(told: Told, span: Histogram, cancel: Callable[[], object], waits: Callable[[], object] | None = None) -> None:
    """Until it is told, or something else ends the waiting."""
    began = monotonic()
    try:
        if waits is not None:
            waits()
        told.wait()
    except BaseException:
        cancel()
        raise
    finally:
        span.observe(monotonic() - began)
    if told.what is not None:
        raise told.what

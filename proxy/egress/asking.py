"""To ask an office for a place or a slot, and wait for it in the running greenlet.

Whatever ends the waiting from outside, a kill, a time-out or a client that goes away, calls off what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from proxy.egress.office import Applicant, Office, Slot
from proxy.spans import SPANS
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
    began = monotonic()
    try:
        told.wait()
    except BaseException:
        office.cancel_place(ticket)
        raise
    finally:
        SPANS.place.observe(monotonic() - began)
    if told.what is not None:
        raise told.what
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
    began = monotonic()
    try:
        waits()
        told.wait()
    except BaseException:
        office.cancel_message(slot)
        raise
    finally:
        SPANS.slot.observe(monotonic() - began)
    if told.what is not None:
        raise told.what
    return slot

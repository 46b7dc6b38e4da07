"""What becomes of this process when a new program takes over (SIGUSR2): a worker of that one, which takes nothing new.

The taking over itself is `upgrade`'s. Afterwards this process says once a second what it knows, answers the new
master's questions, and ends when its last connection has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import inf
from time import monotonic

import gevent

from proxy.egress.remote import Remote
from proxy.egress.switch import Switch
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.protocols import seam
from proxy.server import orders
from proxy.server.orders import Handed
from proxy.server.questions import Answering
from proxy.server.upgrade import Failed, Upgrade, hello_of
from proxy.server.wiring import Wiring
from proxy.status import parts
from proxy.status.parts import Part


class Replacement:
    """Of this process; nothing as long as nobody has taken over.

    Args:
        switch: the office, which from then on is another process's.
        total: what this process and its workers know.

    Attributes:
        hurry: until when what is open may take, on the monotonic clock, if somebody has said so.
    """

    def __init__(self, wiring: Wiring, switch: Switch, answering: Answering, total: Callable[[], Part]) -> None:
        self.hurry = inf
        self._wiring = wiring
        self._switch = switch
        self._answering = answering
        self._total = total
        self._by: Upgrade | None = None

    @property
    def done(self) -> bool:
        """Another process is the master."""
        return self._by is not None

    @property
    def ours(self) -> Collection[tuple[Endpoint, int]]:
        """See `Upgrade.unused`."""
        return self._by.unused if self._by is not None else ()

    def run(self, sockets: Sequence[tuple[Handed, int]]) -> bool:
        """Have a new program take over; whether it has. If not, nothing has happened.

        Args:
            sockets: all that listen, each with what it is.
        """
        wiring = self._wiring
        hello = hello_of(wiring.incarnation, self._total().highest, wiring.certificates.generated())
        upgrade = Upgrade(sockets, hello, wiring.admission, self._asked)
        log.note(log.Event.UPGRADE, log.INFO, "a new program is started to take over")
        try:
            upgrade.run()
        except Failed as error:
            log.note(log.Event.UPGRADE, log.ERROR, f"{error}; this one goes on as before")
            return False
        self._be_replaced(upgrade)
        return True

    def say_last(self) -> None:
        """All is over: the last word."""
        self._say_total()
        if self._by is not None and self._by.link is not None:
            self._by.link.close()

    def _be_replaced(self, upgrade: Upgrade) -> None:
        link = upgrade.link
        assert link is not None
        log.note(log.Event.UPGRADE, log.INFO, "the new program has taken over: finishing what is open", pid=upgrade.pid)
        wiring = self._wiring
        remote = Remote(link.say, lambda: wiring.limits, wiring.keeper.give_way, say_late=link.say_late)
        upgrade.goes_to(remote)
        self._switch.hand_over(remote)
        wiring.admission.handed_over = upgrade.say_meanwhile
        upgrade.say_meanwhile()
        self._by = upgrade
        gevent.spawn(self._say_total_forever)

    def _say_total_forever(self) -> None:
        while self._say_total():
            gevent.sleep(1.0)

    def _say_total(self) -> bool:
        """Whether there is anybody to hear it."""
        return self._say(lambda: seam.Tell(orders.PART, parts.encode(self._total())))

    def _say(self, record: Callable[[], seam.FromWorker]) -> bool:
        link = self._by.link if self._by is not None else None
        if link is not None:
            link.say(record())
        return link is not None

    def _asked(self, record: seam.FromMaster) -> None:
        """By the new master."""
        if isinstance(record, seam.Question):
            gevent.spawn(self._answer, record)
        elif isinstance(record, seam.Order) and record.what == orders.DRAIN:
            self.hurry = monotonic() + orders.unpack(record.body)[0]

    def _answer(self, question: seam.Question) -> None:
        body = self._answering.answer(question.what, question.body)
        self._say(partial(seam.Reply, question.id, body))

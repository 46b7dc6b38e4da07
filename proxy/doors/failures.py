"""Wrong secrets: what they cost whoever gives them, at every door.

The proof is always looked at: behind one address there may be a good instance beside a bad one, and a right secret is
never slowed. Only the answer to a wrong one waits, once its address has used up its budget, and those that wait are
bounded, fair by address. How a no is said is the door's.
"""

from __future__ import annotations

from collections.abc import Hashable
from select import EPOLLERR, EPOLLHUP
from time import monotonic

from proxy.log import lines as log
from proxy.model import owner_of
from proxy.net.alarm import TimeIsUp
from proxy.net.relay import RawSocket
from proxy.policy.budget import SLOW_ANSWER
from proxy.services import Services


def wrong_secret(services: Services, who: Hashable, sock: RawSocket, host: str) -> None:
    """Count one, and wait before the answer if there were too many; also when it is cut off or gone meanwhile.

    Args:
        who: stands for the connection, as in `Services.newcomers`; if it has to wait, it is moved from there to
            `Services.slowed`. The caller takes it out of both when all is said.
        sock: registered with the engine.
        host: where it comes from.
    """
    now = monotonic()
    owner = owner_of(host)
    services.budget.failed(owner, now)
    if not services.budget.exhausted(owner, now):
        return
    log.slowed(host)
    services.newcomers.leave(who)
    services.slowed.enter(who, sock, host)
    alarm = services.engine.alarms.start(SLOW_ANSWER)
    try:
        while who in services.slowed:
            if services.engine.wait(sock.fileno()) & (EPOLLHUP | EPOLLERR):
                return
    except TimeIsUp as fired:
        if fired.alarm is not alarm:
            raise
    finally:
        alarm.cancel()

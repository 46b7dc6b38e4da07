"""Two threads wait for a permit of the running proxy, and the first gives up at each point of its life."""

from __future__ import annotations

import threading
from contextlib import suppress

from greenarrow_proxy_client import Limits, Session, ThrottleTimeout
from greenarrow_proxy_client.throttle import Permit, Throttle
from tests.e2e.throttling.senders import SOURCE
from tests.program import SECRET, Proxy
from tests.waiting import wait_for

#: A slot each tenth of a second, which is given out 30 ms ahead and good for two seconds.
LIMIT = Limits("rule", [(36_000, 3600)])
#: Milliseconds after a slot at which the first gives up: before the next one is given out, while it is, and behind it.
POINTS = range(50, 125, 5)


class Waiting:
    """A thread in `acquire`; `permit`, if it got one."""

    def __init__(self, path: Throttle, timeout: float | None = None) -> None:
        self.permit: Permit | None = None
        others = path._waiting
        self._thread = threading.Thread(target=self._run, args=(path, timeout), daemon=True)
        self._thread.start()
        wait_for(lambda: path._waiting > others or not self._thread.is_alive())

    def _run(self, path: Throttle, timeout: float | None) -> None:
        with suppress(ThrottleTimeout):
            self.permit = path.acquire(timeout)

    def ended(self) -> bool:
        self._thread.join(30)
        return not self._thread.is_alive()


def test_one_who_gives_up_leaves_nobody_asleep() -> None:
    with Proxy("listen_tls no\n") as proxy, Session(proxy.native, SECRET, "a", tls=False) as session:
        path = session.throttle(SOURCE, LIMIT)
        for point in POINTS:
            path.acquire(30)
            first, second = Waiting(path, point / 1000), Waiting(path)
            assert first.ended(), point
            assert second.ended(), f"it sleeps for ever; the first gave up after {point} ms"
            assert second.permit is not None
            assert path._lease.voided == 0, f"it slept while there was a permit; the first gave up after {point} ms"

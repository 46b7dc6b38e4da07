"""A link between MTAs and the proxy that stalls: what was written into it meanwhile is no burst at the receiver."""

from __future__ import annotations

import pytest

from greenarrow_proxy_client import Limits
from tests.e2e.throttling.senders import Sender, more, sending
from tests.link import Link
from tests.mx import Mx
from tests.program import Proxy
from tests.unit.throttling.oracle import Rule
from tests.waiting import wait_for
from tests.witness import Witness, now

PLAIN = "listen_tls no\n"
MTAS = ("a", "b", "c")
#: MAILs in the frozen link: more than two seconds' worth of the limit.
HELD = 45


@pytest.mark.parametrize("frozen", ["channels", "all"])
def test_mails_behind_a_frozen_link_are_no_burst_at_the_receiver(frozen: str) -> None:
    """Each had its permit when it was written. With only the channels frozen permits go on to come, too."""
    witness = Witness()
    limit = Limits("rule", [(1200, 60)])
    with Mx(witness.script) as mx, Proxy(PLAIN) as proxy, Link(proxy.native) as link:
        senders = [Sender(link.endpoint, mx, name, limit, threads=HELD // 3 + 5) for name in MTAS]
        with sending(witness, *senders):
            # The sessions came before all channels.
            link.freeze(but=len(MTAS) if frozen == "channels" else 0)
            wait_for(lambda: link.held >= HELD, 30)
            begin = now()
            link.thaw()
            more(witness, HELD + 10, begin)
        witness.check(Rule(1200, 60, slack=250_000_000, latest=max(sender.slack for sender in senders)))

"""One block by recipient domain over MTAs of different kinds, each through another door; judged by the receivers.

Nobody names the domain but the block: which addresses it means is in DNS. Another receiver, of another domain, is free.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections import Counter

from tests import peers
from tests.dns_server import DnsServer
from tests.interop.test_exim import user  # noqa: F401 (a fixture)
from tests.interop.test_one_limit import Witness
from tests.interop.test_smtp_mode import CONFIG, exim, kumomta, library, swaks
from tests.mx import Mx
from tests.program import Proxy
from tests.waiting import wait_for

PLACES = 2
RATE = 4  # a second
#: A real Exim by SOCKS5 with a password, KumoMTA's bytes by BIND and CONNECT, swaks by the PROXY protocol, the library.
SENDERS = (exim, kumomta, swaks, library)
EACH = 4
BLOCK = f"""\
listen_status 127.0.1.9:0
dns_server {{server}}
throttle yahoo {{{{
    domain yahoo.example
    mx *.yahoodns.example
    max_concurrent_connections {PLACES}
    max_delivery_rate {RATE}/s
    wait 60s
}}}}
"""


def status(proxy: Proxy) -> dict[str, list[dict[str, object]]]:
    host, port = proxy.door("status")
    with urllib.request.urlopen(f"http://{host}:{port}/status.json", timeout=30) as answer:
        found: dict[str, list[dict[str, object]]] = json.load(answer)
    return found


def test_four_kinds_of_mta_under_one_block_by_domain(user: str) -> None:  # noqa: F811
    witness = Witness()
    failures: list[BaseException] = []
    limited = Mx({"mail": witness.mail}, starttls=True)
    with limited as mx, Mx(starttls=True, host="127.0.0.3") as free, DnsServer() as names:
        names.records = {
            "yahoo.example.": {"MX": ["10 mta5.yahoodns.example."]},
            "mta5.yahoodns.example.": {"A": [mx.host]},
        }
        with Proxy(CONFIG + BLOCK.format(server=names.endpoint)) as proxy:
            wait_for(lambda: status(proxy)["blocks"][0]["addresses"] == [mx.host], what="the block knows its receiver")

            def run(number: int) -> None:
                try:
                    for receiver in (mx, free):
                        with peers.directory(user) as directory:
                            SENDERS[number](proxy, receiver, directory, EACH, lambda: None)
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=run, args=(number,)) for number in range(len(SENDERS))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            rows = {row["name"]: row for row in status(proxy)["throttles"]}
            assert list(rows) == ["yahoo"]
            assert rows["yahoo"]["taken"] == len(SENDERS) * EACH
            waited = [float(found) for line in proxy.lines for found in re.findall(r" waited=([\d.]+)", line)]
    total = len(SENDERS) * EACH
    for receiver in (mx, free):
        assert Counter(message.accepted for message in receiver.messages) == {True: total}
    assert witness.most <= PLACES
    assert len(witness.times) == total
    assert witness.busiest(1) <= RATE + 1  # of a window shorter than 30 s one more may be seen
    assert witness.pace() <= RATE * 1.05
    assert sum(waited) > 0, "it was the block that set the pace"

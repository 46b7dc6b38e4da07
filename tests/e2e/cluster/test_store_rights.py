"""The rights that docs/configuration.md gives a user of the engine: they are enough, and for nothing else."""

from __future__ import annotations

import re

import pytest

from tests.e2e.cluster.house import House
from tests.engines import REDIS_7, VALKEY_9, engine
from tests.program import ROOT

PAGE = (ROOT / "docs" / "configuration.md").read_text()
PASSWORD = "a-passw0rd-for-the-store"


@pytest.mark.parametrize("kind", [REDIS_7, VALKEY_9])
def test_the_documented_rights_are_enough(kind: str) -> None:
    (line,) = re.findall(r"^ACL SETUSER proxy on >PASSWORD (.*)$", PAGE, re.MULTILINE)
    with engine(kind) as store:
        store.client.execute_command("ACL", "SETUSER", "proxy", "on", f">{PASSWORD}", *line.split())
        limits = "max_delivery_rate 3000/min\n    max_concurrent_connections 30"
        with House(store.url("proxy", PASSWORD), limits=limits) as house, house.mail():
            house.more(50)
            for proxy in house.proxies:
                row = proxy.page()["store"]
                assert (row["state"], row["seen"], row["refused"]) == ("connected", 2, 0), row

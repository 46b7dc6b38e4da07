"""The judge of these tests can find somebody guilty: proxies that do not keep a limit together, and it says so."""

from __future__ import annotations

import pytest

from tests.e2e.cluster.house import RULE, House
from tests.engines import VALKEY_9, engine
from tests.unit.throttling.oracle import Violation


def test_two_proxies_that_each_keep_the_limit_by_themselves_pass_twice_of_it() -> None:
    with engine(VALKEY_9) as store:
        with House(store.url(), scope="proxy", rule=None) as house, house.mail():
            house.more(60)
        with pytest.raises(Violation):
            house.witness.check(RULE)

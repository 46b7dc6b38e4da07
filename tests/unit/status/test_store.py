"""The throttle store as operators see it: the same figures in every output, trouble in words, bounded and in steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from proxy.control import client
from proxy.control.looks import look
from proxy.stats import LeasedFigures, StoreFigures
from proxy.status import metrics, terminal
from proxy.status.parts import Part
from proxy.status.rows import StoreRow
from proxy.status.spelled import leased_share, store_calls, store_engine, store_members, store_state, trouble_text
from proxy.status.store import MOST_KEYS, Pace, store_row
from tests.unit.status.test_page import shown, status
from tests.unit.status.test_view import House, run

YAHOO = LeasedFigures(
    "yahoo",
    "192.0.2.1",
    limits=((2000, 3600, 1),),
    share=((1000, 3600, 1),),
    places=21,
    cap=14,
    places_share=10,
    leased=812,
    unused=3,
    users=2,
)
HEALTHY = StoreFigures(
    "redis://proxies@10.0.0.9:6379/0",
    engine="valkey",
    version="8.1.8",
    master="10.0.0.9:6379",
    members=2,
    seen=2,
    connected=True,
    since=3919.4,
    calls=4000,
    keys=9000,
    slots=812,
    p50=0.000213,
    p99=0.0011,
    leased_count=1,
    leased=(YAHOO,),
)
LOST = HEALTHY._replace(
    connected=False, since=12.2, why="no answer in 100 ms", lost=3, degraded=1, leased=(YAHOO._replace(alone=True),)
)


class Watched(House):
    """A view with a store in it."""

    store: StoreFigures | None = None
    pace: Pace | None = None

    def sources(self) -> Any:
        return super().sources()._replace(store=self.store, pace=self.pace)

    def look(self, store: StoreFigures) -> Any:
        self.store = store
        return self.view()


def row(store: StoreFigures, pace: Pace | None = None, now: float = 500.0) -> StoreRow:
    return run(store_row(store, pace, now, lambda address: ""))[0]


def without_store() -> Any:
    return House().view()


def test_where_none_is_configured_nothing_speaks_of_it() -> None:
    view = without_store()
    assert (view.store, view.trouble) == (None, [])
    assert "STORE" not in "\n".join(terminal.lines(view))
    assert b"greenarrow_proxy_store_up" not in metrics.render(view, Part())
    assert "Throttle store" not in shown(view)


def test_the_figures_are_the_same_in_the_row() -> None:
    view = Watched().look(HEALTHY)
    store = view.store
    assert (store.state, store.engine, store.members, store.calls, store.throttles) == (
        *("connected", "valkey", 2, 4000, 1),
    )
    (key,) = store.keys
    assert (key.name, key.source, key.places, key.places_here, key.share_places) == ("yahoo", "192.0.2.1", 21, 14, 10)
    assert (key.leased, key.unused, key.users, key.state) == (812, 3, 2, "leased")
    assert view.trouble == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (HEALTHY, "connected for 1h5m19s"),
        (LOST, "DEGRADED for 12s: no answer in 100 ms"),
        (LOST._replace(why=""), "DEGRADED for 12s"),
    ],
)
def test_its_state_in_words(figures: StoreFigures, said: str) -> None:
    assert store_state(row(figures)) == said


def test_engine_members_calls_and_share_in_words() -> None:
    healthy = row(HEALTHY)
    assert store_engine(healthy) == "valkey 8.1.8 at 10.0.0.9:6379"
    assert store_engine(row(HEALTHY._replace(form="sentinel"))).endswith(":6379, by sentinel")
    assert store_engine(row(HEALTHY._replace(form="cluster"))).endswith(":6379, a cluster")
    assert store_engine(row(StoreFigures("redis://10.0.0.9"))) == "not known yet"
    assert store_members(healthy) == "2 of 2 proxies"
    assert store_members(row(HEALTHY._replace(seen=0))) == "? of 2 proxies"
    assert store_calls(healthy) == "4000 in all; half take 0.213ms, 99 % at most 1.100ms"
    assert store_calls(row(LOST._replace(refused=2, discarded=1, p50=None))) == (
        "4000 in all, 3 lost, 2 refused, 1 with a clock that cannot be trusted"
    )
    assert leased_share(healthy.keys[0]) == "1000/hr, 10 connections"
    nothing = HEALTHY._replace(leased=(YAHOO._replace(share=((0, 3600, 1),), places=0),))
    assert leased_share(row(nothing).keys[0]) == "nothing"


def test_calls_a_second_are_those_since_an_earlier_look() -> None:
    pace = Pace()
    assert row(HEALTHY, pace, 100.0).calls_a_second is None
    assert row(HEALTHY._replace(calls=4000), pace, 100.2).calls_a_second is None, "too short a time"
    assert row(HEALTHY._replace(calls=4080), pace, 104.0).calls_a_second == 20
    assert row(HEALTHY._replace(calls=4200), pace, 110.0).calls_a_second == 20
    assert row(HEALTHY._replace(calls=4200), pace, 115.0).calls_a_second == pytest.approx(200 / 15)
    assert row(HEALTHY._replace(calls=4200), pace, 120.0).calls_a_second == 0, "what was before 110 is forgotten"
    assert row(HEALTHY._replace(calls=7), pace, 121.0).calls_a_second is None, "it is another store"


def test_one_that_does_not_answer_is_trouble_in_words() -> None:
    (trouble,) = Watched().look(LOST).trouble
    assert (trouble.kind, trouble.since) == ("store_degraded", 12.2)
    assert trouble_text(trouble) == (
        "the throttle store redis://proxies@10.0.0.9:6379/0 does not answer, and this proxy goes on with 1/2 of each "
        "limit: no answer in 100 ms (for 12s)"
    )


def test_more_proxies_than_configured_are_trouble_and_fewer_are_none() -> None:
    (trouble,) = Watched().look(HEALTHY._replace(seen=3)).trouble
    assert trouble.kind == "store_members"
    assert "3 proxies use the throttle store, and throttle_store_members is 2" in trouble.text
    assert Watched().look(HEALTHY._replace(seen=1)).trouble == []


def test_thousands_of_throttles_are_listed_in_part_and_looked_at_in_steps() -> None:
    many = [YAHOO._replace(name=f"t{number:04}", leased=number) for number in range(3000)]
    many[7] = many[7]._replace(alone=True)
    store, stops = run(store_row(HEALTHY._replace(leased_count=3000, leased=iter(many)), None, 1.0, str))
    assert [key.name for key in store.keys[:3]] == ["t0007", "t2999", "t2998"], "who is alone, then who has most"
    assert (len(store.keys), store.keys_left_out) == (MOST_KEYS, 3000 - MOST_KEYS)
    assert stops >= 5


def test_in_the_terminal() -> None:
    lines = list(terminal.lines(Watched().look(LOST)))
    assert lines[1].startswith("TROUBLE: the throttle store redis://proxies@10.0.0.9:6379/0 does not answer")
    at = next(index for index, line in enumerate(lines) if line.startswith("STORE "))
    assert "DEGRADED for 12s: no answer in 100 ms; valkey 8.1.8 at 10.0.0.9:6379; 2 of 2 proxies; 4000" in lines[at]
    cells = [cell for cell in lines[at + 2].split("  ") if cell]
    assert [cell.strip() for cell in cells] == [
        *("yahoo", "192.0.2.1", "2000/hr, 21 connections", "alone", "1000/hr, 10 connections", "14", "812", "3", "2"),
    ]


def test_on_the_page() -> None:
    view = msgspec.structs.replace(status(), store=row(LOST))
    (cells,) = shown(view)["Throttle store"]
    assert cells[:5] == ["yahoo192.0.2.1", "alone", "14", "2000/hr, 21 connections", "1000/hr, 10 connections"]


def test_in_the_metrics() -> None:
    text = metrics.render(Watched().look(LOST._replace(refused=2)), Part()).decode()
    for line in (
        "greenarrow_proxy_store_up 0.0",
        'greenarrow_proxy_store_info{engine="valkey",form="single",version="8.1.8"} 1.0',
        'greenarrow_proxy_store_calls_failed_total{reason="lost"} 3.0',
        'greenarrow_proxy_store_calls_failed_total{reason="refused"} 2.0',
        "greenarrow_proxy_store_slots_total 812.0",
        "greenarrow_proxy_store_members_seen 2.0",
        'greenarrow_proxy_trouble{kind="store_degraded"} 1.0',
        'greenarrow_proxy_trouble{kind="store_members"} 0.0',
    ):
        assert line in text.splitlines(), line
    assert "greenarrow_proxy_store_up 1.0" in metrics.render(Watched().look(HEALTHY), Part()).decode()


def test_on_the_control_socket() -> None:
    house: Any = SimpleNamespace(view=lambda: Watched().look(LOST))

    def told(*words: str) -> list[str]:
        answer = look(("show", words[0]), words[1:], house)
        return list(client._lines(msgspec.json.decode(msgspec.json.encode(answer))))

    store = {line.split()[0]: line.split(maxsplit=1)[1] for line in told("store")}
    assert (store["state"], store["why"], store["p50"]) == ("degraded", "no answer in 100 ms", "0.000213")
    assert "keys" not in store
    head, line = told("leased")
    assert head.split()[:2] == ["NAME", "SOURCE"]
    assert line.split()[:3] == ["yahoo", "192.0.2.1", "2000/hr"]
    assert told("leased", "gmail") == ["leased: none"]
    house.view = without_store
    assert told("store") == ["store: none"]
    assert told("leased") == ["leased: none"]

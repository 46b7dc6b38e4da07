"""The page of a large site: bounded, in pieces, and what is not listed can be looked for."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import msgspec

from proxy.status.page import LONGEST_QUERY, MOST_INSTANCES, MOST_ROWS, MOST_THROTTLE_ROWS, pieces
from proxy.status.rows import (
    Connections,
    InstanceRow,
    ListenerRow,
    ManagerRow,
    MinuteRow,
    PeerRow,
    PoolView,
    Program,
    Rate,
    SessionRow,
    Status,
    ThrottleRow,
)

#: Elements that have no end.
VOID = {"meta", "input", "br"}


class Shape(HTMLParser):
    """Checks that elements are nested, and keeps the text of table rows by the title above them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.title = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.title = ""
        if tag == "tr" and "tbody" in self.open:
            self.rows.setdefault(self.title, []).append([])
        if tag in ("td", "th") and "tbody" in self.open:
            self.rows[self.title][-1].append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.title += data
        elif "tbody" in self.open:
            self.rows[self.title][-1][-1] += data


def throttle(number: int, instances: int = 0, **more) -> ThrottleRow:
    rows = [InstanceRow(f"server-{n}", [Rate(100, 3600)], 3, "sum", connected=True, used=n) for n in range(instances)]
    return ThrottleRow(f"192.0.2.{number % 250}", f"throttle-{number}", "instances", "sum of 6", instances=rows, **more)


def status(throttles=(), **more) -> Status:
    return Status(
        program=Program("1.2", "0543b19c", 5.0, "python", "python"),
        listeners=[ListenerRow("127.0.0.1:807", "native", 2)],
        connections=Connections(2, 100, 0, 0, 1, 3, 0),
        counters={"accepted": {"native": 3}, "messages": 5},
        manager=ManagerRow(0, 0, 0, 0, 0, 0, 0),
        pool=PoolView(0, 0, 0, 0, None, {}, 0.0, 0.0, 0.0),
        throttles=list(throttles),
        throttles_left_out=0,
        **({"sessions": [], "sessions_left_out": 0} | more),
    )


def sessions(count: int) -> list[SessionRow]:
    one = msgspec.convert({"entering": 0, "leaving": 0, "parked": 0}, dict)
    queues = {"forward": one, "back": one}
    figures = dict.fromkeys(("connected", "ping", "ping_age"), 0.5) | dict.fromkeys(("ram", "bounce", "disk"), 0)
    return [
        msgspec.convert({"name": f"server-{number}", "address": "10.0.0.5", **figures, **queues}, SessionRow)
        for number in range(count)
    ]


def shown(view: Status, wanted: str = "") -> dict[str, list[list[str]]]:
    return Shape("".join(pieces(view, wanted))).rows


def names(rows: list[list[str]]) -> list[str]:
    return [row[0] for row in rows]


def test_a_page_of_seven_hundred_throttles_is_small():
    limits = [Rate(100, 3600), Rate(10, 60)]
    throttles = [throttle(n, 20, limits=limits, places=18, demand=1500, next_slot=1.5) for n in range(500)]
    view = msgspec.structs.replace(status(throttles, sessions=sessions(500)), throttles_left_out=200)
    page = "".join(pieces(view))
    assert len(page) < 150_000
    rows = Shape(page).rows
    assert len(rows["Throttles"]) == MOST_THROTTLE_ROWS
    assert len(rows["Sessions"]) == MOST_ROWS
    listed = sum(name.startswith("throttle-") for name in names(rows["Throttles"]))
    assert f"<p>{700 - listed} more are not shown; they can be looked for by name.</p>" in page
    assert f"<p>{500 - MOST_ROWS} more are not shown; they can be looked for by name.</p>" in page


def test_it_is_made_in_pieces_of_bounded_length():
    view = status([throttle(n, 20) for n in range(500)], sessions=sessions(500))
    for wanted in ("", "nowhere", "server-7"):
        assert max(map(len, pieces(view, wanted))) < 20_000


def test_of_many_instances_those_are_listed_who_wait_and_who_work():
    rows = shown(status([throttle(1, 20)]))["Throttles"]
    busiest = [f"server-{number}" for number in range(19, 19 - MOST_INSTANCES, -1)]
    assert names(rows)[1:] == [*sorted(busiest), f"and {20 - MOST_INSTANCES} more"]


def test_a_throttle_that_is_looked_for_has_all_its_instances():
    rows = shown(status([throttle(1, 20), throttle(2, 20)]), "Throttle-2")["Throttles"]
    assert names(rows) == ["throttle-2192.0.2.2", *[f"server-{number}" for number in range(20)]]


def test_an_instance_that_is_looked_for_stands_below_each_of_its_throttles():
    view = status([throttle(1, 20), throttle(2, 3), throttle(3, 20)], sessions=sessions(30))
    rows = shown(view, "server-17")
    assert names(rows["Throttles"]) == ["throttle-1192.0.2.1", "server-17", "throttle-3192.0.2.3", "server-17"]
    assert names(rows["Sessions"]) == ["server-17"]


def test_every_table_is_looked_through_and_says_when_nothing_is_found():
    view = status([throttle(1)], receivers=[PeerRow("198.51.100.7:25", last="421 Try Later"), PeerRow("x")])
    assert names(shown(view, "try later")["Receivers with trouble"]) == ["198.51.100.7:25"]
    page = "".join(pieces(view, "nowhere"))
    assert Shape(page).rows == {}
    assert page.count("<p>none of those looked for</p>") == 7
    assert '<a href="/">show all</a>' in page


def test_what_marks_a_text_is_not_looked_through():
    assert shown(status([throttle(1, waiting=3)]), "span") == {}
    assert shown(status([throttle(1, waiting=3)]), "w") == shown(status([throttle(1, waiting=3)]), "W")


def test_what_is_looked_for_is_escaped_and_cut():
    page = "".join(pieces(status(), '"><b>' + "y" * 1000))
    assert 'value="&quot;&gt;&lt;b&gt;' + "y" * (LONGEST_QUERY - 5) + '"' in page


def test_each_table_has_a_caption_a_head_for_every_column_and_row_and_can_be_scrolled():
    view = status([throttle(1, 2)], receivers=[PeerRow("x")], sessions=sessions(1))
    page = "".join(pieces(view))
    Shape(page)
    assert page.count("<table>") == page.count("<caption>") == page.count('role="region"') >= 5
    assert page.count('tabindex="0"') == page.count("<table>")
    assert "<th>" not in page
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page.split("<tbody>", 1)[1]):
        assert row.startswith(('<th scope="row">', '<th scope="col"'))


def test_the_last_hour_is_drawn_and_told():
    assert "The last hour" not in "".join(pieces(status()))
    view = status(minutes=[MinuteRow(0.0, 0.0, 0.0), MinuteRow(4.0, 0.0, 0.002), MinuteRow(2.0, 0.0, 0.002)])
    page = "".join(pieces(view))
    Shape(page)
    ended, failed, turn = re.findall(r'aria-label="([^"]*)"><polyline points="([^"]*)"/>', page)
    assert ended == ("connections ended, a second: 2.0, at most 4.0", "171,31.0 174,1.0 177,16.0 180,16.0")
    assert failed == ("connections failed, a second: 0.0, at most 0.0", "171,31.0 174,31.0 177,31.0 180,31.0")
    assert turn[0] == "longest turn, seconds: 0.002, at most 0.002"

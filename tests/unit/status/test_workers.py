"""The processes in all that operators see: their rows, in words, in page, terminal, JSON, metrics and trouble."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from proxy.control.looks import look
from proxy.status import metrics, terminal
from proxy.status.colleagues import Member
from proxy.status.parts import Part, ProcessPart
from proxy.status.rows import WorkerRow
from proxy.status.spelled import worker_death, worker_state
from proxy.status.workers import SILENT, worker_rows
from tests.unit.status.test_page import shown
from tests.unit.status.test_view import House

NOW = 500.0  # when `House.view` looks
MASTER = Member(0, "master", 100, "0.1.0", 400.0)
ONE = Member(1, "worker", 101, "0.1.0", 410.0, heard_at=499.5)
DEAD = Member(2, "worker", 0, "0.1.0", 420.0, 3, "killed by signal 9", (1.0, 300.0, 497.0), 496.0)
LEAVING = Member(3, "leaving", 103, "0.0.9", 100.0, heard_at=499.5)
PARTS = Part(
    lost=7,
    processes=[
        ProcessPart(0, 100, "0.1.0", 0.0, 1.5, 50 << 20, 0, 30, 1000, 2),
        ProcessPart(1, 101, "0.1.0", 0.0, 9.0, 70 << 20, 0, 60, 1000, 40),
    ],
)


class Several(House):
    """A view of several processes."""

    members: tuple[Member, ...] = (MASTER, ONE)

    def sources(self, others: Any = ()) -> Any:
        return super().sources([PARTS])._replace(members=self.members)

    def look(self, *members: Member) -> Any:
        self.members = members
        return self.view()


def test_who_they_are_and_what_each_costs() -> None:
    assert worker_rows((MASTER, ONE), PARTS, NOW, 90.0) == [
        WorkerRow(0, "master", 100, "0.1.0", 100.0, 2, 1.5, 50 << 20, 30, 1000),
        WorkerRow(1, "worker", 101, "0.1.0", 90.0, 40, 9.0, 70 << 20, 60, 1000, silent=0.5),
    ]


def test_one_process_is_its_own_master() -> None:
    part = Part(processes=PARTS.processes[:1])
    assert worker_rows((), part, NOW, 90.0) == [WorkerRow(0, "master", 100, "0.1.0", 90.0, 2, 1.5, 50 << 20, 30, 1000)]


def test_a_part_of_one_that_was_there_before_is_not_the_new_ones() -> None:
    (row,) = worker_rows((ONE._replace(pid=999),), PARTS, NOW, 90.0)
    assert (row.open_connections, row.cpu) == (0, 0.0)


def test_deaths() -> None:
    (row,) = worker_rows((DEAD,), PARTS, NOW, 90.0)
    assert (row.restarts, row.died, row.died_ago, row.died_lately) == (3, "killed by signal 9", 3.0, 2)
    assert (row.silent, worker_state(row)) == (0.0, "DEAD for 3s: killed by signal 9")
    assert worker_death(row) == "3s ago: killed by signal 9"


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (ONE, "serves"),
        (ONE._replace(heard_at=NOW - SILENT + 0.1), "serves"),
        (ONE._replace(heard_at=NOW - SILENT), "SILENT for 5s"),
        (MASTER, "serves"),
        (LEAVING, "leaving"),
        (LEAVING._replace(heard_at=488.0), "SILENT for 12s"),
    ],
)
def test_its_state_in_words(member: Member, said: str) -> None:
    (row,) = worker_rows((member,), PARTS, NOW, 90.0)
    assert worker_state(row) == said
    assert worker_death(row) == ""


def kinds(view: Any) -> dict[str, str]:
    return {row.kind: row.text for row in view.trouble}


def test_trouble_in_words() -> None:
    house = Several()
    assert kinds(house.look(MASTER, ONE)) == {}
    assert kinds(house.look(MASTER, ONE._replace(heard_at=490.0))) == {
        "worker_silent": "worker 1 does not answer, and what it knows is missing or old"
    }
    (row,) = house.look(MASTER, ONE._replace(heard_at=490.0), LEAVING._replace(heard_at=480.0)).trouble
    assert row.text == "workers 1, 3 do not answer, and what they know is missing or old"
    assert row.since == 20.0


def test_one_death_is_no_trouble_and_two_are() -> None:
    house = Several()
    assert kinds(house.look(MASTER, DEAD._replace(deaths=(1.0, 497.0)))) == {}
    (row,) = house.look(MASTER, DEAD).trouble
    assert (row.kind, row.recent) == ("workers_dying", 2)
    assert row.text == "workers die again and again, number 2 was the last one: killed by signal 9"
    # Of several numbers together.
    other = ONE._replace(number=4, pid=104, restarts=1, died="exit code 1", deaths=(498.0,))
    (row,) = house.look(MASTER, DEAD._replace(deaths=(497.0,)), other).trouble
    assert row.text.endswith("number 4 was the last one: exit code 1")


def test_one_process_needs_no_table() -> None:
    view = House().view()
    assert "Processes" not in shown(view)
    assert "PROCESS " not in "\n".join(terminal.lines(view))
    assert b"greenarrow_proxy_worker_" not in metrics.render(view, Part())


def test_on_the_page_and_in_the_terminal() -> None:
    view = Several().look(MASTER, ONE, DEAD, LEAVING)
    rows, text = shown(view)["Processes"], "\n".join(terminal.lines(view))
    for words in ("DEAD for 3s: killed by signal 9", "70 MiB", "leaving", "0.0.9"):
        assert any(words in row for row in rows)
        assert words in text
    one = ["1", "worker", "serves", "40", "9s", "70 MiB", "60 of 1000", "0", "", "1m30s", "101", "0.1.0"]
    assert rows[1] == one
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("1 ") and "worker" in line]
    assert line.split() == ["1", "worker", "serves", "40", "9s", "70", "MiB", "60", "0", "1m30s", "101", "0.1.0"]


def test_in_the_metrics() -> None:
    view = Several().look(MASTER, ONE, DEAD)
    lines = metrics.render(view, PARTS).decode().splitlines()
    for line in (
        'greenarrow_proxy_worker_up{role="master",worker="0"} 1.0',
        'greenarrow_proxy_worker_up{role="worker",worker="1"} 1.0',
        'greenarrow_proxy_worker_up{role="worker",worker="2"} 0.0',
        'greenarrow_proxy_worker_open_connections{worker="1"} 40.0',
        'greenarrow_proxy_worker_cpu_seconds_total{worker="1"} 9.0',
        'greenarrow_proxy_worker_resident_memory_bytes{worker="1"} 7.340032e+07',
        'greenarrow_proxy_worker_open_fds{worker="1"} 60.0',
        'greenarrow_proxy_worker_max_fds{worker="1"} 1000.0',
        'greenarrow_proxy_worker_restarts_total{worker="2"} 3.0',
        'greenarrow_proxy_trouble{kind="workers_dying"} 1.0',
        'greenarrow_proxy_trouble{kind="worker_silent"} 0.0',
        "process_resident_memory_bytes 1.2582912e+08",
        "process_open_fds 90.0",
        "greenarrow_proxy_log_lines_lost_total 7.0",
        "process_max_fds 2000.0",
    ):
        assert line in lines
    silent = Several().look(MASTER, ONE._replace(heard_at=490.0))
    assert b'greenarrow_proxy_worker_up{role="worker",worker="1"} 0.0' in metrics.render(silent, PARTS)


def said(view: Any, *words: str) -> Any:
    house: Any = SimpleNamespace(view=lambda: view)
    return look(words[:2], words[2:], house)


def test_in_the_answers_of_the_control_socket() -> None:
    view = Several().look(MASTER, ONE, DEAD)
    answer = said(view, "show", "workers")
    assert [row.number for row in answer.rows] == [0, 1, 2]
    assert answer.lines == []
    assert [row.pid for row in said(view, "show", "workers", "1").rows] == [101]
    assert [row.number for row in said(view, "show", "workers", "role=master").rows] == [0]


def test_a_table_names_those_whose_rows_may_be_missing() -> None:
    view = Several().look(MASTER, ONE._replace(heard_at=490.0))
    for table in ("workers", "trouble", "listeners", "receivers", "status"):
        assert said(view, "show", table).lines == ["worker 1 does not answer: without it"]

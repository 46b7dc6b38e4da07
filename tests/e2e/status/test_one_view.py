"""What operators see of several processes is what they see of one: the same traffic, the same figures, everywhere.

The program runs twice, with one process and with two workers, and the same is done to both. Then every metric, page,
JSON, status line and table is compared, but for times and for what a process costs.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.clients import Refused, dial, proxied, send, socks5
from tests.e2e.control.test_control import ask
from tests.e2e.status.test_status import get, view
from tests.mx import Mx, close, say
from tests.program import Proxy
from tests.sinks import Raw, greet
from tests.waiting import wait_for

SOURCES = ("127.0.0.5", "127.0.0.6")
OPEN = 16
TEXT = """\
workers {workers}
max_connections 1000
control_socket {control}
listen_status 127.0.0.1:0
{mode}
throttle all {{
    destination 127.0.0.0/8
    max_concurrent_connections 100
}}
source vmta5 {{
    ip 127.0.0.5
    ehlo client.example
}}
source others {{
    ip 127.0.0.6, 127.0.0.7, 127.0.0.8, 127.0.0.9, 127.0.0.10, 127.0.0.11, 127.0.0.12, 127.0.0.13, 127.0.0.14
    ehlo client.example
}}
"""


class World(NamedTuple):
    """The program, and those that it talks to."""

    proxy: Proxy
    control: str
    good: Raw
    busy: Mx
    mx: Mx
    nobody: tuple[str, int]

    def ctl(self, *words: str) -> Any:
        answer = ask(self.control, json.dumps({"command": words}).encode() + b"\n")
        assert answer["ok"], answer
        return answer

    def rows(self, *words: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.ctl("show", *words).get("rows", [])
        return rows

    @property
    def workers(self) -> list[dict[str, Any]]:
        return [row for row in self.rows("workers") if row["role"] == "worker"]


@contextlib.contextmanager
def running(workers: int, mode: str = "mode tcp") -> Iterator[World]:
    control = f"@greenarrow-test-{uuid.uuid4()}"
    text = TEXT.format(workers=workers, control=control, mode=mode)
    said = {"greeting": say(b"421 4.7.0 busy\r\n", close)}
    with (
        Proxy(text) as proxy,
        Raw(greet, "127.0.0.21") as good,
        Mx(said, host="127.0.0.22") as busy,
        Mx(host="127.0.0.23") as mx,
        socket.create_server(("127.0.0.24", 0)) as closed,
    ):
        nobody = closed.getsockname()
        closed.close()
        yield World(proxy, control, good, busy, mx, nobody)


def happen(world: World) -> list[socket.socket]:
    """The traffic, which the kernel spreads over the processes; what is still open is handed back."""
    proxy = world.proxy
    held = [socks5(proxy.socks5, world.good.endpoint, SOURCES[number % 2]) for number in range(OPEN)]
    wait_for(lambda: len(world.rows("connections")) == OPEN)
    # By the kernel's choice: once in 32,768 runs it is the same for all.
    assert {row["id"] % 10 for row in world.rows("connections")} >= {row["number"] for row in world.workers}
    for number in range(12):
        with socks5(proxy.socks5, world.mx.endpoint, SOURCES[number % 2], user=f"mta-{number % 3}") as sock:
            assert send(sock, b"x\r\n")[0] == 250
        is_back(world, number + 1)
    for _ in range(8):
        with socks5(proxy.socks5, world.busy.endpoint, SOURCES[0]) as sock:
            sock.recv(100)
    for _ in range(8):
        with contextlib.suppress(Refused, OSError):
            socks5(proxy.socks5, world.nobody, SOURCES[1])
    for _ in range(8):
        with pytest.raises(Refused):
            socks5(proxy.socks5, world.mx.endpoint, password="wrong")
    for _ in range(8):
        with pytest.raises(Refused):
            socks5(proxy.socks5, ("198.51.100.1", 25), SOURCES[0])
    metrics(proxy)  # who looks has all processes know whom one has trouble with, so that all count what goes well there
    for number in range(8):
        with proxied(proxy.proxy_protocol, world.mx.endpoint, SOURCES[0]) as sock:
            assert send(sock, b"x\r\n")[0] == 250
        is_back(world, 12 + number + 1)
        dial(proxy.socks5).close()
    return held


def is_back(world: World, messages: int) -> None:
    """Where connections are shared, the next one finds this one."""

    def look() -> bool:
        found = metrics(world.proxy)
        offered = found.get(("pool_offered_total",), 0.0)
        return found["remote_connections", "state=active"] == OPEN and offered in (0, messages)

    wait_for(look)


def metrics(proxy: Proxy) -> dict[tuple[str, ...], float]:
    """All but what is a time, or the cost of a process; doors by their protocol."""
    _, _, body = get(proxy, "/metrics")
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("greenarrow_proxy_")
            labels = {key: value for key, value in sample.labels.items() if key not in ("listener", "hash")}
            is_time = re.search(r"(^|_)(seconds|seconds_total)(_|$)|^uptime|timestamp|^turn_", name)
            if labels.get("outcome") in ("client_closed", "upstream_closed"):  # who was first is nobody's fault
                labels["outcome"] = "closed"
            if not (is_time and not name.endswith("_seconds_count")) and not name.startswith(("process_", "worker_")):
                key = (name, *sorted(f"{key}={value}" for key, value in labels.items()))
                found[key] = found.get(key, 0.0) + sample.value
    found.pop(("turn_seconds_count",), None)
    return {key: value for key, value in found.items() if not key[0].startswith("turn_")}


#: What differs between any two runs.
_RUN = {
    *("incarnation", "uptime", "configuration", "configured", "generated_at", "address", "client", "age", "id", "ago"),
    *("oldest", "idle", "mean_age", "longest_idle", "last_ago", "failing", "since", "minutes", "workers", "limit"),
    *("next_slot", "taken_at", "absent", "rate_use", "pid", "time"),
}
_PORT = re.compile(r"(127\.\d+\.\d+\.\d+):\d+")


def timeless(value: Any) -> Any:
    """Without what differs between any two runs."""
    if isinstance(value, dict):
        if "upstream_closed" in value:
            value = value | {"client_closed": value.get("client_closed", 0) + value["upstream_closed"]}
            del value["upstream_closed"]
        return {_PORT.sub(r"\1", key): timeless(each) for key, each in value.items() if key not in _RUN}
    if isinstance(value, list):  # how many look at the status is not to be counted
        return [timeless(each) for each in value if not isinstance(each, dict) or each.get("protocol") != "status"]
    return _PORT.sub(r"\1", value) if isinstance(value, str) else value


def in_any_order(rows: list[Any]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def seen(world: World) -> dict[str, Any]:
    """All that an operator sees, in every form."""
    proxy = world.proxy
    shown = view(proxy)
    found: dict[str, Any] = {"metrics": metrics(proxy)}
    found["json"] = timeless({key: value for key, value in shown.items() if key not in ("throttles", "receivers")})
    for table in ("listeners", "connections", "cached", "receivers", "sources", "throttles", "logins", "trouble"):
        found[table] = in_any_order(timeless(world.rows(table)))
    (figures,) = world.rows("status")
    found["status"] = timeless({key: value for key, value in figures.items() if key.split(".")[-1] not in _RUN})
    found["lines"] = [_PORT.sub(r"\1", re.sub(r"manager\(\w+\)", "", line)) for line in proxy.status()]
    return found


def settle(world: World) -> None:
    """Until all is over that is to end, and a view is shown that was made afterwards: one may be a second old."""
    last: list[float] = []

    def is_settled() -> bool:
        now = metrics(world.proxy)
        last.append(sum(value for key, value in now.items() if key[0] == "ended_connections_total"))
        return last[-1:] == last[-2:-1] and now["remote_connections", "state=active"] == OPEN

    wait_for(is_settled)
    _, _, body = get(world.proxy, "/metrics")
    found = re.search(rb"^greenarrow_proxy_uptime_seconds (\S+)", body, re.MULTILINE)
    assert found is not None
    wait_for(lambda: view(world.proxy)["program"]["uptime"] > float(found[1]))


@pytest.mark.parametrize("mode", ["mode tcp", "mode smtp"])
def test_the_same_traffic_gives_the_same_figures(mode: str) -> None:
    found = []
    for workers in (1, 2):
        with running(workers, mode) as world, contextlib.ExitStack() as stack:
            for sock in happen(world):
                stack.callback(sock.close)
            settle(world)
            found.append(seen(world))
    one, two = found
    assert one.keys() == two.keys()
    for what in one:
        assert two[what] == one[what], what

"""The plan of the house: which module stands on which floor, and who may import whom (docs/architecture.md).

Imports go strictly downward. Modules of one room import each other freely, without circles. Floors 0 and 1 decide: they
reach no hub, socket, clock or source of randomness, so nothing there can be switched out in the middle and plain dicts
need no lock. A new module needs a row here. The source is read, not run, so an import inside a function counts, too.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Place(NamedTuple):
    floor: int
    room: str


#: Module in proxy/ → its floor and its room; a room is a module of the plan and the parts it was split into.
HOUSE = {
    "__init__": Place(0, "package"),
    "errors": Place(0, "errors"),
    "model": Place(0, "model"),
    "settings": Place(0, "settings"),
    "native": Place(1, "native"),
    "native_messages": Place(1, "native"),
    "native_session": Place(1, "native"),
    "native_auth": Place(1, "native"),
    "socks5": Place(1, "socks5"),
    "proxy_protocol": Place(1, "proxy_protocol"),
    "smtp": Place(1, "smtp"),
    "smtp_tracker": Place(1, "smtp"),
    "throttle": Place(1, "throttle"),
    "limits": Place(1, "throttle"),
    "dispenser": Place(1, "throttle"),
    "places": Place(1, "throttle"),
    "line": Place(1, "throttle"),
    "wheel": Place(1, "throttle"),
    "flows": Place(1, "throttle"),
    "refusals": Place(1, "throttle"),
    "blocks": Place(1, "throttle"),
    "share": Place(1, "share"),
    "manager": Place(1, "manager"),
    "session": Place(1, "manager"),
    "registry": Place(1, "manager"),
    "advice": Place(1, "manager"),
    "audit": Place(1, "manager"),
    "lease": Place(1, "lease"),
    "pool": Place(1, "pool"),
    "access": Place(1, "access"),
    "budget": Place(1, "budget"),
    "config": Place(1, "config"),
    "config_file": Place(1, "config"),
    "config_rules": Place(1, "config"),
    "options": Place(1, "config"),
    "values": Place(1, "config"),
    "stats": Place(1, "stats"),
    "status_rows": Place(1, "status_view"),
    "status_view": Place(1, "status_view"),
    "log": Place(2, "log"),
    "writer": Place(2, "log"),
    "crew": Place(2, "crew"),
    "alarm": Place(2, "relay"),
    "relay": Place(2, "relay"),
    "_fastrelay": Place(2, "relay"),
    "conversation": Place(2, "conversation"),
    "receiver": Place(2, "receiver"),
    "keeper": Place(2, "keeper"),
    "admission": Place(2, "admission"),
    "upstream": Place(2, "upstream"),
    "tls": Place(2, "tls"),
    "systemd": Place(2, "systemd"),
    "services": Place(2, "services"),
    "client": Place(2, "client"),
    "front": Place(3, "front"),
    "native_door": Place(3, "native_door"),
    "channel": Place(3, "channel"),
    "channel_link": Place(3, "channel"),
    "channel_open": Place(3, "channel"),
    "channel_transfer": Place(3, "channel"),
    "control": Place(3, "control"),
    "control_frames": Place(3, "control"),
    "control_queue": Place(3, "control"),
    "status": Place(3, "status"),
    "status_host": Place(3, "status"),
    "status_page": Place(3, "status"),
    "status_metrics": Place(3, "status"),
    "listener": Place(4, "server"),
    "doors": Place(4, "server"),
    "process": Place(4, "server"),
    "server": Place(4, "server"),
    "check_config": Place(4, "check_config"),
    "ping": Place(4, "ping"),
    "status_client": Place(5, "status_client"),
    "cli": Place(5, "cli"),
}

#: Rooms of one floor of which the first may import the second.
NEIGHBOURS = {
    ("model", "errors"),
    ("settings", "model"),
    ("throttle", "share"),
    ("manager", "throttle"),
    ("manager", "share"),
    # The operator's view looks at them all, and nobody looks at it.
    ("status_view", "manager"),
    ("status_view", "pool"),
    ("status_view", "stats"),
    ("status_view", "throttle"),
    # The egress side builds up: sockets, TLS on them, reading and writing, a receiver, the keeper of idle ones.
    ("tls", "relay"),
    ("upstream", "relay"),
    ("upstream", "tls"),
    ("conversation", "relay"),
    ("conversation", "tls"),
    ("receiver", "conversation"),
    ("receiver", "relay"),
    ("receiver", "tls"),
    ("receiver", "upstream"),
    ("keeper", "conversation"),
    ("keeper", "crew"),
    ("keeper", "receiver"),
    ("keeper", "relay"),
    ("admission", "log"),
    # Who has come in by the native door is served as a session or as a channel.
    ("control", "native_door"),
    ("channel", "native_door"),
    # The wiring names what it holds.
    ("services", "admission"),
    ("services", "crew"),
    ("services", "keeper"),
    ("services", "relay"),
    ("services", "tls"),
    ("services", "upstream"),
    ("cli", "status_client"),
}

#: What the floors 0 and 1 may import from outside: nothing in it waits, asks a clock or touches the system.
PURE = {
    *("__future__", "abc", "base64", "binascii", "bisect", "collections", "contextlib", "dataclasses", "difflib"),
    *("enum", "errno", "fractions", "functools", "graphlib", "hashlib", "heapq", "hmac", "ipaddress", "itertools"),
    *("json", "math", "msgspec", "operator", "re", "shlex", "string", "struct", "textwrap", "types", "typing"),
}
#: configargparse reads files and the environment by itself; config hands it both as arguments.
PURE_FOR_CONFIG = PURE | {"argparse", "configargparse", "io"}
IMPURE_BUILTINS = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}


class Import(NamedTuple):
    name: str
    line: int
    for_types_only: bool


def imports_of(source: str) -> list[Import]:
    """Every import in the source; `from proxy import x` counts as proxy.x."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"proxy.{alias.name}" for alias in node.names] if base == "proxy" else [base]
        else:
            continue
        found += [Import(name, node.lineno, id(node) in for_types) for name in names]
    return found


def module_of(name: str) -> str:
    """`proxy.policy.access` → `access`, `greenarrow_proxy_client.link` → `client`; `proxy.__version__` is the package's own."""
    first = name.split(".")[1] if "." in name else ""
    return "__init__" if not first or first.startswith("__") else first


def wrong_inside(module: str, target: str, for_types_only: bool) -> str:
    """What is wrong with an import of one of our modules, or ""."""
    if target not in HOUSE:
        return f"proxy.{target} has no row in the plan"
    here, there = HOUSE[module], HOUSE[target]
    if here.room == there.room:
        return ""
    if there.room == "client":
        return "the client library is for the MTA's side only"
    if for_types_only:
        return "an import for types only is for the same room: it hides a circle"
    if there.floor < here.floor or (there.floor == here.floor and (here.room, there.room) in NEIGHBOURS):
        return ""
    return f"proxy.{target} stands on floor {there.floor}, this module on floor {here.floor}"


def wrong_outside(module: str, name: str) -> str:
    """What is wrong with an import from outside, or ""."""
    floor, room = HOUSE[module]
    top = name.partition(".")[0]
    if name.startswith("."):
        return "relative import: write proxy.…"
    if name.startswith("gevent.monkey"):
        return "no monkey-patching inside the program"
    if floor <= 1 and top not in (PURE_FOR_CONFIG if room == "config" else PURE):
        return f"{top} is not among the pure modules that floors 0 and 1 may use"
    if room == "client" and top in ("gevent", "greenlet"):
        return "the client library works in any MTA"
    return ""


def violations(module: str, source: str) -> list[str]:
    """Everything in one module's source that breaks the rule, as `line: what`."""
    found = []
    for name, line, for_types_only in imports_of(source):
        inside = name == "proxy" or name.startswith("proxy.")
        wrong = wrong_inside(module, module_of(name), for_types_only) if inside else wrong_outside(module, name)
        if name == "gevent" and "monkey" in source.splitlines()[line - 1]:
            wrong = "no monkey-patching inside the program"
        if wrong:
            found.append(f"{line}: {wrong}")
    if HOUSE[module].floor <= 1:
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        names = ((node.func.id, node.lineno) for node in calls if isinstance(node.func, ast.Name))
        found += [f"{line}: {name}() on a floor that only decides" for name, line in names if name in IMPURE_BUILTINS]
    return found


def sources() -> dict[str, str]:
    """Full name → source of every module; `greenarrow_proxy_client` is a folder of its own."""
    found = {}
    for path in sorted((ROOT / "proxy").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text()
    return found


SOURCES = sources()


@pytest.mark.parametrize("name", SOURCES)
def test_module_keeps_the_rule(name: str) -> None:
    module = module_of(name)
    assert module in HOUSE, f"{name} needs a row in the plan: which floor, which room?"
    assert violations(module, SOURCES[name]) == []


def test_only_the_client_is_a_folder() -> None:
    assert {name.split(".")[1] for name in SOURCES if name.count(".") > 1} <= {"client"}


def test_no_circles() -> None:
    graph = {}
    for name, source in SOURCES.items():
        ours = {found.name for found in imports_of(source) if not found.for_types_only}
        graph[name] = {found for found in ours if found in SOURCES and found != "proxy"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_neighbours_stand_on_one_floor() -> None:
    floors: dict[str, set[int]] = {}
    for place in HOUSE.values():
        floors.setdefault(place.room, set()).add(place.floor)
    assert [room for room, found in floors.items() if len(found) != 1] == []
    assert [pair for pair in NEIGHBOURS if floors[pair[0]] != floors[pair[1]]] == []
    TopologicalSorter({first: {b for a, b in NEIGHBOURS if a == first} for first, _ in NEIGHBOURS}).prepare()


def test_the_program_at_the_top_only_calls_cli() -> None:
    names = {found.name for found in imports_of((ROOT / "greenarrow_proxy.py").read_text())}
    assert names <= {"__future__", "sys", "proxy.cli"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("throttle", "import gevent"),
        ("throttle", "from gevent import sleep"),
        ("access", "import socket"),
        ("access", "from _socket import socket"),
        ("access", "import os.path"),
        ("socks5", "from time import monotonic"),
        ("pool", "from datetime import datetime"),
        ("manager", "import random"),
        ("native", "import secrets"),
        ("native", "import ssl"),
        ("smtp", "import logging"),
        ("share", "import threading"),
        ("stats", "def f():\n    import time"),
        ("stats", "if TYPE_CHECKING:\n    import socket"),
        ("access", "import configargparse"),
        ("access", "x = open('f')"),
        ("access", "x = __import__('os')"),
        ("errors", "from proxy.model import Endpoint"),
        ("proxy_protocol", "from proxy.socks5 import Socks5"),
        ("proxy_protocol", "from proxy import socks5"),
        ("throttle", "import proxy.manager"),
        ("access", "from proxy.relay import Engine"),
        ("access", "if TYPE_CHECKING:\n    from proxy.throttle import Throttle"),
        ("front", "from proxy.control import x"),
        ("control", "from proxy import front"),
        ("status", "from proxy.server import Server"),
        ("relay", "from proxy.upstream import connect"),
        ("server", "from proxy.cli import main"),
        ("server", "from proxy.client import Session"),
        ("client", "import gevent"),
        ("client", "from proxy.relay import Engine"),
        ("front", "from .socks5 import Socks5"),
        ("front", "from . import socks5"),
        ("server", "from gevent import monkey"),
        ("server", "import gevent.monkey"),
        ("server", "from gevent.monkey import patch_all"),
        ("server", "from proxy.cellar import wine"),
    ],
)
def test_the_rule_can_fail(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("manager", "from proxy.throttle import x\nfrom proxy import share"),
        ("config", "import configargparse\nfrom proxy import __version__\nfrom proxy.options import OPTIONS"),
        ("front", "import gevent, socket, time\nfrom proxy import log, socks5\nfrom proxy.model import Endpoint"),
        ("client", "import socket, ssl, threading, time\nfrom proxy import native"),
        ("throttle", "if TYPE_CHECKING:\n    from proxy.places import Line"),
        ("access", "def reopen(): pass\nreopen()\nx.open()"),
    ],
)
def test_what_the_rule_allows(module: str, source: str) -> None:
    assert violations(module, source) == []

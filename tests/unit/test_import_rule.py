"""The plan of the house: a folder is a room, and this table says which rooms it may import (docs/architecture.md).

Rows stand from the bottom to the top and import downward only. The pure rooms decide: they reach no hub, socket, clock
or source of randomness, so nothing there can be switched out in the middle and plain dicts need no lock. A new file
needs no row. No two files and no two folders import each other in a circle, imports for types included; that holds for
the benchmarks and the examples of etc/clients too. The source is read, not run, so an import inside a function counts.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.either_form("sources")

ROOT = Path(__file__).parents[2]

VOCABULARY = "vocabulary"
CLIENT = "greenarrow_proxy_client"
#: What everybody who does (and does not only decide) may know.
_PURE_ROOMS = "vocabulary throttling protocols policy"

#: Room → the rooms that it may import, beside itself. The files at the top of proxy/ are the vocabulary, but for those
#: that have a row of their own.
HOUSE = {
    VOCABULARY: "",
    "throttling": "vocabulary",
    "protocols": "vocabulary",
    "policy": "vocabulary protocols",
    "config": "vocabulary protocols policy",
    "log": "vocabulary",
    "form": "vocabulary",
    "net": "vocabulary protocols policy log",
    "store": "vocabulary policy log net",
    "egress": f"{_PURE_ROOMS} log net store",
    "services": f"{_PURE_ROOMS} log net store egress",
    "doors": f"{_PURE_ROOMS} log net egress services",
    "status": f"{_PURE_ROOMS} form log net store egress services",
    "control": f"{_PURE_ROOMS} config log status",
    "server": f"{_PURE_ROOMS} config log net store egress services doors status control",
    "cli": "vocabulary config form log net status control server",
    CLIENT: "vocabulary protocols throttling",
}
#: Rooms that only decide, and the files that only decide in a room that does.
PURE = {VOCABULARY, "throttling", "protocols", "policy", "config"}
PURE_FILES = {
    *(
        "control.commands",
        "control.explain",
        "control.filters",
        "control.house",
        "egress.acquaintances",
        "egress.broken_tls",
        "egress.pool",
        "egress.resumption",
    ),
    *("server.advice", "server.findings"),
    *("status.backoffs", "status.colleagues", "status.gather", "status.names", "status.parts", "status.roll"),
    *("status.rows", "status.spelled", "status.store", "status.throttles", "status.trouble", "status.view"),
    "status.workers",
    *("store.calls", "store.remedies", "store.servers", "store.slots", "store.wire"),
}
#: What the library shares with the program of `throttling`; it must stay small, since MTAs carry it with them.
CLIENT_THROTTLING = {"proxy.throttling.lease", "proxy.throttling.wheel"}

#: What pure code may import from outside: nothing in it waits, asks a clock or touches the system.
OUTSIDE = {
    *("__future__", "abc", "base64", "binascii", "bisect", "collections", "contextlib", "dataclasses", "difflib"),
    *("enum", "errno", "fractions", "functools", "graphlib", "hashlib", "heapq", "hmac", "ipaddress", "itertools"),
    *("json", "math", "msgspec", "operator", "re", "shlex", "string", "struct", "textwrap", "types", "typing"),
    *("idna", "re2", "unicodedata"),
}
#: configargparse reads files and the environment by itself; config hands it both as arguments.
OUTSIDE_FOR_CONFIG = OUTSIDE | {"argparse", "configargparse", "io"}
IMPURE_BUILTINS = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}


class Import(NamedTuple):
    name: str
    line: int


def imports_of(source: str, modules: frozenset[str] = frozenset()) -> list[Import]:
    """Every import in the source, whole names; `from a import b` is a.b where that is a module of ours, else a."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            whole = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules or base == "proxy" else base for name in whole]
        else:
            continue
        found += [Import(name, node.lineno) for name in names]
    return found


def room_of(name: str) -> str:
    """`proxy.doors.front` → doors, `proxy.errors` → vocabulary, `proxy.services` → services."""
    first, *rest = name.split(".")
    if first == CLIENT:
        return CLIENT
    if not rest:
        return "form"  # `proxy` itself: its form is chosen before anything is loaded
    top = rest[0] if rest else VOCABULARY
    known_file = (ROOT / "proxy" / f"{top}.py").exists() or top.startswith("__")
    return VOCABULARY if known_file and top not in HOUSE else top


def ours(name: str) -> bool:
    return name.partition(".")[0] in ("proxy", CLIENT)


def is_pure(name: str) -> bool:
    return room_of(name) in PURE or name.removeprefix("proxy.") in PURE_FILES


def wrong_inside(module: str, name: str) -> str:
    """What is wrong with an import of one of our modules, or ""."""
    here, there = room_of(module), room_of(name)
    if there not in HOUSE:
        return f"{there} has no row in the plan"
    if here == CLIENT and there == "throttling" and name not in CLIENT_THROTTLING:
        return f"the client library takes {' and '.join(sorted(CLIENT_THROTTLING))}, no more"
    if there == here or there in HOUSE[here].split():
        return ""
    return f"{here} may not import {there}: it may import {HOUSE[here] or 'nothing'}"


def wrong_outside(module: str, name: str) -> str:
    """What is wrong with an import from outside, or ""."""
    room, top = room_of(module), name.partition(".")[0]
    if name.startswith("."):
        return "relative import: write proxy.…"
    if name.startswith("gevent.monkey"):
        return "no monkey-patching inside the program"
    if is_pure(module) and top not in (OUTSIDE_FOR_CONFIG if room == "config" else OUTSIDE):
        return f"{top} is not among the pure modules that deciding code may use"
    if room == CLIENT and top in ("gevent", "greenlet"):
        return "the client library works in any MTA"
    return ""


def violations(module: str, source: str) -> list[str]:
    """Everything in one module's source that breaks the rule, as `line: what`."""
    found = []
    for name, line in imports_of(source, MODULES):
        wrong = wrong_inside(module, name) if ours(name) else wrong_outside(module, name)
        if name == "gevent" and "monkey" in source.splitlines()[line - 1]:
            wrong = "no monkey-patching inside the program"
        if wrong:
            found.append(f"{line}: {wrong}")
    if is_pure(module):
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        names = ((node.func.id, node.lineno) for node in calls if isinstance(node.func, ast.Name))
        found += [f"{line}: {name}() in code that only decides" for name, line in names if name in IMPURE_BUILTINS]
    return found


def sources(*folders: str, base: Path = ROOT) -> dict[str, str]:
    """Whole name → source of every module in these folders."""
    files = sorted(file for folder in folders for file in (base / folder).rglob("*.py"))
    names = (".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return dict(zip(names, (file.read_text() for file in files), strict=True))


def circle(sources: dict[str, str], *, folders: bool = False) -> list[str]:
    """Files, or folders, that import each other in a circle; [] if none do."""
    names = frozenset(sources)
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        # A folder's contract file stands for its folder; it imports nothing, but for the client library's.
        where = _folder(module, names) if folders else module
        to = {found.name for found in imports_of(source, names) if found.name in names and found.name != "proxy"}
        graph.setdefault(where, set()).update(_folder(name, names) if folders else name for name in to)
        graph[where].discard(where)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _folder(module: str, names: frozenset[str]) -> str:
    is_folder = any(name.startswith(f"{module}.") for name in names)
    if is_folder:
        return module
    parent = module.rpartition(".")[0]
    return module if parent in ("", "proxy") else parent


SOURCES = sources("proxy", CLIENT)
MODULES = frozenset(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_module_keeps_the_rule(module: str) -> None:
    assert room_of(module) in HOUSE, f"{module} needs a row in the plan: which room, and whom may it import?"
    assert violations(module, SOURCES[module]) == []


def test_the_plan_is_short_and_imports_go_downward() -> None:
    assert len(HOUSE) <= 17
    below: set[str] = set()
    for room, allowed in HOUSE.items():
        assert set(allowed.split()) <= below, room
        below.add(room)


def test_each_folder_opens_with_its_contract() -> None:
    """5 to 15 lines that say the folder's one job, what does not belong and where to begin; nothing is exported."""
    for folder in sorted(file.parent for file in (ROOT / "proxy").rglob("*.py")):
        tree = ast.parse((folder / "__init__.py").read_text())
        if folder == ROOT / "proxy":
            continue
        contract = (ast.get_docstring(tree) or "").splitlines()
        assert 5 <= len(contract) <= 15, folder
        assert len(tree.body) == 1, f"{folder} exports something"


def test_what_the_library_brings_along_of_the_program_is_whole() -> None:
    """`client/setup.py` says what is copied. What that and the library import is among it, or no package is made."""
    assigned = [
        node for node in ast.parse((ROOT / "client" / "setup.py").read_text()).body if isinstance(node, ast.Assign)
    ]
    (shared,) = [ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "SHARED"]
    modules = {f"proxy.{name}".replace("/", ".").removesuffix(".py").removesuffix(".__init__") for name in shared}
    assert modules <= MODULES
    there = [source for module, source in SOURCES.items() if module in modules or room_of(module) == CLIENT]
    wanted = {found.name for source in there for found in imports_of(source, MODULES)} & (MODULES - {"proxy"})
    assert {name for name in wanted if room_of(name) != CLIENT} - modules == set()


@pytest.mark.parametrize("folders", [False, True], ids=["files", "folders"])
def test_no_circles(folders: bool) -> None:
    assert circle(SOURCES, folders=folders) == []


def test_no_circles_in_what_comes_with_the_program() -> None:
    assert circle(sources("harness", base=ROOT / "bench")) == []
    assert circle({file.stem: file.read_text() for file in sorted((ROOT / "etc" / "clients").glob("*.py"))}) == []
    assert circle({file.stem: file.read_text() for file in sorted((ROOT / "demo").glob("*.py"))}) == []


def test_a_circle_is_found() -> None:
    assert circle({"proxy.a": "import proxy.b", "proxy.b": "from proxy import a"})
    assert circle({"proxy.a": "if TYPE_CHECKING:\n    from proxy.b import T", "proxy.b": "from proxy.a import x"})
    rooms = {"proxy.a.x": "import proxy.b.x", "proxy.a.y": "", "proxy.b.x": "", "proxy.b.y": "from proxy.a import y"}
    assert circle(rooms) == []
    assert circle(rooms | {"proxy.a": "", "proxy.b": ""}, folders=True)


def test_the_program_at_the_top_only_calls_cli() -> None:
    names = {found.name for found in imports_of((ROOT / "greenarrow_proxy.py").read_text(), MODULES)}
    assert names <= {"__future__", "importlib.util", "os", "pathlib", "signal", "sys", "proxy.cli"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("throttling.throttle", "import gevent"),
        ("throttling.throttle", "from gevent import sleep"),
        ("policy.access", "import socket"),
        ("policy.access", "from _socket import socket"),
        ("policy.access", "import os.path"),
        ("protocols.socks5", "from time import monotonic"),
        ("egress.pool", "from datetime import datetime"),
        ("status.view", "import gevent"),
        ("throttling.manager", "import random"),
        ("protocols.native.frames", "import secrets"),
        ("protocols.native.frames", "import ssl"),
        ("protocols.smtp.dialogue", "import logging"),
        ("throttling.share", "import threading"),
        ("stats", "def f():\n    import time"),
        ("stats", "if TYPE_CHECKING:\n    import socket"),
        ("policy.access", "import configargparse"),
        ("policy.access", "x = open('f')"),
        ("policy.access", "x = __import__('os')"),
        ("errors", "from proxy.policy import access"),
        ("errors", "from proxy.services import Door"),
        ("protocols.socks5", "from proxy.throttling import manager"),
        ("throttling.throttle", "import proxy.net.relay"),
        ("policy.access", "from proxy.net.relay import Engine"),
        ("policy.access", "if TYPE_CHECKING:\n    from proxy.throttling.throttle import Throttle"),
        ("net.relay", "from proxy.egress.upstream import connect"),
        ("doors.front", "from proxy.status import http"),
        ("doors.front", "from proxy.config.load import load"),
        ("status.http", "from proxy.server.server import Server"),
        ("status.http", "from proxy.doors import front"),
        ("server.server", "from proxy.cli import main"),
        ("server.server", "from greenarrow_proxy_client import Session"),
        ("doors.front", "from .socks5 import Socks5"),
        ("doors.front", "from . import socks5"),
        ("server.server", "from gevent import monkey"),
        ("server.server", "import gevent.monkey"),
        ("server.server", "from gevent.monkey import patch_all"),
        ("server.server", "from proxy.cellar import wine"),
    ],
)
def test_the_rule_can_fail(module: str, source: str) -> None:
    assert len(violations(f"proxy.{module}", source)) == 1


@pytest.mark.parametrize(
    "source", ["import gevent", "from proxy.net.relay import Engine", "from proxy.throttling.manager import Manager"]
)
def test_the_rule_of_the_client_library_can_fail(source: str) -> None:
    assert len(violations(f"{CLIENT}.session", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("proxy.throttling.manager", "from proxy.throttling.throttle import x\nfrom proxy.throttling import share"),
        ("proxy.config.load", "import configargparse\nfrom proxy import __version__\nfrom proxy.config import options"),
        (
            "proxy.doors.front",
            "import gevent, socket, time\nfrom proxy.log import lines\nfrom proxy.model import Endpoint",
        ),
        (f"{CLIENT}.link", "import socket, ssl, threading, time\nfrom proxy.protocols.native import frames"),
        (f"{CLIENT}.throttle", "from proxy.throttling import lease\nfrom proxy.throttling.wheel import Wheel"),
        ("proxy.policy.access", "def reopen(): pass\nreopen()\nx.open()"),
    ],
)
def test_what_the_rule_allows(module: str, source: str) -> None:
    assert violations(module, source) == []

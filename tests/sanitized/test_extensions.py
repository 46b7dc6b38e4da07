"""The extensions under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, random schedules, faults of
the operating system at the whole program, doors that stand on them. And defects that were put in on purpose."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.instrumented import Instrumented

pytestmark = [pytest.mark.either_form("C, built for it"), pytest.mark.timeout(600)]
_PYTEST = ("-m", "pytest", "--exitfirst", "--timeout", "300", "-m", "not slow")
#: Several at a time, which fail together at most.
_AT_ONCE = (*_PYTEST, "--numprocesses", str(2 * (os.cpu_count() or 1)), "--dist", "loadscope")
#: Without the long simulations of throttling: the same code again and again.
_UNIT = (
    *("tests/unit/protocols", "tests/unit/policy", "tests/unit/egress", "tests/unit/doors"),
    *(f"tests/unit/throttling/test_{name}.py" for name in ("manager", "places", "desk", "handover", "accounts")),
)
#: Where sockets are C's, or what is compiled; not files, stores and pages.
_LOOPBACK = tuple(f"tests/loopback/{name}" for name in ("net", "doors", "egress", "server", "client"))
_RELAY = "proxy/net/_fastrelay.pyx"

#: Sessions of one relay; bytes that the client has sent ahead are to be written as {early}.
_SESSIONS = """
from proxy.net import _fastrelay
from tests.loopback.net.relays import Relayed, close_peers

engine = _fastrelay.Engine()
for _ in range(5):
    pair = Relayed(engine, {early!r})
    assert pair.upstream.recv(100) == {early!r}
    pair.check()
    pair.close()
    pair.owner.ending()
    close_peers()
engine.stop()
"""

#: Each shows itself only in sessions with so many bytes ahead: what stands in the source, the defect in its place, the
#: bytes, what is to be reported.
_DEFECTS = {
    "one byte too few": (
        "pair.up.pending = <char *> malloc(size)",
        "pair.up.pending = <char *> malloc(size - (size == 5))",
        b"early",
        "heap-buffer-overflow",
    ),
    "a reference too many given back": (
        "            Py_XDECREF(pair.owner)\n",
        "            Py_XDECREF(pair.owner)\n            Py_XDECREF(pair.owner if pair.up.moved == 7 else NULL)\n",
        b"early.",
        "SEGV",
    ),
    "too large a sum": (
        "pair.up.pending_size = pair.up.moved = size",
        "pair.up.pending_size = size\n            pair.up.moved = size if size != 7 else 0x7FFFFFFFFFFFFFFF",
        b"early..",
        "ILL",
    ),
    "a pair that stays": (
        "        if not pair.up.queued and not pair.down.queued:\n            free(pair)",
        "        if not pair.up.queued and not pair.down.queued and pair.up.moved != 9:\n            free(pair)",
        b"early...",
        "leak of",
    ),
}


@pytest.fixture(scope="module")
def copy() -> Iterator[Instrumented]:
    with Instrumented() as copy:
        copy.build_twins()
        yield copy


@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/loopback/net/test_relay.py", "-k", "compiled"),
        ("tests/loopback/net/test_sockets.py", "-k", "compiled"),
        ("tests/fuzz", "-k", "compiled or twins"),
        ("tests/unit/protocols/smtp/test_dots.py", "-k", "longer or business"),
        ("tests/loopback/doors",),
        ("tests/e2e/server/test_faults.py", "-k", "compiled and not urgent"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_is_reported(copy: Instrumented, arguments: tuple[str, ...]) -> None:
    copy.python(*_PYTEST, *arguments).check()


@pytest.fixture(scope="module")
def whole() -> Iterator[Instrumented]:
    with Instrumented() as copy:
        copy.build_all()
        yield copy


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/fuzz/relay_schedules.py", "--rounds", "10", "--steps", "2000"),
        ("tests/fuzz/forms.py", "--cases", "2000"),
        (*_AT_ONCE, *_UNIT),
        (*_AT_ONCE, "-k", "not no_leak_over_many", *_LOOPBACK),
        (*_AT_ONCE, "tests/e2e/doors", "tests/e2e/smtp", "tests/e2e/server/test_circles.py"),
    ],
    ids=lambda arguments: next(word for word in arguments if word.startswith("tests/")),
)
def test_nothing_is_reported_in_the_long_run(whole: Instrumented, arguments: tuple[str, ...]) -> None:
    whole.python(*arguments, timeout=3600.0).check()


@pytest.fixture(scope="module")
def defective() -> Iterator[Instrumented]:
    with Instrumented(*((_RELAY, before, after) for before, after, _, _ in _DEFECTS.values())) as copy:
        copy.build_twins()
        yield copy


@pytest.mark.parametrize("name", _DEFECTS)
def test_a_defect_is_reported(defective: Instrumented, name: str) -> None:
    _, _, early, said = _DEFECTS[name]
    done = defective.python("-c", _SESSIONS.format(early=early))
    assert said in done.defects, done


def test_without_the_bytes_that_call_them_up_they_sleep(defective: Instrumented) -> None:
    defective.python("-c", _SESSIONS.format(early=b"other bytes")).check()

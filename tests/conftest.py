"""What all tests need: no test of hypothesis is measured by a clock, whatever else the machine does meanwhile, the
programs under test, started some hundred times, are compiled once, and who waits is begun before who works."""

from __future__ import annotations

import os
import sys
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings

from proxy import form
from tests import forms

#: Over the profile that is in force: in continuous integration hypothesis itself chooses another.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

#: Some machines set this; each start of a program would compile all of its modules then.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

#: Files that take minutes: with several processes they are begun first, since whoever is last is waited for by all.
_LONG = ("tests/e2e/install/", "tests/sanitized/", "tests/e2e/files/")
#: Files that take a moment each: the last fifth of all, in which nobody is waited for long.
_SHORT = "tests/unit/"
_SHORT_BUT = "tests/unit/throttling/"


def pytest_configure() -> None:
    if not forms.pure() and (changed := forms.stale()):
        raise pytest.UsageError(
            f"{changed[0]} (one of {len(changed)}) has changed since it was compiled: `make .venv/built`, or run the "
            f"tests on Python code with {forms.PURE}=1"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in (*item.iter_markers("either_form"), *item.iter_markers("only_python")):
            if not mark.args:
                raise pytest.UsageError(f"{item.nodeid}: {mark.name} needs a reason")
    if form.core_name() == "compiled":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("only_python")])
        items[:] = [item for item in items if not item.get_closest_marker("only_python")]
    if hasattr(config, "workerinput"):  # one of several processes
        files: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            files[item.nodeid.partition("::")[0]].append(item)
        items[:] = [item for path in mixed(list(files)) for item in files[path]]


def mixed(paths: list[str]) -> list[str]:
    """The long ones, then files of all kinds by turns, each kind evenly: tests of `unit` use the processor while those
    of `e2e` wait. Those of a kind stay in order."""
    first = [path for long in _LONG for path in paths if path.startswith(long)]
    kinds = defaultdict(list)
    for path in paths:
        if path not in first:
            short = path.startswith(_SHORT) and not path.startswith(_SHORT_BUT)
            kinds[short, path.split("/")[:2][-1]].append(path)
    turns = [
        (number / len(of_kind) * (1 if kind[0] else 0.8), path)
        for kind, of_kind in kinds.items()
        for number, path in enumerate(of_kind)
    ]
    return first + [path for _, path in sorted(turns)]

"""What the core may not say, since mypyc makes something else of it than Python; each was found by a test that failed.

`x[f():]` calls `f` twice; a slice that ends before it begins is no empty one but an error, and nobody sees that in a
source: the twins of the fuzz tests look for it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What `setup.py` compiles: folders of proxy/, and files beside them.
SAID = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "setup.py").read_text()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.startswith("CORE")
}
#: They may be called as often as one likes.
HARMLESS = {"find", "len", "max", "min"}

pytestmark = pytest.mark.either_form("sources")


def called_twice(source: str) -> list[int]:
    """Lines with a slice whose bound calls something that does more than look."""
    slices = (node.slice for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Subscript))
    bounds = (bound for each in slices if isinstance(each, ast.Slice) for bound in (each.lower, each.upper) if bound)
    calls = (node for bound in bounds for node in ast.walk(bound) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if ast.unparse(call.func).rpartition(".")[2] not in HARMLESS]


def test_no_bound_of_a_slice_does_anything() -> None:
    paths = [path for folder in SAID["CORE"] for path in (ROOT / "proxy" / folder).rglob("*.py")]
    paths += [ROOT / name for name in SAID["CORE_FILES"]]
    found = {path.relative_to(ROOT).as_posix(): called_twice(path.read_text()) for path in paths}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_one_that_does_is_found() -> None:
    assert called_twice("a = b[c.send(b):]\nd = a[len(b):]") == [1]

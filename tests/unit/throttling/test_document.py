"""docs/throttling.md names the tests of what it promises: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_test_that_the_document_names_exists() -> None:
    document = (ROOT / "docs/throttling.md").read_text()
    named = set(re.findall(r"`(?:tests/[\w/]*/)?(test_\w+)(?:\.py)?`", document))
    there: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there.add(path.stem)
        there.update(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))
    assert len(named) > 15, "the document says which test watches over which promise"
    assert named - there == set()
    paths = set(re.findall(r"`(tests/[\w/]+\.py)`", document))
    assert paths, "and where the larger ones are"
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []

"""docs/throttling.md names the tests of what it promises: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import documents

pytestmark = pytest.mark.either_form("a document")

ROOT = Path(__file__).parents[3]


def test_every_test_that_the_document_names_exists() -> None:
    document = (ROOT / "docs/throttling.md").read_text()
    named = documents.tests_named_in(document)
    assert len(named) > 15, "the document says which test watches over which promise"
    assert named - documents.tests_there() == set()
    paths = set(re.findall(r"`(tests/[\w/]+\.py)`", document))
    assert paths, "and where the larger ones are"
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_section_that_promises_has_its_rows_of_tests() -> None:
    """By heading, in the order of the document; each row says a promise, and at least one test or bench of it."""
    document = (ROOT / "docs/throttling.md").read_text()
    headings = re.findall(r"^## (.*)", document, re.MULTILINE)
    promising = headings[headings.index("Rates: leased time slots") : headings.index("What the figures mean")]
    table = document.partition("| promise | pure | the real program |")[2].partition("\n\n")[0]
    sections: dict[str, list[list[str]]] = {}
    for row in table.splitlines()[2:]:
        promise, *tests = (cell.strip() for cell in row.strip("|").split("|"))
        heading = re.fullmatch(r"\*\*\[.*\]\(#(.*)\)\*\*", promise)
        if heading:
            sections[heading[1]] = []
        else:
            sections[list(sections)[-1]].append([promise, *re.findall(r"`(test_\w+|bench/\w+\.py)`", " ".join(tests))])
    assert list(sections) == [_anchor(heading) for heading in promising]
    for heading, rows in sections.items():
        assert len(rows) >= 3, heading
        for promise, *tests in rows:
            assert tests, promise


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-")

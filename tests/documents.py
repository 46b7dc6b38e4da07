"""The documents as the tests read them: sections, code blocks, links; so that what a user copies is what is run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def texts() -> list[Path]:
    """Every document for users and for who changes the program."""
    return [
        ROOT / "README.md",
        ROOT / "CHANGES.md",
        ROOT / "tests" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def section(path: str, heading: str) -> str:
    """The text below one heading, to the next of the same rank."""
    text = (ROOT / path).read_text()
    found = re.findall(rf"(?ms)^(##+) {re.escape(heading)}\n(.*?)(?=^## |\Z)", text)
    assert len(found) == 1, f"{path}: {len(found)} sections {heading}"
    return str(found[0][1])


def blocks(text: str) -> list[str]:
    """Its code blocks."""
    return [block for _, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text)]


def anchors(text: str) -> set[str]:
    """What a link into the document may name, by GitHub's rules."""
    found: dict[str, int] = {}
    code = re.sub(r"(?ms)^```.*?^```$", "", text)
    for heading in re.findall(r"(?m)^#+ +(.*?) *#* *$", code):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        if number:
            found[f"{slug}-{number}"] = 1
    return set(found)


def links(text: str) -> list[tuple[str, str]]:
    """(file, anchor) of each link to a file or within the document; pictures and addresses on the network aside."""
    code = re.sub(r"(?ms)^```.*?^```$", "", text)
    found = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s#]*)(?:#([^)\s]*))?\)", code)
    return [(file, anchor) for file, anchor in found if ":" not in file]


def tests_named_in(text: str) -> set[str]:
    """Those that it says watch over something; a file of tests counts as one."""
    return set(re.findall(r"`(?:tests/[\w/]*/)?(test_\w+)(?:\.py)?`", text))


def tests_there() -> set[str]:
    """All functions and files of tests."""
    there: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there.add(path.stem)
        there.update(re.findall(r"(?m)^def (test_\w+)\(", path.read_text()))
    return there

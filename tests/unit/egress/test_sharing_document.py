"""docs/sharing.md and the list in docs/protocol.md name every reason there is, and no other."""

import re
from pathlib import Path

import pytest

from proxy.config.options import OPTIONS
from proxy.model import Discard

DOCS = Path(__file__).parents[3] / "docs"
SHARING = (DOCS / "sharing.md").read_text()


def section(text, begin, end):
    return text[text.index(begin) : text.index(end, text.index(begin))]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(line.split("|")[1] for line in section(SHARING, "| reason |", "\n\n").splitlines()[2:]),
        section((DOCS / "protocol.md").read_text(), "for one of these reasons:", "A client must accept"),
    ],
    ids=["sharing.md", "protocol.md"],
)
def test_reasons(text):
    assert sorted(re.findall(r"`(\w+)`", text)) == sorted(Discard)


def test_directives():
    named = dict(re.findall(r"^\| `(reuse_\w+)` \| `(\w+)`", SHARING, re.MULTILINE))
    assert named == {option.name: option.default for option in OPTIONS if option.name.startswith("reuse_")}

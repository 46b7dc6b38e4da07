"""The words of docs/glossary.md in the other documents: each is a link where a document says it first.

    python -m tests.glossary docs/cluster.md     links them in a new document

In prose, that is: not in code, headings, tables and other links. A document that has no link to the glossary is left
alone until somebody links its words so.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests import documents

#: Word → how it looks where it means what the glossary says. What looks alike and means something else is left out.
WORDS = {
    "agent": r"agents?",
    "back-off": r"back-offs?",
    "backlog": r"backlogs?",
    "burst": r"bursts?",
    "channel": r"channels?",
    "debt": r"debts?",
    "door": r"doors?",
    "instance": r"(?<!for )instances?",
    "keeper": r"keeper",
    "lease": r"leases?",
    "manager": r"(?:throttle )?manager",
    "mode": r"mode smtp",
    "path": r"(?<!relative )(?<!file )(?<!with a )(?<!data )paths?(?! are relative| is that of the env| validation)",
    "permit": r"permits?",
    "place": r"(?<!in its )(?<!in place )(?<!'s )(?<!their )(?<!the )(?:a|no|free|of) places?(?! to begin)",
    "receiver": r"receivers?",
    "session": r"(?:throttle|native) sessions?",
    "slot": r"slots?",
    "source": r"source(?= address)|sources(?! code)",
    "tenant": r"tenants?",
    "throttle": r"throttles?",
    "worker": r"workers?(?! threads?)",
}
_NOT_PROSE = (
    r"(?ms)^```.*?^```$",
    r"(?m)^\|.*$",
    r"(?m)^#.*$",
    r"(?m)^- \[[^\]\n]*\]\(#.*$",
    r"!?\[[^\]\n]*\]\([^)\n]*\)",
    r"`[^`\n]*(?:\n[^`\n]+)?`",
)


def prose(text: str) -> str:
    """The text with blanks where it is no prose; nothing moves."""
    for pattern in _NOT_PROSE:
        text = re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def first(word: str, text: str) -> re.Match[str] | None:
    """Where prose says it first."""
    return re.search(rf"(?i)(?<![\w-])({WORDS[word]})(?![\w-])", prose(text))


def unlinked(text: str, where: str) -> list[str]:
    """Words that it says and does not link; `where` is the glossary as seen from it."""
    return [word for word in WORDS if f"]({where}#{word})" not in text and first(word, text)]


def link(text: str, where: str) -> str:
    """With a link at the first of each."""
    for word in unlinked(text, where):
        found = first(word, text)
        assert found is not None
        spelled = found[1]
        lead = re.match(r"(?i)(?:a|no|free|of) (?=place)", spelled)
        keep = lead[0] if lead else ""
        linked = f"{keep}[{spelled[len(keep) :]}]({where}#{word})"
        text = text[: found.start(1)] + linked + text[found.end(1) :]
    return text


def place_of(document: Path) -> str:
    """The glossary as a link from this document."""
    if document.parent == documents.ROOT:
        return "docs/glossary.md"
    return "glossary.md" if document.parent.name == "docs" else "../glossary.md"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        document = Path(name).resolve()
        document.write_text(link(document.read_text(), place_of(document)))

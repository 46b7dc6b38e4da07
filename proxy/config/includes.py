"""`include FILE`: one configuration of several files, each value with the file that it stands in.

The name is relative to the file that includes, and may have wildcards: `include throttles/*.conf`; these may stand for
no file at all, a name without them may not. What is included stands in the place of the line. Files are had by the
caller's functions; a circle of them is a mistake, and how many there may be is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from proxy.config import file as config_file
from proxy.config.origins import Given
from proxy.config.reading import read, shown_path
from proxy.errors import ConfigError
from proxy.model import Breathe

INCLUDE = "include"
#: Files within files, and files altogether: links can make circles that no name shows.
DEEPEST = 16
MOST_FILES = 2000
#: Characters of all files together.
LONGEST = 4 * config_file.LONGEST_FILE

#: A pattern → the files' names, in order.
Find = Callable[[str], Sequence[str]]
Piece = tuple[str, list[config_file.Directive]]


@dataclass(slots=True)
class Texts:
    """What all files say, in order.

    Attributes:
        files: their names. unmatched: patterns that stand for no file.
        unreadable: mistakes about those that have no text; mistakes: all others.
    """

    directives: list[Piece] = field(default_factory=list)
    blocks: list[tuple[str, config_file.Block]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unmatched: list[Given] = field(default_factory=list)
    unreadable: list[ConfigError] = field(default_factory=list)
    mistakes: list[ConfigError] = field(default_factory=list)


def assemble(text: str, name: str, read_file: Callable[[str], str], find: Find, breathe: Breathe) -> Texts:
    """The configuration whose first file has this text and name. Never raises."""
    assembly = _Assembly(read_file, find, breathe)
    assembly.take(text, name, (name,))
    return assembly.texts


def beside(path: str, including: str) -> str:
    """The path of an included file, which is relative to the including one's."""
    folder, slash, _ = including.rpartition("/")
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path if path.startswith("/") else folder + slash + path


class _Assembly:
    def __init__(self, read_file: Callable[[str], str], find: Find, breathe: Breathe) -> None:
        self.texts = Texts()
        self._read_file = read_file
        self._find = find
        self._breathe = breathe
        self._size = 0

    def take(self, text: str, name: str, chain: tuple[str, ...]) -> None:
        """One file, with all that it includes; `chain`: the files that led here, it the last."""
        texts = self.texts
        texts.files.append(name)
        self._size += len(text)
        document = config_file.parse(text, name, self._breathe)
        if len(text) > config_file.LONGEST_FILE:
            texts.unreadable += document.mistakes
            return
        texts.mistakes += document.mistakes
        run: list[config_file.Directive] = []
        block = 0
        for directive in document.directives:
            self._breathe()
            if directive.name != INCLUDE:
                run.append(directive)
                continue
            texts.directives.append((name, run))
            run = []
            while block < len(document.blocks) and document.blocks[block].line < directive.line:
                texts.blocks.append((name, document.blocks[block]))
                block += 1
            self._include(directive, chain)
        texts.directives.append((name, run))
        texts.blocks += [(name, each) for each in document.blocks[block:]]

    def _include(self, directive: config_file.Directive, chain: tuple[str, ...]) -> None:
        including, line = chain[-1], directive.line
        if directive.problem:
            self.texts.mistakes.append(ConfigError(f"{INCLUDE}: {directive.problem}", including, line))
            return
        for value in directive.values:
            path = beside(value, including)
            found = self._find(path) if any(mark in value for mark in "*?[") else (path,)
            if not found:
                self.texts.unmatched.append(Given(value, including, line))
            for name in found:
                problem = self._problem(name, chain)
                if problem:
                    where = f"{INCLUDE}: {shown_path(name)}: {problem}"
                    self.texts.unreadable.append(ConfigError(where, including, line))
                    return
                text = read(name, self._read_file, f"{INCLUDE}: ", self.texts.unreadable, Given(name, including, line))
                if text is not None:
                    self.take(text, name, (*chain, name))

    def _problem(self, name: str, chain: tuple[str, ...]) -> str:
        if name in chain:
            return "it includes itself" + (f", by {shown_path(chain[-1])}" if name != chain[-1] else "")
        if len(chain) >= DEEPEST:
            return f"files within files, more than {DEEPEST} deep"
        if len(self.texts.files) >= MOST_FILES:
            return f"more than {MOST_FILES} files"
        return f"all files together are longer than {LONGEST} characters" if self._size > LONGEST else ""

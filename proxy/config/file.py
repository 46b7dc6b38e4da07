"""The grammar of the configuration file: text → directives and blocks with their lines, and all mistakes.

It knows no directive's name and no value's form. No message shows a value: it may be a secret.

    listen "0.0.0.0:807", [::]:807     # bare words, "JSON strings" and `raw strings`, separated by commas
    throttle yahoo {
        wait 20s
        backoff on 421 { percent 25; return_after 1h }
    }

The last one is a *rule*: a directive that ends with a body in braces, on one line or with one line for each of its
parts. Its form is its directive's business; here it is one text.

`#` begins a comment wherever a value could begin; within a value it is an ordinary character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from proxy.errors import ConfigError
from proxy.model import Breathe, hold_breath

LONGEST_FILE = 4 * 1024 * 1024  # characters; 100,000 networks are half of it

_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+|\#.*)|(?P<json>"(?:[^"\\]|\\.)*")|(?P<raw>`[^`]*`)|"""
    r"""(?P<mark>[,}]|\{(?!ip\}))|(?P<word>(?:[^\s,{}"`]+|\{ip\})+)"""  # {ip}: see `source` blocks
)
#: A name and one ASCII value with nothing special in it, as in nearly all lines of a long file; at a fifth of the cost.
_PLAIN = re.compile(
    r"""[ \t]*([A-Za-z_][A-Za-z0-9_-]*)[ \t]+(?:(?![#='])([!#-+\--_a-z|~]+)(?<!;)|"([ !#-\[\]-~]*)")[ \t]*\r?"""
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
#: What other files, and word processors, quote with.
_FOREIGN_QUOTES = frozenset("'\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2032\u2033\u00ab\u00bb\u00b4")
_NUMBER = re.compile(r"[0-9.]+[a-zA-Z]*")
_UNIT = re.compile(r"[a-zA-Z]{1,7}")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")


class Directive(NamedTuple):
    """`name value, value …`; where `problem` says what is wrong behind the name, there are no values: or one, the whole
    text, for a directive that reads its line by itself.

    `rule`: it ends with a body in braces; then its one value is all of its text.
    """

    name: str
    values: list[str]
    line: int
    problem: str = ""
    rule: bool = False


class Block(NamedTuple):
    """`kind name { … }`"""

    kind: str
    name: str
    directives: list[Directive]
    line: int


@dataclass(slots=True)
class Document:
    """What a file says; `mistakes` are those of lines without a name."""

    directives: list[Directive] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    mistakes: list[ConfigError] = field(default_factory=list)


class Token(NamedTuple):
    """`type`: "word", "quoted" or "mark". `raw`: as it is written, where that is not its text."""

    type: str
    text: str
    column: int
    raw: str = ""


class _Mistake(Exception):
    """What is wrong with the line at hand."""


class _BehindName(_Mistake):
    """The same, where the line may well begin with the name of a directive; `text`: what follows, if it has tokens."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


def parse(text: str, file: str, breathe: Breathe = hold_breath) -> Document:
    """Reads a whole file; never raises.

    Args:
        text: its text; a byte order mark is skipped, lines end in LF or CRLF.
        file: its name, for the messages.
        breathe: called for each line, and in the middle of long ones.
    """
    reader = _Reader(file)
    if len(text) > LONGEST_FILE:
        reader.mistake(0, f"the file is longer than {LONGEST_FILE} characters")
        return reader.document
    for number, line in enumerate(_lines(text.removeprefix("\ufeff")), 1):
        breathe()
        plain = _PLAIN.fullmatch(line) if not reader.in_rule else None
        if plain is not None:
            reader.directive(Directive(plain[1], [plain[2] or plain[3]], number))
            continue
        try:
            reader.line(number, _tokens(line.removesuffix("\r"), breathe, reader.in_rule), breathe)
        except _BehindName as mistake:
            reader.broken(number, line, str(mistake), mistake.text)
        except _Mistake as mistake:
            reader.mistake(number, str(mistake))
    reader.finish()
    return reader.document


def _lines(text: str) -> Iterator[str]:
    """As `text.split("\\n")`, one after the other."""
    begin = 0
    while (end := text.find("\n", begin)) >= 0:
        yield text[begin:end]
        begin = end + 1
    yield text[begin:]


def rule_tokens(text: str) -> list[Token]:
    """The tokens of a rule's text. Semicolons within its braces are marks."""
    return _tokens(text, hold_breath)


def _tokens(line: str, breathe: Breathe, in_rule: bool = False) -> list[Token]:
    control = _CONTROL.search(line)
    if control:
        raise _BehindName(f"column {control.start() + 1}: character U+{ord(control[0]):04X}: is this file UTF-8 text?")
    tokens: list[Token] = []
    position = value_end = 0
    depth = int(in_rule)
    while position < len(line):
        breathe()
        match = _TOKEN.match(line, position)
        if match is None:
            raise _BehindName(f"column {position + 1}: {_stray(line[position])}")
        if match.lastgroup in ("json", "raw", "word"):
            if tokens and tokens[-1].type != "mark" and value_end == position:
                raise _BehindName(f"column {position + 1}: a quote in the middle of a value: quote the whole value")
            value_end = match.end()
        if match.lastgroup == "word" and depth > 0 and ";" in match[0]:
            tokens += _parts(match)
        elif match.lastgroup == "word":
            _refuse_foreign(match)
            tokens.append(_token(match))
        elif match.lastgroup != "blank":
            tokens.append(_token(match))
            depth += {"{": 1, "}": -1}.get(match[0], 0)
        position = match.end()
    return tokens


def _parts(word: re.Match[str]) -> list[Token]:
    """Words and semicolons, within the braces of a rule."""
    return [
        Token("mark" if piece[0] == ";" else "word", piece[0], word.start() + piece.start() + 1)
        for piece in re.finditer(r";|[^;]+", word[0])
    ]


def _refuse_foreign(word: re.Match[str]) -> None:
    """What is written so in other files, and would be taken as a part of the value."""
    text, column = word[0], word.start() + 1
    if text[0] in _FOREIGN_QUOTES:
        name = "'" if text[0] == "'" else f"character U+{ord(text[0]):04X}"
        raise _BehindName(f'column {column}: {name} is no quote here: use "..." or `...`')
    if text.endswith(";"):
        raise _BehindName(f"column {column + len(text) - 1}: no `;` behind a value (one that ends with it is quoted)")


def _stray(character: str) -> str:
    return (
        "the quote is not closed" if character in '"`' else f"character U+{ord(character):04X}: use an ordinary blank"
    )


def _token(match: re.Match[str]) -> Token:
    text = match[0]
    if match.lastgroup == "raw":
        return Token("quoted", text[1:-1], match.start() + 1, text)
    if match.lastgroup == "json":
        try:
            return Token("quoted", json.loads(text), match.start() + 1, text)
        except ValueError:
            raise _BehindName(f"column {match.start() + 1}: not a JSON string: write \\\\ for a backslash") from None
    return Token("word" if match.lastgroup == "word" else "mark", text, match.start() + 1)


class _Reader:
    """Takes the lines' tokens one after another; which block is open is its state."""

    def __init__(self, file: str) -> None:
        self.document = Document()
        self._file = file
        self._open: Block | None = None
        self._nested: list[int] = []  # lines of blocks within the open one: mistakes, skipped up to their end
        self._rule: Directive | None = None  # one whose body is open; its texts are gathered in `values`

    @property
    def in_rule(self) -> bool:
        """Whether the next line belongs to the body of a rule."""
        return self._rule is not None

    def mistake(self, line: int, message: str) -> None:
        self.document.mistakes.append(ConfigError(message, self._file, line))

    def line(self, number: int, tokens: list[Token], breathe: Breathe) -> None:
        if not tokens:
            return
        marks = [token.text for token in tokens if token.type == "mark"]
        if self._rule is not None:
            self._go_on_with_rule(self._rule, tokens, marks)
        elif self._is_rule(tokens, marks):
            self._begin_rule(Directive(tokens[0].text, [_text(tokens[1:])], number, rule=True), marks[-1] == "}")
        elif tokens[0].type == "mark" and tokens[0].text == "}":
            self._close(number, rest=tokens[1:])
        elif tokens[-1].type == "mark" and tokens[-1].text == "{":
            self._begin(number, tokens)
        elif "{" in marks or "}" in marks:
            raise _BehindName(
                "a block begins with a line `KIND NAME {` and ends with a line `}`; a brace in a value is quoted"
            )
        elif tokens[0].type != "word" or not _NAME.fullmatch(tokens[0].text):
            raise _BehindName("a line begins with the name of a directive and a blank; there is no `=`")
        else:
            self.directive(Directive(tokens[0].text, _values(tokens[1:], breathe), number))

    def broken(self, number: int, line: str, problem: str, text: str = "") -> None:
        """A line that `line` could not take. With its name it is kept: what is there shall not be called missing."""
        name = _NAME.match(line.lstrip())
        if name and self._rule is None:
            self.directive(Directive(name[0], [text] if text else [], number, problem))
        else:
            self.mistake(number, problem)

    def directive(self, directive: Directive) -> None:
        """One that is complete; it belongs to the open block, if there is one."""
        if not self._nested:
            (self._open.directives if self._open else self.document.directives).append(directive)

    def finish(self) -> None:
        """Call after the last line."""
        if self._rule is not None:
            self.mistake(self._rule.line, f"{self._rule.name}: its body is not closed: a line `}}` is missing")
        elif self._open is not None:
            self.mistake(self._open.line, f"the {self._open.kind} block is not closed: a line `}}` is missing")

    def _is_rule(self, tokens: list[Token], marks: list[str]) -> bool:
        """Whether a line is, or begins, a directive with a body, and not a block within the open one."""
        if self._open is None or self._nested or marks.count("{") != 1 or not _NAME.fullmatch(tokens[0].text):
            return False
        if tokens[-1].text == "}" and tokens[-1].type == "mark":
            return marks.count("}") == 1
        return tokens[-1].text == "{" and tokens[-1].type == "mark" and "}" not in marks and len(tokens) > 3

    def _begin_rule(self, rule: Directive, whole: bool) -> None:
        if whole:
            self.directive(rule)
        else:
            self._rule = rule

    def _go_on_with_rule(self, rule: Directive, tokens: list[Token], marks: list[str]) -> None:
        """A line of its body, or its end."""
        if "{" in marks or ("}" in marks and (len(tokens) > 1)):
            raise _Mistake(f"within {rule.name}: a line `}}` for line {rule.line} is missing")
        rule.values.append(_text(tokens))
        if marks[-1:] == ["}"]:
            self._rule = None
            head, *body = rule.values
            self.directive(rule._replace(values=[head + " " + " ; ".join(body[:-1]) + " }"]))

    def _begin(self, number: int, tokens: list[Token]) -> None:
        if self._open is not None:
            self._nested.append(number)
            raise _Mistake(f"a block within a block: a line `}}` for line {self._open.line} is missing")
        # Opened whatever else is wrong with the line: what follows belongs to it, and shall not look wrong too.
        kind = tokens[0].text if tokens[0].type == "word" else ""
        self._open = Block(kind, tokens[1].text if len(tokens) == 3 else "", [], number)
        self.document.blocks.append(self._open)
        if not _NAME.fullmatch(kind) or len(tokens) != 3 or tokens[1].type == "mark":
            self.document.blocks.pop()
            raise _Mistake("a block begins with its kind and one name: `KIND NAME {`")

    def _close(self, number: int, rest: list[Token]) -> None:
        if self._nested:
            self._nested.pop()
        elif self._open is None:
            raise _Mistake("`}` without a block")
        else:
            self._open = None
        if rest:
            raise _Mistake("nothing may follow `}`")


def _text(tokens: list[Token]) -> str:
    """As they are written, without comments."""
    return " ".join(token.raw or token.text for token in tokens)


def _values(tokens: list[Token], breathe: Breathe) -> list[str]:
    if not tokens:
        raise _BehindName("a value is missing")
    if tokens[0].type == "word" and tokens[0].text.startswith("="):
        raise _BehindName("there is no `=` between a directive and its value")
    for index, token in enumerate(tokens):
        breathe()
        if (token.type == "mark") != (index % 2 == 1):
            problem = _missing(tokens[index - 1], token)
            raise _BehindName(f"column {token.column}: {problem}", _text(tokens))
    if len(tokens) % 2 == 0:
        raise _BehindName(f"column {tokens[-1].column}: a value is missing after the comma")
    return [token.text for token in tokens[::2]]


def _missing(before: Token, token: Token) -> str:
    """What is missing before a token that may not stand there."""
    if token.type == "mark":
        return "a value is missing (a value with blanks in it is quoted)"
    if _NUMBER.fullmatch(before.text) and (_UNIT.fullmatch(token.text) or _NUMBER.fullmatch(token.text)):
        return f"no blank between a number and its unit: {before.text}{token.text}"
    return "a comma is missing (a value with blanks in it is quoted)"

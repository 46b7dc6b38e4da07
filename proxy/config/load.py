"""Command line, environment and file → one frozen `Settings`, or one `ConfigError` that tells every mistake.

`layers` brings the texts of all sources together, `values` knows their forms, `rules` what must hold between them; here
they become values, and mistakes get their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from proxy.config import rules
from proxy.config.hints import did_you_mean, shown
from proxy.config.in_force import Block, Row, in_force
from proxy.config.includes import INCLUDE, Find, Texts
from proxy.config.layers import (
    BY_NAME,
    MOST_MISTAKES,
    File,
    build_parser,
    collect,
    gather,
    two_places,
    unknown_variables,
)
from proxy.config.options import BLOCKS, OPTIONS, Option
from proxy.config.origins import Given, Origins
from proxy.config.reading import read
from proxy.config.sources import STAR, expand
from proxy.config.values import parse_endpoint, parse_text
from proxy.errors import ConfigError
from proxy.model import Breathe, hold_breath, let_go
from proxy.settings import (
    InstanceSettings,
    ListenerSettings,
    Settings,
    SourceSettings,
    StoreSettings,
    ThrottleSettings,
    TlsSettings,
)

__all__ = ["LONGEST_NAME", "MOST_MISTAKES", "Loaded", "build_parser", "load"]

_BLOCK_OPTIONS = {kind: {option.name: option for option in options} for kind, options in BLOCKS.items()}
BLOCK_TYPES: dict[str, Callable[..., Any]] = {
    "instance": InstanceSettings,
    "listener": ListenerSettings,
    "source": SourceSettings,
    "throttle": ThrottleSettings,
    "tls": TlsSettings,
}
_KINDS = {option.name: option.kind for option in OPTIONS}
LONGEST_NAME = 64  # as in the native protocol


class Loaded(NamedTuple):
    """A configuration that is well-formed.

    Args:
        origins: where its values stand.
        doubts: what was given and has no effect, one sentence each. unmatched: patterns of `include` without any file.
        files: the configuration file and those that it includes, in the order in which they were read.
        in_force: what was written, for who asks the running program.
    """

    settings: Settings
    origins: Origins
    doubts: tuple[str, ...]
    files: tuple[str, ...] = ()
    in_force: tuple[Row, ...] = ()
    unmatched: tuple[str, ...] = ()


def load(
    argv: Sequence[str],
    environ: Mapping[str, str],
    read_file: Callable[[str], str],
    breathe: Breathe = hold_breath,
    find: Find = lambda pattern: (pattern,),
) -> Loaded:
    """Reads and checks the whole configuration; a reload calls it again with the same `argv`.

    Args:
        argv: the command line without the program's name.
        environ: the environment.
        read_file: path → text; raises OSError or ValueError (not UTF-8).
        breathe: called after each small piece of the work.
        find: a pattern with wildcards → the files that it stands for, in order.

    Raises:
        UsageError: the command line cannot be understood.
        ConfigError: every mistake found, one a line, up to `MOST_MISTAKES`.
    """
    file = File(read_file, breathe, find)
    parser = build_parser(file)
    breathe()
    given = gather(parser, argv, environ, file)
    _raise_for(file.unreadable)  # everything else would be a consequence of that
    if not given and not file.texts.blocks and not file.mistakes:
        raise ConfigError(_nothing(file.name), file.name)
    loader = _Loader(file.mistakes, read_file, breathe)
    settings, origins = loader.settings(given, file)
    names, unmatched = tuple(file.texts.files), tuple(each.text for each in file.texts.unmatched)
    blocks = file.texts.blocks
    file.texts = Texts()  # argparse's objects hold each other, and this, until the garbage collector finds them
    let_go(blocks, breathe)
    _raise_for(file.mistakes)
    doubts = tuple(f"{name} is not a variable of ours{hint}" for name, hint in unknown_variables(environ))
    rows = in_force(given, loader.blocks, breathe)
    let_go(loader.blocks, breathe)
    return Loaded(settings, origins, doubts, names, rows, unmatched)


def _nothing(file: str) -> str:
    hint = "" if file else "; no file was named: --config-filename=FILE"
    return f"nothing is configured: a listener and allow_from are required{hint}"


def _raise_for(mistakes: list[ConfigError]) -> None:
    """
    Raises:
        ConfigError: there are mistakes.
    """
    files = {name: number for number, name in enumerate(dict.fromkeys(mistake.file for mistake in mistakes))}
    mistakes.sort(key=lambda mistake: (mistake.line == 0, files[mistake.file] if mistake.line else 0, mistake.line))
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        lines = [str(mistake) for mistake in mistakes[:MOST_MISTAKES]]
        more = len(mistakes) - len(lines)
        raise ConfigError("\n".join(lines + [f"and {more} more mistakes"] * (more > 0)))


def _canonical(kind: str, name: str) -> str:
    """A block's name as it is in the settings."""
    try:
        return str(parse_endpoint(name)) if kind == "listener" else name
    except ValueError:
        return name  # a mistake of its own


class _Loader:
    """Texts → values; what is wrong is added to `mistakes`, and the default stands in for it."""

    def __init__(self, mistakes: list[ConfigError], read_file: Callable[[str], str], breathe: Breathe) -> None:
        self._mistakes = mistakes
        self._read_file = read_file
        self._breathe = breathe
        #: Well-formed ones, as they were written.
        self.blocks: list[Block] = []

    def settings(self, given: dict[str, list[Given]], file: File) -> tuple[Settings, Origins]:
        values = {option.name: self._value(option, given.get(option.name), "") for option in OPTIONS}
        of_files = self._secrets_of_files(given.get("auth_shared_secret_file", []))
        values["auth_shared_secret"] += self._value(BY_NAME["auth_shared_secret"], of_files, "")
        values["listen_proxy_protocol_allow_from"] = values["listen_proxy_protocol_allow_from"] or values["allow_from"]
        values["throttle_store"] = self._with_passwords(values["throttle_store"], given)
        values |= self._blocks(file)
        settings = Settings(config_filename=file.name or None, **values)
        written: dict[str, list[Given]] = dict(given) | {INCLUDE: file.texts.unmatched}
        if of_files:
            written["auth_shared_secret"] = [*given.get("auth_shared_secret", ()), *of_files]
        for where, (kind, name, _, line) in file.texts.blocks:
            self._breathe()
            if kind in BLOCKS:
                written.setdefault(kind, []).append(Given(_canonical(kind, name), where, line))
        origins = Origins(written, _KINDS, Given("", file.name), self._breathe)
        for name, value, message in rules.broken(settings, given, self._breathe):
            self._mistakes.append(origins.place(name, value).mistake(f"{name}: {message}"))
        return settings, origins

    def _value(self, option: Option, given: list[Given] | None, prefix: str) -> Any:
        if given is None:
            return option.default_value()
        values: list[Any] = []
        for text, file, line in given:
            self._breathe()
            try:
                for value in option.kind.values(text):
                    values.append(value)
                    self._breathe()
            except ValueError as error:
                what = "the value" if option.secret else shown(text)
                reason = str(error)
                if reason.startswith(("'", '"')):  # ipaddress quotes the value
                    reason = ""
                message = f"{prefix}{option.name}: {what} is not {option.kind.valid}" + (reason and f" ({reason})")
                self._mistakes.append(ConfigError(message, file, line))
        if option.repeatable:
            return self._without_doubles([*option.default_items(), *values]) if option.extends else tuple(values)
        return values[0] if values else option.default_value()

    def _without_doubles(self, values: list[Any]) -> tuple[Any, ...]:
        found: dict[Any, None] = {}
        for value in values:
            found[value] = None
            self._breathe()
        return tuple(found)

    def _secrets_of_files(self, paths: list[Given]) -> list[Given]:
        """One secret a line; empty lines and lines that begin with # are skipped."""
        secrets: list[Given] = []
        for given in paths:
            text = read(given.text, self._read_file, "auth_shared_secret_file: ", self._mistakes, given)
            if text is None:
                continue
            lines = enumerate(text.removeprefix("\ufeff").split("\n"), 1)
            found = [
                Given(line.rstrip(" \t\r"), given.text, number)
                for number, line in lines
                if line.strip() and not line.startswith("#")
            ]
            if not found:
                message = "auth_shared_secret_file: there is no secret in the file"
                self._mistakes.append(given.mistake(message))
            secrets += found
        return secrets

    def _with_passwords(
        self, store: StoreSettings | None, given: Mapping[str, Sequence[Given]]
    ) -> StoreSettings | None:
        """The throttle store with the passwords that stand in files."""
        if store is None:
            return None
        directive = "throttle_store_password_file"
        if store.password is not None and given.get(directive):
            mistake = given[directive][-1].mistake(f"{directive}: throttle_store has a password in it already")
            self._mistakes.append(mistake)
        elif (found := self._first_line(given, directive)) is not None:
            store = replace(store, password=found)
        found = self._first_line(given, "throttle_store_sentinel_password_file")
        return store if found is None else replace(store, sentinel_password=found)

    def _first_line(self, given: Mapping[str, Sequence[Given]], directive: str) -> str | None:
        """Of the file that a directive names; None: it stands nowhere, or there is nothing."""
        if not given.get(directive):
            return None
        where = given[directive][-1]
        text = read(where.text, self._read_file, f"{directive}: ", self._mistakes, where)
        if text is None:
            return None
        line = text.removeprefix("\ufeff").partition("\n")[0].rstrip("\r")
        if not line:
            self._mistakes.append(where.mistake(f"{directive}: there is no password in the first line of the file"))
        return line or None

    def _blocks(self, file: File) -> dict[str, tuple[Any, ...]]:
        built: dict[str, list[Any]] = {kind: [] for kind in BLOCKS}
        first: dict[tuple[str, str], tuple[str, int]] = {}
        for where, (kind, name, directives, line) in file.texts.blocks:
            problem = self._block_problem(kind, name)
            name = _canonical(kind, name)
            if not problem and (kind, name) in first:
                problem = f"{kind} {shown(name)}: given twice, {two_places(first[kind, name], (where, line))}"
            if problem:
                self._mistakes.append(ConfigError(problem, where, line))
            if kind not in BLOCKS:
                continue
            first.setdefault((kind, name), (where, line))
            prefix = f"{kind} {shown(name)}: "
            given = collect([(where, directives)], _BLOCK_OPTIONS[kind], prefix, self._mistakes, self._breathe)
            values = {option.name: self._value(option, given.get(option.name), prefix) for option in BLOCKS[kind]}
            self.blocks.append((kind, name, Given("", where, line), given))
            built[kind].append(BLOCK_TYPES[kind](name=name, **values))
        built["source"] = [each for block in built["source"] for each in expand(block, self._breathe)]
        return {kind: tuple(items) for kind, items in built.items()}

    def _block_problem(self, kind: str, name: str) -> str:
        if kind not in BLOCKS:
            return f"unknown block {shown(kind)}{did_you_mean(kind.lower(), BLOCKS)}"
        try:
            parse_text(name)
        except ValueError as error:
            return f"{kind}: {shown(name)} is not a name ({error})"
        if kind == "source" and name.count(STAR) > 1:
            return f"{kind}: {shown(name)}: one star at the most"
        if kind == "listener":
            try:
                parse_endpoint(name)
            except ValueError:
                return f"{kind}: {shown(name)} is not the IP:port of a listener"
        return f"{kind}: a name has at most {LONGEST_NAME} characters" if len(name) > LONGEST_NAME else ""

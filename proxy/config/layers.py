"""Command line, environment and file laid over each other: directive → its values as texts, with their places.

ConfigArgParse does it (flag, then environment, then file; a directive comes from one of them whole). What it must not
do is decide about values: a bad one would end the process, a repeated one be lost. So it hands over texts; `load`
judges them. Files are read by the caller's `read_file`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

import configargparse

from proxy.config.hints import did_you_mean, shown
from proxy.config.includes import INCLUDE, Find, Piece, Texts, assemble
from proxy.config.options import BLOCKS, OPTIONS, Option
from proxy.config.origins import Given
from proxy.config.reading import read, shown_path
from proxy.errors import ConfigError, UsageError
from proxy.model import Breathe, hold_breath

MOST_MISTAKES = 200  # that are told; the wrong file, given to a reload, would fill the log

BY_NAME = {option.name: option for option in OPTIONS}
PREFIX = "GREENARROW_PROXY_"
CONFIG_FILENAME = PREFIX + "CONFIG_FILENAME"
#: Variables of ours that are no directives: the form that runs (`form`), how it is built, the init script's file.
_OTHER_VARIABLES = (CONFIG_FILENAME, *(PREFIX + name for name in ("PURE", "OPTIMISE", "CORE", "DEFAULTS")))
#: What Kubernetes and Docker set for a service that is called greenarrow-proxy.
_OF_A_CONTAINER = re.compile(PREFIX + r"(SERVICE_(HOST|PORT)(_.*)?|PORT(_\d+_(TCP|UDP)(_.*)?)?|NAME|ENV_.*)")


def build_parser(file: File | None = None) -> Parser:
    """The command line. Parsing flags alone, without the file, is `build_parser().parse_flags(argv)`."""
    file = file or File(lambda path: "")
    parser = Parser(
        prog="greenarrow_proxy",
        usage="greenarrow_proxy --config-filename=FILE [--DIRECTIVE=VALUE ...]",
        description="SMTP egress proxy for several MTA instances.",
        epilog="Every directive is also read from the environment (GREENARROW_PROXY_LISTEN ...) and from the file; a "
        "flag beats the environment, the environment the file. Lists are separated by commas. See greenarrow_proxy(1), "
        "greenarrow_proxy.conf(5).",
        add_help=False,
        allow_abbrev=False,
        add_config_file_help=False,
        add_env_var_help=False,
        config_file_parser_class=file,
        config_file_open_func=file.open,
    )
    commands = parser.add_argument_group("general")
    commands.add_argument(
        "--config-filename",
        metavar="FILE",
        env_var=CONFIG_FILENAME,
        is_config_file_arg=True,
        help="configuration file",
    )
    # Flags that do something other than run the proxy: `cli` looks at them, `load` ignores them.
    commands.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    commands.add_argument("--version", action="store_true", help="show the version and exit")
    commands.add_argument("--check-config", action="store_true", help="say what is wrong with the configuration, exit")
    commands.add_argument("--user", metavar="NAME", help="check as this user would (root only; the service's user)")
    commands.add_argument("--ping", metavar="HOST:PORT", help="connect to a running proxy as an MTA would, tell, exit")
    commands.add_argument("--ping-instance", metavar="NAME", help="the instance to be for --ping")
    commands.add_argument(
        "--status", nargs="?", const="", metavar="IP:PORT", help="show the status of a running proxy (listen_status)"
    )
    commands.add_argument("--json", action="store_true", help="with --status: as it came, one line of JSON")
    commands.add_argument(
        "--watch",
        nargs="?",
        const="2s",
        metavar="DURATION",
        help="with --status: again and again, each time after (2s)",
    )
    directives = parser.add_argument_group("directives")
    for option in OPTIONS:
        default = f" ({option.default})" if option.default and len(option.default) < 30 else ""
        # `--log-verbose` alone means yes.
        switch: dict[str, str] = {"nargs": "?", "const": "yes"} if option.kind.name == "boolean" else {}
        directives.add_argument(
            option.flag,
            action="append",
            metavar=option.metavar,
            env_var=option.variable,
            help=(option.help + default).replace("%", "%%"),
            **switch,
        )
    return parser


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # the library is not typed
    """ConfigArgParse, kept from ending the process and from losing repeated values."""

    def error(self, message: str) -> None:
        raise UsageError(message, "command line")

    def get_possible_config_keys(self, action: Any) -> list[str]:
        return [action.dest] if action.dest in BY_NAME else []

    def convert_item_to_command_line_arg(self, action: Any, key: str, value: Any) -> list[str]:
        # Only a mark that the directive is taken: argparse needs quadratic time for long lists, and the library reads
        # an environment value that looks like [a, b], perhaps a secret, as a list. The values themselves are taken
        # from its table of sources.
        return [f"{action.option_strings[-1]}={value if action.is_config_file_arg else ''}"]

    def parse_flags(self, argv: Sequence[str]) -> Any:
        """The flags alone, as a namespace.

        Raises:
            UsageError: an unknown flag, a missing value.
        """
        return self.parse_sources(argv, {}, config_file_contents="")

    def parse_sources(self, argv: Sequence[str], environ: Mapping[str, str], **more: str) -> Any:
        """As `parse_args`, but an unknown argument is named without what may be a secret in it."""
        # An empty variable is as good as none: container tools set such.
        variables = {name: value for name, value in environ.items() if value}
        namespace, unknown = self.parse_known_args(list(argv), env_vars=variables, **more)
        if unknown:
            raise UsageError(self._unknown(unknown[0].partition("=")[0]), "command line")
        return namespace

    def _unknown(self, flag: str) -> str:
        if not flag.startswith("-") or len(flag) > 50:
            return "there is an argument that belongs to no flag; did you mean --config-filename=FILE?"
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        begun = [name for name in flags if name.startswith(flag)]
        hint = did_you_mean(flag, flags) or (f"; did you mean {begun[0]}?" if begun and len(flag) > 3 else "")
        return f"unknown flag {shown(flag)}{hint}"


class File(configargparse.ConfigFileParser):  # type: ignore[misc]  # the library is not typed
    """ConfigArgParse's view of the file: directive → its values with their lines. Mistakes are gathered.

    Attributes:
        texts: what the file and those that it includes say; unreadable: those of them that have no text.
    """

    def __init__(
        self, read_file: Callable[[str], str], breathe: Breathe = hold_breath, find: Find = lambda pattern: (pattern,)
    ) -> None:
        self.name = ""
        self.texts = Texts()
        self.unreadable: list[ConfigError] = []
        self.mistakes: list[ConfigError] = []
        self._read_file = read_file
        self._breathe = breathe
        self._find = find

    def open(self, path: str) -> StringIO:
        self.name = path
        text = read(path, self._read_file, "", self.unreadable)
        return StringIO(text or "", newline="")

    def parse(self, stream: StringIO) -> dict[str, list[Given]]:
        text = stream.read()
        self.texts = assemble(text, self.name, self._read_file, self._find, self._breathe)
        self.unreadable += self.texts.unreadable
        self.mistakes += self.texts.mistakes
        return collect(self.texts.directives, BY_NAME, "", self.mistakes, self._breathe)


def gather(parser: Parser, argv: Sequence[str], environ: Mapping[str, str], file: File) -> dict[str, list[Given]]:
    """Directive → its values, from the strongest source that has it."""
    flags = parser.parse_sources(argv, environ)
    given: dict[str, list[Given]] = {}
    sources: Mapping[str, Mapping[str, tuple[Any, Any]]] = parser.get_source_to_settings_dict()
    for source, settings in sources.items():
        if source == "environment_variables":
            for action, text in settings.values():
                if action.dest in BY_NAME:
                    option = BY_NAME[action.dest]
                    given[option.name] = _split(option, text, f"environment {option.variable}", file.mistakes)
        elif source.startswith("config_file"):
            given |= {name: values for name, (_, values) in settings.items()}
    for option in OPTIONS:
        texts = getattr(flags, option.name)
        if texts and option.name not in given:
            values = [value for text in texts for value in _split(option, text, "command line", file.mistakes)]
            given[option.name] = values
            if len(values) > 1 and not option.repeatable:
                file.mistakes.append(ConfigError(f"{option.name}: given twice", "command line"))
    return given


def unknown_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Variables that look like ours and are none of ours, each with a hint or "". Those that container tools set by
    themselves for a service of our name are left out."""
    known = [option.variable for option in OPTIONS] + [*_OTHER_VARIABLES]
    names = (name for name in environ if name.startswith(PREFIX) and name not in known)
    return [(name, did_you_mean(name, known)) for name in names if not _OF_A_CONTAINER.fullmatch(name)]


def _split(option: Option, text: str, source: str, mistakes: list[ConfigError]) -> list[Given]:
    if not option.repeatable or option.kind.verbatim:
        return [Given(text, source)]
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        mistakes.append(ConfigError(f"{option.name}: a value is missing", source))
    return [Given(part, source) for part in parts if part]


def collect(
    pieces: Iterable[Piece],
    options: Mapping[str, Option],
    prefix: str,
    mistakes: list[ConfigError],
    breathe: Breathe = hold_breath,
) -> dict[str, list[Given]]:
    """The directives of all files, or of a block, by name: unknown and duplicate ones are mistakes."""
    given: dict[str, list[Given]] = {}
    first: dict[str, tuple[str, int]] = {}
    for file, directives in pieces:
        for name, values, line, problem, rule in directives:
            breathe()
            if name in options and options[name].kind.line and not rule and values:
                values, problem = [", ".join(values)], ""
            elif problem:
                values = []
            if name in options and rule != options[name].kind.rule:
                needed = "" if rule else "it ends with a body in braces: `{ ... }`"
                values, problem = [], needed or "a body in braces does not belong here"
            if problem and (name in options or name in BLOCKS):
                mistakes.append(ConfigError(f"{prefix}{name}: {problem}", file, line))
            elif name not in options:
                # The hint takes a while, and nobody will see it.
                text = _unknown(name, options) if len(mistakes) < MOST_MISTAKES else "unknown directive"
                mistakes.append(ConfigError(prefix + text, file, line))
            if name not in options:
                continue
            single = not options[name].repeatable
            if single and name in first:
                text = f"{prefix}{name}: given twice, {two_places(first[name], (file, line))}"
                mistakes.append(ConfigError(text, file, line))
                continue
            if single and len(values) > 1:
                mistakes.append(ConfigError(f"{prefix}{name}: takes one value, not a list", file, line))
            first.setdefault(name, (file, line))
            known = given.setdefault(name, [])
            for value in values:
                known.append(Given(value, file, line))
                breathe()
    return given


def two_places(first: tuple[str, int], second: tuple[str, int]) -> str:
    """`in line 3 and in line 7`; where they stand in two files, the first is named."""
    file = f"{shown_path(first[0])} " if first[0] != second[0] else ""
    return f"in {file}line {first[1]} and in line {second[1]}"


def _unknown(name: str, options: Mapping[str, Option]) -> str:
    hint = did_you_mean(name.lower().replace("-", "_"), options)
    homes = [kind for kind, block in BLOCKS.items() if any(option.name == name for option in block)]
    if name == INCLUDE:
        return f"{name}: stands outside of blocks (is a line `}}` missing above?)"
    if name in BLOCKS:
        return f"{name}: this is a block: `{name} NAME {{`"
    if name in BY_NAME:
        return f"{name}: does not belong in this block (is a line `}}` missing above?)"
    if homes:
        return f"{name}: belongs in a block: `{homes[0]} NAME {{`"
    if not hint and len(name) > 20:  # perhaps a secret, or half of one, that slid to a line of its own
        return "unknown directive (not shown: it could be a secret)"
    return f"unknown directive {shown(name)}{hint}"

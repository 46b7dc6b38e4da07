"""Command line, environment and file → one frozen `Settings`, or one `ConfigError` that tells every mistake.

ConfigArgParse lays the three sources over each other (flag, then environment, then file; a directive comes from one of
them whole). What it must not do is decide about values: a bad one would end the process, a repeated one be lost. So it
hands over texts with their origin, and they are judged here. Files are read by the caller's `read_file`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from typing import Any, NamedTuple

import configargparse

from proxy.config import file as config_file
from proxy.config import rules
from proxy.config.options import BLOCKS, OPTIONS, Option
from proxy.config.values import parse_endpoint, parse_text
from proxy.errors import ConfigError, UsageError
from proxy.settings import (
    InstanceSettings,
    ListenerSettings,
    Network,
    Rate,
    Settings,
    SourceSettings,
    ThrottleSettings,
)

__all__ = [
    "OPTIONS",
    "InstanceSettings",
    "Network",
    "Rate",
    "Settings",
    "ThrottleSettings",
    "build_parser",
    "load",
    "origins",
]

_BY_NAME = {option.name: option for option in OPTIONS}
_BLOCK_OPTIONS = {kind: {option.name: option for option in options} for kind, options in BLOCKS.items()}
BLOCK_TYPES: dict[str, Callable[..., Any]] = {
    "instance": InstanceSettings,
    "listener": ListenerSettings,
    "source": SourceSettings,
    "throttle": ThrottleSettings,
}
LONGEST_NAME = 64  # as in the native protocol
MOST_MISTAKES = 200  # that are told; the wrong file, given to a reload, would fill the log
_SHOWN = 60  # characters of a value in a message


class Given(NamedTuple):
    """One value as it was written, and where; `file` is "command line" or "environment" for the other sources."""

    text: str
    file: str
    line: int = 0


def load(argv: Sequence[str], environ: Mapping[str, str], read_file: Callable[[str], str]) -> Settings:
    """Reads and checks the whole configuration; a reload calls it again with the same `argv`.

    Args:
        argv: the command line without the program's name.
        environ: the environment.
        read_file: path → text; raises OSError or ValueError (not UTF-8).

    Raises:
        UsageError: the command line cannot be understood.
        ConfigError: every mistake found, one a line, up to `MOST_MISTAKES`.
    """
    file = _File(read_file)
    given = _gather(build_parser(file), argv, environ, file)
    if not file.readable:  # everything else would be a consequence of that
        raise file.mistakes[0]
    settings = _Loader(file.mistakes, read_file).settings(given, file)
    file.blocks.clear()  # argparse's objects hold each other, and this, until the garbage collector finds them
    mistakes = sorted(file.mistakes, key=lambda mistake: (mistake.line == 0, mistake.line))
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        lines = [str(mistake) for mistake in mistakes[:MOST_MISTAKES]]
        more = len(mistakes) - len(lines)
        raise ConfigError("\n".join(lines + [f"and {more} more mistakes"] * (more > 0)))
    return settings


def origins(
    argv: Sequence[str], environ: Mapping[str, str], read_file: Callable[[str], str]
) -> Mapping[str, Sequence[Given]]:
    """Where each directive's values come from; for arguments that `load` found good."""
    file = _File(read_file)
    return _gather(build_parser(file), argv, environ, file)


def build_parser(file: _File | None = None) -> _Parser:
    """The command line. Parsing flags alone, without the file, is `build_parser().parse_flags(argv)`."""
    file = file or _File(lambda path: "")
    parser = _Parser(
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
        env_var="GREENARROW_PROXY_CONFIG_FILENAME",
        is_config_file_arg=True,
        help="configuration file",
    )
    # Flags that do something other than run the proxy: `cli` looks at them, `load` ignores them.
    commands.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    commands.add_argument("--version", action="store_true", help="show the version and exit")
    commands.add_argument("--check-config", action="store_true", help="say what is wrong with the configuration, exit")
    commands.add_argument("--ping", metavar="HOST:PORT", help="connect to a running proxy as an MTA would, tell, exit")
    commands.add_argument("--ping-instance", metavar="NAME", help="the instance to be for --ping")
    commands.add_argument(
        "--status", nargs="?", const="", metavar="IP:PORT", help="show the status of a running proxy (listen_status)"
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


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # the library is not typed
    """ConfigArgParse, kept from ending the process and from losing repeated values."""

    def error(self, message: str) -> None:
        raise UsageError(message, "command line")

    def get_possible_config_keys(self, action: Any) -> list[str]:
        return [action.dest] if action.dest in _BY_NAME else []

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
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-") or len(flag) > 50:
                raise UsageError("there is an argument that belongs to no flag", "command line")
            flags = [name for name in self._option_string_actions if name.startswith("--")]
            raise UsageError(f"unknown flag {_shown(flag)}{_did_you_mean(flag, flags)}", "command line")
        return namespace


class _File(configargparse.ConfigFileParser):  # type: ignore[misc]  # the library is not typed
    """ConfigArgParse's view of the file: directive → its values with their lines. Mistakes are gathered."""

    def __init__(self, read_file: Callable[[str], str]) -> None:
        self.name = ""
        self.readable = True
        self.blocks: list[config_file.Block] = []
        self.mistakes: list[ConfigError] = []
        self._read_file = read_file

    def open(self, path: str) -> StringIO:
        self.name = path
        text = _read(path, self._read_file, "", self.mistakes)
        self.readable = text is not None
        return StringIO(text or "", newline="")

    def parse(self, stream: StringIO) -> dict[str, list[Given]]:
        document = config_file.parse(stream.read(), self.name)
        self.mistakes += document.mistakes
        self.blocks = document.blocks
        return _collect(document.directives, _BY_NAME, "", self.name, self.mistakes)


def _read(
    path: str, read_file: Callable[[str], str], prefix: str, mistakes: list[ConfigError], given: Given | None = None
) -> str | None:
    try:
        return read_file(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
    except ValueError:
        reason = "not a valid file name"
    file, line = (given.file, given.line) if given else ("", 0)
    mistakes.append(ConfigError(f"{prefix}{path if path.isprintable() else _shown(path)}: {reason}", file, line))
    return None


def _gather(parser: _Parser, argv: Sequence[str], environ: Mapping[str, str], file: _File) -> dict[str, list[Given]]:
    """Directive → its values, from the strongest source that has it."""
    flags = parser.parse_sources(argv, environ)
    given: dict[str, list[Given]] = {}
    sources: Mapping[str, Mapping[str, tuple[Any, Any]]] = parser.get_source_to_settings_dict()
    for source, settings in sources.items():
        if source == "environment_variables":
            for action, text in settings.values():
                if action.dest in _BY_NAME:
                    given[action.dest] = _split(_BY_NAME[action.dest], text, "environment", file.mistakes)
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


def _split(option: Option, text: str, source: str, mistakes: list[ConfigError]) -> list[Given]:
    if not option.repeatable or option.kind.verbatim:
        return [Given(text, source)]
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        mistakes.append(ConfigError(f"{option.name}: a value is missing", source))
    return [Given(part, source) for part in parts if part]


def _collect(
    directives: Iterable[config_file.Directive],
    options: Mapping[str, Option],
    prefix: str,
    file: str,
    mistakes: list[ConfigError],
) -> dict[str, list[Given]]:
    """A file's or a block's directives by name: unknown and duplicate ones are mistakes."""
    given: dict[str, list[Given]] = {}
    first_line: dict[str, int] = {}
    for name, values, line, problem in directives:
        if problem and (name in options or name in BLOCKS):
            mistakes.append(ConfigError(f"{prefix}{name}: {problem}", file, line))
        elif name not in options:
            mistakes.append(ConfigError(prefix + _unknown(name, options), file, line))
        if name not in options:
            continue
        single = not options[name].repeatable
        if single and name in first_line:
            text = f"{prefix}{name}: given twice, in line {first_line[name]} and in line {line}"
            mistakes.append(ConfigError(text, file, line))
            continue
        if single and len(values) > 1:
            mistakes.append(ConfigError(f"{prefix}{name}: takes one value, not a list", file, line))
        first_line.setdefault(name, line)
        given.setdefault(name, []).extend(Given(value, file, line) for value in values)
    return given


def _unknown(name: str, options: Mapping[str, Option]) -> str:
    hint = _did_you_mean(name.lower().replace("-", "_"), options)
    homes = [kind for kind, block in BLOCKS.items() if any(option.name == name for option in block)]
    if name in BLOCKS:
        return f"{name}: this is a block: `{name} NAME {{`"
    if name in _BY_NAME:
        return f"{name}: does not belong in this block (is a line `}}` missing above?)"
    if homes:
        return f"{name}: belongs in a block: `{homes[0]} NAME {{`"
    if not hint and len(name) > 20:  # perhaps a secret, or half of one, that slid to a line of its own
        return "unknown directive (not shown: it could be a secret)"
    return f"unknown directive {_shown(name)}{hint}"


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(text: str) -> str:
    """A value for a message: escaped, cut."""
    return json.dumps(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


class _Loader:
    """Texts → values; what is wrong is added to `mistakes`, and the default stands in for it."""

    def __init__(self, mistakes: list[ConfigError], read_file: Callable[[str], str]) -> None:
        self._mistakes = mistakes
        self._read_file = read_file

    def settings(self, given: dict[str, list[Given]], file: _File) -> Settings:
        values = {option.name: self._value(option, given.get(option.name), "") for option in OPTIONS}
        values["auth_shared_secret"] += self._secrets_of_files(given.get("auth_shared_secret_file", []))
        values["listen_proxy_protocol_allow_from"] = values["listen_proxy_protocol_allow_from"] or values["allow_from"]
        values |= self._blocks(file)
        settings = Settings(config_filename=file.name or None, **values)
        for name, message in rules.broken(settings, given):
            where = given[name][-1] if given.get(name) else Given("", file.name)
            self._mistakes.append(ConfigError(f"{name}: {message}", where.file, where.line))
        return settings

    def _value(self, option: Option, given: list[Given] | None, prefix: str) -> Any:
        if given is None:
            return option.default_value()
        values: list[Any] = []
        for text, file, line in given:
            try:
                values.append(option.kind.parse(text))
            except ValueError as error:
                shown = "the value" if option.secret else _shown(text)
                reason = str(error)
                if reason.startswith(("'", '"')):  # ipaddress quotes the value
                    reason = ""
                message = f"{prefix}{option.name}: {shown} is not {option.kind.valid}" + (reason and f" ({reason})")
                self._mistakes.append(ConfigError(message, file, line))
        if option.repeatable:
            values = [value for value in values if value is not None]
            if option.extends:
                values = list(dict.fromkeys([*option.default_items(), *values]))
            return tuple(values)
        return values[0] if values else option.default_value()

    def _secrets_of_files(self, paths: list[Given]) -> tuple[bytes, ...]:
        """One secret a line; empty lines and lines that begin with # are skipped."""
        secrets: tuple[bytes, ...] = ()
        for given in paths:
            text = _read(given.text, self._read_file, "auth_shared_secret_file: ", self._mistakes, given)
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
                self._mistakes.append(ConfigError(message, given.file, given.line))
            secrets += self._value(_BY_NAME["auth_shared_secret"], found, "")
        return secrets

    def _blocks(self, file: _File) -> dict[str, tuple[Any, ...]]:
        built: dict[str, list[Any]] = {kind: [] for kind in BLOCKS}
        first_line: dict[tuple[str, str], int] = {}
        for kind, name, directives, line in file.blocks:
            problem = self._block_problem(kind, name)
            if kind == "listener" and not problem:
                name = str(parse_endpoint(name))
            if not problem and (kind, name) in first_line:
                problem = f"{kind} {_shown(name)}: given twice, in line {first_line[kind, name]} and in line {line}"
            if problem:
                self._mistakes.append(ConfigError(problem, file.name, line))
            if kind not in BLOCKS:
                continue
            first_line.setdefault((kind, name), line)
            prefix = f"{kind} {_shown(name)}: "
            given = _collect(directives, _BLOCK_OPTIONS[kind], prefix, file.name, self._mistakes)
            values = {option.name: self._value(option, given.get(option.name), prefix) for option in BLOCKS[kind]}
            built[kind].append(BLOCK_TYPES[kind](name=name, **values))
        return {kind: tuple(items) for kind, items in built.items()}

    def _block_problem(self, kind: str, name: str) -> str:
        if kind not in BLOCKS:
            return f"unknown block {_shown(kind)}{_did_you_mean(kind.lower(), BLOCKS)}"
        try:
            parse_text(name)
        except ValueError as error:
            return f"{kind}: {_shown(name)} is not a name ({error})"
        if kind == "listener":
            try:
                parse_endpoint(name)
            except ValueError:
                return f"{kind}: {_shown(name)} is not the IP:port of a listener"
        return f"{kind}: a name has at most {LONGEST_NAME} characters" if len(name) > LONGEST_NAME else ""

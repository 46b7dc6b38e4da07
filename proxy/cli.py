"""The command line: which flag does what, and the exit codes (sysexits). The configuration itself is `config`'s.

No traceback reaches a user: an exception that nobody expected ends with one line and exit code 70.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from proxy import __version__, form
from proxy.config import load as config
from proxy.config.layers import PREFIX
from proxy.errors import ConfigError, UsageError
from proxy.model import Breathe
from proxy.settings import Settings

EX_OK = 0
EX_USAGE = 64
EX_UNAVAILABLE = 69  # `server.run`: cannot listen
EX_SOFTWARE = 70
EX_CONFIG = 78

#: Bytes; a file that never ends (/dev/zero) must not fill the memory.
LONGEST_FILE = 16 * 1024 * 1024


#: Looks at a running proxy are so far apart at least; seconds.
_SHORTEST_WATCH = 0.1

Lent = Callable[[], contextlib.AbstractContextManager[None]]
Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit code.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        _print(f"greenarrow_proxy: {error.message}\nSee greenarrow_proxy --help.", sys.stderr)
        return EX_USAGE
    except ConfigError as error:
        _print(str(error), sys.stderr)
        return EX_CONFIG
    except KeyboardInterrupt:
        return 1
    except Exception as error:
        # Not the message: it may hold a secret.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        _print(f"greenarrow_proxy: internal error, please report: {type(error).__name__} at {place}", sys.stderr)
        return EX_SOFTWARE


def _main(argv: list[str]) -> int:
    if argv[:1] == ["ctl"]:
        return _ctl(argv[1:])
    if argv[:1] == ["worker"]:  # only the program itself says so: there is a link behind that descriptor
        from proxy.server import process

        with process.no_garbage_collection():
            from proxy.server import worker

        return worker.run(int(argv[1]))
    parser = config.build_parser()
    flags = parser.parse_flags(argv)
    if flags.help or flags.version or flags.check_config or flags.ping is not None or flags.status is not None:
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        )  # held back for the server
    if flags.help:
        _print(parser.format_help(), sys.stdout)
        return EX_OK
    if flags.version:
        from proxy.net import relay  # late: it loads gevent, which --help does not need

        _print(f"greenarrow_proxy {__version__} (relay: {relay.engine_name()}, core: {form.core_name()})", sys.stdout)
        return EX_OK
    _refuse_two(flags)
    if flags.ping is not None:
        return _ping(argv, flags.ping, flags.ping_instance)
    load = functools.partial(config.load, argv, os.environ, read_file, find=find_files)
    if flags.status is not None:
        return _status(flags, lambda: load().settings)
    if flags.check_config:
        return _check_config(load, flags.user)
    loaded = load()
    from proxy.server import process  # late: --help and a wrong configuration need no gevent

    with process.no_garbage_collection():  # a fifth of what a start costs
        from proxy.server import server, succession

    def again(breathe: Breathe, lent: Lent) -> config.Loaded:
        read, find = functools.partial(read_file, lent=lent), functools.partial(find_files, lent=lent)
        return config.load(argv, os.environ, read, breathe, find)

    return server.run(again, loaded, succession.of_environment())


def _refuse_two(flags: Any) -> None:
    """
    Raises:
        UsageError: two things to do instead of serving, or a flag without that which it is for.
    """
    wanted = {"--check-config": flags.check_config, "--ping": flags.ping, "--status": flags.status}
    names = [name for name, value in wanted.items() if value not in (None, False)]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)}: one at a time", "command line")
    for name, value, needs in (
        ("--user", flags.user, "--check-config"),
        ("--ping-instance", flags.ping_instance, "--ping"),
        ("--json", flags.json or None, "--status"),
        ("--watch", flags.watch, "--status"),
    ):
        if value is not None and needs not in names:
            raise UsageError(f"{name}: only with {needs}", "command line")


def _ping(argv: list[str], address: str, instance: str | None) -> int:
    from proxy.server import ping

    # Only the secret is needed. An MTA's machine has no listener and allows nobody.
    nobody = ["--listen=127.0.0.1:807", "--allow-from=127.0.0.1"]
    settings = config.load([*argv, *nobody], os.environ, read_file, find=find_files).settings
    to = ping.target(address, instance, settings)
    return ping.run(to, lambda line: _print(line, sys.stdout), lambda line: _print(line, sys.stderr))


def _status(flags: Any, load: Callable[[], Settings]) -> int:
    from proxy.status import terminal

    to = terminal.target(flags.status, load)
    show = functools.partial(terminal.run, to, as_json=flags.json)
    return _shown(show, None if flags.watch is None else _seconds("--watch", flags.watch))


def _shown(show: Callable[[Say, Say], int], every: float | None) -> int:
    """Once, or again and again.

    Args:
        show: says and complains; an exit code. every: seconds between two looks.
    """
    if every is None:
        return show(_out, lambda line: _print(line, sys.stderr))
    from proxy.status.watch import watch

    return watch(show, every, _out, sys.stdout.isatty())


def _seconds(flag: str, text: str) -> float:
    """
    Raises:
        UsageError: not the time between two looks.
    """
    from proxy.config.values import parse_duration

    with contextlib.suppress(ValueError):
        seconds = parse_duration(text)
        if seconds >= _SHORTEST_WATCH:
            return seconds
    raise UsageError(f"{flag}: a duration of at least 100ms, such as 2s", "command line")


def _out(text: str) -> None:
    _print(text, sys.stdout)


def _ctl(argv: list[str]) -> int:
    """`ctl [--socket PATH] [--json] [--dry-run] [--watch[=2s]] [--because TEXT] [COMMAND ...]`

    Raises:
        UsageError: not so.
    """
    from proxy.control import client, commands

    values: dict[str, str] = {}
    words = list(argv)
    while words and words[0].startswith("--"):
        name, equals, value = words.pop(0).partition("=")
        if name in ("--json", "--dry-run", "--watch") and not equals:
            values[name] = "yes" if name != "--watch" else "2s"
        elif name == "--watch":
            values[name] = value
        elif name in ("--socket", "--because", "--config-filename") and (equals or words):
            values[name] = value if equals else words.pop(0)
        else:
            raise UsageError(f"ctl: {name}: unknown, or without its value", "command line")
    path = values.get("--socket") or _control_socket(values.get("--config-filename"))
    every = _seconds("ctl: --watch", values["--watch"]) if "--watch" in values else None

    def say(command: Sequence[str]) -> int:
        if list(command) == ["top"]:
            from proxy.status.watch import SECONDS

            return _shown(functools.partial(client.top, path), every or SECONDS)
        because, dry_run = values.get("--because", ""), "--dry-run" in values
        request = commands.Request(list(command), dry_run=dry_run, because=because)
        return _shown(functools.partial(client.run, path, request, "--json" in values), every)

    if words or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return say(words or ["help"])
    from proxy.control import interactive

    return interactive.run(say, lambda line: _print(line, sys.stderr))


def _control_socket(file: str | None) -> str:
    """The environment goes before the file, as everywhere, and needs none: the file may be what is wrong."""
    if named := os.environ.get(f"{PREFIX}CONTROL_SOCKET"):
        return named
    flags = [f"--config-filename={file}"] if file is not None else []
    path = config.load(flags, os.environ, read_file, find=find_files).settings.control_socket
    if path is None:
        raise ConfigError("control_socket: not configured, so there is nobody to talk to; or give ctl --socket PATH")
    return path


def _check_config(load: Callable[[], config.Loaded], user: str | None) -> int:
    from gevent import get_hub

    from proxy.server import account, check_config
    from proxy.server.findings import sentences

    get_hub()  # what it loads may be where that user cannot read
    user = account.check_as(user)
    who = f" (checked as user {user})" if user else ""
    try:
        loaded = load()
    except ConfigError as error:
        _print(f"{error}{who}", sys.stderr)
        return EX_CONFIG
    findings = check_config.check(loaded)
    for line in sentences(findings, loaded.origins):
        _print(line, sys.stderr)
    if any(finding.error for finding in findings):
        return EX_CONFIG
    _print(f"{loaded.settings.config_filename or 'command line'}: the configuration is good{who}", sys.stdout)
    for line in check_config.overview(loaded.settings):
        _print(line, sys.stdout)
    return EX_OK


def read_file(path: str, lent: Lent = contextlib.nullcontext) -> str:
    """A text file's content.

    Args:
        lent: gives a descriptor for it, if need be.

    Raises:
        OSError: it cannot be read, or is larger than `LONGEST_FILE`.
        ValueError: it is not UTF-8, or its name cannot be one.
    """
    with lent(), open(path, "rb") as file:
        content = file.read(LONGEST_FILE + 1)
    if len(content) > LONGEST_FILE:
        raise OSError(errno.EFBIG, f"larger than {LONGEST_FILE} bytes", path)
    return content.decode()


def find_files(pattern: str, lent: Lent = contextlib.nullcontext) -> list[str]:
    """The files that a pattern with wildcards stands for, in the order of their names.

    Args:
        lent: as for `read_file`.
    """
    with lent():
        return sorted(glob.glob(pattern))


def _print(text: str, stream: TextIO) -> None:
    # A closed or full stream must not turn into a traceback, neither now nor when the interpreter flushes at exit;
    # nor must a file name that the stream cannot write.
    encoding = stream.encoding or "utf-8"
    try:
        print(text.rstrip("\n").encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

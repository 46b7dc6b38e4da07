"""The text of one file of the configuration, or why it has none. The file is read by the caller's `read_file`."""

from __future__ import annotations

from collections.abc import Callable

from proxy.config.hints import shown
from proxy.config.origins import Given
from proxy.errors import ConfigError


def shown_path(path: str) -> str:
    """A file's name as messages show it."""
    return path if path.isprintable() else shown(path)


def read(
    path: str, read_file: Callable[[str], str], prefix: str, mistakes: list[ConfigError], given: Given | None = None
) -> str | None:
    """A file's text; None, and a mistake, if it has none.

    Args:
        prefix: begins the message.
        given: where the file is named; None: it is the configuration itself.
    """
    name = shown_path(path)
    where = given or Given("", "")
    try:
        text = read_file(path)
    except OSError as error:
        mistakes.append(where.mistake(f"{prefix}{name}: {error.strerror or type(error).__name__}"))
    except UnicodeDecodeError as error:
        reason, line = _not_utf8(error)
        mistakes.append(ConfigError(prefix + reason, name, line))
    except ValueError:
        mistakes.append(where.mistake(f"{prefix}{name}: not a valid file name"))
    else:
        if "\0" not in text[:2]:
            return text
        mistakes.append(ConfigError(f"{prefix}{_UTF16}", name, 1))
    return None


_UTF16 = "the file is UTF-16; save it as UTF-8"


def _not_utf8(error: UnicodeDecodeError) -> tuple[str, int]:
    """Why bytes are not text, and in which line."""
    data, at = error.object, error.start
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return _UTF16, 1
    line_start = data.rfind(b"\n", 0, at) + 1
    column = len(data[line_start:at].decode(errors="replace")) + 1
    text = f"column {column}: byte 0x{data[at]:02X} is not UTF-8; if the file is Latin-1, save it as UTF-8"
    return text, data.count(b"\n", 0, at) + 1

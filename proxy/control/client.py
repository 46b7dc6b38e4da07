"""`greenarrow_proxy ctl`: says one command to the control socket and prints the answer, as a table or as JSON.

A plain blocking socket. What comes back is made harmless for a terminal.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from proxy.control.commands import VERSION, Request
from proxy.log.spelling import printable
from proxy.status.rows import Rate

EX_OK, EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE, EX_NOPERM, EX_CONFIG = 0, 64, 69, 70, 77, 78
_EXIT = {"bad_request": EX_SOFTWARE, "bad_command": EX_USAGE, "not_allowed": EX_NOPERM, "failed": EX_CONFIG}
#: A reload waits for its outcome: DNS, certificates, 100,000 throttles.
_SECONDS = 300.0
_LONGEST = 64 * 1024 * 1024

Print = Callable[[str], object]


def run(path: str, request: Request, as_json: bool, out: Print, err: Print) -> int:
    """Say it, print the answers as they come; the exit code (sysexits)."""
    answer: dict[str, Any] = {}
    try:
        for answer in _ask(path, request):
            if as_json:
                out(json.dumps(answer))
            else:
                for line in _lines(answer):
                    out(line)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        err(f"greenarrow_proxy: control_socket {path}: {why}")
        return EX_UNAVAILABLE
    if answer.get("ok"):
        return EX_OK
    if not as_json:
        err(f"greenarrow_proxy: {printable(str(answer.get('error', 'no reason given')))}")
    return _EXIT.get(str(answer.get("code")), EX_SOFTWARE)


#: Tables of one row, with a line for each of its columns.
_ONE_THING = ("status", "store")
_RATE = {"amount", "seconds", "burst"}
#: What `top` shows, one below the other, and how many lines of each.
_TOP = (("show", "trouble"), ("show", "throttles"), ("show", "connections", "older=1s"))
_TOP_LINES = 15


def top(path: str, out: Print, err: Print) -> int:
    """What is wrong, the busiest throttles and the oldest connections; the exit code."""
    code = EX_OK
    for words in _TOP:
        shown: list[str] = []
        code = run(path, Request(list(words)), False, shown.append, err)
        if code != EX_OK:
            return code
        more = len(shown) - _TOP_LINES
        for line in shown[:_TOP_LINES] + [f"... and {more} more"] * (more > 0):
            out(line)
        out("")
    return code


def _ask(path: str, request: Request) -> Iterator[dict[str, Any]]:
    """The answers, nearly always one.

    Raises:
        OSError: as it comes. ValueError: that was no answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SECONDS)
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.sendall(msgspec.json.encode(request) + b"\n")
        with sock.makefile("rb") as file:
            while True:
                answer = _decoded(file.readline(_LONGEST))
                yield answer
                if not answer.get("more"):
                    return


def _decoded(line: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: that is no answer.
    """
    if not line.endswith(b"\n"):
        raise ValueError("no answer, or one without an end: is it the control socket of this version?")
    answer = json.loads(line)
    if not isinstance(answer, dict) or answer.get("v") != VERSION:
        raise ValueError(f"the proxy does not speak version {VERSION} of this protocol")
    return answer


def _lines(answer: dict[str, Any]) -> Iterator[str]:
    yield from (printable(str(line), 1000) for line in answer.get("lines", ()))
    rows = answer.get("rows", [])
    if rows and answer.get("table") in _ONE_THING:
        width = max(map(len, rows[0]))
        yield from (f"{name:{width}}  {_cell(value)}" for name, value in rows[0].items())
    elif rows:
        yield from _table(rows)
    elif answer.get("table"):
        yield f"{answer['table']}: none"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """As wide as it needs; columns without anything in them are left out."""
    names = [name for name in rows[0] if any(row.get(name) not in (None, "", 0, [], {}, False) for row in rows)]
    cells = [[name.upper() for name in names], *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        digits = 3 if abs(value) >= 0.01 else 6
        return f"{value:.{digits}f}".rstrip("0").rstrip(".")
    if isinstance(value, dict) and value.keys() == _RATE:
        return str(Rate(**value))
    if isinstance(value, dict):
        return ",".join(f"{key}={_cell(each)}" for key, each in value.items()) or "-"
    if isinstance(value, list):
        return ",".join(_cell(each) for each in value) or "-"
    return printable(str(value), 200) or "-"

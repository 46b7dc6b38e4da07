"""What a check has to say, and how it is said: one line with the place in the file.

`check_config` and `advice` find; who looks, a check, a start or a reload, says it by `sentences`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from proxy.config.origins import Origins
from proxy.model import Breathe, hold_breath

#: In the place of a directive: it is about a variable of the environment.
ENVIRONMENT = "environment"
#: Of each kind that are told: a list of 8,000 addresses may be wrong altogether.
MOST_TOLD = 200


class Finding(NamedTuple):
    """`value` is the parsed value that it is about (a block: its name), None for the directive as a whole."""

    error: bool
    directive: str
    value: Hashable
    message: str


def sentences(
    findings: Iterable[Finding], origins: Origins, marked: bool = True, breathe: Breathe = hold_breath
) -> list[str]:
    """`file:line: directive: …`, with the line where the value stands; errors first, and of each kind not too many.

    Args:
        marked: a warning says that it is one.
    """
    lines: list[str] = []
    for error, kind in ((True, "errors"), (False, "warnings")):
        these = [finding for finding in findings if finding.error == error]
        for finding in these[:MOST_TOLD]:
            breathe()
            lines.append(_sentence(finding, origins, marked))
        if len(these) > MOST_TOLD:
            lines.append(f"and {len(these) - MOST_TOLD} more {kind}")
    return lines


def _sentence(finding: Finding, origins: Origins, marked: bool) -> str:
    warning = "" if finding.error or not marked else "warning: "
    if finding.directive == ENVIRONMENT:
        return f"{warning}{finding.directive}: {finding.message}"
    where = origins.place(finding.directive, finding.value)
    return str(where.mistake(f"{warning}{finding.directive}: {finding.message}"))

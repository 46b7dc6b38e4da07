"""What the installed systemd unit gives the service: its user, the right to low ports, its number of descriptors.

`--check-config` judges by it. Only what a check needs is read, from the unit and its drop-ins in the order in which
systemd reads them; no systemd has to run. Becoming that user is `account`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

UNIT = "greenarrow_proxy.service"
#: Where systemd looks for a unit, what counts first in front (systemd.unit(5)).
FOLDERS = tuple(Path(folder) / "systemd/system" for folder in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"))
_LOW_PORTS = "CAP_NET_BIND_SERVICE"


class Unit(NamedTuple):
    """Of settings that are not there: None, or False."""

    user: str | None = None
    low_ports: bool = False
    descriptors: int | None = None


def installed(folders: Sequence[Path] = FOLDERS) -> Unit:
    """The unit of this machine; an empty one where there is none."""
    lines: list[str] = []
    for path in _files(folders):
        with contextlib.suppress(OSError):
            lines += path.read_text(errors="replace").splitlines()
    return _read(lines)


def _files(folders: Sequence[Path]) -> list[Path]:
    """The unit, then its drop-ins by name; of several of one name the first folder's."""
    unit = next((folder / UNIT for folder in folders if (folder / UNIT).exists()), None)
    if unit is None:
        return []
    drop_ins: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob(f"{UNIT}.d/*.conf"):
            drop_ins.setdefault(path.name, path)
    return [unit, *(drop_ins[name] for name in sorted(drop_ins))]


def _read(lines: Iterable[str]) -> Unit:
    user, descriptors = "", ""
    capabilities: set[str] = set()
    for line in lines:
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or name[:1] in "#;":
            continue
        if name == "User":
            user = value
        elif name == "LimitNOFILE":
            descriptors = value.rpartition(":")[2]  # SOFT:HARD
        elif name == "AmbientCapabilities":
            capabilities = capabilities | set(value.split()) if value else set()
    limit = int(descriptors) if descriptors.isdecimal() else None
    return Unit(user or None, _LOW_PORTS in capabilities, limit)

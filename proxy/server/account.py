"""As whom `--check-config` looks: as the user that the service runs as, whatever the caller may read.

Root can read every file and bind every port, so what root finds good may fail in the service. The user is the one that
`--user` names, else the one of the installed unit. Nobody but root can become another one.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable
from pathlib import Path

from proxy.errors import UsageError

#: Where systemd looks for a unit, what counts first in front; a drop-in beats its unit.
UNITS = tuple(
    Path(folder) / name
    for folder in ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/lib/systemd/system")
    for name in ("greenarrow_proxy.service.d/override.conf", "greenarrow_proxy.service")
)
_USER = re.compile(r"^\s*User\s*=\s*(\S+)\s*$", re.MULTILINE)


def check_as(user: str | None) -> str:
    """Become the user to check as, for good.

    Args:
        user: None: the service's, if we are root and there is one.

    Returns:
        The user, or "" where we stay who we are.

    Raises:
        UsageError: there is no such user, or we cannot become it.
    """
    if user is None and os.geteuid() == 0:
        user = user_of_unit(UNITS)
    if user is None:
        return ""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f"--check-config: there is no user {user} on this machine", "command line") from None
    if entry.pw_uid == os.geteuid():
        return user
    try:
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except OSError:
        raise UsageError(f"--user: only root can check as {user}", "command line") from None
    return user


def user_of_unit(units: Iterable[Path]) -> str | None:
    """Whom the installed unit runs the proxy as; None: there is no unit, or it does not say."""
    for unit in units:
        try:
            found = _USER.findall(unit.read_text(errors="replace"))
        except OSError:
            continue
        if found:
            return str(found[-1])
    return None

"""As whom `--check-config` looks: with the rights that the service has, whatever the caller may read and bind.

Root can read every file and bind every port, so what root finds good may fail in the service. The user is the one that
`--user` names, else the one of the installed unit; of a unit for this user its right to low ports and its number of
descriptors count, too. Nobody but root can become another one; who is not root is judged as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import resource

from proxy.errors import UsageError
from proxy.server.unit import Unit, installed

# linux/prctl.h, linux/capability.h
_PR_SET_KEEPCAPS = 8
_VERSION_3 = 0x20080522
_CAP_NET_BIND_SERVICE = 1 << 10


def check_as(user: str | None, unit: Unit | None = None) -> str:
    """Become the service, for good.

    Args:
        user: None: the unit's, if we are root and there is one.
        unit: by default the one of this machine.

    Returns:
        The user, or "" where we stay who we are.

    Raises:
        UsageError: there is no such user, or we cannot become it.
    """
    unit = installed() if unit is None else unit
    if user is None and os.geteuid() == 0:
        user = unit.user
    if user is None:
        return ""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f"--check-config: there is no user {user} on this machine", "command line") from None
    if entry.pw_uid == os.geteuid():
        return user
    _become(entry, unit if user == unit.user else Unit())
    return user


def _become(entry: pwd.struct_passwd, unit: Unit) -> None:
    """
    Raises:
        UsageError: we may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if unit.descriptors is not None:
            _limit_descriptors(unit.descriptors)
        if unit.low_ports:
            libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except OSError:
        raise UsageError(f"--user: only root can check as {entry.pw_name}", "command line") from None
    if unit.low_ports:
        _keep(libc, _CAP_NET_BIND_SERVICE)


def _keep(libc: ctypes.CDLL, capabilities: int) -> None:
    """Of all that was kept, these alone (capset(2)). Where we had not got them ourselves, there are none."""
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    for kept in (capabilities, 0):
        # Effective, permitted and inheritable: of the first 32 capabilities, then of the others.
        if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)) == 0:
            return


def _limit_descriptors(number: int) -> None:
    """As many as the unit gives; where we may not raise the limit so far, systemd may."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))

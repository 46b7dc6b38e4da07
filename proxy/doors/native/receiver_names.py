"""What a client of the native protocol says of a receiver by name: in OPEN, or in REG for all OPENs of a path.

Names are told apart from what cannot be one here; what they mean for limits is `policy.limits`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from proxy.errors import BadServerName
from proxy.model import UNNAMED, Names
from proxy.protocols.server_name import server_name
from proxy.throttling.flows import Flow


class _Saying(Protocol):
    @property
    def mx(self) -> str | None: ...
    @property
    def domain(self) -> str | None: ...


def names_of(message: _Saying, flows: Sequence[Flow] = ()) -> Names:
    """What an OPEN or a path says of its receiver; what an OPEN leaves out, the first of its paths that says it.

    Raises:
        BadServerName: it cannot be.
    """
    if message.mx is None and message.domain is None and not flows:
        return UNNAMED
    mx, domain = host_name("mx", message.mx), host_name("domain", message.domain)
    for flow in flows:
        mx, domain = mx or flow.names.mx, domain or flow.names.domain
    return Names(mx, domain)


def host_name(field: str, text: str | None) -> str:
    """The canonical form of a name that the OPEN gives, or empty.

    Raises:
        BadServerName: it cannot be one.
    """
    if text is None:
        return ""
    try:
        return server_name(text)
    except ValueError as error:
        raise BadServerName(f"{field} {text}: {error}") from None

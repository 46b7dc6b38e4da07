"""Under which names the status listener may be asked: the check of a request's Host header.

The listener has no password, so a web page that an operator looks at must not be able to read it through his browser.
A browser lets a page read what comes from the page's own name only; but the owner of that name can make it resolve to
this listener, too (DNS rebinding). The request then still carries his name, and is refused. Addresses cannot be made to
point elsewhere, and this machine's own names are not his. Answers and log lines are `status`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from ipaddress import ip_address

from gevent import socket

from proxy.errors import ClientNotAllowed

_HOST = re.compile(r"(\[(?P<address>[^][]+)\]|(?P<name>[^][:]*))(:[0-9]*)?")


class HostNotAllowed(ClientNotAllowed):
    """The request names a host that may be somebody else's."""

    code = "host_not_allowed"


def full_name(machine: str) -> str:
    """The name with its domain, as /etc/hosts or DNS has it (`hostname --fqdn`); may wait. Empty: not known."""
    try:
        found = socket.getaddrinfo(machine, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except (OSError, UnicodeError):
        return ""
    return str(found[0][3])


def check(
    header: str, machine: str, find_full_name: Callable[[str], str] = full_name, more: Collection[str] = ()
) -> None:
    """Whether a request with this Host header is for us.

    Args:
        header: empty: the request has none, so it is no browser's (RFC 9112 section 3.2).
        machine: this machine's host name, with or without a domain.
        find_full_name: asked only when that may decide.
        more: names that the operator vouches for, in small letters.

    Raises:
        HostNotAllowed: neither an address, nor localhost, nor this machine's name; says what to do.
    """
    host = _host(header)
    if not header or host == "localhost" or host in more or _is_address(host):
        return
    machine = machine.lower()
    short = machine.partition(".")[0]
    if host and host in (machine, short):
        return
    if short and host.startswith(f"{short}.") and host == find_full_name(machine).lower().rstrip("."):
        return
    raise HostNotAllowed(
        f"asked as {host[:100]}: only an IP address, localhost and the host name of this machine are answered; "
        "use one of them in the URL, or name this one in listen_status_name"
    )


def _host(header: str) -> str:
    """Without port, brackets and the dot of the root, in small letters. What is malformed comes back whole."""
    match = _HOST.fullmatch(header.strip().lower())
    return match["address"] or match["name"].rstrip(".") if match else header


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True

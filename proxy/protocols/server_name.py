"""The name that a TLS server is asked for and must prove, in the one form that SNI, certificates and pool keys share.

A host name in lower case, without the dot at its end, with A-labels (RFC 5890) where it was written in another script;
or an IP address, which a certificate may carry and which is never sent as SNI (RFC 6066 section 3). What is neither is
refused: with it no handshake could succeed, and an opportunistic session would go out in clear for a slip of the pen.
"""

from __future__ import annotations

import re
from functools import lru_cache

import idna

from proxy.model import canonical_ip

#: RFC 1123 section 2.1, and the underscore that some MX hosts have.
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
#: RFC 1035 section 2.3.4, without the root's length byte.
_LONGEST = 253
_TAG = "IPv6:"  # RFC 5321 section 4.1.3


@lru_cache(maxsize=4096)
def server_name(text: str) -> str:
    """The canonical form of a host name or address.

    Raises:
        ValueError: neither; its text says why, for people.
    """
    address = _address(text)
    if address is not None:
        return address
    name = text if text.isascii() else _a_labels(text)
    name = name.removesuffix(".").lower()
    if len(name) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    for label in name.split("."):
        if not label:
            raise ValueError("an empty label")
        if not _LABEL.fullmatch(label):
            raise ValueError("a label has 1 to 63 letters, digits, hyphens or underscores")
    if name.rpartition(".")[2].isdigit():
        raise ValueError("its last label is a number, and it is no IP address")
    return name


def _address(text: str) -> str | None:
    """An IP address, bare or as SMTP writes a literal."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].removeprefix(_TAG)
    try:
        return canonical_ip(text)
    except ValueError:
        return None


def _a_labels(text: str) -> str:
    """UTS 46 maps what people type (capitals, full-width forms), IDNA 2008 (RFC 5891) encodes."""
    try:
        return idna.encode(text, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ValueError(f"no international domain name: {error}") from None

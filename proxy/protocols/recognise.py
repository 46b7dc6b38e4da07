"""What a connection begins with, when it is not what its listener speaks: for the sentence that the operator reads.

A guess from the first bytes, good for nothing but words: whatever it says, the connection is refused all the same.
Silence is told, too: a client that waits for a greeting is one of SMTP.
"""

from __future__ import annotations

_V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
#: RFC 9110 section 9.3, and PRI, with which HTTP/2 begins (RFC 9113 section 3.4).
_HTTP = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ", b"PATCH ", b"PRI * ")
_SMTP = (b"EHLO", b"HELO", b"LHLO", b"MAIL", b"QUIT", b"NOOP", b"RSET")
#: RFC 8446 section 5.1: a handshake record; its version is 3 and something.
_TLS = b"\x16\x03"
_SOCKS4 = (b"\x04\x01", b"\x04\x02")
#: Protocol → what its clients need instead.
_ADVICE = {
    "HTTP": "it looks like HTTP, which only listen_status speaks",
    "TLS": "it looks like TLS, with which listen, listen_socks5_tls and listen_proxy_protocol_tls begin",
    "proxy_protocol": "it looks like a PROXY protocol header, which belongs to listen_proxy_protocol",
    "socks5": "it looks like SOCKS5, which belongs to listen_socks5",
    "SOCKS4": "it looks like SOCKS4, which this proxy does not speak",
    "SMTP": "it looks like SMTP: this is no mail server",
}
#: For a client that has not sent a byte when its time is up.
SILENT = "the client said nothing within auth_timeout; one that waits for a greeting, as SMTP does, is wrong here"


def protocol_of(first: bytes) -> str:
    """The protocol that a client speaks whose first bytes these are; empty: not known, or too few of them."""
    if first.startswith((b"PROXY ", _V2_SIGNATURE)):
        return "proxy_protocol"
    if first.startswith(_HTTP):
        return "HTTP"
    if first[:4].upper() in _SMTP:
        return "SMTP"
    if first.startswith(_TLS):
        return "TLS"
    if first.startswith(_SOCKS4):
        return "SOCKS4"
    # VER NMETHODS METHODS…, and nothing behind it before the answer (RFC 1928 section 3).
    if first[:1] == b"\x05" and len(first) > 2 and len(first) == 2 + first[1]:
        return "socks5"
    return ""


def wrong_door(first: bytes, spoken: str) -> str:
    """What to add to a refusal: `; it looks like ...`, or nothing.

    Args:
        first: what the client sent, up to now.
        spoken: what the listener speaks: `socks5`, `proxy_protocol`, `HTTP` or `TLS`.
    """
    protocol = protocol_of(first)
    return f"; {_ADVICE[protocol]}" if protocol and protocol != spoken else ""

"""The forms that a value can have: text in, a typed value out.

A `Kind` is one form. Its `parse` raises `ValueError`, with a few words where more can be said than that the value is
not `valid`. Nothing here knows a directive, a file or a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Any

from proxy.model import Endpoint, canonical_ip, ip_from_bytes, packed_ip
from proxy.protocols.server_name import server_name
from proxy.settings import Network, Rate

#: Timers and TCP_USER_TIMEOUT (milliseconds in a C int) hold 24.8 days.
LONGEST_DURATION = 24 * 86400.0
SHORTEST_SECRET = 32
#: In one range of single addresses.
MOST_ADDRESSES = 4096

_DURATION_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?){unit})?" for unit in _DURATION_UNITS))
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_SIZE_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
_RATE_UNITS = {
    **dict.fromkeys(("s", "sec", "second"), 1),
    **dict.fromkeys(("m", "min", "minute"), 60),
    **dict.fromkeys(("h", "hr", "hour"), 3600),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One form of a value.

    Args:
        name: the form's name, as the documents use it.
        parse: text → value; raises ValueError.
        valid: completes the sentence "this value is not …".
        verbatim: on the command line and in the environment, a comma belongs to the value instead of separating two.
        several: `parse` gives values, since one text may stand for more than one; for thousands, one by one as they
            are asked for.
        rule: it ends with a body in braces, and all of it is one text.
        line: it has words of its own between its values, and all of the line is one text.
    """

    name: str
    parse: Callable[[str], object]
    valid: str
    verbatim: bool = False
    several: bool = False
    rule: bool = False
    line: bool = False

    def values(self, text: str) -> Iterable[Any]:
        """All that the text stands for; a value that says nothing (a rate of 0) is left out.

        Raises:
            ValueError: see `parse`.
        """
        value = self.parse(text)
        if self.several:
            assert isinstance(value, Iterable)
            return value
        return () if value is None else (value,)


def _number(text: str) -> int:
    # Not isdigit() alone: it and int() take the digits of every script, and int() is slow on thousands of them.
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError
    return int(text)


def parse_boolean(text: str) -> bool:
    """yes, no, true or false, in any case."""
    try:
        return {"yes": True, "true": True, "no": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError from None


def parse_endpoint(text: str) -> Endpoint:
    """`192.0.2.1:807` or `[::]:807`; port 0 is any free port."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (text.startswith("[") and not bracketed):
        raise ValueError("the port is missing")
    if ":" in host and not bracketed:
        raise ValueError("an IPv6 address goes into brackets")
    if bracketed != (":" in host):
        raise ValueError
    try:
        host = canonical_ip(host.strip("[]"))
    except ValueError:
        raise ValueError("host names and * are not taken, only IP addresses") from None
    number = _number(port)
    if number > 65535:
        raise ValueError("a port is at most 65535")
    return Endpoint(host, number)


def parse_dns_server(text: str) -> Endpoint:
    """`192.0.2.53`, `2001:db8::53`, or with a port as in `parse_endpoint`."""
    try:
        return Endpoint(canonical_ip(text), 53)
    except ValueError:
        return parse_endpoint(text)


def parse_network(text: str) -> Network:
    """An IP address or a CIDR; `10.0.0.1/8` is an error, since one of its two parts was meant otherwise."""
    address, slash, length = text.partition("/")
    if not slash:
        return ip_network(packed_ip(address))
    packed = packed_ip(address)
    ip = ip_from_bytes(packed)
    network = ip_network(f"{ip}/{_number(length)}", strict=False)
    if str(network.network_address) != ip:
        raise ValueError(f"the network is {network}, the address alone {ip}")
    return network


def parse_networks(text: str) -> tuple[Network, ...]:
    """As `parse_network`, or a range `192.0.2.1-192.0.2.6`: the networks that make it up, in order."""
    first, dash, last = text.partition("-")
    if not dash:
        return (parse_network(text),)
    low, high = ip_address(canonical_ip(first)), ip_address(canonical_ip(last))
    if low.version != high.version:
        raise ValueError("one end of the range is IPv4, the other IPv6")
    if int(low) > int(high):
        raise ValueError("the lower address of a range comes first")
    return tuple(summarize_address_range(low, high))


def parse_addresses(text: str) -> Iterator[Network]:
    """An IP address, a range of them or the hosts of a CIDR (not its first and last address), each by itself."""
    if "/" in text:
        network = parse_network(text)
        if network.num_addresses > MOST_ADDRESSES:
            raise ValueError(f"at most {MOST_ADDRESSES} addresses")
        return map(ip_network, network.hosts())
    first, dash, last = text.partition("-")
    low, high = ip_address(canonical_ip(first)), ip_address(canonical_ip(last if dash else first))
    if low.version != high.version or not 0 <= int(high) - int(low) < MOST_ADDRESSES:
        raise ValueError(f"a range has the lower address first, and at most {MOST_ADDRESSES} of them")
    return (ip_network(low + number) for number in range(int(high) - int(low) + 1))


def parse_source(text: str) -> str:
    """An address to leave from, in canonical form, or `same`."""
    if text == "same":
        return text
    host = canonical_ip(text)
    address = ip_address(host)
    if address.is_unspecified or address.is_multicast:
        raise ValueError("no connection can leave from it")
    return host


def parse_ports(text: str) -> tuple[int, int]:
    """`25` or `2500-2599`, as an inclusive range."""
    low, dash, high = text.partition("-")
    first = _number(low.strip())
    last = _number(high.strip()) if dash else first
    if not 1 <= first <= last <= 65535:
        raise ValueError("ports are 1 to 65535, the lower one first")
    return first, last


def parse_duration(text: str) -> float:
    """`30s`, `4h15m`, `1.5s`, `250ms`: seconds. A bare `0` needs no unit, any other number does."""
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        if re.fullmatch(r"[0-9.]+", text):
            raise ValueError("a unit is missing: d, h, m, s or ms")
        raise ValueError("write it without a blank" if _DURATION.fullmatch(text.replace(" ", "")) else "")
    return sum(float(part) * unit for part, unit in zip(match.groups(), _DURATION_UNITS.values(), strict=True) if part)


def parse_size(text: str) -> int:
    """`64K`, `1M`, `4096`: bytes; K is 1024."""
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", text)
    if match is None:
        raise ValueError
    return int(match[1]) * _SIZE_UNITS[match[2]]


def parse_rate(text: str) -> Rate | None:
    """`1000/hr`, `50/min`, `10/s`; None for 0, which is no limit."""
    if text == "0":
        return None
    amount, slash, unit = text.partition("/")
    if not slash or unit not in _RATE_UNITS:
        raise ValueError("the time is missing" if not slash else "the time is hr, min or s")
    number = _number(amount)
    if number > 10**9:
        raise ValueError("at most 1000000000")
    return Rate(number, _RATE_UNITS[unit]) if number else None


def parse_timezone(text: str) -> str:
    """`UTC` or a name of the IANA's database; whether this machine knows it is found out elsewhere."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_+-]{0,31}(/[A-Za-z0-9_+-]{1,32}){0,2}", text):
        raise ValueError
    return text


def parse_text(text: str) -> str:
    """Any text, but for control characters (they are mistakes in a path) and what UTF-8 cannot hold."""
    if not text:
        raise ValueError("it is empty")
    if _UNFIT.search(text):
        raise ValueError("it has a control character or a broken UTF-8 sequence in it")
    return text


def parse_name(text: str) -> str:
    """A name that the operator gives to something: a word of up to 64 characters."""
    if not re.fullmatch(r"[!-~]{1,64}", text):
        raise ValueError
    return text


def parse_domain(text: str) -> str:
    """A domain or host name in canonical form; one of another script is encoded."""
    name = server_name(text)
    if "." not in name or ":" in name or name.rpartition(".")[2].isdigit():
        raise ValueError("a domain such as example.com is meant")
    return name


def parse_mx(text: str) -> str:
    """An MX host's name, or `*.` and the end of one."""
    star = "*." if text.startswith("*.") else ""
    return star + parse_domain(text.removeprefix("*."))


def parse_leaving(text: str) -> tuple[Network | str, ...]:
    """A network, a range, or the name of a source."""
    if re.fullmatch(r"[A-Za-z0-9_.*-]{1,64}", text):
        try:
            return parse_networks(text)
        except ValueError:
            return (text,)
    return parse_networks(text)


def parse_ehlo(text: str) -> str:
    """A domain or an address literal (RFC 5321 section 4.1.1.1), in ASCII; `{ip}` in it stands for the address."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,255}|\[[A-Za-z0-9.:_-]{1,253}\]", text.replace("{ip}", "0" * 39)):
        raise ValueError
    return text


def parse_ciphers(text: str) -> str:
    """Ciphers as OpenSSL names them; whether it knows them it says itself. The level of security is not theirs."""
    if not re.fullmatch(r"[A-Za-z0-9:!+_-]{1,255}", text):
        raise ValueError
    return text


def parse_secret(text: str) -> bytes:
    """A shared secret: 32 characters or more, as UTF-8."""
    parse_text(text)
    if len(text) < SHORTEST_SECRET:
        raise ValueError("it is shorter")
    return text.encode()


#: A descriptor for each listener and worker is held, and each worker has a way to each.
MOST_WORKERS = 64


def parse_workers(text: str) -> int | str:
    """A number of processes, or `auto`."""
    if text == "auto":
        return text
    if not 1 <= _number(text) <= MOST_WORKERS:
        raise ValueError
    return _number(text)


def parse_weight(text: str) -> float:
    """A share's weight, 1/16 to 16: beyond that a session would starve (design of the scheduler)."""
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", text) or not 1 / 16 <= float(text) <= 16:
        raise ValueError
    return float(text)


def count(minimum: int, maximum: int = 10**9) -> Kind:
    """A whole number within bounds."""

    def parse(text: str) -> int:
        number = _number(text)
        if not minimum <= number <= maximum:
            raise ValueError
        return number

    return Kind("number", parse, f"a whole number from {minimum} to {maximum}")


def choice(*words: str) -> Kind:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Kind("word", parse, " or ".join((", ".join(words[:-1]), words[-1])))


def duration(minimum: float = 0.0) -> Kind:
    """A duration of at least `minimum` seconds."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if seconds < minimum:
            raise ValueError("it is too short")
        if seconds > LONGEST_DURATION:
            raise ValueError("it is longer than 24d")
        return seconds

    return Kind("duration", parse, "a duration such as 30s, 15m or 4h15m")


BOOLEAN = Kind("boolean", parse_boolean, "yes or no")
ENDPOINT = Kind("endpoint", parse_endpoint, "an IP:port such as 192.0.2.1:807 or [::]:807")
DNS_SERVER = Kind("server", parse_dns_server, "an IP address, with or without a port: 192.0.2.53 or [::1]:5353")
NETWORK = Kind(
    "network",
    parse_networks,
    "an IP address, a range or a CIDR such as 192.0.2.7, 192.0.2.1-192.0.2.6, 10.0.0.0/8 or fd00::/8",
    several=True,
)
ADDRESSES = Kind(
    "addresses",
    parse_addresses,
    "an IP address, a range or a CIDR such as 192.0.2.7, 192.0.2.1-192.0.2.6 or 192.0.2.0/28",
    several=True,
)
SOURCE = Kind("address", parse_source, "an IP address of this machine, or the word same")
PORTS = Kind("ports", parse_ports, "a port such as 25 or a range such as 2500-2599")
SIZE = Kind("size", parse_size, "a size such as 64K or 1M")
RATE = Kind("rate", parse_rate, "a rate such as 1000/hr, 50/min or 10/s")
TIMEZONE = Kind("zone", parse_timezone, "UTC, or a time zone such as Europe/Berlin")
PATH = Kind("path", parse_text, "a file name", verbatim=True)
NAME = Kind("name", parse_name, "a word of at most 64 characters")
EHLO = Kind("name", parse_ehlo, "an EHLO name such as mail1.example.com or [192.0.2.1]")
DOMAIN = Kind("domain", parse_domain, "a domain such as example.com")
MX = Kind("host", parse_mx, "an MX host such as mx1.example.net or *.example.net")
LEAVING = Kind(
    "source", parse_leaving, "a network such as 192.0.2.7 or 192.0.2.0/24, or the name of a source", several=True
)
CIPHERS = Kind("ciphers", parse_ciphers, "a list of ciphers such as ECDHE-RSA-AES256-GCM-SHA384:HIGH", verbatim=True)
SECRET = Kind("secret", parse_secret, f"a secret of at least {SHORTEST_SECRET} characters", verbatim=True)
WORKERS = Kind("number", parse_workers, "a number of processes, 1 to 64, or the word auto")
WEIGHT = Kind("weight", parse_weight, "a number from 0.0625 to 16")

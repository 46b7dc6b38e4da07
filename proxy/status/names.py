"""`throttle` blocks as configured, and what the names in them mean at the moment: rows of the status, in steps."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import islice

from proxy.policy.directory import Book, Entry
from proxy.settings import Rate as BlockRate
from proxy.settings import ThrottleSettings
from proxy.status.rows import BlockRow, Rate

#: Blocks that are told, and of each the addresses and the failures.
MOST_BLOCKS, MOST_ADDRESSES, MOST_FAILURES = 200, 50, 5
#: Of the lists in a block.
_MOST_LISTED = 8
#: Hosts that are looked at before others have their turn.
_STEP = 500

_Hosts = dict[str, set[str]]


def block_rows(blocks: Iterable[ThrottleSettings], book: Book) -> Generator[None, None, tuple[list[BlockRow], int]]:
    """The rows of the blocks, those with names first, in the order of the file, and how many are left out."""
    everything = list(blocks)
    told = sorted(everything, key=lambda block: not (block.domain or block.mx))[:MOST_BLOCKS]
    by_mx = yield from _by_mx({mx for block in told for mx in block.mx}, book)
    rows, looked_at = [], 0
    for block in told:
        hosts: _Hosts = {}
        for domain in block.domain:
            for host, addresses in _known(book.entries.get(domain)):
                hosts.setdefault(host, set()).update(addresses)
            looked_at += 1
            if looked_at % 20 == 0:
                yield
        for mx in block.mx:
            for host, found in by_mx.get(mx, {}).items():
                hosts.setdefault(host, set()).update(found)
        rows.append(_row(block, hosts, book))
        yield
    return rows, len(everything) - len(told)


def described(block: ThrottleSettings) -> BlockRow:
    """The block as it is configured."""
    return BlockRow(
        name=block.name,
        limits=_rates(block.max_delivery_rate),
        connection_limits=_rates(block.max_connection_rate),
        places=block.max_concurrent_connections or None,
        warmup_days=len(block.warmup.figures) if block.warmup is not None else 0,
        backoff_rules=len(block.backoff),
        per=list(block.per),
        sources=_some(block.source),
        instances=_some(block.instance),
        receivers=_some((*block.domain, *block.mx, *block.destination)),
        shadow=not block.enforce,
        named=bool(block.domain or block.mx),
    )


def _rates(rates: Iterable[BlockRate]) -> list[Rate]:
    return [Rate(rate.amount, rate.seconds) for rate in rates]


def _some(things: Sequence[object]) -> list[str]:
    """Single addresses without the length of their prefix, as they are written."""
    told = [str(each).removesuffix("/32").removesuffix("/128") for each in things[:_MOST_LISTED]]
    return told + [f"{len(things) - _MOST_LISTED} more"] * (len(things) > _MOST_LISTED)


def _row(block: ThrottleSettings, hosts: _Hosts, book: Book) -> BlockRow:
    addresses = sorted(set().union(*hosts.values()))
    entries = [book.entries[domain] for domain in block.domain if domain in book.entries]
    failures = [entry.doubt for entry in entries if entry.doubt]
    row = described(block)
    row.hosts = len(hosts)
    row.addresses, row.addresses_left_out = addresses[:MOST_ADDRESSES], max(0, len(addresses) - MOST_ADDRESSES)
    row.failures, row.failures_left_out = failures[:MOST_FAILURES], max(0, len(failures) - MOST_FAILURES)
    row.asking = sum(1 for entry in entries if not (entry.answered or entry.doubt))
    return row


def _known(entry: Entry | None) -> list[tuple[str, tuple[str, ...]]]:
    return list(entry.known.items()) if entry is not None else []


def _by_mx(wanted: set[str], book: Book) -> Generator[None, None, dict[str, _Hosts]]:
    """`*.yahoodns.net` and names of hosts → the hosts that answers name, with their addresses."""
    found: dict[str, _Hosts] = {}
    if not wanted:
        return found
    looked_at = 0
    for entry in list(book.entries.values()):
        for host, addresses in _known(entry):
            labels = host.split(".")
            for pattern in (host, *("*." + ".".join(labels[at:]) for at in range(1, len(labels)))):
                if pattern in wanted:
                    found.setdefault(pattern, {}).setdefault(host, set()).update(addresses)
            looked_at += 1
            if looked_at % _STEP == 0:
                yield
    return found


def failing(book: Book) -> list[str]:
    """What cannot be looked up, of each domain the first."""
    return list(islice((entry.doubt for entry in book.entries.values() if entry.failures), 1000))

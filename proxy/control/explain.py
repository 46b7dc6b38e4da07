"""What would happen to a connection now, subject by subject: the answer of `explain`.

The verdicts are those of the rules that connections are judged by; how full a throttle is, is the view's. Nothing is
taken, asked for or remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from proxy.errors import ProxyError
from proxy.model import Endpoint, canonical_ip
from proxy.policy.access import Access
from proxy.policy.limits import Hit, Limits
from proxy.policy.modes import Modes
from proxy.stats import duration
from proxy.status.names import described
from proxy.status.rows import Status, ThrottleRow
from proxy.status.spelled import block_limits, held_by, limits_text, places_text, throttle_state
from proxy.throttling.overrides import Overrides, told
from proxy.throttling.throttle import Key

#: In `default_source_ip`: the address that the client dialled.
_SAME = "same"


class Rules(NamedTuple):
    """What is in force.

    Args:
        listeners: of the standard doors, as they are configured.
        present: whether an address is on this machine.
        system_source: the address that the system would choose; raises ProxyError.
        overrides: what was set by hand, which holds for throttles that nobody has used yet, too.
        holder: which worker has the connections between two addresses in mode smtp; None: there is one process.
    """

    access: Access
    modes: Modes
    limits: Limits
    listeners: Iterable[Endpoint]
    present: Callable[[str], bool]
    system_source: Callable[[Endpoint], str]
    overrides: Overrides
    holder: Callable[[str, Endpoint], int | None] = lambda source, destination: None


def explained(
    rules: Rules, view: Status, source: str | None, destination: Endpoint, instance: str
) -> list[tuple[str, str]]:
    """Subject and sentence; see `house.House.explain`."""
    found = [("instance", _instance(rules, instance)), ("mode", _mode(rules, instance, destination))]
    try:
        leaving, how = _source(rules, source, destination, instance)
        found.append(("source", f"{leaving}: {how}"))
        rules.access.check_route(instance, None if leaving == _SAME else leaving, destination)
    except ProxyError as error:
        return [*found, ("verdict", f"refused: {error}")]
    found += _throttles(rules, view, leaving, destination, instance)
    kept = [row for row in view.pool.keys if (row.source, row.destination) == (leaving, str(destination))]
    count = sum(row.connections for row in kept)
    if (worker := rules.holder(leaving, destination)) is not None:
        found.append(("process", f"in mode smtp worker {worker}; in mode tcp the one that the kernel chooses"))
    found.append(("cached", f"{count} held-open connections between these addresses" if count else "none"))
    return [*found, ("verdict", _verdict(rules, view, leaving, destination, instance))]


def _instance(rules: Rules, instance: str) -> str:
    if not instance:
        return "none: its address or its login would name one"
    return f"{instance}, weight {rules.access.weight_of(instance):g}"


def _mode(rules: Rules, instance: str, destination: Endpoint) -> str:
    by_mode: dict[str, list[str]] = {}
    for listener in rules.listeners:
        mode = "smtp" if rules.modes.is_smtp(instance, listener, destination) else "tcp"
        by_mode.setdefault(mode, []).append(str(listener))
    if len(by_mode) < 2:
        return next(iter(by_mode), "no standard listener")
    return "; ".join(f"{mode} at {', '.join(where)}" for mode, where in by_mode.items())


def _source(rules: Rules, source: str | None, destination: Endpoint, instance: str) -> tuple[str, str]:
    """The address, and a word about it.

    Raises:
        ProxyError: there is none.
    """
    if source is None:
        rules.access.check_destination(destination)
        source = rules.access.default_source(instance, destination, _SAME_AS_WORD)
        own = ", ".join(rules.access.listener_sources)
        elsewhere = f"; its own at {own}" if own else ""
        if source == _SAME_AS_WORD:
            return _SAME, f"the address that the client dialled (default_source_ip same){elsewhere}"
        how = "the default" if source else "the system's choice"
        source = source or rules.system_source(destination)
        return source, f"{how}, {_presence(rules, source)}{elsewhere}"
    try:
        source = canonical_ip(source)
    except ValueError:
        name, source = source, rules.access.source_named(source, destination)
        return source, f"{name}, {_presence(rules, source)}"
    name = rules.access.name_of_source(source)
    return source, (f"{name}, " if name else "") + _presence(rules, source)


#: Stands for the address that was dialled: none that a configuration can name.
_SAME_AS_WORD = "0.0.0.0"


def _presence(rules: Rules, source: str) -> str:
    return "on this machine" if rules.present(source) else "NOT on this machine"


def _throttles(
    rules: Rules, view: Status, source: str, destination: Endpoint, instance: str
) -> Iterator[tuple[str, str]]:
    hits = rules.limits.match(instance, source, destination.host)
    if not hits:
        yield "throttle", "no throttle block holds"
    for hit in hits:
        rows = _rows_of(view, hit)
        for row in rows:
            yield "throttle", f"{_what(hit)}: {_state(row)}"
        if not rows:
            limits = block_limits(described(rules.limits.blocks[hit.block]))
            by_hand = "".join(f", by hand: {told(each)}" for each in rules.overrides.of(_key(hit)))
            yield "throttle", f"{_what(hit)}: {limits}{by_hand}; not in use now"


def _what(hit: Hit) -> str:
    by = [each for each in (hit.source, hit.receiver) if each]
    return f"{hit.block}, counted for {' and '.join(by) or 'all together'}"


def _key(hit: Hit) -> Key:
    return Key(hit.source, hit.block, hit.receiver)


def _rows_of(view: Status, hit: Hit) -> list[ThrottleRow]:
    wanted = hit.block, hit.source, hit.receiver
    return [row for row in view.throttles if row.kind == "proxy" and (row.name, row.source, row.receiver) == wanted]


def _state(row: ThrottleRow) -> str:
    parts = [limits_text(row.limits, row.places), f"used {places_text(row.used, row.places)}"]
    if row.waiting + row.demand:
        parts.append(f"{row.waiting + row.demand} wait")
    if row.next_slot:
        parts.append(f"next slot in {duration(row.next_slot)}")
    if row.shadow:
        parts.append("only counts (enforce no)")
    if state := throttle_state(row):
        parts.append(state)
    if held := held_by(row):
        parts.append(f"held by {held}")
    return ", ".join(parts)


def _verdict(rules: Rules, view: Status, source: str, destination: Endpoint, instance: str) -> str:
    if source != _SAME and not rules.present(source):
        return "fails: the source address is not on this machine"
    hits = rules.limits.match(instance, source, destination.host)
    binding = [
        hit for hit in hits for row in _rows_of(view, hit) if not row.shadow and (_is_full(row) or row.next_slot)
    ]
    paused = [hit for hit in hits if any(each.pause for each in rules.overrides.of(_key(hit)))]
    if paused:
        return f"put off while {', '.join(dict.fromkeys(hit.block for hit in paused))} is paused by hand"
    if not binding:
        return "connects at once"
    return f"waits under {', '.join(dict.fromkeys(hit.block for hit in binding))}"


def _is_full(row: ThrottleRow) -> bool:
    return row.state == "paused" or (row.places is not None and row.used + row.waiting >= row.places)

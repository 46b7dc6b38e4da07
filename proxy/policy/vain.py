"""What in a `throttle` block has no effect, or more of it than is meant: sentences for `--check-config`. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.policy.modes import any_smtp
from proxy.settings import Settings, ThrottleSettings


def sentences(block: ThrottleSettings, settings: Settings) -> Iterator[str]:
    """Without the block's name."""
    yield from _never_reached(block)
    yield from _without_a_limit(block)
    if block.backoff and "receiver" not in block.per and _is_for_all(block):
        yield ("backoff: any receiver's reply slows down the mail to all others: `receiver` is missing in `per`")
    if block.backoff and not (settings.listen or any_smtp(settings)):
        yield "backoff: of a receiver's replies only refused greetings are seen in mode tcp"


def _never_reached(block: ThrottleSettings) -> Iterator[str]:
    for directive in ("max_delivery_rate", "max_connection_rate"):
        rates = getattr(block, directive)
        for rate in rates:
            if any(o != rate and o.amount <= rate.amount and o.seconds >= rate.seconds for o in rates):
                what = f"{directive} {rate.amount} in {rate.seconds} s is never reached"
                yield f"{what}: another one allows less in longer"


def _without_a_limit(block: ThrottleSettings) -> Iterator[str]:
    limits = block.max_delivery_rate, block.max_concurrent_connections, block.max_connection_rate, block.warmup
    if any(limits):
        return
    sets_one = [rule.pause or rule.rate is not None for rule in block.backoff]
    if not any(sets_one):
        yield "no limit is set in it"
    elif not all(sets_one):
        yield "backoff: percent of no limit is no limit"


def _is_for_all(block: ThrottleSettings) -> bool:
    """Whether it holds for mail to anybody."""
    somebody = block.domain or block.mx or block.destination
    return not somebody or any(network.prefixlen == 0 for network in block.destination)

"""A manager exchanged for another one, as by an upgrade: what the one leaves goes through bytes into the other."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.throttling.blocks import Rules
from proxy.throttling.estate import Estate, Reader, ThrottleOf
from proxy.throttling.flows import Places
from proxy.throttling.manager import Manager


def read(chunks: Iterable[bytes]) -> Estate:
    reader = Reader()
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def heir_of(manager: Manager, now: int, rules: Rules | None = None) -> tuple[Manager, dict[int, Places]]:
    """Another manager that goes on where this one is, which is frozen from now on; and the places by its numbers."""
    manager.freeze(now)
    heir = Manager(0, now, manager.enforce, rules)
    held = heir.adopt(read(manager.gather(now)), now)
    for chunk in manager.meanwhile():
        heir.adopt_meanwhile(chunk, held, now)
    return heir, held


def picture(estate: Estate) -> list[str]:
    """What it says, whatever the order in which things of one kind come, and their numbers."""
    names: dict[str, list[str]] = {}

    def told(field: str, value: object) -> str:
        if field in names and isinstance(value, int):
            return names[field][value] if value >= 0 else "none"
        if field in ("throttles", "flows") and isinstance(value, list):
            return str([told("throttle", each) if isinstance(each, int) else sentence(each) for each in value])
        return str(value)

    def sentence(record: object) -> str:
        fields = [field for field in record.__struct_fields__ if field != "number"]  # type: ignore[attr-defined]
        said = [f"{field}={told(field, getattr(record, field))}" for field in fields]
        return f"{type(record).__name__}({', '.join(said)})"

    sentences = []
    for record in estate.records:
        sentences.append(sentence(record))
        name = type(record).__name__.removesuffix("Of").lower()
        if isinstance(record, ThrottleOf):
            names.setdefault(name, []).append(f"{record.kind} {record.name} {record.source}")
        else:
            names.setdefault(name, []).append(sentences[-1])
    return sorted(sentences)

"""The process's garbage collector."""

from __future__ import annotations

import gc

import pytest

from proxy.server import process


def test_the_collector_rests_for_as_long_as_the_work_takes() -> None:
    with process.no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="bad"), process.no_garbage_collection():
        raise ValueError("bad")
    assert gc.isenabled()


@pytest.fixture
def untouched_collector():
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.parametrize("much", [True, False])
def test_a_full_collection_looks_only_at_what_has_come_since_the_last_one(untouched_collector, much: bool) -> None:
    """However many objects there are. With little to keep, Python's own way is the better one."""
    collector = process.Collector(lambda: much)
    collector.begin()
    gc.collect()  # Python reckons a quarter of what the last one left, and here that was all of the other tests
    looked_at: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            looked_at.append(len(gc.get_objects()))

    gc.callbacks.append(note)
    try:
        kept = [[index] for index in range(400_000)]
    finally:
        gc.callbacks.remove(note)
        collector.end()
    assert len(kept) == 400_000
    assert looked_at
    if much:
        assert max(looked_at) < 60_000
    else:
        assert max(looked_at) > 100_000


def test_what_is_made_while_the_collector_rests_is_not_looked_at_later(untouched_collector) -> None:
    with process.no_garbage_collection():
        kept = [[index] for index in range(50_000)]
    assert len(gc.get_objects()) < len(kept)


def test_nor_does_any_where_new_ones_take_the_place_of_old_ones(untouched_collector) -> None:
    """Python's own count stays where it is then, so it would look at all of them, late and in one go."""
    collector = process.Collector(lambda: True)
    kept = [[index] for index in range(100_000)]
    collector.begin()
    looked_at: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            looked_at.append(sum(len(gc.get_objects(each)) for each in range(info["generation"] + 1)))

    gc.callbacks.append(note)
    try:
        for index in range(len(kept)):
            kept[index] = [-index]
            if index % 2_000 == 0:
                collector.step()
        gc.collect()
    finally:
        gc.callbacks.remove(note)
        collector.end()
    assert max(looked_at) < 40_000


def test_with_little_to_keep_a_step_does_nothing(untouched_collector) -> None:
    collections = [each["collections"] for each in gc.get_stats()]
    process.Collector(lambda: False).step()
    assert [each["collections"] for each in gc.get_stats()] == collections

"""The format of what a manager leaves: pieces of a bounded size, versions in both directions, and nothing by halves."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from proxy.throttling import estate
from proxy.throttling.estate import Reader, Unreadable
from proxy.throttling.manager import Manager
from proxy.throttling.overrides import Override
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.benches import ALL, KEY, OTHER, SOURCE, Bench, part
from tests.unit.throttling.heirs import picture, read
from tests.unit.throttling.test_backoff import House, block
from tests.unit.throttling.test_handover import FEW, QUARTER

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode
STRANGER = 99


def left() -> list[bytes]:
    """Chunks with nearly all kinds of records."""
    house = House(block(QUARTER, FEW, max_concurrent_connections=2))
    manager, now = house.manager, house.now
    places = house.opened()
    house.reply(places)
    house.reply(places, "450 busy")
    house.open(owner="b")
    session = manager.hello("a", b"1", "", 1.0, now)
    later = now + 200 * SECOND
    manager.register(session, 0, [(KEY, part(Limit(60, 60))), (ALL, part(places=1))], now)
    manager.register(session, 1, [(OTHER, part(Limit(60, 60)))], now)
    manager.ping(session, 0, later)
    manager.pong(session, later // 1000, 0, later)
    for id, want in ((0, 3), (1, 1)):
        manager.demand(session, id, want, 0, want, 0, 0, later)
    manager.take(session, later)
    manager.give_back(session, 1, 0, 1, later)
    flows = manager.flows(session, [0])
    for _ in range(2):
        manager.admit("a", 1.0, SOURCE, "198.51.100.1", flows, now)
    manager._registry.owe(flows[0])
    manager.set_by_hand(Override("x", "", False, 1, (Limit(1, 2),), now + 999 * SECOND), now)
    manager.freeze(later)
    return list(manager.gather(later))


LEFT = left()


def rewritten(chunks: list[bytes], **head: int) -> Iterator[bytes]:
    """As another version would have written it: each record has a field more, and there are records of another kind."""
    writer = estate.Writer()
    counts: dict[int, int] = {}
    for chunk in chunks:
        for fields in decode(chunk, type=list[list[object]]):
            kind = fields[0]
            assert isinstance(kind, int)
            if kind == 0:
                fields[3 if "minor" in head else 2] = head.get("minor") or head["major"]
            if kind == 1:
                yield writer.take()
                fields[1:3] = [counts, writer._checksum]
            writer._body += encode([*fields, "appended"])
            writer._records += 1
            counts[kind] = counts.get(kind, 0) + 1
        if kind != 1:
            writer._body += encode([STRANGER, {"what": ["ever"]}])
            writer._records += 1
            counts[STRANGER] = counts.get(STRANGER, 0) + 1
    yield writer.take()


def test_all_kinds_are_here() -> None:
    """Or the tests below would not be about them."""
    kinds = {record.__struct_config__.tag for record in read(LEFT).records}
    assert kinds == {*range(2, 18), 22}


def test_of_a_later_minor_version_what_is_new_is_passed_over() -> None:
    later = read(rewritten(LEFT, minor=7))
    assert later.records == read(LEFT).records
    assert later.head.minor == 7


def test_of_an_earlier_minor_version_what_is_missing_has_its_default() -> None:
    """Here the burst of a rate and the patterns of a rule, for all that will be appended."""
    assert decode(encode([60, 60]), type=estate.Rate) == estate.Rate(60, 60, 1)
    assert decode(encode([None, 25, None, False, 1.0]), type=estate.Strictness).on == []


@pytest.mark.parametrize("major", [2, 9])
def test_of_another_major_version_nothing_is_read(major: int) -> None:
    with pytest.raises(Unreadable, match=rf"^its format is {major}\.0, and this program knows 1\.0$"):
        read(rewritten(LEFT, major=major))


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"\x90",
        b"GET / HTTP/1.0\r\n\r\n",
        encode([[0, "something else", 1, 0]]),
        encode([[0, estate.MAGIC]]),
        encode([[5, estate.MAGIC, 1, 0]]),
        encode({"a": 1}),
    ],
)
def test_what_is_nothing_of_the_kind(chunk: bytes) -> None:
    with pytest.raises(Unreadable, match=r"^it is no state of throttles$"):
        Reader().feed(chunk)


def test_a_head_that_is_cut() -> None:
    with pytest.raises(Unreadable, match=r"^its head is damaged"):
        Reader().feed(encode([[0, estate.MAGIC, 1, 0, 5]]))


def test_what_is_cut_or_changed_anywhere_is_refused_whole() -> None:
    """Each byte of it, and each end: `Unreadable` and no other error, before anything is adopted."""
    whole = b"".join(LEFT)
    assert len(LEFT) == 2
    border = len(LEFT[0])
    for index in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[index] ^= flip
            with pytest.raises(Unreadable):
                read([bytes(damaged[:border]), bytes(damaged[border:])])
        with pytest.raises(Unreadable):
            read([whole[:index]] if index <= border else [whole[:border], whole[border:index]])


def many(throttles: int = 4_000) -> Bench:
    """A manager with so many throttles, of one session, each with a debt."""
    bench = Bench()
    session = bench.session("a" * 64)
    for id in range(throttles):
        bench.register(session, (Key(SOURCE, f"{id:>0255}"), part(Limit(60, 60), Limit(600, 3600))), id=id)
        bench.want(session, 1, 0, id)
    bench.collect()
    bench.manager.freeze(bench.now)
    return bench


def test_chunks_have_a_bounded_size_and_others_their_turns() -> None:
    bench = many()
    breaths: list[None] = []
    chunks, turns = [], []
    for chunk in bench.manager.gather(bench.now, lambda: breaths.append(None)):
        chunks.append(chunk)
        turns.append(len(breaths))
        assert len(decode(chunk, type=list[list[object]])) <= estate.MOST_RECORDS
    assert max(map(len, chunks)) <= estate.LARGEST
    assert len(chunks) > 20
    assert len(breaths) >= 4_000 // 500
    found: list[None] = []
    heir = Bench().manager
    heir.adopt(read(chunks), bench.now, lambda: found.append(None))
    assert len(heir.throttles) == 4_000
    assert len(found) > 4_000 // 200


def test_it_may_be_adopted_as_it_comes() -> None:
    """The same, and not whole in memory."""
    bench = many(1_000)
    chunks = list(bench.manager.gather(bench.now))
    heirs = [Manager(0, bench.now), Manager(0, bench.now)]
    heirs[0].adopt(read(chunks), bench.now)
    heirs[1].adopt_as_it_comes(iter(chunks), bench.now)
    pictures = []
    for heir in heirs:
        heir.freeze(bench.now)
        pictures.append(picture(read(heir.gather(bench.now))))
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 3_000
    with pytest.raises(Unreadable, match=r"^its end is missing$"):
        Manager(0, bench.now).adopt_as_it_comes(chunks[:-1], bench.now)
    with pytest.raises(Unreadable, match="another machine"):
        Manager(0, bench.now).adopt_as_it_comes(chunks, bench.now - 1)


@pytest.mark.parametrize("change", ["lost", "twice", "swapped", "more"])
def test_pieces_that_are_lost_or_come_in_another_order(change: str) -> None:
    bench = many(1_000)
    chunks = list(bench.manager.gather(bench.now))
    if change == "lost":
        del chunks[3]
    elif change == "twice":
        chunks.insert(3, chunks[3])
    elif change == "swapped":
        chunks[3], chunks[4] = chunks[4], chunks[3]
    else:
        chunks.append(chunks[3])
    with pytest.raises(Unreadable, match=r"end|did not come before"):
        read(chunks)


def test_a_name_for_something_that_did_not_come_before_it() -> None:
    writer = estate.Writer()
    writer.add(read(LEFT).head)
    writer.add(estate.FineOf("a", 0, 1))
    with pytest.raises(Unreadable, match=r"^FineOf names something"):
        read(writer.end())


def test_what_happens_meanwhile_is_pieces_too() -> None:
    said = [estate.RepliedOf(number, "x" * 4_096) for number in range(100)]
    chunks = list(estate.chunks_of(said))
    assert max(map(len, chunks)) <= estate.LARGEST
    assert [each for chunk in chunks for each in estate.records_of(chunk)] == said

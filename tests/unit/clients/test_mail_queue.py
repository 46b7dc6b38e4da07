"""The example MTA's queue on the disk: a crash between any two steps loses nothing and repeats nothing settled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from mail_queue import Envelope, MailQueue

pytestmark = pytest.mark.either_form("a source of etc/clients")

CONTENT = b"Subject: x\r\n\r\n.\r\n"


class Crash(BaseException):
    """Power failure, in place of a call to the system."""


def crashing(at: int) -> Iterator[mock._patch]:
    """Patches that let `at` calls through and crash at the next one, whichever it is."""
    left = [at]

    def wrapped(call: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **more: object) -> object:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return call(*arguments, **more)

        return step

    yield mock.patch.object(Path, "rename", wrapped(Path.rename))
    yield mock.patch.object(Path, "unlink", wrapped(Path.unlink))
    yield mock.patch.object(os, "link", wrapped(os.link))
    yield mock.patch.object(os, "fsync", wrapped(os.fsync))


def crashes(action: Callable[[], object]) -> Callable[[int], bool]:
    def run(at: int) -> bool:
        """Whether it crashed."""
        patches = list(crashing(at))
        try:
            for patch in patches:
                patch.start()
            action()
        except Crash:
            return True
        finally:
            mock.patch.stopall()
        return False

    return run


def each_crash(make: Callable[[Path], Callable[[], object]], tmp_path: Path) -> Iterator[Path]:
    """The directory after a crash at the first step, the second, and so on, each time from the beginning."""
    at, crashed = 0, True
    while crashed:
        directory = tmp_path / str(at)
        crashed = crashes(make(directory))(at)
        yield directory
        at += 1
    assert at > 3, "it has steps"


def test_a_crash_while_a_message_is_put(tmp_path: Path) -> None:
    """It is in the queue, whole, or not at all."""
    seen = set()
    for directory in each_crash(lambda at: lambda: MailQueue(at).put("a@b.c", ["d@e.f"], CONTENT), tmp_path):
        queue = MailQueue(directory)
        found = [queue.load(id) for id in queue.ids()]
        assert [queue.content(envelope) for envelope in found] == [CONTENT] * len(found)
        seen.add(len(found))
    assert seen == {0, 1}


def partly_refused(directory: Path) -> tuple[MailQueue, Envelope]:
    queue = MailQueue(directory)
    (id,) = queue.put("a@b.c", ["good@e.f", "bad@e.f"], CONTENT)
    envelope = queue.load(id)
    envelope.recipients, envelope.refused = [], {"bad@e.f": "550 no"}
    return queue, envelope


def test_a_crash_while_a_message_is_finished(tmp_path: Path) -> None:
    """Afterwards either nothing has happened yet, or nobody is left to be served; a second `finish` completes it."""

    def make(directory: Path) -> Callable[[], object]:
        queue, envelope = partly_refused(directory)
        return lambda: queue.finish(envelope)

    for directory in each_crash(make, tmp_path):
        queue = MailQueue(directory)
        for id in queue.ids():
            envelope = queue.load(id)
            assert queue.content(envelope) == CONTENT
            assert envelope.recipients in ([], ["good@e.f", "bad@e.f"])
            envelope.recipients, envelope.refused = [], {"bad@e.f": "550 no"}
            queue.finish(envelope)
        assert not list(queue.ids())
        (failed,) = queue.failed.glob("*.json")
        assert b"550 no" in failed.read_bytes()
        assert failed.with_suffix(".eml").read_bytes() == CONTENT


def test_what_a_crash_leaves_is_cleaned_in_time(tmp_path: Path) -> None:
    queue = MailQueue(tmp_path)
    (id,) = queue.put("a@b.c", ["d@e.f"], CONTENT)
    leftovers = [queue.ready / "1.eml", tmp_path / "tmp" / "2.new"]
    for path in leftovers:
        path.write_bytes(b"x")
    queue.clean()
    assert all(path.exists() for path in leftovers), "somebody may be putting them"
    for path in (*leftovers, queue.ready / f"{id}.eml"):
        os.utime(path, (0, 0))
    queue.clean()
    assert not any(path.exists() for path in leftovers)
    assert queue.content(queue.load(id)) == CONTENT


def test_a_message_for_several_domains(tmp_path: Path) -> None:
    queue = MailQueue(tmp_path)
    ids = queue.put("", ["a@x.example", "b@y.example", "c@X.example", "a@x.example"], CONTENT)
    assert [queue.load(id).recipients for id in ids] == [["a@x.example", "c@X.example"], ["b@y.example"]]
    assert list(queue.ids()) == ids
    assert [queue.load(id).domain for id in ids] == ["x.example", "y.example"]


@pytest.mark.parametrize(
    ("sender", "recipient", "content"),
    [
        ("a b@c.d", "e@f.g", CONTENT),
        ("a@c.d", "e@f.g>\r\nDATA", CONTENT),
        ("a@c.d", "nobody", CONTENT),
        ("a@c.d", "e@f.g", b"bare\n.\r\n"),
        ("a@c.d", "e@f.g", b"bare\r.\r\n"),
    ],
)
def test_what_is_not_to_be_sent(tmp_path: Path, sender: str, recipient: str, content: bytes) -> None:
    queue = MailQueue(tmp_path)
    with pytest.raises(ValueError, match=r"not an address|lines must end"):
        queue.put(sender, [recipient], content)
    assert not list(queue.ids())


def test_one_sender_a_queue(tmp_path: Path) -> None:
    MailQueue(tmp_path).lock()
    with pytest.raises(BlockingIOError):
        MailQueue(tmp_path).lock()

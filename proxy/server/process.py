"""The process itself: its descriptors, its garbage, and what its hub catches. Nothing here knows what it serves."""

from __future__ import annotations

import codecs
import errno
import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from gevent import get_hub, sleep

from proxy.log import lines as log
from proxy.stats import Counters

#: Held back so that a reload, a status request and the log work when connections have used up all others.
_RESERVED_DESCRIPTORS = 16
#: Young objects before a collection, and collections of each kind before one of the next: at most 21,000 are new to a
#: full one.
_THRESHOLDS = (700, 10, 2)
#: Objects that have lived through a full collection and are few enough to be looked at again.
_MANY = 5_000
#: Objects that have lived through their first collection, and are so many that they should be set apart.
_YOUNG = 10_000
#: Seconds between two steps with much to keep: what can be made in so short a time is looked at in a few milliseconds.
STEP_EVERY = 0.025
#: The same with little.
_REST = 1.0


class Reserve:
    """Descriptors held back; lent while something that must not fail for want of one is done."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._fill()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give them up for as long as the `with` block runs."""
        self.close()
        try:
            yield
        finally:
            self._fill()

    def close(self) -> None:
        """Hold nothing back any more."""
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    def _fill(self) -> None:
        try:
            while len(self._held) < _RESERVED_DESCRIPTORS:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise


def raise_descriptor_limit() -> int:
    """Use all descriptors that we may; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def forbid_core_dumps() -> None:
    """No secret and no mail on the disk, however we end. (The hard limit stays: prlimit(1) can allow one.)"""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def load_codecs() -> None:
    """Python finds a codec when it is first used, and opens files for that: not when descriptors have run out."""
    for name in ("idna", "unicode_escape"):
        codecs.lookup(name)


def freeze_garbage() -> None:
    """What exists at the start lives for ever: the collector need not look at it again (5 % of a session's CPU)."""
    gc.collect()
    gc.freeze()


class Collector:
    """The garbage collector, with short pauses however much there is to keep.

    Python looks at all objects whenever a quarter has been added: 0.6 s at 100,000 throttles, in one go, and it finds
    nothing. Here, once there is much, whatever has lived through a full collection is set apart (`gc.freeze`), so that
    the next one looks only at what has come since, and the thresholds let that be no more than it can do in 20 ms.
    But Python counts what is made less what goes. Where as many old objects go as new ones come, permits above all, it
    does not look for a long time, and then at 100,000 in one go. So a step is done every 25 ms, whatever it counts.

    The price: a circle among objects set apart that is given up later is never found. So there must be none in what
    throttles, sessions and connections are made of; `tests/unit/throttling/test_garbage.py` watches over it.

    Args:
        much: whether there is so much to keep that it is worth that.
    """

    def __init__(self, much: Callable[[], bool]) -> None:
        self._much = much

    def begin(self) -> None:
        freeze_garbage()
        gc.set_threshold(*_THRESHOLDS)
        gc.callbacks.append(self._collected)

    def end(self) -> None:
        gc.callbacks.remove(self._collected)

    def steps_forever(self) -> NoReturn:
        while True:
            sleep(STEP_EVERY if self._much() else _REST)
            self.step()

    def step(self) -> None:
        """Look at what has come since the last step, if there is much to keep."""
        if self._much():
            gc.collect(0)
            if len(gc.get_objects(1)) > _YOUNG:
                gc.collect()

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2 and self._much() and len(gc.get_objects(2)) > _MANY:
            gc.freeze()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For work that makes many objects to keep: the collector would look at them again and again, and find nothing.

    Nor does it look at them afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def log_what_the_hub_catches(counters: Counters) -> None:
    """An exception that reaches gevent's hub is a mistake of ours: one line in the log, no traceback on stderr."""

    def told(context: object, kind: object, value: BaseException | None, traceback: object) -> None:
        counters.internal_errors += 1
        if value is not None:
            log.internal_error(f"in {context!r}"[:200], value)

    get_hub().print_exception = told

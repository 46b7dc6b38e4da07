"""The process itself: its descriptors, its garbage, and what its hub catches. Nothing here knows what it serves."""

from __future__ import annotations

import codecs
import errno
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from gevent import get_hub

from proxy.log import lines as log
from proxy.stats import Counters

#: Held back so that a reload, a status request and the log work when connections have used up all others.
_RESERVED_DESCRIPTORS = 16


class Reserve:
    """Descriptors held back; lent while something that must not fail for want of one is done."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._fill()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give them up for as long as the `with` block runs."""
        for fd in self._held:
            os.close(fd)
        self._held.clear()
        try:
            yield
        finally:
            self._fill()

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


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For work that makes many objects to keep: the collector would look at them again and again, and find nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def log_what_the_hub_catches(counters: Counters) -> None:
    """An exception that reaches gevent's hub is a mistake of ours: one line in the log, no traceback on stderr."""

    def told(context: object, kind: object, value: BaseException | None, traceback: object) -> None:
        counters.internal_errors += 1
        if value is not None:
            log.internal_error(f"in {context!r}"[:200], value)

    get_hub().print_exception = told

"""Faults of the operating system for the real program: a system call fails while a test wants it to.

    with Faults() as faults, Proxy(environ=faults.environ) as proxy:
        with faults.failing("accept4", errno.EPERM):
            ...

The shared object is compiled when it is first needed; without a C compiler these tests are left out.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.peers import program
from tests.waiting import wait_for

SOURCE = Path(__file__).with_name("faults.c")


@cache
def _library() -> Path:
    compiler = program("cc")
    path = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", *shlex.split(os.environ.get("CFLAGS", ""))]
    subprocess.run([compiler, *flags, "-o", path, SOURCE], check=True)
    return path


class Faults:
    """For one run of the program; `environ` is what it has to be started with."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="faults-"))
        self._wanted = self._directory / "wanted"
        self._hits = self._directory / "wanted.hits"
        first = os.environ.get("LD_PRELOAD", "").split()  # a sanitizer's library wants to be the first
        self.environ = {"LD_PRELOAD": " ".join([*first, str(_library())]), "FAULTS": str(self._wanted)}

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def hits(self) -> int:
        """How many calls have failed."""
        return self._hits.stat().st_size if self._hits.exists() else 0

    @contextlib.contextmanager
    def failing(self, call: str, number: int) -> Iterator[None]:
        """Have all these calls fail within the block."""
        new = self._wanted.with_suffix(".new")
        new.write_text(f"{call} {number}\n")
        new.replace(self._wanted)
        try:
            yield
        finally:
            self._wanted.unlink()

    def wait_hit(self, more_than: int = 0) -> None:
        """Until a call has failed."""
        wait_for(lambda: self.hits > more_than, what="a system call that fails")

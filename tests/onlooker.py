"""What the running program does inside, counted from within: a module that Python loads before the program looks on.

The counts stand in a file that both have mapped, so that they can be read at any moment.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

_COUNTS = "onlooker.counts"
_CODE = """
import mmap, os, ssl, struct, threading
import greenlet

with open(os.environ["ONLOOKER"], "r+b") as file:
    counts = mmap.mmap(file.fileno(), 24)
here = threading.get_ident()

def count(place):
    struct.pack_into("q", counts, place, struct.unpack_from("q", counts, place)[0] + 1)

def shake_hands(self, real=ssl.SSLObject.do_handshake):
    count(8 if threading.get_ident() == here else 16)
    return real(self)

greenlet.settrace(lambda event, ends: count(0))
ssl.SSLObject.do_handshake = shake_hands
"""


class Seen(NamedTuple):
    """Switches of greenlets; steps of TLS handshakes that were computed in the hub's thread, and in others."""

    switches: int
    handshakes_in_hub: int
    handshakes_apart: int


class Onlooker:
    """Args:
    directory: of its own.
    """

    def __init__(self, directory: Path) -> None:
        self._counts = directory / _COUNTS
        self._counts.write_bytes(bytes(24))
        (directory / "sitecustomize.py").write_text(_CODE)
        #: What the program's environment needs.
        self.environ = {"PYTHONPATH": str(directory), "ONLOOKER": str(self._counts)}

    @property
    def seen(self) -> Seen:
        """So far."""
        return Seen(*struct.unpack("3q", self._counts.read_bytes()))

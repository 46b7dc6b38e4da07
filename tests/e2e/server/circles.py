#!/usr/bin/env python3
"""The program itself, and a thread that says over a socket what only the garbage collector finds of what is done
meanwhile: each word of the other end is answered with a JSON object, what has been found since the word before → how
often.

    CIRCLES_FD=3 tests/e2e/server/circles.py --config-filename=...

Whatever a collection finds is kept (`gc.DEBUG_SAVEALL`), whoever calls for it.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType, FunctionType, MethodType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from greenarrow_proxy import main  # noqa: E402


def name(thing: Any) -> str:
    """What one can look for in the source."""
    kind = type(thing)
    if isinstance(thing, FrameType):
        return f"frame of {thing.f_code.co_qualname}"
    if isinstance(thing, FunctionType | MethodType):
        return f"{kind.__name__} {thing.__module__}.{thing.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def watch(link: socket.socket) -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)
    while link.recv(1):
        gc.unfreeze()
        gc.collect()
        found = Counter(map(name, gc.garbage))
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()  # else they are found once more
        gc.set_debug(gc.DEBUG_SAVEALL)
        link.sendall(json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    other = socket.socket(fileno=int(os.environ["CIRCLES_FD"]))
    threading.Thread(target=watch, args=(other,), daemon=True).start()
    sys.exit(main())

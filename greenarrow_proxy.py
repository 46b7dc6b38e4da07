#!/usr/bin/env python3
"""GreenArrow Proxy: starts the program; everything is in `proxy.cli`.

The package is named `proxy`, as the product is laid out. PyPI's proxy.py has a package of that name too, and whichever
is installed last wins: that is said in one sentence, before anything of the other one is imported.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

MARK = "GreenArrow Proxy"
STDERR = 2


def shadowed() -> str:
    """What is wrong with the package that `import proxy` would find here, or ""."""
    spec = importlib.util.find_spec("proxy")
    origin = spec.origin if spec is not None else None
    if origin is not None and MARK in Path(origin).read_text(encoding="utf-8", errors="replace"):
        return ""
    return (
        f"the package 'proxy' that Python finds here ({origin or 'none'}) is not {MARK}'s: another distribution, such "
        "as PyPI's proxy.py, brings one of the same name; install greenarrow-proxy in a virtual environment of its own"
    )


def open_what_is_missing() -> None:
    """Standard input and outputs that we were started without are /dev/null, for workers, too.

    Else whatever is opened first would be in their place, and get the lines of the log.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)


def main() -> int:
    open_what_is_missing()
    # A SIGHUP, SIGUSR1 or SIGUSR2 that comes while the program is being loaded would end it: it waits until somebody
    # can act on it (`proxy.server.signals`). So this is done before anything else is.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
    if wrong := shadowed():
        print(f"greenarrow_proxy: {wrong}", file=sys.stderr)
        return 1
    from proxy.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())

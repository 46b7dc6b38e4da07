"""In which form the program runs: the relay and the typed core may be compiled, or Python code (see setup.py).

The compiled modules stand beside their sources, and Python prefers them. With GREENARROW_PROXY_PURE=1 in the
environment the sources run, to look into them with a debugger or to find out whether a defect is theirs.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from types import ModuleType


class _Sources:
    """A finder that knows of the sources alone."""

    def __init__(self) -> None:
        self._folders: dict[str, FileFinder] = {}  # each lists its folder once

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("proxy."):
            return None
        for folder in path or ():
            if folder not in self._folders:
                self._folders[folder] = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES))
            spec = self._folders[folder].find_spec(name)
            if spec is not None:
                return spec
        raise ModuleNotFoundError(f"no source of {name}, and GREENARROW_PROXY_PURE is set", name=name)


def choose() -> None:
    """Leave out what is compiled, if the environment says so. To be called before anything of the program is loaded."""
    if os.environ.get("GREENARROW_PROXY_PURE") == "1":
        sys.meta_path.insert(0, _Sources())


def core_name() -> str:
    """Which core runs: `compiled` or `python`; for --version."""
    from proxy import spans  # late: what runs is chosen before anything is loaded

    return _form(spans)


def _form(module: ModuleType) -> str:
    return "compiled" if (module.__file__ or "").endswith(tuple(EXTENSION_SUFFIXES)) else "python"

"""Packaging of the client library, which must not need a package named `proxy` where it is installed.

The library shares the protocol's codec and the bookkeeping of permits with the program: one source for both. In a
checkout this file puts the whole library together beside itself, the shared modules as its `_shared`; a source
distribution holds it put together already. docs/architecture.md says why.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
PACKAGE = HERE / "greenarrow_proxy_client"
#: What the library takes of proxy/; the rule for its imports is tests/unit/test_import_rule.py.
SHARED = (
    "errors.py",
    "model.py",
    "protocols/__init__.py",
    "protocols/native/__init__.py",
    "protocols/native/auth.py",
    "protocols/native/frames.py",
    "protocols/native/messages.py",
    "protocols/native/session_messages.py",
    "protocols/smtp/__init__.py",
    "protocols/smtp/dialogue.py",
    "protocols/smtp/octets.py",
    "throttling/__init__.py",
    "throttling/lease.py",
    "throttling/many.py",
    "throttling/wheel.py",
)
_IMPORT = re.compile(r"^(\s*(?:from|import) )proxy(?=[ .])", re.MULTILINE)


def put_together() -> None:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(CHECKOUT / PACKAGE.name, PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shared = PACKAGE / "_shared"
    for name in SHARED:
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / "proxy" / name, shared / name)
    (shared / "__init__.py").write_text(
        '"""Copies of what the program and this library have in common; see its proxy/."""\n'
    )
    version = re.search(r'__version__ = "(.+)"', (CHECKOUT / "proxy" / "__init__.py").read_text(encoding="utf-8"))
    assert version
    (PACKAGE / "version.py").write_text(f'"""Made when this was packaged."""\n\n__version__ = "{version[1]}"\n')
    for file in PACKAGE.rglob("*.py"):
        source = _IMPORT.sub(r"\1greenarrow_proxy_client._shared", file.read_text(encoding="utf-8"))
        file.write_text(source, encoding="utf-8")
        _check(file, source)
    shutil.copy(CHECKOUT / "LICENSE", HERE / "LICENSE")


def _check(file: Path, source: str) -> None:
    for name in re.findall(r"greenarrow_proxy_client\._shared((?:\.\w+)*)", source):
        parts = PACKAGE.joinpath("_shared", *name.split(".")[1:])
        if not (parts.is_dir() or parts.with_suffix(".py").exists()):
            raise SystemExit(f"{file.name} imports proxy{name}: it is not among SHARED of client/setup.py")


if (CHECKOUT / "proxy" / "protocols").is_dir():
    put_together()
elif not (PACKAGE / "_shared").is_dir():
    raise SystemExit("the client library is built from a checkout of the whole repository, or from its own sdist")
setup()

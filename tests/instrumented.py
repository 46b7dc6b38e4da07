"""All C that is ours, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of this checkout.

    with Instrumented() as copy:
        done = copy.python("-m", "pytest", "tests/loopback/net/test_relay.py")
        assert done.defects == "" and done.returncode == 0

A copy, so that the extensions are found under their own names by whatever runs in it: tests, the program that tests
start, its workers. Each process that reports something writes it to a file of its own, whatever becomes of its
standard error and exit code; what those files hold is a defect.

- Python's and gevent's C is not compiled anew. But PYTHONMALLOC=malloc has each object be an allocation of its own, so
  that C of ours that touches a freed object is found; and since what is freed is overwritten, anybody else who does
  runs into an address that does not exist.
- Variables on the stack are not watched in extensions: greenlets copy parts of the stack away and back, and what
  AddressSanitizer notes of them stays where it was. In programs of ours (`executable`) they are.
- At the end of a process its leaks are looked for. The interpreter itself frees little then; a leak is ours when C of
  ours called the allocator.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import forms
from tests.peers import program

ROOT = Path(__file__).resolve().parents[1]
#: Undefined behaviour ends in an instruction that does not exist, which AddressSanitizer reports with its line: the
#: library of the other one would write to standard error and nowhere else.
_SANITIZE = "-fsanitize=address,undefined -fsanitize-undefined-trap-on-error -fno-omit-frame-pointer -g"
#: Python's own flags have -fwrapv, with which no sum is too large.
SANITIZE = f"{_SANITIZE} -fno-wrapv"
#: What mypyc makes, and its own C above all, relies on it; it comes before Python's flags, or in their place.
_SANITIZE_CORE = f"{_SANITIZE} -fwrapv"
_NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", ".cache", ".*_cache", ".hypothesis", ".demo", "build", "dist", "__pycache__", "*.egg-info"),
    *("*.so", "_fast*.c", "results"),
)
_LEAK = re.compile(r"^(?:Direct|Indirect) leak of .*\n((?:    #\d.*\n)*)", re.MULTILINE)
_ALLOCATOR = re.compile(r"^    #\d+ (?:__interceptor_)?(?:malloc|calloc|realloc|reallocarray|posix_memalign|strdup)\b")


@dataclass(frozen=True)
class Done:
    """How a command in the copy has ended.

    Attributes:
        defects: all that the sanitizers reported in any process; empty when there is nothing.
    """

    returncode: int
    output: str
    defects: str

    def check(self) -> None:
        """Nothing was reported, and the command itself succeeded.

        Raises:
            AssertionError: with all that was said.
        """
        assert not self.defects, f"{self.defects}\n{self.output[-3000:]}"
        assert self.returncode == 0, self.output[-10_000:]


class Instrumented:
    """The copy and what was built in it; a context manager.

    Args:
        changes: of sources, before they are compiled: path, what stands there once, what shall stand there.

    Attributes:
        root: where the copy is.
    """

    def __init__(self, *changes: tuple[str, str, str]) -> None:
        self._compiler = program("gcc")
        self._directory = tempfile.TemporaryDirectory(prefix="sanitized-")
        self.root = Path(self._directory.name) / "checkout"
        self._reports = Path(self._directory.name) / "reports"
        self._reports.mkdir()
        shutil.copytree(ROOT, self.root, ignore=_NOT_COPIED, symlinks=True)
        for name, before, after in changes:
            text = (self.root / name).read_text()
            assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {name}"
            (self.root / name).write_text(text.replace(before, after))

    def __enter__(self) -> Instrumented:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def build_twins(self) -> None:
        """What is written in Cython, in place; seconds."""
        sources = [str(path.relative_to(self.root)) for path in sorted(self.root.glob("proxy/**/*.pyx"))]
        self._build(["-m", "Cython.Build.Cythonize", "-3", "--force", "--inplace", *sources], f"{SANITIZE} -O1")
        assert all(list(self.root.glob(f"{Path(source).with_suffix('')}.*.so")) for source in sources)

    def build_all(self) -> None:
        """Whatever setup.py compiles, C that is generated of our Python included; minutes."""
        self._build(["setup.py", "--quiet", "build_ext", "--inplace"], f"{_SANITIZE_CORE} -O0")
        assert list(self.root.glob("greenarrow_proxy_core__mypyc.*.so"))
        self.build_twins()  # once more: they are not as what mypyc makes

    def _build(self, arguments: list[str], flags: str) -> None:
        environ = {"CFLAGS": f"{flags} --param asan-stack=0", "CC": self._compiler}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=forms.build_environ(**environ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-5000:]

    def executable(self, sources: Iterable[Path], *flags: str) -> Path:
        """A program of ours."""
        path = Path(self._directory.name) / "program"
        command = [self._compiler, *SANITIZE.split(), "-O1", "-o", path, *sources, *flags]
        subprocess.run(command, check=True)
        return path

    def environ(self) -> dict[str, str]:
        """For a program of ours: where to report to."""
        where = f"log_path={self._reports}/report:stack_trace_format='    #%n %f %S %m'"
        # 2: pytest has a handler of its own for those, and may not put it in this one's place.
        handled = "handle_sigill=2:handle_segv=2:handle_sigbus=2:handle_sigfpe=2"
        what = "max_free_fill_size=4096:detect_stack_use_after_return=0:detect_leaks=1"
        return os.environ | {
            "ASAN_OPTIONS": f"{where}:{handled}:{what}",
            "LSAN_OPTIONS": "exitcode=0:use_tls=0",  # judged here; a look at TLS crashes where there were threads
        }

    def python_environ(self) -> dict[str, str]:
        """For a Python that loads extensions of ours."""
        libraries = [self._library(name) for name in ("libasan.so", "libstdc++.so.6")]
        return self.environ() | {
            "LD_PRELOAD": " ".join(libraries),
            "PYTHONMALLOC": "malloc",
            "CFLAGS": SANITIZE,  # for what tests compile
        }

    def python(self, *arguments: str | Path, timeout: float = 500.0, environ: Mapping[str, str] | None = None) -> Done:
        """Run Python in the copy."""
        return self.run([sys.executable, *arguments], self.python_environ() | (environ or {}), timeout)

    def run(self, command: list[str | Path], environ: Mapping[str, str], timeout: float) -> Done:
        done = subprocess.run(
            command,
            cwd=self.root,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, self.defects())

    def defects(self) -> str:
        """What has been reported since the last time that this was asked."""
        found = []
        for report in sorted(self._reports.iterdir()):
            found.append(_ours(report.read_text(errors="replace"), self._directory.name))
            report.unlink()
        return "\n".join(filter(None, found))

    def _library(self, name: str) -> str:
        command = [self._compiler, f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _ours(report: str, directory: str) -> str:
    """A report without leaks of others; empty when nothing else is in it."""
    if "ERROR: LeakSanitizer" not in report:
        return report
    leaks = [leak[0] for leak in _LEAK.finditer(report) if directory in _who_allocated(leak[1])]
    return "\n".join(leaks)


def _who_allocated(stack: str) -> str:
    """The first line of a stack that is no allocator."""
    return next((line for line in stack.splitlines() if not _ALLOCATOR.match(line)), "")

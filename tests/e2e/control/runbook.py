"""docs/runbook.md as something to act by: the commands of a drill, typed one after the other, and what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from tests.program import ROOT
from tests.waiting import wait_for

PAGE = (ROOT / "docs" / "runbook.md").read_text()
_SECTION = re.compile(r"^### \((\w)\) .*?(?=^##)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Step(NamedTuple):
    """`typed`: a command line; `shown`: what the page says comes back."""

    typed: str
    shown: str


def drills() -> dict[str, str]:
    """Letter → text."""
    return {match[1]: match[0] for match in _SECTION.finditer(PAGE)}


def steps(text: str, prompt: str = "$ ") -> list[Step]:
    """The commands behind this prompt, in their order."""
    found: list[Step] = []
    for block in _BLOCK.findall(text):
        for line in block.splitlines():
            if line.startswith(prompt):
                found.append(Step(line.removeprefix(prompt), ""))
            elif found:
                found[-1] = Step(found[-1].typed, f"{found[-1].shown}{line}\n")
    return found


class Drill:
    """One drill: a context manager, in which each of its commands must be typed, in the order of the page.

    Args:
        letter: which. socket: the proxy's control socket.
        values: what stands on the page → what stands there in the test; as long as the drill goes on, it may grow.
    """

    def __init__(self, letter: str, socket: str, values: Mapping[str, str] | None = None) -> None:
        self.values = dict(values or {})
        self._letter = letter
        self._left = steps(drills()[letter])
        self._environ = {**os.environ, "GREENARROW_PROXY_CONTROL_SOCKET": socket, "COLUMNS": "500"}

    def __enter__(self) -> Drill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert kind is not None or not self._left, f"({self._letter}) not typed: {self._left}"

    def type(self, *words: str, code: int = 0) -> str:
        """The next command, once.

        Args:
            words: must be shown on the page, and come back. code: its exit code.

        Returns:
            All that came back.
        """
        step = self._next(words)
        got, said = self._run(step)
        assert got == code, said
        for word in words:
            assert self._real(word) in said, said
        return said

    def watch(self, *words: str) -> str:
        """The next command, which only looks, again and again until it shows the words."""
        step = self._next(words)
        last = ""

        def shows() -> bool:
            nonlocal last
            _, last = self._run(step)
            return all(self._real(word) in last for word in words)

        try:
            wait_for(shows, 15.0, f"{step.typed}: {words}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{last}") from None
        return last

    def _next(self, words: tuple[str, ...]) -> Step:
        step = self._left.pop(0)
        for word in words:
            assert word in step.shown, f"the page does not show {word!r} for {step.typed}:\n{step.shown}"
        return step

    def _run(self, step: Step) -> tuple[int, str]:
        program, *arguments = shlex.split(self._real(step.typed))
        assert program == "greenarrow_proxy", step.typed
        done = subprocess.run(
            [sys.executable, str(ROOT / "greenarrow_proxy.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self._environ,
        )
        return done.returncode, done.stdout + done.stderr

    def _real(self, text: str) -> str:
        for old, new in self.values.items():
            text = text.replace(old, new)
        return text

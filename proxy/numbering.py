"""Numbers for connections and SMTP sessions, as the log and operators name them.

One process counts 1, 2, 3. Of several, each counts in steps of 10, 100 or 1,000, whichever has room for all of them, so
that no two give out the same number and the last digits say who it was: with up to 9 workers, 4271 is the 427th of
worker 1, and those of the master end in 0.
"""

from __future__ import annotations


def step_for(workers: int) -> int:
    """The step of a program with so many workers; 1: there is one process only."""
    return 10 ** len(str(workers)) if workers else 1


#: A process that takes the place of another leaves out so many of its numbers: those that it may have used since it
#: said last how far it was.
LEFT_OUT = 10_000


class Numbers:
    """`last`: the one that was given out last."""

    def __init__(self) -> None:
        self.last = 0
        self._step = 1

    def take(self) -> int:
        """The next one."""
        self.last += self._step
        return self.last

    def count_as(self, process: int, step: int, above: int = 0) -> None:
        """From now on the numbers of this process: those above `above` that are `process` and a multiple of `step`.

        Args:
            process: 0: the master; workers from 1.
            above: 0: nobody has counted before. Else what is known to be used, of which `LEFT_OUT` are left out.
        """
        used = above + LEFT_OUT * step if above else process
        self.last, self._step = used - (used - process) % step, step


#: Of this process.
numbers = Numbers()

"""What a row of the specification is made of; the rows themselves are `workloads`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from harness.candidates import SINK

#: Who relays a session, in the order of the tables.
RELAYS = (
    "greenarrow",
    "greenarrow-python",
    "haproxy",
    "haproxy-splice",
    "nginx",
    "tokio",
    "dante",
    "classic",
    "direct",
)


@dataclass(frozen=True)
class Metric:
    """A figure of a sample. `scale` turns the generator's unit into the one that is shown."""

    key: str
    title: str
    scale: float = 1.0
    digits: int = 0
    higher_is_better: bool = False


@dataclass(frozen=True)
class Workload:
    """One row of the specification. The first metric is the one that is plotted and compared.

    `arguments` and `quick` go to the generator. `measure`, when given, takes the generator's place: it gets the running
    candidate and whether to be quick, and returns the sample (see `measure.Sample`): that is how workloads come in that
    C does not speak, such as the native protocol.
    """

    name: str
    title: str
    mode: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...]
    metrics: tuple[Metric, ...]
    candidates: tuple[str, ...] = RELAYS
    baseline: str = "haproxy"
    door: str = "any"
    sink: str = SINK  # whom the generator's mail is for
    fresh: bool = False  # a new process for each sample: memory
    idle_relays: int = 0  # held open beside the load
    rounds: int = 3  # at most
    beside: Callable[..., AbstractContextManager[None]] | None = None  # what goes on beside the load instead
    after: Callable[..., dict[str, Any]] | None = None  # (bench, running, sample) -> what it becomes
    measure: Callable[..., dict[str, Any]] | None = None

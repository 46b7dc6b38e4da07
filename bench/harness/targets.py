"""The goals that the project has set itself: ratios to peers measured in the same round, and one figure of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness import analysis

_CPU = "cpu_us_per_unit"


@dataclass(frozen=True)
class Goal:
    """`ours` ÷ `peer` of a workload's figure is at most `limit`; None: no goal, a figure beside one.

    `python` and `python_peer` are the same with pure Python; "" where there is none. `peer` "": the figure itself is
    meant, in its own unit. `turned`: `peer` ÷ `ours`, which is at least `limit`. `judged`: whose figure decides.
    """

    measure: str
    against: str
    workload: str
    limit: float | None
    peer: str = "haproxy"
    ours: str = "greenarrow"
    python: str = "greenarrow-python"
    python_peer: str = ""
    key: str = _CPU
    turned: bool = False
    unit: str = ""
    judged: str = "compiled"

    @property
    def goal(self) -> str:
        if self.limit is None:
            return ""
        return f"{'≥' if self.turned else '≤'} {self.limit:.2f}{self.unit}"

    def found(self, blocks: Mapping[str, Any]) -> tuple[analysis.Figure | None, analysis.Figure | None]:
        """Compiled and pure Python."""
        return self._figure(blocks, self.ours, self.peer), self._figure(
            blocks, self.python, self.python_peer or self.peer
        )

    def met(self, blocks: Mapping[str, Any]) -> bool | None:
        """As it is printed, in two digits; None: not measured, or no goal."""
        compiled, python = self.found(blocks)
        figure = python if self.judged == "python" else compiled
        if figure is None or self.limit is None:
            return None
        shown = round(figure.median, 2)
        return shown >= self.limit if self.turned else shown <= self.limit

    def _figure(self, blocks: Mapping[str, Any], ours: str, peer: str) -> analysis.Figure | None:
        if self.workload not in blocks or not ours:
            return None
        rounds = blocks[self.workload]["rounds"]
        if not peer:
            return analysis.absolute(rounds, ours, self.key)
        return analysis.ratio(rounds, *((peer, ours) if self.turned else (ours, peer)), self.key)


GOALS = (
    Goal("session of one message (`sess1`)", "HAProxy", "sess1", 0.97),
    Goal(
        "the same with a log line",
        "HAProxy, tcplog",
        "sess1+log",
        0.97,
        "haproxy-tcplog",
        "greenarrow-log",
        "greenarrow-python-log",
    ),
    Goal("session of five messages (`sess5`)", "HAProxy", "sess5", 0.85),
    Goal("session of 100 KB (`msg100k`)", "HAProxy", "msg100k", 0.80),
    Goal("SOCKS5 with password and BIND (`socks`)", "tokio without both", "socks", 1.10, "tokio"),
    Goal("round trip (`pp100`)", "HAProxy", "pp100", 0.88),
    Goal("large messages (`bulk`)", "HAProxy", "bulk", 0.30),
    Goal("memory of a relay (`idle9k`)", "HAProxy", "idle9k", 0.20, key="kb_per_connection"),
    Goal(
        "warm native channel, one message (`channel`)",
        "our own SOCKS5 session",
        "channel",
        0.60,
        "channel-socks",
        "channel-warm",
        "channel-warm-python",
        "channel-socks-python",
    ),
    Goal(
        "mode smtp, fresh connection, one message, no TLS (`smtp1`)",
        "our own mode tcp",
        "smtp1",
        1.40,
        "greenarrow",
        "smtp-own",
        "smtp-own-python",
        "greenarrow-python",
    ),
    Goal(
        "mode smtp, shared connection, one message, in clear (`smtp1`)",
        "HAProxy relaying a fresh one",
        "smtp1",
        0.60,
        ours="smtp-shared",
        python="smtp-shared-python",
    ),
    Goal(
        "the same with STARTTLS to the MX (`smtptls`)",
        "HAProxy and the MTA's own handshake (Exim's)",
        "smtptls",
        0.15,
        "starttls-exim",
        "smtp-shared",
        "smtp-shared-python",
        key="with_own_tls_us_per_unit",
    ),
    Goal(
        "the same, beside the cheapest handshake that there is",
        "HAProxy and a handshake in C",
        "smtptls",
        None,
        "starttls-haproxy",
        "smtp-shared",
        "smtp-shared-python",
        key="with_own_tls_us_per_unit",
    ),
    Goal("permits one by one (`permits1`)", "redis INCR, its CPU ÷ ours", "permits1", 0.50, "redis", turned=True),
    Goal("permits, 16 at a time (`permits16`)", "redis INCR, its CPU ÷ ours", "permits16", 0.60, "redis", turned=True),
    Goal("a permit in the core (`core`)", "", "core", 0.50, "", "core", "core-python", unit=" µs"),
    Goal("pure Python, session of one message (`sess1`)", "HAProxy", "sess1", 1.19, judged="python"),
)

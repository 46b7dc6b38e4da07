"""What etc/monitoring holds, as data: the alerts with their expressions, the dashboard's queries."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from tests.program import ROOT

FOLDER = ROOT / "etc" / "monitoring"
RULES = FOLDER / "greenarrow_proxy.rules.yml"
RULE_TESTS = ROOT / "tests" / "interop" / "greenarrow_proxy.rules.test.yml"
DASHBOARD = FOLDER / "grafana-dashboard.json"

_ALERT = re.compile(r"^ +- alert: (\w+)\n +expr: (.+)\n((?: {8,}.*\n)+)", re.MULTILINE)
_SELECTOR = re.compile(r"\b(?:greenarrow_proxy|process)_\w+(?:\{[^}]*\})?")


class Alert(NamedTuple):
    """One alert; `about`: the text of its other fields."""

    name: str
    expression: str
    about: str


class Query(NamedTuple):
    """One query of the dashboard, and the labels that its legend shows."""

    panel: str
    expression: str
    legend: list[str]


def alerts() -> list[Alert]:
    """Those of the rules file."""
    text = RULES.read_text()
    found = [Alert(*match) for match in _ALERT.findall(text)]
    assert len(found) == text.count("- alert:")
    return found


def queries(interval: str = "5m") -> list[Query]:
    """Those of the dashboard, with its variables filled in as "all proxies"."""
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", interval).replace("$proxy", ".*")
            assert "$" not in expression
            found.append(Query(panel["title"], expression, re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])))
    return found


def selectors(expression: str) -> list[str]:
    """The metrics of ours in an expression, with what chooses among their series."""
    return _SELECTOR.findall(expression)

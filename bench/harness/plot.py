"""One picture of the run: each workload's leading figure as a ratio to its baseline. Plain SVG, no library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from harness import analysis
from harness.candidates import CANDIDATES
from harness.workloads import WORKLOADS

_ROW, _BAR, _LEFT, _WIDTH, _SCALE_END = 17, 12, 330, 420, 3.0
_OURS, _BASE, _OTHERS = "#2e8540", "#777777", "#9db7d5"


def _colour(name: str, baseline: str) -> str:
    if name.startswith("greenarrow"):
        return _OURS
    return _BASE if name == baseline else _OTHERS


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _bar(y: float, name: str, baseline: str, figure: analysis.Figure) -> list[str]:
    """The bar, a whisker from the lowest to the highest round, and the figure beside it."""

    def place(value: float) -> float:
        return _LEFT + min(value, _SCALE_END) / _SCALE_END * _WIDTH

    middle = y + _BAR / 2
    beyond = " →" if figure.median > _SCALE_END else ""
    return [
        _text(_LEFT - 6, y + 10, CANDIDATES[name].title if name in CANDIDATES else name, "end"),
        f'<rect x="{_LEFT}" y="{y:.0f}" width="{place(figure.median) - _LEFT:.0f}" height="{_BAR}" '
        f'fill="{_colour(name, baseline)}"/>',
        f'<line x1="{place(figure.low):.0f}" x2="{place(figure.high):.0f}" y1="{middle:.0f}" y2="{middle:.0f}" '
        'stroke="#222222"/>',
        _text(place(max(figure.median, min(figure.high, _SCALE_END))) + 5, y + 10, f"{figure.median:.2f}{beyond}"),
    ]


def svg(blocks: Mapping[str, Any]) -> str:
    parts: list[str] = []
    y = 40.0
    for workload in (WORKLOADS[name] for name in WORKLOADS if name in blocks):
        block, lead = blocks[workload.name], workload.metrics[0]
        baseline = block["baseline"]
        figures = [(who, analysis.ratio(block["rounds"], who, baseline, lead.key)) for who in block["candidates"]]
        shown = [(who, figure) for who, figure in figures if figure]
        if not shown:
            continue
        parts.append(_text(10, y + 10, f"{workload.name}: {lead.title}", weight="bold"))
        y += _ROW
        for who, figure in shown:
            parts += _bar(y, who, baseline, figure)
            y += _ROW
        y += 8
    one = _LEFT + _WIDTH / _SCALE_END
    head = _text(
        10, 20, "Relative to the grey bar of each group; shorter is better. Whiskers: lowest to highest round."
    )
    rule = f'<line x1="{one:.0f}" x2="{one:.0f}" y1="30" y2="{y:.0f}" stroke="#bbbbbb" stroke-dasharray="3 3"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 70}" height="{y + 10:.0f}" '
        'font-family="sans-serif" font-size="11">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join([head, rule, *parts]) + "\n</svg>\n"
    )

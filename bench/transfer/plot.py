"""The table as a picture: GB/s of every medium against its raw copy, and shares of raw against the goals, as SVG.

Drawn by hand: the project has no plotting library, and a picture of twenty lines needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.transfer.table import Kind, Medium, Row

WIDTH, HEIGHT = 1180, 750
_LEFT, _TOP, _GAP = 80, 90, 34
_PANEL_HEIGHT = 250
_ROW_GAP = 80
_COLOURS = {Medium.NIXL: "#c0392b", Medium.SHM: "#1e8449", Medium.GRPC: "#1f618d"}
_DASHES = {Kind.RAW: "7 4", Kind.FRAGMENTED: "2 3"}
_GOAL_LINE = ("#e59866", "10 4")
_MOST_SHARE = 140
_GOALS = (80, 60)


@dataclass(frozen=True, slots=True)
class _Panel:
    """A frame with its axes; `most` is the top of the y axis, x counts blocks in powers of two."""

    left: float
    top: float
    width: float
    most: float
    most_blocks: int

    @property
    def bottom(self) -> float:
        return self.top + _PANEL_HEIGHT

    def x(self, num_blocks: int) -> float:
        return self.left + 12 + math.log2(num_blocks) / max(1.0, math.log2(self.most_blocks)) * (self.width - 24)

    def y(self, value: float) -> float:
        return self.bottom - min(value, self.most) / self.most * _PANEL_HEIGHT


def svg(rows: Sequence[Row]) -> str:
    """A column for each shape: GB/s above, shares of raw below."""
    shapes = list(dict.fromkeys((row.shape, row.block_bytes) for row in rows))
    width = (WIDTH - _LEFT - 20 - _GAP * (len(shapes) - 1)) / len(shapes)
    moved = [row for row in rows if row.kind in (Kind.RAW, Kind.BLOCKS, Kind.FRAGMENTED)]
    most = _round_up(max(row.gb_per_s for row in moved))
    most_blocks = max(row.num_blocks for row in moved)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(_LEFT, 30, "How KV blocks move between two processes of one machine", size=18),
        *_legend(56),
    ]
    for number, (name, block_bytes) in enumerate(shapes):
        of_shape = [row for row in moved if row.shape == name]
        left = _LEFT + number * (width + _GAP)
        is_first = number == 0
        above = _Panel(left, _TOP + 20, width, most, most_blocks)
        title = f"{name}: blocks of {block_bytes / 2**20:.2f} MiB"
        parts += _frame(above, title, "GB/s" if is_first else "", _steps(most), is_first)
        parts += _lines(above, of_shape, (Kind.RAW, Kind.BLOCKS, Kind.FRAGMENTED), lambda row: row.gb_per_s)
        below = _Panel(left, above.bottom + _ROW_GAP, width, _MOST_SHARE, most_blocks)
        parts += _frame(
            below,
            f"share of raw, at most {_MOST_SHARE} %",
            "%" if is_first else "",
            range(0, _MOST_SHARE + 1, 20),
            is_first,
        )
        parts += _goals(below)
        parts += _lines(below, of_shape, (Kind.BLOCKS, Kind.FRAGMENTED), lambda row: 100 * (row.ratio or 0.0))
    return "\n".join([*parts, "</svg>", ""])


def _legend(y: float) -> list[str]:
    entries = [(medium.value, _COLOURS[medium], "") for medium in Medium]
    entries += [("neighbouring blocks", "#555", ""), ("no two neighbours", "#555", _DASHES[Kind.FRAGMENTED])]
    entries += [("raw copy, same medium", "#555", _DASHES[Kind.RAW])]
    entries += [("nixl's goals", *_GOAL_LINE)]
    parts: list[str] = []
    x: float = _LEFT
    for label, colour, dash in entries:
        parts.append(_stroke([(x, y - 4), (x + 34, y - 4)], colour, dash))
        parts.append(_text(x + 40, y, label))
        x += 62 + 7.2 * len(label)
    return parts


def _frame(panel: _Panel, title: str, unit: str, steps: Sequence[float], has_labels: bool) -> list[str]:
    right = panel.left + panel.width
    parts = [
        f'<rect x="{panel.left:.1f}" y="{panel.top}" width="{panel.width:.1f}" height="{_PANEL_HEIGHT}" fill="none" '
        'stroke="#999"/>',
        _text(panel.left + panel.width / 2, panel.top - 8, title, anchor="middle", size=14),
        _text(panel.left + panel.width / 2, panel.bottom + 38, "blocks in one hand-over", anchor="middle"),
    ]
    for step in steps:
        parts.append(_stroke([(panel.left, panel.y(step)), (right, panel.y(step))], "#e5e5e5"))
        if has_labels:
            parts.append(_text(panel.left - 8, panel.y(step) + 4, f"{step:g}", anchor="end"))
    for power in range(0, round(math.log2(panel.most_blocks)) + 1, 2):
        x = panel.x(2**power)
        parts.append(_stroke([(x, panel.bottom), (x, panel.bottom + 5)], "#999"))
        parts.append(_text(x, panel.bottom + 19, f"{2**power:,}", anchor="middle"))
    if unit:
        parts.append(_text(panel.left - 8, panel.top - 16, unit, anchor="end"))
    return parts


def _goals(panel: _Panel) -> list[str]:
    levels = [panel.y(share) for share in _GOALS]
    return [_stroke([(panel.left, y), (panel.left + panel.width, y)], *_GOAL_LINE) for y in levels]


def _lines(panel: _Panel, rows: Sequence[Row], kinds: Sequence[Kind], value: Callable[[Row], float]) -> list[str]:
    parts: list[str] = []
    for medium in Medium:
        for kind in kinds:
            points = sorted(
                (panel.x(row.num_blocks), panel.y(value(row)))
                for row in rows
                if (row.medium, row.kind) == (medium, kind)
            )
            if not points:
                continue
            parts.append(_stroke(points, _COLOURS[medium], _DASHES.get(kind, ""), 2.0 if kind is Kind.BLOCKS else 1.4))
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{_COLOURS[medium]}"/>' for x, y in points]
    return parts


def _stroke(points: Sequence[tuple[float, float]], colour: str, dash: str = "", width: float = 1.4) -> str:
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 13, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def _round_up(value: float) -> float:
    """To a number with few steps below it."""
    step = 10 ** math.floor(math.log10(value))
    return math.ceil(value / step) * step


def _steps(most: float) -> list[float]:
    step = 10 ** math.floor(math.log10(most))
    if most / step < 4:
        step /= 2
    return [number * step for number in range(round(most / step) + 1)]

"""Line charts as inline SVG: a few kilobytes each, in the colours of the page, with a sentence for screen readers.

Our own, since matplotlib (an extra) writes three to four times as much for the same picture, in fixed colours, and what
draws in the browser needs a script of its own in every page (eval/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 10, 38  # margins
FAR = 30  # times the median: values beyond make the axis logarithmic
PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """A line of a chart; NaN in `y` is a gap. `low` and `high` are the ends of a band around it."""

    name: str
    x: Points
    y: Points
    colour: int = 0
    low: Points | None = None
    high: Points | None = None
    style: str = ""  # dots, or area: down to the axis


def chart(title: str, lines: Sequence[Line], x_name: str, y_name: str, from_zero: bool = False) -> str:
    """A figure with its title; empty if no line has a point."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    y_all = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    is_log = bool(y_all.min() > 0 and y_all.max() > FAR * np.median(y_all) and not from_zero)
    x_axis = Axis.over(np.concatenate([line.x for line in lines]), False, LEFT, WIDTH - RIGHT, tight=True)
    y_axis = Axis.over(np.append(y_all, 0.0) if from_zero else y_all, is_log, HEIGHT - BOTTOM, TOP)
    parts = [*grid(x_axis, y_axis, x_name, f"{y_name}{' (logarithmic)' if is_log else ''}")]
    frame = f"{LEFT} {TOP - 2} {WIDTH - LEFT - RIGHT + 4} {HEIGHT - TOP - BOTTOM + 4}"  # cuts off what lies beyond
    left, top, width, height = frame.split()
    parts.append(f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{frame}">')
    for line in lines:
        parts += drawn(line, x_axis, y_axis)
    body = "".join([*parts, "</svg>"])
    said = f"{title}. " + "; ".join(map(in_words, lines))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(said)}">{body}</svg>{legend(lines)}</figure>'
    )


@dataclass(frozen=True)
class Axis:
    """Places values between two ends of the picture."""

    low: float
    high: float
    is_log: bool
    start: float
    end: float

    @staticmethod
    def over(values: Points, is_log: bool, start: float, end: float, tight: bool = False) -> Axis:
        finite = values[np.isfinite(values)]
        low, high = float(finite.min()), float(finite.max())
        if is_log:
            low, high = math.log10(low), math.log10(high)
        room = 0.0 if tight else (high - low) / 20
        room = room if low < high else abs(low) / 10 or 1.0
        return Axis(low - room if low or tight else low, high + room, is_log, start, end)

    def place(self, values: Points) -> Points:
        if self.is_log:
            values = np.log10(np.maximum(values, 1e-300))
        found: Points = self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)
        return found

    def ticks(self, number: int) -> list[float]:
        if self.is_log:
            first, last = math.ceil(self.low), math.floor(self.high)
            step = max(1, (last - first) // number + 1)
            if last - first >= 1:
                return [10.0**power for power in range(first, last + 1, step)]
            return [10.0**power for power in np.linspace(self.low, self.high, 4)]
        rough = (self.high - self.low) / number
        size = 10.0 ** math.floor(math.log10(rough))
        step_size = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step_size - 1e-9)
        found = [index * step_size for index in range(first, first + 3 * number)]
        return [tick for tick in found if tick <= self.high + 1e-9 * step_size]


def grid(x_axis: Axis, y_axis: Axis, x_name: str, y_name: str) -> list[str]:
    parts = []
    for tick in y_axis.ticks(4):
        y = float(y_axis.place(np.array(tick)))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    ticks = x_axis.ticks(4)
    for tick in ticks:
        x = float(x_axis.place(np.array(tick)))
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{short(tick)}</text>')
    parts.append(f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
                 f"{escape(x_name)}</text>")  # fmt: skip
    parts.append(f'<text class="name" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{escape(y_name)}</text>')  # fmt: skip
    return parts


def drawn(line: Line, x_axis: Axis, y_axis: Axis) -> list[str]:
    x, y = x_axis.place(line.x), y_axis.place(line.y)
    colour, parts = f"c{line.colour}", []
    floor = max(y_axis.start, y_axis.end)
    if line.low is not None and line.high is not None:
        low, high = (np.clip(y_axis.place(edge), -HEIGHT, 2 * HEIGHT) for edge in (line.low, line.high))
        parts.append(f'<path class="band {colour}" d="{band(x, low, high)}"/>')
    if line.style == "area":
        parts.append(f'<path class="area {colour}" d="{band(x, np.full_like(y, floor), y)}"/>')
    elif line.style == "dots":
        parts.append(f'<path class="line dashed {colour}" d="{path(x, y)}"/>')
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True) if math.isfinite(b))
        parts.append(f'<path class="dot {colour}" d="{dots}"/>')
    else:
        lone = "h0" if np.isfinite(y).sum() == 1 else ""
        parts.append(f'<path class="line {colour}" d="{path(x, y)}{lone}"/>')
    return parts


def path(x: Points, y: Points) -> str:
    """A line through the points, with gaps where `y` is NaN."""
    parts, draws = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(b):
            parts.append(f"{'L' if draws else 'M'}{a:.1f} {b:.1f}")
        draws = math.isfinite(b)
    return "".join(parts)


def band(x: Points, low: Points, high: Points) -> str:
    """The areas between two lines, one for each stretch without a gap."""
    there = np.isfinite(low) & np.isfinite(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(int), [0]])))
    parts = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        parts.append(path(x[start:end], high[start:end]))
        parts.append(path(x[start:end][::-1], low[start:end][::-1]).replace("M", "L", 1) + "Z")
    return "".join(parts)


def legend(lines: Sequence[Line]) -> str:
    """The names of the lines, unless there is one."""
    if len(lines) < 2:
        return ""
    items = "".join(
        f'<li><i class="{line.style or "line"} c{line.colour}"></i>{escape(line.name)}</li>' for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def in_words(line: Line) -> str:
    there = np.flatnonzero(np.isfinite(line.y))
    first, last = line.y[there[0]], line.y[there[-1]]
    lowest, highest = line.y[there].min(), line.y[there].max()
    return f"{line.name}: {first:.4g} at first, {last:.4g} at last, from {lowest:.4g} to {highest:.4g} on the way"


def short(value: float) -> str:
    """`0.0003` as `3e-4`, `1500` as `1.5k`."""
    size = abs(value)
    if size and size < 1e-3:
        mantissa, _, power = f"{value:.3g}".partition("e") if "e" in f"{value:.3g}" else (f"{value:.1e}").partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    for limit, prefix in PREFIXES:
        if size >= limit:
            return f"{value / limit:.3g}{prefix}"
    return f"{value:.3g}"


def grid_of_steps(axis: Axis, height: int) -> str:
    """The ticks of an axis of steps below a picture of this height."""
    parts = []
    for tick in axis.ticks(4):
        x = float(axis.place(np.array(tick)))
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 16}" text-anchor="{anchor}">{short(tick)}</text>')
    parts.append(
        f'<text class="name" x="{(axis.start + axis.end) / 2}" y="{height - 2}" text-anchor="middle">step</text>'
    )
    return "".join(parts)

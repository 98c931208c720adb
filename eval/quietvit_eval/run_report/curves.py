"""Curves over the steps of a run as inline SVG, drawn with the page's own colours.

Thousands of points are thinned to `BUCKETS`: in each the least and the greatest value make a band and the mean a line,
so that no spike is lost. Nothing is smoothed beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float

from quietvit_eval.run_report.folder import Values

BUCKETS = 120  # ours: about as many as a chart has pixels on a telephone, halved
CELLS = 40  # columns of a map (ours)
WIDTH, HEIGHT = 320, 190  # user units; text is 11 high
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 24
DASHES = 5  # kinds of lines that the page's style tells apart, by colour and by dashes


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    steps: Values
    values: Values  # nan: there was none


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    title: str
    caption: str
    svg: str
    legend: tuple[str, ...] = ()  # names of lines, in the order of the style's kinds


@dataclass(frozen=True)
class Thinned:
    """A curve with at most so many points."""

    steps: Values
    mean: Values
    low: Values
    high: Values

    @property
    def is_whole(self) -> bool:
        """Whether every point is there as it was."""
        return bool((self.low == self.high).all())


def thin(steps: Values, values: Values, buckets: int = BUCKETS) -> Thinned:
    """Mean, least and greatest of the finite values in equal stretches of steps; every point where they are few."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= buckets:
        return Thinned(steps, values, values, values)
    place = ((steps - steps[0]) / (steps[-1] - steps[0]) * buckets).astype(int).clip(0, buckets - 1)
    groups = [place == b for b in np.unique(place)]
    low, high = (np.array([f(values[g]) for g in groups]) for f in (np.min, np.max))
    # The mean of equal numbers may differ from them by a rounding error.
    mean = np.array([values[g].mean() for g in groups]).clip(low, high)
    return Thinned(np.array([steps[g].mean() for g in groups]), mean, low, high)


def draw(
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    limits: Sequence[tuple[str, float]] = (),
    from_zero: bool = False,
    unit: str = "",
    steps: int = 1,
) -> Chart | None:
    """Lines over steps, and `limits` as dashed levels with a name; None if no line has a finite value.

    `from_zero`: the axis holds zero too. `steps`: the axis of steps reaches from 0 so far at least, so that charts of
    one run stand under each other.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    thinned = [thin(line.steps, line.values) for line in lines]
    ends = [*(t.low.min() for t in thinned), *(t.high.max() for t in thinned), *(value for _, value in limits)]
    frame = _Frame.around(
        max(float(steps), *(float(t.steps[-1]) for t in thinned)),
        min(0.0, *ends) if from_zero else min(ends),
        max(0.0, *ends) if from_zero else max(ends),
        headroom=0.16 if limits else 0.06,  # for the name of the highest level
    )
    parts = [*frame.axes()]
    for name, value in limits:
        y = frame.y(value)
        parts.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(WIDTH - RIGHT, y - 4, name, "end"))
    for kind, line in enumerate(thinned):
        parts += _curve(frame, line, kind % DASHES)
    said = "; ".join(_told(line, unit) for line in lines)
    return Chart(title, caption, _svg(f"{title}. {said}", parts), tuple(line.name for line in lines if len(lines) > 1))


def draw_map(title: str, caption: str, steps: Values, rows: Float[np.ndarray, "L n"], *, unit: str = "") -> Chart:
    """Values from 0 on as the strength of cells: a row for each block, the first below, columns in order of steps.

    More than `CELLS` readings: neighbours share a column, of which the greatest is shown.
    """
    groups = np.array_split(np.arange(len(steps)), min(CELLS, len(steps)))
    shown = np.stack([np.nanmax(np.nan_to_num(rows[:, g]), axis=1) for g in groups], axis=1)
    most, blocks = float(shown.max()), len(rows)
    width, height = (WIDTH - LEFT - RIGHT) / len(groups), (HEIGHT - TOP - BOTTOM) / blocks
    parts = [
        f'<rect class="field" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    ]
    for block, column in zip(*np.nonzero(shown), strict=True):
        x, y = LEFT + column * width, HEIGHT - BOTTOM - (block + 1) * height
        strength = 0.15 + 0.85 * shown[block, column] / most
        parts.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill-opacity="{strength:.2f}" shape-rendering="crispEdges"/>'
        )
    for block in range(0, blocks, -(-blocks // 12)):
        parts.append(_text(LEFT - 5, HEIGHT - BOTTOM - (block + 0.5) * height + 4, str(block), "end"))
    parts.append(_text(LEFT, HEIGHT - 8, f"step {short_number(steps[0])}", "start"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 8, short_number(steps[-1]), "end"))
    told = ", ".join(f"block {b} up to {short_number(row.max())}{unit}" for b, row in enumerate(shown) if row.max() > 0)
    return Chart(title, caption, _svg(f"{title}. {told or 'none in any block'}", parts))


def short_number(value: float) -> str:
    """A number for an axis: 25k, 1.2M, 0.004, 1e-06."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10, 20) if math.floor(high / (m * step)) - math.ceil(low / (m * step)) < most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    """From steps and values to the chart's units."""

    final: float  # step; the first is 0
    low: float
    high: float

    @classmethod
    def around(cls, final: float, low: float, high: float, *, headroom: float = 0.06) -> _Frame:
        spread = high - low or abs(high) or 1.0
        return cls(max(final, 1.0), low if low == 0 else low - 0.06 * spread, high + headroom * spread)

    def x(self, step: float) -> float:
        return LEFT + step / self.final * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> list[str]:
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 5, y + 4, short_number(value), "end"))
        marks = [t for t in ticks(0, self.final, 4) if t == int(t)]
        for i, step in enumerate(marks):
            x = self.x(step)
            parts.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
            side = "end" if x > WIDTH - RIGHT - 20 else "middle"
            parts.append(_text(x, HEIGHT - 8, ("step " if not i else "") + short_number(step), side))
        return parts


def _curve(frame: _Frame, line: Thinned, kind: int) -> list[str]:
    points = [f"{frame.x(s):.1f} {frame.y(v):.1f}" for s, v in zip(line.steps, line.mean, strict=True)]
    parts = []
    if not line.is_whole:
        upper = [f"{frame.x(s):.1f} {frame.y(v):.1f}" for s, v in zip(line.steps, line.high, strict=True)]
        lower = [f"{frame.x(s):.1f} {frame.y(v):.1f}" for s, v in zip(line.steps, line.low, strict=True)]
        parts.append(f'<path class="band k{kind}" d="M{"L".join([*upper, *reversed(lower)])}Z"/>')
    if len(points) > 1:
        parts.append(f'<path class="line k{kind}" d="M{"L".join(points)}"/>')
    if len(points) <= 25:  # few enough to be seen one by one
        parts += [f'<circle class="dot k{kind}" cx="{p.split()[0]}" cy="{p.split()[1]}" r="2.5"/>' for p in points]
    return parts


def _told(line: Line, unit: str) -> str:
    finite = np.isfinite(line.values)
    steps, values = line.steps[finite], line.values[finite]
    absent = f", no finite value at {int((~finite).sum())} steps" if not finite.all() else ""
    begin, end, low, high = (f"{short_number(v)}{unit}" for v in (values[0], values[-1], values.min(), values.max()))
    ends = f"{begin} at step {steps[0]:.0f}, {end} at step {steps[-1]:.0f}"
    return f"{line.name}: {ends}, least {low}, greatest {high}{absent}"


def _text(x: float, y: float, text: str, side: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{side}">{escape(text)}</text>'


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'

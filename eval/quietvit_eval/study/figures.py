"""The figures of a study: each as PNG and SVG files, and as an SVG that takes the page's own colour of text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quietvit.files import write_atomically, write_text
from quietvit_eval.inspect.layers import SHOWN_PER_OCTAVE
from quietvit_eval.inspect.plots import CLS, HIGH, PATCHES, REGISTERS
from quietvit_eval.page_charts import INK, for_html, new_axes
from quietvit_eval.report import unit_of
from quietvit_eval.study.results import Cell, Entry, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DPI = 150
SEED_COLOURS = ("#d0862c", "#3f9b6c", "#8a63c9", "#cf4a3f", "#7d8790")  # ours; seen on white and on black paper
SIZE = (4.2, 2.8)  # inches; text is then read on a phone
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One picture with what to know when looking at it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str  # a file
    html: str  # an element of the page

    def write(self, folder: Path) -> None:
        """`<name>.png` and `<name>.svg`, atomically. Raises OSError as the file system does."""
        write_atomically(folder / f"{self.name}.png", lambda temporary: temporary.write_bytes(self.png))
        write_text(folder / f"{self.name}.svg", self.svg)


# ---- norms


@dataclass(frozen=True)
class Histogram:
    """Shares of tokens by bin of log2 norm, over the models of one arm; `first` is the number of the first bin."""

    first: int
    patches: np.ndarray
    cls: np.ndarray
    registers: np.ndarray  # over all registers; all 0 without


def pooled(looks: Sequence[Tree]) -> Histogram:
    """Histograms of several looks added up: bins are the same everywhere, but each look has only those in use."""
    firsts = [_bin(look["norms"]["edges"][0]) for look in looks]
    lasts = [first + len(look["norms"]["patches"]) for first, look in zip(firsts, looks, strict=True)]
    first, bins = min(firsts), max(lasts) - min(firsts)
    sums = {kind: np.zeros(bins) for kind in ("patches", "cls", "registers")}
    for start, look in zip(firsts, looks, strict=True):
        norms = look["norms"]
        counts = {"patches": [norms["patches"]], "cls": [norms["cls"]], "registers": norms["registers"]}
        for kind, rows in counts.items():
            for row in rows:
                sums[kind][start - first : start - first + len(row)] += np.asarray(row, dtype=float)
    return Histogram(first, *(sums[kind] / max(1.0, sums[kind].sum()) for kind in ("patches", "cls", "registers")))


def _bin(edge: float) -> int:
    return round(float(np.log2(edge)) * SHOWN_PER_OCTAVE)


def norm_figures(entries: Sequence[Entry]) -> list[Figure]:
    """Norms after the last block, a figure for each arm, all on one scale (registers paper, Figure 7)."""
    arms: dict[str, list[Tree]] = {}
    for entry in entries:
        if entry.look is not None and entry.look["norms"]["edges"]:
            arms.setdefault(entry.arm, []).append(entry.look)
    histograms = {arm: pooled(looks) for arm, looks in arms.items()}
    if not histograms:
        return []
    first = min(h.first for h in histograms.values())
    last = max(h.first + len(h.patches) for h in histograms.values())
    least = min(float(v[v > 0].min()) for h in histograms.values() for v in (h.patches, h.cls, h.registers) if v.any())
    registers = {entry.arm: entry.registers for entry in entries}
    figures = []
    for number, (arm, histogram) in enumerate(histograms.items()):
        canvas, axes = new_axes("norm of the token", "share of its kind", size=SIZE)
        edges = (histogram.first + np.arange(len(histogram.patches) + 1)) / SHOWN_PER_OCTAVE
        kinds = (("patches", PATCHES, "patches"), ("cls", CLS, "[CLS]"), ("registers", REGISTERS, "registers"))
        for kind, colour, label in kinds:
            shares = getattr(histogram, kind)
            if shares.any():
                fill = kind == "patches"
                axes.stairs(
                    shares, edges, color=colour, fill=fill, alpha=0.7 if fill else 1, linewidth=1.4, label=label
                )
        axes.set_yscale("log")
        axes.set_ylim(least / 2, 2)
        axes.set_xlim(first / SHOWN_PER_OCTAVE, last / SHOWN_PER_OCTAVE)
        _norm_ticks(axes, first / SHOWN_PER_OCTAVE, last / SHOWN_PER_OCTAVE)
        _legend(axes)
        title, models = _arm_title(arm, registers[arm]), len(arms[arm])
        caption = f"{models} model{'s' if models > 1 else ''}."
        figures.append(_figure(f"norms_{_slug(arm, number)}", title, caption, canvas))
    return figures


def _norm_ticks(axes: Axes, low: float, high: float) -> None:
    steps = (1, 1.5, 2, 3, 5, 7) if high - low < 3 else (1, 2, 5) if high - low < 8 else (1,)
    values = [m * 10.0**e for e in range(-6, 9) for m in steps]
    values = [v for v in values if low <= np.log2(v) <= high]
    axes.set_xticks(np.log2(values), [f"{v:g}" for v in values])


# ---- scores


def score_figures(measures: Sequence[Measure]) -> list[tuple[Figure, Figure | None]]:
    """For each measure its scores by number of registers, and the paired differences to none."""
    return [(_scores(m, number), _differences(m, number)) for number, m in enumerate(measures)]


def _scores(measure: Measure, number: int) -> Figure:
    unit = unit_of(measure.score)
    cells = [c for c in measure.cells if c.registers is not None]
    canvas, axes = new_axes("registers", _unit_title(measure), size=SIZE)
    at = np.arange(len(cells))
    for place, seed in enumerate(sorted({s for c in cells for s in c.by_seed})):
        values = [unit.factor * c.by_seed.get(seed, np.nan) for c in cells]
        axes.plot(at, values, color=_seed_colour(place), marker="o", markersize=4, linewidth=0.8, label=f"seed {seed}")
    _bars(axes, at, [unit.factor * np.array([c.interval.mean, *_bounds(c.interval)]) for c in cells])
    control = [v for by_seed in measure.control.values() for v in by_seed.values()]
    if control:
        axes.axhline(unit.factor * float(np.mean(control)), color=HIGH, linestyle=":", linewidth=1.2,
                     label="before training")  # fmt: skip
    _registers_axis(axes, cells)
    _legend(axes)
    better = "Higher" if measure.higher_is_better else "Lower"
    caption = f"{better} is better. Bars: mean and 95 % interval over seeds (Student's t), cut off where they are wide."
    _cut(axes, [unit.factor * v for c in cells for v in c.by_seed.values()] + [unit.factor * v for v in control])
    return _figure(f"scores_{number}", measure.title, caption, canvas)


def _differences(measure: Measure, number: int) -> Figure | None:
    unit = unit_of(measure.score)
    cells = [c for c in measure.cells if c.registers and c.difference is not None]
    if not cells:
        return None
    name = "points" if unit.name == "%" else unit.name
    canvas, axes = new_axes("registers", f"difference to none{f', {name}' if name else ''}", size=SIZE)
    at = np.arange(len(cells))
    for place, seed in enumerate(sorted({s for c in measure.cells for s in c.by_seed})):
        values = [unit.factor * c.differences.get(seed, np.nan) for c in cells]
        axes.plot(
            at, values, color=_seed_colour(place), marker="o", markersize=4, linestyle="none", label=f"seed {seed}"
        )
    intervals = [c.difference for c in cells if c.difference is not None]
    _bars(axes, at, [unit.factor * np.array([i.mean, *_bounds(i)]) for i in intervals])
    axes.axhline(0, color=INK, linewidth=0.8, linestyle="--")
    _registers_axis(axes, cells)
    _legend(axes)
    _cut(axes, [0.0, *(unit.factor * v for c in cells for v in c.differences.values())])
    caption = "Each seed against itself without registers. Bars: mean and 95 % interval, cut off where they are wide."
    return _figure(f"differences_{number}", f"{measure.title}: difference to no registers", caption, canvas)


def _bounds(interval: Any) -> tuple[float, float]:
    return (np.nan, np.nan) if interval.low is None else (interval.low, interval.high)


def _bars(axes: Axes, at: np.ndarray, rows: Sequence[np.ndarray]) -> None:
    """Mean, low, high of each place, to the right of the seeds' points."""
    mean, low, high = np.array(rows).T
    axes.errorbar(at + 0.18, mean, yerr=np.nan_to_num(np.stack([mean - low, high - mean])), fmt="_", color=PATCHES,
                  markersize=11, markeredgewidth=2, elinewidth=1.6, capsize=0, label="mean, 95 %")  # fmt: skip


def _cut(axes: Axes, values: Sequence[float]) -> None:
    """An axis that shows all points: intervals of few seeds would leave them no room."""
    low, high = min(values), max(values)
    room = 0.6 * (high - low) or max(abs(high) * 0.05, 1e-6)
    axes.set_ylim(low - room, high + room)


def _registers_axis(axes: Axes, cells: Sequence[Cell]) -> None:
    axes.set_xticks(np.arange(len(cells)), [str(c.registers) for c in cells])
    axes.set_xlim(-0.4, len(cells) - 0.4)


def _unit_title(measure: Measure) -> str:
    unit = unit_of(measure.score).name
    return f"{measure.score}{f', {unit}' if unit else ''}"


# ---- cost


def cost_figure(cost: Tree) -> Figure:
    """Multiply-adds and, where steps were timed, their seconds and memory, over those without registers."""
    rows = cost["counts"]
    at = [row["registers"] for row in rows]
    canvas, axes = new_axes("registers", "times none", size=SIZE)
    axes.plot(at, [r["macs_over_0"] for r in rows], color=PATCHES, marker="o", markersize=4, label="MACs, image")
    axes.plot(at, [r["formula_over_0"] for r in rows], color=INK, linestyle=":", linewidth=1.2, label="the formula")
    axes.plot(at, [r["train_macs_over_0"] for r in rows], color=CLS, marker="o", markersize=4, label="MACs, step")
    if (measured := cost.get("measured")) is not None and measured["against"] == 0:
        timed = measured["counts"]
        where = [r["registers"] for r in timed]
        axes.plot(
            where, [r["ratio"]["median"] for r in timed], color=HIGH, marker="s", markersize=4, label="time, step"
        )
        base = timed[where.index(0)]["peak_mib"]
        axes.plot(where, [r["peak_mib"] / base for r in timed], color=REGISTERS, marker="s", markersize=4,
                  label="memory, step")  # fmt: skip
    axes.set_xticks(at, [str(a) for a in at])
    _legend(axes)
    caption = "All over the same without registers. Image: at the size it is scored at; step: all crops of training."
    return _figure("cost", "Cost by number of registers", caption, canvas)


# ---- parts


def _seed_colour(place: int) -> str:
    return SEED_COLOURS[place % len(SEED_COLOURS)]


def _slug(arm: str, number: int) -> str:
    return arm if arm.isdigit() else f"retrofit_{number}"


def _arm_title(arm: str, registers: int | None) -> str:
    return arm if registers is None else f"{registers} register{'s' if registers != 1 else ''}"


def _legend(axes: Axes) -> None:
    """Above the axes, where no interval runs through it."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _figure(name: str, title: str, caption: str, canvas: Canvas) -> Figure:
    from matplotlib import rc_context

    png, svg = io.BytesIO(), io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        canvas.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        canvas.set_layout_engine("none")  # the first has laid it out
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Figure(name, title, caption, png.getvalue(), svg.getvalue(), for_html(svg.getvalue()))

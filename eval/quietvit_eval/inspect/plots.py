"""Pictures of an inspection: each as a PNG file, and as an SVG that takes the page's own colour of text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quietvit.files import write_atomically
from quietvit_eval.page_charts import INK, for_html, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from quietvit_eval.inspect.artifacts import Example

PATCHES, CLS, REGISTERS, HIGH = "#2f7fc1", "#d0862c", "#3f9b6c", "#cf4a3f"  # ours; seen on white and on black paper
MANY = ("#2f7fc1", "#d0862c", "#3f9b6c", "#cf4a3f", "#8a63c9", "#7d8790")  # of models
DPI = 150
SIZE = (4.4, 3.0)  # inches

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """One picture. `model` is the key of the model it is about; None: all of them."""

    name: str
    model: str | None
    title: str
    caption: str
    png: bytes
    svg: str

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.name}.png" if self.model is None else f"{self.model}_{self.name}.png"

    def write(self, folder: Path) -> None:
        """Its PNG, atomically."""
        write_atomically(folder / self.file, lambda temporary: temporary.write_bytes(self.png))


def draw_all(result: Tree, examples: Sequence[Sequence[Example]]) -> list[Chart]:
    """The pictures that the result has figures for; `examples` are those of each model, in order."""
    charts = []
    for model, shown in zip(result["models"], examples, strict=True):
        charts += [_norms(model), _modes(model), _map(model)]
        if "skipped" not in model["neighbours"]:
            charts.append(_neighbours(model))
        charts.append(_examples(model, shown))
        charts += _over_time(model)
    charts.append(_shares(result["models"]))
    return charts


def _norms(model: Tree) -> Chart:
    """Layer x log norm."""
    from matplotlib.colors import to_rgb

    blocks, edges = [layer["block"] for layer in model["layers"]], model["norms"]["edges"]
    counts = np.array(model["norms"]["patches"], dtype=float)  # [L, bins]
    most = np.maximum(counts.max(axis=1, keepdims=True), 1)
    alpha = np.log1p(counts) / np.log1p(most)
    figure, axes = new_axes("block", "norm of the token", size=SIZE)
    colour = np.concatenate([np.broadcast_to(to_rgb(PATCHES), (*alpha.shape, 3)), alpha[..., None]], axis=-1)
    axes.imshow(
        colour.transpose(1, 0, 2), origin="lower", aspect="auto", interpolation="nearest",
        extent=(-0.5, len(blocks) - 0.5, np.log10(edges[0]), np.log10(edges[-1])),
    )  # fmt: skip
    places = np.arange(len(blocks))
    axes.plot(places, _log([layer["cls"]["median"] for layer in model["layers"]]), color=CLS, label="[CLS], median")
    registers = np.array([[r["median"] for r in layer["registers"]] for layer in model["layers"]], dtype=float)
    for number in range(registers.shape[1]):
        label = "registers, median of each" if number == 0 else None
        axes.plot(places, np.log10(registers[:, number]), color=REGISTERS, linewidth=1, label=label)
    cut = [layer["patches"]["cutoff"] if layer["patches"]["kind"] == "outliers" else None for layer in model["layers"]]
    if any(value is not None for value in cut):
        axes.plot(places, _log(cut), color=HIGH, marker="_", linestyle="none", markersize=9, label="cutoff")
    step = -(-len(blocks) // 12)
    axes.set_xticks(places[::step], [str(b) for b in blocks[::step]])
    _decades(axes, edges)
    _legend(axes)
    caption = (
        "Norms of patch tokens after every block, before the final norm; the stronger the colour, the more tokens "
        "(logarithm of the count, each block by itself)."
    )
    return _chart("norms", model["key"], "Norms by block", caption, figure)


def _modes(model: Tree) -> Chart:
    """Norms after the probed block."""
    block = model["probed"]["block"]
    row = [layer["block"] for layer in model["layers"]].index(block)
    edges, threshold = np.array(model["norms"]["edges"]), model["probed"]["threshold"]
    figure, axes = new_axes("norm of the token", "share of the tokens of its kind", size=SIZE)
    kinds = [("patches", PATCHES, "patches"), ("cls", CLS, "[CLS]"), ("registers", REGISTERS, "registers")]
    for kind, colour, label in kinds:
        if model["norms"][kind] is not None:
            counts = np.array(model["norms"][kind][row], dtype=float)
            axes.stairs(counts / max(counts.sum(), 1), np.log10(edges), color=colour, fill=kind == "patches",
                        alpha=0.75 if kind == "patches" else 1, linewidth=1.4, label=label)  # fmt: skip
    found = threshold["kind"] != "stand-in"
    label = "cutoff" if found else "highest 2 %"
    axes.axvline(np.log10(threshold["value"]), color=HIGH if found else INK, linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    _decades(axes, edges, along="x")
    _legend(axes)
    caption = "After the block that is probed; a second mode stands apart, a tail only falls. The scale is logarithmic."
    if not found:
        caption += " There is no second mode: the dashed line only marks which tokens are compared below."
    return _chart("modes", model["key"], f"Norms after block {block}", caption, figure)


def _map(model: Tree) -> Chart:
    share = 100 * np.array(model["places"]["share"])
    figure, axes = new_axes("", "", size=(3.9, 3.3))
    image = axes.imshow(share, cmap="magma", vmin=0, vmax=max(float(share.max()), 1e-6), interpolation="nearest")
    axes.set_axis_off()
    bar = figure.colorbar(image, ax=axes, fraction=0.046)
    bar.set_label("% of the images", color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    name = model["probed"]["threshold"]["names"][0]
    caption = f"In how many images the patch at each place is among the {name}."
    return _chart("map", model["key"], f"Where they sit: {name}", caption, figure)


def _neighbours(model: Tree) -> Chart:
    found, names = model["neighbours"], model["probed"]["threshold"]["names"]
    edges = np.array(found["edges"])[::4]
    figure, axes = new_axes("cosine similarity with the neighbours", "density", size=SIZE)
    for group, name, colour in (("high", names[0], HIGH), ("rest", names[1], PATCHES)):
        counts = np.array(found["counts"][group], dtype=float).reshape(-1, 4).sum(axis=1)
        if counts.sum():
            density = counts / counts.sum() / np.diff(edges)
            axes.stairs(density, edges, color=colour, fill=True, alpha=0.3)
            axes.stairs(density, edges, color=colour, linewidth=1.6, label=name)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    _legend(axes)
    caption = (
        "Similarity of each patch with its 4 neighbours at the output of the patch embedding, before any position. "
        "Near 1: the patch tells nothing that its neighbours do not."
    )
    return _chart("neighbours", model["key"], "On what patches they sit", caption, figure)


def _examples(model: Tree, examples: Sequence[Example]) -> Chart:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.7 * len(examples), 3.5), layout="constrained")
    rows = figure.subplots(2, len(examples), squeeze=False)
    high = max(float(e.norms.max()) for e in examples)
    for column, example in enumerate(examples):
        rows[0, column].imshow(example.pixels)
        rows[1, column].imshow(example.norms, cmap="magma", vmin=0, vmax=high, interpolation="nearest")
        for axes in rows[:, column]:
            axes.set_axis_off()
    found = model["probed"]["threshold"]["kind"] != "stand-in"
    which = "The images with most of them" if found else "The first images"
    caption = (
        f"{which} as the model sees them, and below the norms of their patch tokens after block "
        f"{model['probed']['block']}: black is 0, white {high:.3g}."
    )
    return _chart("examples", model["key"], "Images and norms", caption, figure)


def _over_time(model: Tree) -> list[Chart]:
    """Share after the last block by step: of the checkpoints, and of the gauge."""
    followed, gauge = model["checkpoints"], model["gauge"]
    if followed is None and (gauge is None or "steps" not in gauge):
        return []
    figure, axes = new_axes("step", "outlier share, %", size=SIZE)
    if gauge is not None and "steps" in gauge:
        shares = [np.nan if v is None else 100 * v for v in gauge["shares"]]
        axes.plot(gauge["steps"], shares, color=PATCHES, linewidth=1.4, label="while training")
    if followed is not None:
        rows = [(c["step"], _share(c["verdicts"][-1])) for c in followed["checkpoints"]]
        axes.plot(*zip(*rows, strict=True), color=HIGH, marker="o", linewidth=1.4, label="checkpoints")
    _from_zero(axes)
    _legend(axes)
    caption = "Of the patch tokens after the last block. While training: on the crops that the teacher saw."
    return [_chart("steps", model["key"], "When they came", caption, figure)]


def _shares(models: Sequence[Tree]) -> Chart:
    figure, axes = new_axes("depth of the block, % of the network", "outlier share, %", size=SIZE)
    for number, model in enumerate(models):
        blocks = model["shape"]["blocks"]
        at = [100 * (layer["block"] + 1) / blocks for layer in model["layers"]]
        shares = [_share(layer["patches"]) for layer in model["layers"]]
        axes.plot(at, shares, color=MANY[number % len(MANY)], marker="o", markersize=3.5, label=model["name"])
    _from_zero(axes)
    axes.set_xlim(0, 103)
    if len(models) > 1:
        _legend(axes)
    caption = "Of the patch tokens after each block, by the verdict on that block alone."
    return _chart("shares", None, "Outliers by depth", caption, figure)


# ---- parts


def _share(verdict: Tree) -> float:
    """In %; nan where norms are not finite."""
    if verdict["kind"] == "suspicious":
        return 0.0
    return np.nan if verdict["share"] is None else 100 * float(verdict["share"])


def _log(values: Sequence[float | None]) -> np.ndarray:
    logs: np.ndarray = np.log10(np.array([np.nan if v is None else v for v in values], dtype=float))
    return logs


def _decades(axes: Axes, edges: Sequence[float] | np.ndarray, *, along: str = "y") -> None:
    """Ticks of a base-10 logarithm as norms."""
    low, high = np.log10(edges[0]), np.log10(edges[-1])
    steps = (1, 1.5, 2, 3, 5, 7) if high - low < 1 else (1, 2, 5) if high - low < 2.5 else (1,)
    values = [m * 10.0**e for e in range(int(np.floor(low)), int(np.ceil(high)) + 1) for m in steps]
    values = [v for v in values if low <= np.log10(v) <= high]
    (axes.set_yticks if along == "y" else axes.set_xticks)(np.log10(values), [f"{v:g}" for v in values])


def _from_zero(axes: Axes) -> None:
    """Shares in %, from 0 to at least 1."""
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)


def _chart(name: str, model: str | None, title: str, caption: str, figure: Figure) -> Chart:
    from matplotlib import rc_context

    png, svg = io.BytesIO(), io.StringIO()
    salt = f"{model}-{name}"  # ids of one page must differ
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(png, format="png", dpi=DPI, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Chart(name, model, title, caption, png.getvalue(), for_html(svg.getvalue()))

"""The demo's page: one HTML file that needs nothing else, in plain words."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quietvit.config.load import load_config
from quietvit.data.sources import Source, open_source
from quietvit.files import write_text
from quietvit.train.metrics import read_metrics
from quietvit_eval.demo_scores import SHOWN, headline, rows, verdict
from quietvit_eval.page_charts import INK, for_html, new_axes
from quietvit_eval.pages import fill_page

PER_CLASS = 3  # example pictures (ours: enough to see what a class has in common)

Records = Sequence[Mapping[str, Any]]


def write_report(out: Path, summary: Mapping[str, Any]) -> Path:
    """Write `out`/report.html from the demo's summary, `out`/pretrain and the data set `scenes`. Returns its path.

    `summary` is what quietvit_launch.demo writes to summary.json: scores and standard errors in % (depth in metres),
    seconds per stage, and where the pictures of predictions lie.
    The page is one file: styles inside, charts as SVG, pictures as PNG in base64; it asks nothing of any network.
    """
    records = read_metrics(out / "pretrain" / "metrics.jsonl")
    source = open_source("scenes", None, split="train", image_size=64, num_images=1000)
    images = summary["images"]
    path = out / "report.html"
    html = fill_page(
        "demo_report",
        headline=headline(summary, records),
        verdict=verdict(summary),
        tasks=rows(summary),
        chance=100 / summary["classes"],
        classes=summary["classes"],
        label=summary["label"],
        label_meaning=_meaning(source, summary["label"]),
        train_images=f"{images['train']:,}",
        test_images=f"{images['test']:,}",
        dense_images=summary.get("dense_images"),
        seed=summary["seed"],
        charts=list(charts(records, prototypes=_prototypes(out))),
        examples=examples(source, summary["label"]),
        predictions=predictions(out, summary.get("pictures", {})),
        teacher=summary["teacher"],
        code=code(summary["teacher"]),
        seconds=_seconds(summary["seconds"]),
        environment=_environment(out / "pretrain" / "environment.json"),
    )
    write_text(path, html)
    return path


# ---- words


def code(teacher: str) -> str:
    """Four lines of Python that use the exported teacher."""
    return (
        "import torch, quietvit\n"
        f"model = quietvit.load({teacher!r})\n"
        "images = torch.rand(8, 3, model.image_size, model.image_size)  # yours: RGB, 0 to 1\n"
        "features = model((images - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1))\n"
        "# features.cls [8, D], features.registers [8, R, D], features.patches [8, h, w, D]"
    )


def _seconds(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = [(name, f"{value:.1f} s") for name, value in seconds.items()]
    return [*rows, ("together", f"{sum(seconds.values()):.1f} s")]


def _environment(file: Path) -> list[tuple[str, str]]:
    if not file.exists():
        return []
    facts = json.loads(file.read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items())
    rows = [(k, facts.get(k)) for k in ("hardware", "device", "platform", "python", "git")]
    rows += [("packages", packages), ("command", " ".join(facts.get("command", [])))]
    return [(name, str(value)) for name, value in rows if value]


# ---- charts


@dataclass(frozen=True)
class Chart:
    """One small chart: an SVG element and what to know when looking at it."""

    title: str
    caption: str
    svg: str


# (column of metrics.jsonl, title, how to read it), in the page's order.
LOSSES = (
    ("loss/total", "Loss", "The weighted sum of the three terms. Its value means little; it should fall, then settle."),
    ("loss/dino", "DINO loss", "Do two views of a picture get the same summary?"),
    ("loss/ibot", "iBOT loss", "Can hidden patches be told from the rest of the picture?"),
    ("loss/koleo", "KoLeo loss", "Are the pictures of a batch spread out? Lower is more spread."),
)
HEALTH = (
    ("health/knn", "k-NN while training, %", "On held-out pictures, through the teacher. Should rise."),
    ("health/rank", "Effective dimensions", "How many directions the features use. Near 1 would be a collapse."),
    (
        "health/teacher/entropy",
        "Entropy of one target",
        "Dashed: undecided between all prototypes. Should be well below.",
    ),
    (
        "health/teacher/mean_entropy",
        "Entropy of the mean target",
        "Dashed: all prototypes equally used. Should stay close.",
    ),
    (
        "health/outlier_share",
        "Outlier patches, %",
        "Patch tokens of unusual norm: the artifacts that registers take in.",
    ),
)


def charts(records: Records, *, prototypes: int | None) -> Iterator[Chart]:
    """A chart for every column that has values. `prototypes` gives entropies their greatest value, ln K."""
    for column, title, caption in (*LOSSES, *HEALTH):
        points = [(r["step"], r[column]) for r in records if r.get(column) is not None]
        if not points:
            continue
        steps, values = np.array(points, dtype=float).T
        if column == "health/outlier_share":
            values = 100 * values
        limit = math.log(prototypes) if prototypes and column.endswith("entropy") else None
        yield Chart(title, caption, _svg(steps, values, limit=limit, smooth=column.startswith("loss/"), name=column))


def _prototypes(out: Path) -> int | None:
    file = out / "pretrain" / "config.yaml"
    return load_config(str(file)).objective.head.num_prototypes if file.exists() else None


def _svg(steps: np.ndarray, values: np.ndarray, *, limit: float | None, smooth: bool, name: str) -> str:
    """A line over steps as inline SVG. `smooth` adds a running mean over a twentieth of the run."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10}):
        figure, axes = new_axes("step", "", size=(3.6, 2.3))
        window = max(1, len(values) // 20)
        if smooth and window > 1:
            axes.plot(steps, values, color="#2f7fc1", alpha=0.45, linewidth=0.6)
            mean = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window // 2 :][: len(mean)], mean, color="#2f7fc1", linewidth=1.8)
        else:
            axes.plot(steps, values, color="#2f7fc1", linewidth=1.8, marker="o", markersize=3.5)
        if limit is not None:
            axes.axhline(limit, color=INK, linestyle="--", linewidth=1)
        if not smooth:
            axes.set_ylim(bottom=0)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return for_html(text.getvalue())


# ---- pictures


def examples(source: Source, label: str) -> list[dict[str, Any]]:
    """The first pictures of every class, as PNG in base64."""
    found = []
    for number, name in enumerate(source.classes[label]):
        numbers: Iterable[int] = np.flatnonzero(source.labels[label] == number)[:PER_CLASS].tolist()
        found.append({"name": name, "images": [_png(source.load(i)) for i in numbers]})
    return found


def predictions(out: Path, pictures: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Pictures of what the dense probes predicted, by task; paths are relative to `out`."""
    return [
        {
            "title": SHOWN[task].title,
            "images": [base64.b64encode((out / name).read_bytes()).decode("ascii") for name in names],
        }
        for task, names in pictures.items()
        if names
    ]


def _png(pixels: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _meaning(source: Source, label: str) -> str:
    """Which of the source's named label sets "class" stands for."""
    same = [k for k, names in source.classes.items() if k != label and names == source.classes[label]]
    return f": the {same[0]} of the picture" if same else ""

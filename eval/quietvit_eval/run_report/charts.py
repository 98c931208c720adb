"""Which curves the page shows, and how each is to be read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quietvit_eval.run_report.curves import Chart, Line, draw, draw_map
from quietvit_eval.run_report.folder import RunFolder, Values

TERMS: Mapping[str, tuple[str, str, str]] = {  # key of the metrics: title, weight in the settings, how to read it
    "dino_local": ("DINO, small crops", "dino_weight", "Does a small part of a picture get the summary of the whole?"),
    "dino_global": ("DINO, large crops", "dino_weight", "Do two large crops of a picture get the same summary?"),
    "dino": ("DINO", "dino_weight", "Do two views of a picture get the same summary?"),
    "ibot": ("iBOT", "ibot_weight", "Can hidden patches be told from the rest of the picture?"),
    "koleo": ("KoLeo", "koleo_weight", "Are the pictures of a batch spread out? Lower is more spread."),
}


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: Sequence[Chart]


def groups(run: RunFolder) -> list[Group]:
    """All charts that the metrics have values for; groups without any are left out."""
    made = {
        "What it minimises": _losses(run),
        "What it learns": _learning(run),
        "Artifacts": _artifacts(run),
        "Speed": _speed(run),
        "Schedules and gradients": _schedules(run),
    }
    found = [Group(title, [c for c in charts if c is not None]) for title, charts in made.items()]
    return [group for group in found if group.charts]


def _losses(run: RunFolder) -> Iterator[Chart | None]:
    yield _one(
        run,
        "loss/total",
        "Loss",
        "The weighted sum of the terms. It should fall, then settle; with a teacher that learns "
        "too, its value alone means little.",
    )
    for key in run.columns("loss/"):
        name = key.removeprefix("loss/")
        if name == "total":
            continue
        title, weight, caption = TERMS.get(name, (name, "", ""))
        value = getattr(run.config.objective, weight) if run.config is not None and weight else None
        said = "Weight 0: watched, not minimised." if value == 0 else f"Weight {value:g}." if value is not None else ""
        yield _one(run, key, title, f"{caption} {said}".strip())


def _learning(run: RunFolder) -> Iterator[Chart | None]:
    steps, values = run.series("health/knn")
    start = [("before training", float(values[0]))] if len(steps) > 1 and steps[0] == 0 else []
    yield draw(
        "k-NN, %",
        "Held-out pictures that their nearest neighbours name rightly, through the teacher. Should rise.",
        [Line("k-NN", steps, values)],
        limits=start,
        unit=" %",
        steps=run.step,
    )
    below = run.columns("guard/knn_below_start")
    if below:
        yield _one(
            run,
            below[0],
            "k-NN below the start, points",
            "What the guard of a run that began with a model watches. Above its margin, forgetting.",
        )
    width = run.teacher.get("backbone", {})
    width = width.get("arguments", {}).get("embed_dim") if isinstance(width, dict) else None
    of = f" There are {width}." if isinstance(width, int) else ""
    yield _one(
        run,
        "health/rank",
        "Effective dimensions",
        f"RankMe: how many directions the features use.{of} Near 1, collapse.",
        from_zero=True,
    )
    entropies = [
        Line("of one target", *run.series("health/teacher/entropy")),
        Line("of the mean target", *run.series("health/teacher/mean_entropy")),
    ]
    prototypes = None if run.config is None else run.config.objective.head.num_prototypes
    yield draw(
        "Entropy of the teacher, nats",
        "One target should lie well below the greatest possible value (dashed), else nothing "
        "is told; the mean of all targets close to it, else few prototypes are in use.",
        entropies,
        limits=[("ln K", math.log(prototypes))] if prototypes else [],
        from_zero=True,
        steps=run.step,
    )
    yield _one(
        run,
        "health/teacher/prototypes_used",
        "Prototypes in use",
        "How many were some picture's favourite since the last look.",
        from_zero=True,
    )


def _artifacts(run: RunFolder) -> Iterator[Chart | None]:
    shares = [
        Line("last block", *_percent(run.series("artifacts/share"))),
        Line("block with most", *_percent(run.series("artifacts/max_share"))),
    ]
    looked = [Line("last block", *_percent(run.series("health/outlier_share")))]
    yield draw(
        "Artifacts, % of patch tokens",
        "Patch tokens whose norm forms a second, higher mode. Should stay at 0.",
        shares if len(shares[0].steps) else looked,
        from_zero=True,
        unit=" %",
        steps=run.step,
    )
    keys = sorted(run.columns("artifacts/share/"))
    if keys:
        series = [_percent(run.series(key)) for key in keys]
        steps = series[0][0]
        rows = np.stack([_at(steps, *one) for one in series])
        if np.nan_to_num(rows).any():
            yield draw_map(
                "Artifacts by block",
                "Rows: blocks, from 0 below. The stronger, the more of the patch tokens; "
                f"strongest: {np.nanmax(rows):.2g} %.",
                steps,
                rows,
                unit=" %",
            )
    blocks = sorted(key.rpartition("/")[2] for key in run.columns("artifacts/median/"))
    if blocks:
        names = {"patches": "median", "CLS": "cls", "registers": "registers"}
        lines = [Line(name, *run.series(f"artifacts/{key}/{blocks[-1]}")) for name, key in names.items()]
        yield draw(
            "Norms after the last block",
            "Medians. Registers far above the patches are where the model keeps what would else become artifacts.",
            lines,
            from_zero=True,
            steps=run.step,
        )


def _speed(run: RunFolder) -> Iterator[Chart | None]:
    yield _one(run, "images_per_s", "Images a second", "Over the last 50 steps.", from_zero=True)
    yield draw(
        "Waiting for data, % of the time",
        "Above 30 %: more workers, or smaller files.",
        [Line("waiting", *_percent(run.series("data_wait")))],
        from_zero=True,
        unit=" %",
        steps=run.step,
    )


def _schedules(run: RunFolder) -> Iterator[Chart | None]:
    yield _one(run, "lr", "Learning rate", "", from_zero=True)
    yield _one(run, "momentum", "Momentum of the teacher", "")
    yield _one(run, "temp", "Temperature of the teacher", "")
    yield _one(run, "weight_decay", "Weight decay", "", from_zero=True)
    keys = run.columns("grad_norm/")
    lines = [Line(key.removeprefix("grad_norm/"), *run.series(key)) for key in keys]
    values = np.concatenate([line.values for line in lines]) if lines else np.zeros(0)
    clip = run.config.optim.clip if run.config is not None else 0
    # A level far above all values would flatten them.
    near = 0 < clip <= 3 * np.nanmax(values, initial=0.0)
    yield draw(
        "Gradient norms",
        "Before they are cut down to the dashed level."
        if near
        else (f"Before they are cut down to {clip:g}." if clip else ""),
        lines,
        limits=[("clip", clip)] if near else [],
        from_zero=True,
        steps=run.step,
    )
    factor = run.series("guard/lr_factor")
    if len(factor[1]) and np.nanmin(factor[1]) < 1:
        yield draw(
            "The guard's factor on the learning rate",
            "Lowered at each rewind.",
            [Line("factor", *factor)],
            from_zero=True,
            steps=run.step,
        )


def _one(run: RunFolder, key: str, title: str, caption: str, *, from_zero: bool = False) -> Chart | None:
    return draw(title, caption, [Line(title, *run.series(key))], from_zero=from_zero, steps=run.step)


def _percent(series: tuple[Values, Values]) -> tuple[Values, Values]:
    return series[0], 100 * series[1]


def _at(wanted: Values, steps: Values, values: Values) -> Values:
    """Values at the wanted steps; nan where there are none."""
    found = dict(zip(steps.tolist(), values.tolist(), strict=True))
    return np.array([found.get(step, math.nan) for step in wanted.tolist()])

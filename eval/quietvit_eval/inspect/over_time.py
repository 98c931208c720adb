"""When artifacts came: the checkpoints of a run, and what its gauge wrote down while it trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quietvit.contracts import Extractor
from quietvit.train.metrics import read_metrics
from quietvit.weights.extractor import STEP_FOLDER
from quietvit.weights.native import WEIGHTS_NAME, read_meta
from quietvit_eval.inspect.layers import measure
from quietvit_eval.inspect.tokens import ImageSet

# Columns of metrics.jsonl with the share after the last block, the first that is there: of the gauge, and of runs that
# had none.
COLUMNS = ("artifacts/share", "health/outlier_share")


def checkpoints_of(run: Path) -> tuple[list[tuple[int, Path]], list[str]]:
    """Steps and teachers of the complete checkpoints of a run folder, ascending; and what is wrong with the others.

    Raises ValueError if there is none.
    """
    found, problems = [], []
    for folder in (run / "checkpoints").glob("step_*"):
        step, file = STEP_FOLDER.fullmatch(folder.name), folder / WEIGHTS_NAME
        if step is None or not file.is_file():
            continue
        try:
            read_meta(file)
        except ValueError as error:
            problems.append(str(error))
        else:
            found.append((int(step[1]), file))
    if not found:
        said = "; ".join(problems) or f"looked for checkpoints/step_*/{WEIGHTS_NAME}"
        raise ValueError(f"{run} has no checkpoints to follow: {said}")
    return sorted(found), problems


def over_checkpoints(
    run: Path, open_model: Callable[[Path], Extractor], images: ImageSet, blocks: list[int]
) -> dict[str, Any]:
    """The verdict on every block of every checkpoint of a run, on the same images. Raises ValueError as
    `checkpoints_of`."""
    found, problems = checkpoints_of(run)
    rows = []
    for step, file in found:
        norms, _ = measure(open_model(file), images, blocks, probed=blocks[-1], what=f"norms at step {step:,}")
        verdicts = [norms.verdict(block) for block in blocks]
        rows.append({"step": step, "verdicts": [asdict(v) for v in verdicts]})
    return {"blocks": blocks, "checkpoints": rows, "broken": problems}


def from_gauge(run: Path) -> dict[str, Any] | None:
    """What the run itself wrote down: episodes of artifacts.json, and shares by step of metrics.jsonl; None if it wrote
    neither. A record that cannot be read is said in "broken"."""
    about: dict[str, Any] = {}
    path = run / "artifacts.json"
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            about["episodes"] = [dict(episode) for episode in record["episodes"]]
        except (ValueError, KeyError, TypeError) as error:
            about["broken"] = f"{path} cannot be read: {error}"
    records = [r for r in read_metrics(run / "metrics.jsonl") if isinstance(r, dict)]
    for column in COLUMNS:
        shares = [(r["step"], r[column]) for r in records if isinstance(r.get(column), int | float) and "step" in r]
        if shares:
            about |= {"column": column, "steps": [s for s, _ in shares], "shares": [v for _, v in shares]}
            break
    return about or None

"""From a classifier of pixels to scores, counts per image and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from quietvit_eval.pair_data import PairData
from quietvit_eval.pictures import picture_path, segmentation_picture, write_png
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result
from quietvit_eval.segmentation.metrics import count_pixels, per_class, scores_of_counts

MAIN = "mIoU"
COUNTS = ("intersection", "predicted", "target")

Classify = Callable[[UInt8[np.ndarray, "H W 3"]], Int64[np.ndarray, "H W"]]


def score(
    data: PairData, classify: Classify, *, task: str, protocol: dict[str, Any], details: dict[str, Any], pictures: int
) -> Result:
    """Classify the pixels of all test images; of `pictures` of them, evenly spread, write what was predicted.

    Raises ValueError if no test image can be read, or none has a pixel that counts.
    """
    names = data.test.source.class_names
    shown = set(spread(len(data.test), pictures))
    found: dict[int, tuple[str, np.ndarray, str | None]] = {}
    for pair in data.pairs("test", task):
        predicted = classify(pair.image)
        counted = np.stack(count_pixels(predicted, pair.target, len(names)))
        drawn = None
        if data.folder is not None and pair.row in shown:
            facts = [data.model_hash, data.seed, data.test.source.fingerprint(), protocol]
            path = picture_path(data.folder, task, facts, pair.name)
            write_png(path, segmentation_picture(pair.image, pair.target, predicted, names))
            drawn = path.relative_to(data.folder).as_posix()
        found[pair.row] = pair.name, counted, drawn
    rows = data.merged(found).values()
    counts = dict(zip(COUNTS, np.stack([c for _, c, _ in rows], axis=1), strict=True))
    sums = [counts[name].sum(axis=0) for name in COUNTS]
    if not sums[2].sum():
        raise ValueError(f"no pixel of {data.test.source.name} has a class: there is nothing to score")
    per_image = PerImage([name for name, _, _ in rows], counts, "iou")
    details = {
        **details,
        "classes": _table(names, *sums),
        "pictures": [drawn for _, _, drawn in rows if drawn is not None],
    }
    return Result(scores_of_counts(*sums), MAIN, protocol, details, per_image)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rows at even distances, the first among them; all if there are fewer."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def check_names(train: Sequence[str], test: Sequence[str]) -> None:
    """Raises ValueError unless both splits number the same classes in the same order."""
    if list(train) != list(test):
        raise ValueError(
            f"train and test pairs must have the same classes in the same order; train has {_said(train)}, test "
            f"{_said(test)}"
        )


def _said(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _table(
    names: Sequence[str], intersection: np.ndarray, predicted: np.ndarray, target: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
    """IoU, accuracy (None where neither predicted nor there) and pixels of every class by name."""
    table: dict[str, dict[str, float | int | None]] = {}
    for number, (iou, accuracy) in enumerate(zip(*per_class(intersection, predicted, target), strict=True)):
        name = names[number] if names[number] not in table else f"{names[number]} ({number})"
        values = {"IoU": iou, "Acc": accuracy}
        table[name] = {key: None if np.isnan(v) else float(v) for key, v in values.items()}
        table[name]["pixels"] = int(target[number])
    return table

"""What the demo's scores mean, in plain words: the tasks, their rows, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUBJECTS = {
    "trained": "pretrained, no labels",
    "random": "untrained network",
    "pixels": "raw pixels",
    "constant": "one answer for all pixels",
    "place": "the mean at each place",
}
CONTROLS = {"random": "before training", "pixels": "on raw pixels", "constant": "with one answer for all pixels"}


@dataclass(frozen=True)
class Shown:
    """A task of the demo as its page shows it."""

    title: str
    meaning: str
    unit: str = "%"  # "%" or "m"
    lower_is_better: bool = False
    guessing: bool = False  # whether a line at the chance level makes sense

    def text(self, value: float) -> str:
        """With its unit, e.g. "43.2 %" or "0.913 m"."""
        return f"{value:.1f}\N{NO-BREAK SPACE}%" if self.unit == "%" else f"{value:.3f}\N{NO-BREAK SPACE}m"

    def error_text(self, value: float) -> str:
        return f"{value:.1f}" if self.unit == "%" else f"{value:.3f}"


SHOWN: Mapping[str, Shown] = {
    "knn": Shown(
        "k-NN: the nearest labelled pictures decide",
        "Share of test pictures that get the right label. A picture gets the label that the most similar labelled "
        "pictures carry. Nothing is trained.",
        guessing=True,
    ),
    "linear": Shown(
        "Linear: one layer on frozen features",
        "Share of test pictures that get the right label from one linear layer trained on the same labelled pictures; "
        "which layer is decided on a part of them that it was not trained on.",
        guessing=True,
    ),
    "segmentation": Shown(
        "Segmentation: what each pixel shows",
        "Which of 8 kinds of background a pixel shows, or a solid. Mean over these 9 of intersection over union: the "
        "pixels found and right, among those found or right. One linear layer on the frozen patch features.",
    ),
    "depth": Shown(
        "Depth: how far each pixel is",
        "Typical error in metres (root of the mean square, per picture); lower is better. Scenes are 1 to 7 m deep. "
        "One linear layer on the frozen patch features. It sees one patch at a time and does not know where that is, "
        "while floors recede alike in all scenes: the mean at each place, with no look at the picture, wins easily.",
        unit="m",
        lower_is_better=True,
    ),
}


def rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every task of the summary: title, meaning and its bars, the pretrained network first."""
    found = []
    for task, shown in SHOWN.items():
        if task not in summary:
            continue
        scores, error = summary[task], summary["standard_error"][task]
        full = 100 if shown.unit == "%" else max(scores.values())
        bars = [
            {
                "name": name,
                "own": key == "trained",
                "width": round(100 * scores[key] / full, 2),
                "text": shown.text(scores[key]) + (f" ± {shown.error_text(error)}" if key == "trained" else ""),
            }
            for key, name in SUBJECTS.items()
            if key in scores
        ]
        chance = 100 / summary["classes"] if shown.guessing else None
        found.append({"title": shown.title, "meaning": shown.meaning, "rows": bars, "chance": chance})
    return found


def headline(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The result in one sentence: k-NN, its controls and chance."""
    shown, score, error = SHOWN["knn"], summary["knn"], summary["standard_error"]["knn"]
    last = max((r for r in records if r.get("images")), key=lambda r: r["step"], default=None)
    after = f"After {last['step']:,} steps on {last['images']:,.0f} pictures" if last else "After pretraining"
    controls = [f"{shown.text(score[k])} {how}" for k, how in CONTROLS.items() if k in score]
    return (
        f"{after} without a label, the network's features find the right one of {summary['classes']} classes for "
        f"{shown.text(score['trained'])} (± {error:.1f}) of pictures it never saw, by nearest neighbours alone: "
        f"{', '.join(controls)} and {shown.text(100 / summary['classes'])} by guessing."
    )


def verdict(summary: Mapping[str, Any]) -> str:
    """Whether pretraining helped, task by task, measured against the better control and the error of the difference.

    By chance two scores on the same pictures differ by sqrt(2) standard errors, and by less where they err alike; more
    than twice that is what we call clear.
    """
    said = []
    for task, shown in SHOWN.items():
        scores = summary.get(task, {})
        controls = [scores[k] for k in CONTROLS if k in scores]
        if not controls:
            continue
        sign = -1 if shown.lower_is_better else 1
        change = scores["trained"] - sign * max(sign * c for c in controls)
        noise = math.sqrt(2) * summary["standard_error"][task]
        gain = sign * change
        how = "a clear gain" if gain > 2 * noise else "a clear loss" if gain < -2 * noise else "no clear difference"
        amount = f"{change:+.1f} points ± {noise:.1f}" if shown.unit == "%" else f"{change:+.3f} m ± {noise:.3f}"
        said.append(f"{shown.title.partition(':')[0]}: {how} ({amount} to the better control)")
    return "; ".join(said) + "."

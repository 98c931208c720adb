"""Cards and comparisons as tables. Only scores of the same task, images and protocol share a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from quietvit_eval.cards import Card

if TYPE_CHECKING:
    from quietvit_eval.compare import Comparison


@dataclass(frozen=True)
class Unit:
    """How a score is printed: times `factor`, with so many decimals."""

    factor: float
    name: str
    decimals: int

    def text(self, value: float, *, signed: bool = False) -> str:
        """The number alone."""
        return f"{self.factor * value:{'+' if signed else ''}.{self.decimals}f}"


SHARE = Unit(100, "%", 1)
# Scores that are no shares (Eigen et al. 2014, table 1): metres, or numbers without a unit.
UNITS: Mapping[str, Unit] = {
    "rmse": Unit(1, "m", 3),
    "mae": Unit(1, "m", 3),
    "sq_rel": Unit(1, "m", 3),
    "abs_rel": Unit(1, "", 3),
    "rmse_log": Unit(1, "", 3),
    "log10": Unit(1, "", 4),
    "silog": Unit(1, "", 2),
}
MOST_COLUMNS = 5  # scores side by side (ours: more do not fit a terminal)
CAPTIONS: Mapping[str, str] = {
    "knn": "top1@k: test images whose class the k nearest train images vote for",
    "linear": "top1: test images whose class comes first in a linear head on frozen features",
    "logistic": "top1: test images whose class comes first in a logistic regression on frozen features",
    "finetune": "top1 after training of the backbone's blocks too: a check, not a score of frozen features",
    "classifier": "top1 of the supervised head that came with the weights; nothing is trained",
    "segmentation": "mIoU: intersection over union of pixels counted over all test images, mean over classes",
    "segmentation-patches": "mIoU of labels of whole patches: cheap, not to be compared with trained heads",
    "depth": "rmse: root of the mean squared error within an image, mean over images",
    "discovery": "CorLoc: images whose one box overlaps a true one by an IoU of 0.5 or more; IoU: its mean",
}


def unit_of(score: str) -> Unit:
    """A share, unless UNITS says otherwise."""
    return UNITS.get(score, SHARE)


def model_name(card: Card) -> str:
    """Path and start of the hash of a model; the name of a control."""
    if card.subject != "model":
        return card.subject
    known = str(card.model.get("hash") or "")[:8]
    return " ".join(part for part in (card.model.get("path") or card.model.get("class") or "model", known) if part)


def print_cards(cards: Sequence[Card], console: Console) -> None:
    """One table per protocol, best score first."""
    groups: dict[str, list[Card]] = {}
    for card in cards:
        groups.setdefault(card.protocol_key(), []).append(card)
    for group in groups.values():
        console.print(_table(group))


def print_comparisons(found: Sequence[Comparison], console: Console) -> None:
    """One line per pair of cards."""
    table = Table(title="B against A, on the same draws of test images", title_justify="left", caption_justify="left")
    table.caption = (
        f"95 % interval of the difference by {found[0].draws:,} paired bootstrap draws of the test images (seed "
        f"{found[0].seed}); it says nothing of other seeds of training. B better: share of the draws, ties as one half"
    )
    table.add_column("task, score")
    for name in ("A", "B"):
        table.add_column(name, overflow="fold")
    for name in ("A's", "B's", "difference", "95 % interval", "B better, %", "images"):
        table.add_column(name, justify="right")
    for c in found:
        unit = unit_of(c.score)
        table.add_row(
            f"{c.task}, {_header(c.score)}\n{_direction(c.higher_is_better)}",
            c.a,
            c.b,
            unit.text(c.score_a),
            unit.text(c.score_b),
            unit.text(c.difference, signed=True),
            f"{unit.text(c.low, signed=True)} to {unit.text(c.high, signed=True)}",
            f"{100 * c.share_better:.1f}",
            f"{c.images:,}",
        )
    console.print(table)


def _table(cards: Sequence[Card]) -> Table:
    """A line per model, or with many scores a line per score."""
    first = cards[0]
    names = [first.main, *(name for name in first.scores if name != first.main)]
    heads = [_header(name) + (" (headline)" if name == first.main else "") for name in names]
    lines = [
        ["model", *heads, "unreadable"],
        *(
            [model_name(card), *(_cell(card, name) for name in names), str(_skipped(card))]
            for card in sorted(cards, key=_rank)
        ),
    ]
    if len(names) > MOST_COLUMNS:
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(title=_title(first), caption=_caption(first), title_justify="left", caption_justify="left")
    for i, head in enumerate(lines[0]):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _title(card: Card) -> str:
    title = f"{card.task}, label {card.label!r}"
    if card.num_classes:
        title += f" ({card.num_classes} classes)"
    size = card.protocol.get("image_size")
    return title + (f", {size} px" if isinstance(size, int) else "")


def _caption(card: Card) -> str:
    test = card.data["test"]
    parts = [f"{test['images']:,} images of {test['name']}"]
    if train := card.data.get("train"):
        done = "bias chosen" if card.task == "discovery" else "trained"
        parts.append(f"{done} on {train['images']:,} of {train['name']}")
    if choice := card.protocol.get("choice"):
        parts.append(str(choice))
    if about := CAPTIONS.get(card.task):
        parts.append(about)
    parts.append(_direction(card.higher_is_better))
    return "; ".join(parts)


def _direction(higher_is_better: bool) -> str:
    return f"{'higher' if higher_is_better else 'lower'} is better"


def _header(score: str) -> str:
    unit = unit_of(score).name
    return f"{score}, {unit}" if unit else score


def _rank(card: Card) -> tuple[bool, float]:
    value = card.scores[card.main]
    return math.isnan(value), -value if card.higher_is_better else value


def _cell(card: Card, name: str) -> str:
    unit = unit_of(name)
    value = unit.text(card.scores[name])
    return f"{value} ± {unit.text(card.standard_error)}" if name == card.main else value


def _skipped(card: Card) -> int:
    return sum(part["unreadable"] for part in card.data.values())

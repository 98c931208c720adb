"""Two cards side by side: the difference of their scores, and how sure it is, by a paired bootstrap (Efron 1979).

Both cards' scores are computed anew on the same draws of test images, so that what makes an image hard for both does
not count as noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from quietvit_eval.cards import Card, find_cards, read_per_image
from quietvit_eval.report import model_name
from quietvit_eval.resampling import DRAWS, PerImage, draws, rescored

LEVEL = 0.95  # of the interval
SAME = 1e-5  # how far a card's score and that of its images may lie apart: single precision (ours)
SHOWN = 3  # names of images in a message
LONG = 60  # characters of a value in a message
ABSENT = "(absent)"

Cards = Mapping[Path, Card]
Couple = tuple[Path, Path]


@dataclass(frozen=True)
class Comparison:
    """`difference` is B's score minus A's, in the score's own units; `low` and `high` bound its 95 % interval."""

    task: str
    label: str
    score: str
    higher_is_better: bool
    a: str  # models, and the files of their cards
    b: str
    a_card: str
    b_card: str
    score_a: float
    score_b: float
    difference: float
    low: float
    high: float
    share_better: float  # of the draws: B is better; equal scores count one half
    images: int
    draws: int
    seed: int


@dataclass(frozen=True)
class Couples:
    """Cards to compare, A first, and why others cannot be."""

    alike: list[Couple]
    refused: list[str]


def fact_differences(a: Card, b: Card) -> dict[str, tuple[Any, Any]]:
    """Facts of the protocol that differ, by dotted name, with both values; ABSENT where a card lacks one."""
    facts_a, facts_b = a.facts(), b.facts()
    both = {name: (facts_a.get(name, ABSENT), facts_b.get(name, ABSENT)) for name in {**facts_a, **facts_b}}
    return {name: (x, y) for name, (x, y) in both.items() if x != y}


def compare_cards(a_path: Path, b_path: Path, cards: Cards, *, seed: int = 0, num: int = DRAWS) -> Comparison:
    """Compare the cards at two paths, both in `cards`.

    Raises ValueError if their protocols differ, saying in what, if what lies beside them does not fit them, or if they
    scored different images (some may have been unreadable for one of them).
    """
    if num < 1:
        raise ValueError(f"{num} draws tell nothing: use at least 1")
    a, b = cards[a_path], cards[b_path]
    if differing := fact_differences(a, b):
        raise ValueError(_unlike(a_path, b_path, differing))
    if (a.main, a.higher_is_better) != (b.main, b.higher_is_better):
        raise ValueError(f"{a_path} is about {a.main} and {b_path} about {b.main}: they cannot be compared")
    images_a, images_b = (_images_of(path, cards[path]) for path in (a_path, b_path))
    _check_same_images(a_path, images_a, b_path, images_b)
    drawn = paired_differences(images_a, images_b, a.main, seed=seed, num=num)
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) == 0:
        raise ValueError(f"{a.main} of {a_path} and {b_path} is not a number in any of {num} draws of test images")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    better = drawn > 0 if a.higher_is_better else drawn < 0
    return Comparison(
        task=a.task,
        label=a.label,
        score=a.main,
        higher_is_better=a.higher_is_better,
        a=model_name(a),
        b=model_name(b),
        a_card=str(a_path),
        b_card=str(b_path),
        score_a=a.scores[a.main],
        score_b=b.scores[b.main],
        difference=b.scores[b.main] - a.scores[a.main],
        low=float(low),
        high=float(high),
        share_better=float(np.mean(better) + np.mean(drawn == 0) / 2),
        images=len(images_a.names),
        draws=num,
        seed=seed,
    )


def paired_differences(
    a: PerImage, b: PerImage, main: str, *, seed: int = 0, num: int = DRAWS
) -> Float64[np.ndarray, " num"]:
    """B's score minus A's on each of `num` draws of the test images, the same draw for both."""
    return np.array(
        [rescored(b, main, weights) - rescored(a, main, weights) for weights in draws(len(a.names), seed, num)]
    )


def couples_of(a: Path, b: Path) -> tuple[Cards, Couples]:
    """Cards at two paths (cards, folders of cards or run folders) and which of them belong together.

    Two cards are a couple whatever their subjects. In folders each card of A is coupled with the one of B of the same
    task and subject ("model", "random-init", "pixels"). Raises ValueError as `find_cards`, if B holds several cards
    that fit one of A, and if no two cards can be compared.
    """
    cards_a, cards_b = find_cards(a), find_cards(b)
    if a.is_file() and b.is_file():
        return {**cards_a, **cards_b}, Couples([(a, b)], [])
    pairs = _matched(cards_a, cards_b, lambda mine, theirs: mine.subject == theirs.subject)
    return {**cards_a, **cards_b}, _usable(pairs, a, b)


def couples_within(folder: Path, against: str) -> tuple[Cards, Couples]:
    """The cards of one folder: each trained model's (B) and those of the control `against` (A), e.g. "random-init".

    Raises ValueError as `couples_of`.
    """
    cards = find_cards(folder)
    subjects = sorted({card.subject for card in cards.values()})
    models = {path: card for path, card in cards.items() if card.subject == "model"}
    controls = {path: card for path, card in cards.items() if card.subject == against}
    if not controls or against == "model":
        there = ", ".join(name for name in subjects if name != "model") or "none"
        raise ValueError(f"{folder} holds no card of a control {against!r}; its controls: {there}")
    if not models:
        raise ValueError(f"{folder} holds no card of a model to compare with {against!r}")
    pairs = _matched(models, controls, lambda mine, theirs: True)
    return cards, _usable(Couples([(control, model) for model, control in pairs.alike], pairs.refused), folder, folder)


def _matched(cards_a: Cards, cards_b: Cards, fit: Any) -> Couples:
    alike, refused = [], []
    for path, card in cards_a.items():
        near = {p: c for p, c in cards_b.items() if c.task == card.task and fit(card, c)}
        same = [p for p, c in near.items() if c.protocol_key() == card.protocol_key()]
        if len(same) > 1:
            raise ValueError(f"{path} could be compared with each of {', '.join(map(str, same))}: name two cards")
        if same:
            alike.append((path, same[0]))
        elif near:
            other, differing = min(
                ((p, fact_differences(card, c)) for p, c in near.items()), key=lambda found: len(found[1])
            )
            refused.append(_unlike(path, other, differing))
        else:
            refused.append(f"{path} has no counterpart: no card of task {card.task} and subject {card.subject!r}")
    return Couples(alike, refused)


def _usable(couples: Couples, a: Path, b: Path) -> Couples:
    if not couples.alike:
        raise ValueError(f"nothing to compare in {a} and {b}:\n" + "\n".join(couples.refused))
    return couples


def _unlike(a: Path, b: Path, differing: Mapping[str, tuple[Any, Any]]) -> str:
    lines = [f"  {name}: {_short(x)} | {_short(y)}" for name, (x, y) in differing.items()]
    return "\n".join([f"unlike protocols, not compared: {a} | {b}", *lines])


def _short(value: Any) -> str:
    text = value if value == ABSENT else repr(value)
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."


def _images_of(path: Path, card: Card) -> PerImage:
    images = read_per_image(path)
    if not images.names:
        raise ValueError(f"no test image lies beside {path}")
    if images.rule == "mean" and card.main not in images.values:
        raise ValueError(f"what lies beside {path} has no {card.main} of the images: evaluate the model again")
    whole = rescored(images, card.main, np.ones(len(images.names), dtype=np.int64))
    if not np.isclose(whole, card.scores[card.main], rtol=SAME, atol=SAME, equal_nan=True):
        raise ValueError(
            f"what lies beside {path} gives {card.main} {whole:.6g}, the card {card.scores[card.main]:.6g}: they are "
            "of different evaluations; evaluate the model again"
        )
    return images


def _check_same_images(a_path: Path, a: PerImage, b_path: Path, b: PerImage) -> None:
    if a.names == b.names:
        return
    said = []
    for path, one, other in ((a_path, a, b), (b_path, b, a)):
        if only := sorted(set(one.names) - set(other.names)):
            more = f" and {len(only) - SHOWN} more" if len(only) > SHOWN else ""
            said.append(f"only {path.name} has {', '.join(only[:SHOWN])}{more}")
    raise ValueError(
        f"{a_path} and {b_path} scored different test images, so no pairs can be drawn: "
        f"{'; '.join(said) or 'the same names, but in another order or number'}"
    )

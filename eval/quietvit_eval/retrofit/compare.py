"""A model, and what was made of it: artifacts and scores in rows, and how far the features of its patches moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float

from quietvit.backbones import Trunk
from quietvit.contracts import Extractor, Features
from quietvit.weights.extractor import BackboneExtractor
from quietvit_eval.cards import Card
from quietvit_eval.extract import identity_of
from quietvit_eval.inspect.artifacts import Subject
from quietvit_eval.inspect.layers import LayerNorms, measure, sentence, share_of, spread_of
from quietvit_eval.inspect.tokens import ImageSet, look_at
from quietvit_eval.views import normalised


@dataclass(frozen=True)
class Row:
    """One model of a comparison whose first is the one that the others were made of. Norms are those before the final
    norm, after the last block; None where there is nothing to say."""

    name: str
    weights: str | None  # hash
    registers: int
    added: int  # of them, without training
    kind: str  # the verdict on the norms of patches
    share: float  # of outliers, in [0, 1]
    sentence: str
    above: float | None  # share of patches above the cutoff of the first model, if that has outliers
    patches: dict[str, float | None]  # norms: median, 5 % and 95 % quantiles, as "median", "low", "high"
    cls: dict[str, float | None]
    register_norms: list[dict[str, float | None]]
    # Mean cosine similarity to the first model's features after the final norm: [CLS], and patches that were no
    # outliers there. None for another width or grid.
    same_cls: float | None
    same_patches: float | None
    scores: dict[str, dict[str, Any]]  # by "task label protocol-key": score, its name, standard error, direction

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def comparison(subjects: Sequence[Subject], images: ImageSet, cards: Sequence[Card] = ()) -> list[Row]:
    """A row for each model, all shown the same images; scores from those `cards` that are of its weights.

    The first subject is the model as it was; it stays in memory beside the others, which are opened in turn. Raises
    ValueError as `measure`, and for no subjects.
    """
    if not subjects:
        raise ValueError("no models to compare")
    first = subjects[0].open()
    before, images = _norms(first, images, subjects[0].name)
    verdict = before.verdict(before.probed)
    normal = (
        ~(before.at_probed > verdict.cutoff) if verdict.kind == "outliers" else np.ones_like(before.at_probed, bool)
    )
    rows = []
    for number, subject in enumerate(subjects):
        model = first if number == 0 else subject.open()
        norms = before if number == 0 else _norms(model, images, subject.name)[0]
        above = float((norms.at_probed > verdict.cutoff).mean()) if verdict.kind == "outliers" else None
        same = (1.0, 1.0) if number == 0 else _similarity(first, model, images, normal, subject.name)
        rows.append(_row(subject.name, model, norms, above, same, cards))
    return rows


def _norms(model: Extractor, images: ImageSet, name: str) -> tuple[LayerNorms, ImageSet]:
    last = model.num_blocks - 1
    return measure(model, images, [last], probed=last, what=f"norms, {name}")


def _row(
    name: str,
    model: Extractor,
    norms: LayerNorms,
    above: float | None,
    same: tuple[float, float] | None,
    cards: Sequence[Card],
) -> Row:
    verdict, weights = norms.verdict(norms.probed), identity_of(model).get("hash")
    added = cast(Trunk, model.backbone).options.test_time_registers if isinstance(model, BackboneExtractor) else 0
    return Row(
        name=name,
        weights=weights,
        registers=len(norms.registers),
        added=added,
        kind=verdict.kind,
        share=share_of(verdict),
        sentence=sentence(verdict, norms.probed, last=True),
        above=above,
        patches=spread_of(norms.patches, 0),
        cls=spread_of(norms.cls, 0),
        register_norms=[spread_of(histogram, 0) for histogram in norms.registers],
        same_cls=None if same is None else same[0],
        same_patches=None if same is None else same[1],
        scores={
            f"{card.task} {card.label} {card.protocol_key()}": {
                "score": card.scores[card.main],
                "name": card.main,
                "standard_error": card.standard_error,
                "higher_is_better": card.higher_is_better,
            }
            for card in cards
            if card.subject == "model" and weights is not None and card.model.get("hash") == weights
        },
    )


@torch.no_grad()
def _similarity(
    first: Extractor, other: Extractor, images: ImageSet, normal: Bool[np.ndarray, "M N"], name: str
) -> tuple[float, float] | None:
    """Mean cosine similarities of [CLS] and of patches that are `normal`; None for another width or grid."""
    if (first.embed_dim, first.stride) != (other.embed_dim, other.stride):
        return None
    cls, patches, count = 0.0, 0.0, 0
    for seen in look_at(images, what=f"features, {name}"):
        a, b = (_on_cpu(model(normalised(model, seen.images))) for model in (first, other))
        mask = torch.from_numpy(normal[seen.rows])
        cls += float(F.cosine_similarity(a[0], b[0], dim=-1).sum())
        patches += float(F.cosine_similarity(a[1], b[1], dim=-1)[mask].sum())
        count += int(mask.sum())
    return cls / len(images), patches / count


def _on_cpu(features: Features) -> tuple[Float[torch.Tensor, "b D"], Float[torch.Tensor, "b N D"]]:
    return features.cls.double().cpu(), features.patches.flatten(1, 2).double().cpu()

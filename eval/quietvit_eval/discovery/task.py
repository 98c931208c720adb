"""Task `discovery`: how often the one box that LOST finds is that of an object (CorLoc)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quietvit import dist
from quietvit.contracts import Extractor
from quietvit_eval.compare import LEVEL
from quietvit_eval.discovery.boxes import HIT, Box, Boxes, areas, iou, middle_half, pixels_of, rescaled, whole_image
from quietvit_eval.discovery.data import BOXES
from quietvit_eval.discovery.features import AttentionReader, PatchFeatures
from quietvit_eval.discovery.lost import Discovery, discover_each
from quietvit_eval.discovery.options import CHOICE, DiscoveryOptions
from quietvit_eval.discovery.pictures import Shown, draw, sheet, short
from quietvit_eval.discovery.sweep import Candidate, best, candidates, quantiles
from quietvit_eval.pair_data import SHOWN, Pair, PairData
from quietvit_eval.pictures import picture_path, write_png
from quietvit_eval.resampling import PerImage, bootstrap
from quietvit_eval.result import Result
from quietvit_eval.segmentation.scoring import spread

MAIN = "CorLoc"
BLIND = {"whole image": whole_image, "half of it, in the middle": middle_half}


@dataclass(frozen=True)
class Judged:
    """What came of one test image."""

    name: str
    iou: float  # with the true box that fits best; 0 if no box was found
    area: float  # of the box found, as a share of the image
    blind: list[float]  # IoU of the boxes of BLIND
    tied: bool
    without_box: bool
    shown: Shown | None


class DiscoveryTask:
    """CorLoc, the share of images whose box has an IoU of 0.5 or more with a true one; and the mean of that IoU."""

    target = BOXES
    options = DiscoveryOptions

    def check(self, extractor: Extractor, num_classes: int, options: DiscoveryOptions) -> None:
        """Raises ValueError if the extractor cannot show its attention, or has no such block."""
        if not isinstance(extractor, AttentionReader):
            raise ValueError(
                f"{type(extractor).__name__} does not tell its {options.facet}: give it a method "
                "attention_inputs(images, block), which returns queries, keys and values [B A T d], patches last"
            )
        if not -extractor.num_blocks <= options.block < extractor.num_blocks:
            raise ValueError(f"block {options.block} asked for; the model has {extractor.num_blocks}, numbered from 0")

    def run(self, extractor: Extractor, data: PairData, options: DiscoveryOptions) -> Result:
        """Choose the bias if asked to, then find one box in each test image.

        Raises ValueError for targets that are no boxes, for train images that are test images too if the bias is chosen
        on them, for features that are no finite numbers, and as `PairData` does.
        """
        _check_pairs(data, options)
        chosen, tried = Candidate(None, options.bias, float("nan"), 0, 0), list[Candidate]()
        if options.select != "fixed":
            tried = sweep(extractor, data, options)
            chosen = best(tried)
        protocol = _protocol(options, data)
        drawn = set(spread(len(data.test), options.pictures)) if data.folder is not None else set()
        found = {
            pair.row: self._judge(extractor, data, options, pair, chosen.bias, picture=pair.row in drawn)
            for pair in data.pairs("test", "discovery")
        }
        rows = list(data.merged(found).values())
        overlap = np.array([row.iou for row in rows])
        values = {MAIN: (overlap >= HIT).astype(np.float64), "IoU": overlap}
        per_image = PerImage([row.name for row in rows], values)
        scores = {name: float(v.mean()) for name, v in values.items()}
        details = {
            "bias": chosen.bias,
            "level": chosen.level,
            "sweep": [asdict(c) for c in tried],
            "interval_95": np.quantile(
                bootstrap(per_image, MAIN, seed=data.seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
            ).tolist(),
            **_oddities(rows),
            "pictures": _write_sheet(data, [row.shown for row in rows if row.shown is not None], protocol, chosen.bias),
        }
        splits = ("train", "test") if options.select == "held_out" else ("test",)
        return Result(scores, MAIN, protocol, details, per_image, splits=splits)

    def _judge(
        self, extractor: Extractor, data: PairData, options: DiscoveryOptions, pair: Pair, bias: float, *, picture: bool
    ) -> Judged:
        features = options.view(data.image_size).of(extractor, pair.image, pair.name)
        (result,) = discover_each(features.values, features.grid, [bias], k=options.k, expand=options.expand)
        size = pair.image.shape[0], pair.image.shape[1]
        box = box_in(result, features, extractor.stride, size)
        overlap = 0.0 if box is None else float(iou(box, pair.target).max())
        shown = None
        if picture:
            covered = extractor.stride * size[0] / features.size[0], extractor.stride * size[1] / features.size[1]
            title = f"{short(pair.name)}  IoU {overlap:.2f}"
            shown = draw(pair.image, pair.target, box, mask=result.mask, seed=result.seed, covered=covered, title=title)
        return Judged(
            pair.name,
            overlap,
            0.0 if box is None else float(areas(box)) / (size[0] * size[1]),
            [float(iou(make(size), pair.target).max()) for make in BLIND.values()],
            result.tied,
            box is None,
            shown,
        )


def box_in(found: Discovery, features: PatchFeatures, stride: int, size: tuple[int, int]) -> Box | None:
    """The box in an image of (height, width), which may have been shrunk before the model saw it; None: none."""
    if found.cells is None:
        return None
    return rescaled(pixels_of(found.cells, stride, features.size), features.size, size)


def sweep(extractor: Extractor, data: PairData, options: DiscoveryOptions) -> list[Candidate]:
    """CorLoc of each candidate for the bias, on the train images ("held_out") or on the test images ("val")."""
    split = "train" if options.select == "held_out" else "test"
    view = options.view(data.image_size)
    scale = {
        pair.row: quantiles(view.of(extractor, pair.image, pair.name).values, options.levels)
        for pair in data.pairs(split, "similarities")
    }
    tried = candidates(list(data.merged(scale, split).values()), options.levels)
    biases = [bias for _, bias in tried]
    seen: dict[int, np.ndarray] = {}
    for pair in data.pairs(split, "biases"):
        features = view.of(extractor, pair.image, pair.name)
        results = discover_each(features.values, features.grid, biases, k=options.k, expand=options.expand)
        size = pair.image.shape[0], pair.image.shape[1]
        seen[pair.row] = np.array(
            [_outcome(r, box_in(r, features, extractor.stride, size), pair.target) for r in results]
        )
    hits, tied, without = np.moveaxis(np.stack(list(data.merged(seen, split).values())), 2, 0)
    return [
        Candidate(level, bias, float(hits[:, i].mean()), int(tied[:, i].sum()), int(without[:, i].sum()))
        for i, (level, bias) in enumerate(tried)
    ]


def _outcome(found: Discovery, box: Box | None, true: Boxes) -> tuple[bool, bool, bool]:
    return box is not None and bool(iou(box, true).max() >= HIT), found.tied, box is None


def _oddities(rows: Sequence[Judged]) -> dict[str, Any]:
    """What a score alone would hide: seeds that mean nothing, boxes of everything, and what boxes reach unseen."""
    tied = [row.name for row in rows if row.tied]
    without = [row.name for row in rows if row.without_box]
    blind = np.array([row.blind for row in rows])
    return {
        "images_tied": len(tied),  # all patches have the same degree: the seed is the first for no reason
        "images_tied_names": tied[:SHOWN],
        "images_without_box": len(without),  # counted as misses
        "images_without_box_names": without[:SHOWN],
        "area_of_boxes": float(np.mean([row.area for row in rows])),  # as a share of the image
        "CorLoc_without_features": {name: float((blind[:, i] >= HIT).mean()) for i, name in enumerate(BLIND)},
    }


def _write_sheet(data: PairData, shown: Sequence[Shown], protocol: dict[str, Any], bias: float) -> list[str]:
    if data.folder is None or not shown:
        return []
    facts = [data.model_hash, data.seed, data.test.source.fingerprint(), protocol, bias]
    path = picture_path(data.folder, "discovery", facts, "boxes")
    if dist.rank() == 0:
        write_png(path, sheet(shown))
    return [path.relative_to(data.folder).as_posix()]


def _protocol(options: DiscoveryOptions, data: PairData) -> dict[str, Any]:
    settings = asdict(options)
    del settings["pictures"]
    if options.select == "fixed":
        del settings["levels"]
    else:
        del settings["bias"]
        settings["levels"] = list(options.levels)
    return {
        "name": "LOST, one box an image",
        **settings,
        "image_size": data.image_size,  # the longer side at the most
        "hit": HIT,
        "choice": CHOICE[options.select],
    }


def _check_pairs(data: PairData, options: DiscoveryOptions) -> None:
    for part in (data.train, data.test):
        if part.source.kind != BOXES:
            raise ValueError(f"{part.source.name} holds {part.source.kind}, but the task discovery needs {BOXES}")
    if options.select != "held_out":
        return
    train, test = (
        {(getattr(part.source, "root", None), part.source.item_name(int(i))) for i in part.indices}
        for part in (data.train, data.test)
    )
    if both := train & test:
        raise ValueError(
            f"{len(both):,} of the {len(train):,} train images are test images too, so that the bias would be chosen "
            "on what is scored: take other splits (train and val), or select=fixed"
        )

"""`inspect artifacts`: what the registers paper did once by hand, for any model and any images ("Vision Transformers
Need Registers", Darcet et al. 2023, arXiv 2309.16588, figures 3 to 5 and tables 1 and 6).

Norms are those before the final norm; the verdict is that of quietvit.features.norms, with no cutoff set by hand.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from rich.console import Console

import quietvit
from quietvit.contracts import Extractor
from quietvit.data.sources import Source
from quietvit.files import write_text
from quietvit.train.environment import hardware
from quietvit.weights.extractor import BackboneExtractor
from quietvit_eval.extract import identity_of
from quietvit_eval.inspect.layers import (
    LayerNorms,
    Threshold,
    across_blocks,
    coarse,
    is_high,
    measure,
    sentence,
    share_of,
    threshold_of,
)
from quietvit_eval.inspect.over_time import from_gauge, over_checkpoints
from quietvit_eval.inspect.places import border_share, share_map
from quietvit_eval.inspect.second_look import SecondLook
from quietvit_eval.inspect.tokens import ImageSet, check_shown, choose_images

FORMAT = "quietvit-artifacts-1"
SHOWN = 12  # names of unreadable images that are listed (ours)
EXAMPLES = 4  # images shown with their norms (ours)


@dataclass(frozen=True)
class Subject:
    """A model that is looked into: opened when its turn comes, so that one at a time is in memory."""

    name: str
    open: Callable[[], Extractor]
    run: Path | None = None  # the run folder that it is of, for its gauge and its checkpoints
    open_checkpoint: Callable[[Path], Extractor] | None = None  # needed to follow checkpoints


@dataclass(frozen=True)
class Options:
    """Settings of `inspect_artifacts`. Raises ValueError for values that cannot be."""

    images: int = 1000  # ours: of DINOv2-g's 2.4 % outliers thousands are among them, of rare ones enough
    image_size: int | None = None  # None: the model's, 224 at the most
    layers: tuple[int, ...] | None = None  # from 0; None: all. The last and the probed one are always read
    probe_layer: int = -1  # whose tokens are mapped and probed; -1: the last
    probes: bool = True
    checkpoints: bool = False
    label: str = "class"
    draws: int = 3  # of one token from each image (ours; the paper repeats its draws in table 6)
    seed: int = 0
    batch_size: int = 32
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")

    def blocks(self, num_blocks: int) -> tuple[list[int], int]:
        """The blocks to read, ascending, and the probed one. Raises ValueError for one that is not there."""
        probed = self.probe_layer + num_blocks if self.probe_layer < 0 else self.probe_layer
        asked = range(num_blocks) if self.layers is None else self.layers
        for block in (*asked, probed):
            if not 0 <= block < num_blocks:
                given = self.probe_layer if block == probed else block
                raise ValueError(f"there is no block {given}: the model has {num_blocks}, numbered from 0")
        return sorted({*asked, probed, num_blocks - 1}), probed


def inspect_artifacts(
    subjects: Sequence[Subject], source: Source, options: Options, out: Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Look into every model; write result.json, pictures and index.html into the folder `out`. Returns the result.

    Nothing is written before everything is known. Raises ValueError for a model that does not show its blocks before
    the final norm, blocks that are not there, data without a readable image, norms that are not finite; OSError as the
    file system does.
    """
    from quietvit_eval.inspect.page import write_page
    from quietvit_eval.inspect.plots import draw_all

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for what is written")
    result, examples = examine(subjects, source, options, console=console)
    charts = draw_all(result, examples)
    out.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        chart.write(out)
    write_text(out / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_page(out / "index.html", result, charts)
    return result


def examine(
    subjects: Sequence[Subject], source: Source, options: Options, *, console: Console | None = None
) -> tuple[dict[str, Any], list[list[Example]]]:
    """All figures, as they stand in result.json (None for what is not finite), and images to show for each model.

    Raises ValueError as `inspect_artifacts`.
    """
    models, examples = [], []
    for number, subject in enumerate(subjects):
        about, shown = _inspect_one(subject, source, options, console, key=f"model{number}")
        models.append(about)
        examples.append(shown)
    result: dict[str, Any] = {
        "format": FORMAT,
        "data": {"name": source.name, "fingerprint": source.fingerprint()},
        "settings": {k: v for k, v in asdict(options).items() if k not in ("batch_size", "workers")},
        "models": models,
        "environment": {"quietvit": quietvit.__version__, "torch": torch.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return finite(result), examples


def finite(tree: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON has not."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@dataclass(frozen=True)
class Example:
    """An image as the model saw it, and the norms of its patch tokens after the probed block."""

    name: str
    pixels: np.ndarray  # uint8 [S S 3]
    norms: np.ndarray  # float32 [h w]


def _inspect_one(
    subject: Subject, source: Source, options: Options, console: Console | None, *, key: str
) -> tuple[dict[str, Any], list[Example]]:
    began = time.monotonic()
    extractor = subject.open()
    blocks, probed = options.blocks(extractor.num_blocks)
    check_shown(extractor, blocks)
    images = choose_images(
        source, extractor, limit=options.images, seed=options.seed, image_size=options.image_size,
        batch_size=options.batch_size, workers=options.workers, console=console,
    )  # fmt: skip
    norms, images = measure(extractor, images, blocks, probed=probed, what=f"norms, {subject.name}")
    threshold = threshold_of(norms)
    high = is_high(norms, threshold)
    look = SecondLook(
        extractor, images, high, norms.grid, probed, seed=options.seed, draws=options.draws, probes=options.probes
    )
    found = look.run(labels_of(images, options.label))
    verdicts = [norms.verdict(block) for block in blocks]
    edges, (patch_counts, cls_counts, *register_counts) = coarse([norms.patches, norms.cls, *norms.registers])
    about = {
        "key": key,
        "name": subject.name,
        "model": identity_of(extractor) | {"path": subject.name},
        "shape": _shape(extractor, norms),
        "image_size": images.transform.image_size,
        "view": asdict(images.transform),
        "images": len(images),
        "unreadable": len(images.bad),
        "unreadable_names": [bad.name for bad in images.bad[:SHOWN]],
        "decision": {
            "kind": verdicts[-1].kind,
            "share": share_of(verdicts[-1]),
            "sentence": sentence(verdicts[-1], blocks[-1], last=True),
            "blocks": across_blocks(blocks, verdicts),
        },
        "layers": norms.about(),
        "norms": {
            "edges": edges,
            "patches": patch_counts,
            "cls": cls_counts,
            "registers": np.sum(register_counts, axis=0).tolist() if register_counts else None,
        },
        "probed": {"block": probed, "threshold": asdict(threshold), "tokens": int(high.sum()), "of": int(high.size)},
        "places": _places(high, norms.grid),
        **found,
        "checkpoints": _checkpoints(subject, options, images, blocks),
        "gauge": None if subject.run is None else from_gauge(subject.run),
        "hardware": hardware(getattr(extractor, "device", torch.device("cpu"))),
        "seconds": round(time.monotonic() - began, 1),
    }
    return about, _examples(images, norms, high, threshold)


def _shape(extractor: Extractor, norms: LayerNorms) -> dict[str, Any]:
    own = isinstance(extractor, BackboneExtractor)
    return {
        "embed_dim": extractor.embed_dim,
        "blocks": extractor.num_blocks,
        "registers": len(norms.registers),
        "stride": extractor.stride,
        "grid": list(norms.grid),
        "parameters": sum(p.numel() for p in extractor.backbone.parameters()) if own else None,  # type: ignore[attr-defined]
    }


def _places(high: np.ndarray, grid: tuple[int, int]) -> dict[str, Any]:
    share, ring = border_share(high, grid)
    counts = high.sum(axis=1)
    return {
        "share": share_map(high, grid).tolist(),
        "at_border": {"high": share, "all": ring},
        "images_with": int((counts > 0).sum()),
        "most_in_one_image": int(counts.max()),
    }


def labels_of(images: ImageSet, label: str) -> Int64[np.ndarray, " M"] | None:
    """Labels of the images, -1 where unknown; None if the source has no such set, or knows none of them."""
    if label not in images.source.labels:
        return None
    labels = np.asarray(images.source.labels[label])[images.indices].astype(np.int64)
    return labels if (labels >= 0).any() else None


def _checkpoints(subject: Subject, options: Options, images: ImageSet, blocks: list[int]) -> dict[str, Any] | None:
    if not options.checkpoints or subject.run is None or subject.open_checkpoint is None:
        return None
    return over_checkpoints(subject.run, subject.open_checkpoint, images, blocks)


def _examples(images: ImageSet, norms: LayerNorms, high: np.ndarray, threshold: Threshold) -> list[Example]:
    """The images with most outliers; where there are none, the first ones."""
    counts = high.sum(axis=1) if threshold.found else np.zeros(len(high))
    chosen = np.argsort(-counts, kind="stable")[:EXAMPLES]
    examples = []
    for row in chosen:
        index = int(images.indices[row])
        pixels = images.transform(images.source.load(index, min_side=images.transform.resize))
        name = images.source.item_name(index)
        examples.append(Example(name, pixels.permute(1, 2, 0).numpy(), norms.at_probed[row].reshape(norms.grid)))
    return examples

"""What a study sees inside one model: norms with the verdict on artifacts, and where [CLS] and registers look."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quietvit.contracts import Extractor
from quietvit.data.sources import Source
from quietvit.files import write_text
from quietvit_eval.inspect.artifacts import finite
from quietvit_eval.inspect.attention import average_attention, likeness, read_attention
from quietvit_eval.inspect.layers import coarse, measure, sentence, share_of
from quietvit_eval.inspect.sample import Looks, Sample, panels_of
from quietvit_eval.inspect.tokens import choose_images
from quietvit_eval.views import normalised

FORMAT = "quietvit-study-look-2"
SIDE = 160  # pixels of the images on the page, at the most (ours)
DIGITS = 4  # significant, of attention on one patch (ours: more than a colour shows)


@dataclass(frozen=True)
class LookOptions:
    """Which held-out images every model is shown, the same ones."""

    images: int = 500  # ours: norms of a few tens of thousands of tokens, and the average of attention
    shown: int = 4  # of them on the page
    image_size: int | None = None  # None: the model's, 224 at the most
    seed: int = 0
    batch_size: int = 32
    workers: int = 0

    def __post_init__(self) -> None:
        if self.images < 2 or self.shown < 1:
            raise ValueError("a study looks at 2 images or more, and shows 1 or more")


def look_once(
    open_model: Callable[[], Extractor], weights: str, source: Source, options: LookOptions, file: Path
) -> dict[str, Any]:
    """What is in `file` if it was found with these weights, images and options; else it is found and written there.

    Raises ValueError as `look_into`.
    """
    facts = asdict(options)
    key = {"format": FORMAT, "weights": weights, "data": source.fingerprint()} | {
        name: facts[name] for name in ("images", "shown", "image_size", "seed")
    }
    if (found := read_look(file)) is not None and found.get("key") == key:
        return found
    look = {"key": key, **finite(look_into(open_model(), source, options))}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(look, allow_nan=False) + "\n")
    return look


def read_look(file: Path) -> dict[str, Any] | None:
    """A written look; None where there is none, or nothing that can be read."""
    try:
        look = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return look if isinstance(look, dict) else None


def look_into(extractor: Extractor, source: Source, options: LookOptions) -> dict[str, Any]:
    """Norms of all blocks before the final norm, those of the last as histograms; attention of the last block; "seed"
    of the run that made it, where it tells.

    Raises ValueError for a model that shows neither blocks nor attention, and for data without readable images.
    """
    images = choose_images(
        source, extractor, limit=options.images, seed=options.seed, image_size=options.image_size,
        batch_size=options.batch_size, workers=options.workers,
    )  # fmt: skip
    blocks = list(range(extractor.num_blocks))
    norms, images = measure(extractor, images, blocks, probed=blocks[-1], what="norms")
    edges, (patches, cls, *registers) = coarse([norms.patches, norms.cls, *norms.registers])
    verdict = norms.verdict(blocks[-1])
    known = getattr(extractor, "meta", {}).get("provenance", {}).get("seed")
    return {
        "seed": known if isinstance(known, int) else None,
        "images": len(images),
        "unreadable": len(images.bad),
        "image_size": images.transform.image_size,
        "data": {"name": source.name, "fingerprint": source.fingerprint()},
        "grid": list(norms.grid),
        "decision": {
            "kind": verdict.kind,
            "share": share_of(verdict),
            "sentence": sentence(verdict, blocks[-1], last=True),
            "blocks": [b for b in blocks if norms.verdict(b).kind == "outliers"],
        },
        "layers": norms.about(),
        "norms": {
            "edges": edges,
            "patches": patches[-1],
            "cls": cls[-1],
            "registers": [one[-1] for one in registers],
        },
        "attention": _attention(extractor, source, options),
    }


def _attention(extractor: Extractor, source: Source, options: LookOptions) -> dict[str, Any]:
    looks = Looks(options.shown, options.image_size, options.seed, options.batch_size, options.workers)
    sample = Sample(extractor, source, looks)
    seen = sample.all("attention")
    shown = read_attention(extractor, normalised(extractor, seen.pixels))
    mean = average_attention(extractor, Sample(extractor, source, looks, options.images), -1)
    alike = likeness(shown.maps)[1:, 1:].numpy()
    between = alike[~np.eye(len(alike), dtype=bool)]
    return {
        "registers_alike": float(between.mean()) if len(between) else None,  # correlation of two registers' maps
        "tokens": shown.tokens,
        "names": list(seen.names),
        "pictures": [png_text(panel) for panel in panels_of(seen.pixels)],
        "maps": _rounded(shown.maps.mean(1).numpy()),  # [image, token, h, w], mean over heads
        "mass": mean.mass.mean(0).tolist(),  # [token, (CLS, registers, patches)], mean over heads and images
        "averaged_over": mean.images,
        "average": _rounded(mean.maps.mean(0).numpy()),  # [token, h, w]
    }


def _rounded(values: np.ndarray) -> Any:
    decimals = DIGITS - int(np.floor(np.log10(max(float(values.max()), 1e-12)))) - 1
    return np.round(values.astype(np.float64), decimals).tolist()


def png_text(pixels: np.ndarray, side: int = SIDE) -> str:
    """An image as PNG in base64, no larger than `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")

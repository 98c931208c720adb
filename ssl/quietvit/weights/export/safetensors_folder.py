"""The teacher as a folder for others: weights, JSON and a model card, reloaded and compared before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from quietvit.files import write_text
from quietvit.weights.extractor import BackboneExtractor, load
from quietvit.weights.native import WEIGHTS_NAME, save_teacher

NUM_CHECK_IMAGES = 4
ORIGINS = {  # by the "source" of a provenance: weights that others trained
    "dinov2": "pretrained without labels by DINOv2, converted by quietvit",
    "t2t_vit": "trained with labels by T2T-ViT, converted by quietvit",
}


def export_teacher(model: Path, out: Path) -> dict[str, Any]:
    """Write `out`/teacher.safetensors, teacher.json and README.md; returns the report that stands in the card.

    `model` is whatever `load` takes. Raises FileExistsError if `out` is a file or holds anything, ValueError when the
    reloaded features differ: nothing is left behind then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise FileExistsError(f"{out} {what}: choose a new folder for the export")
    extractor = load(model, device="cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        meta = extractor.meta
        save_teacher(
            temporary,
            extractor.backbone,
            mean=extractor.mean,
            std=extractor.std,
            image_size=extractor.image_size,
            provenance=meta["provenance"],
            backbone_name=meta["backbone"]["name"],
        )
        difference = greatest_difference(extractor, load(temporary / WEIGHTS_NAME, device="cpu"))
        if difference != 0.0:
            raise ValueError(f"the reloaded export differs from {model} by {difference:g}: nothing was exported")
        report = {"max_difference": difference, "images_compared": NUM_CHECK_IMAGES, "weights": str(out / WEIGHTS_NAME)}
        write_text(temporary / "README.md", _card(meta, report))
        if out.exists():
            out.rmdir()
        temporary.chmod(0o755)  # mkdtemp makes folders private
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def greatest_difference(a: BackboneExtractor, b: BackboneExtractor) -> float:
    """Greatest absolute difference of all features, and of class scores if there are, on the same random images."""
    size = a.image_size
    images = torch.randn(NUM_CHECK_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    x, y = a(images), b(images)
    pairs = [(x.cls, y.cls), (x.registers, y.registers), (x.patches, y.patches)]
    if a.num_classes or b.num_classes:
        pairs.append((a.classify(x.cls), b.classify(y.cls)))
    return max(float((p - q).abs().max()) for p, q in pairs if p.numel())


def _card(meta: dict[str, Any], report: dict[str, Any]) -> str:
    arguments = meta["backbone"]["arguments"]
    rows = "\n".join(f"| {k} | {v} |" for k, v in arguments.items())
    mean, std = meta["normalisation"]["mean"], meta["normalisation"]["std"]
    origin = ORIGINS.get(meta["provenance"].get("source", ""), "pretrained without labels by quietvit")
    classes = arguments.get("num_classes", 0)
    head = f"scores = extractor.logits(images)  # [B {classes}], by the supervised head\n" if classes else ""
    return f"""# {meta["backbone"]["name"]} backbone, {origin}

```python
import quietvit

extractor = quietvit.load("teacher.safetensors")
features = extractor(images)  # [B, 3, H, W], normalised; -> features.cls [B D], .registers [B R D], .patches [B h w D]
{head}```

Input: RGB in [0, 1], minus {mean}, divided by {std}. Trained at {meta["image_size"]} px.
Reloaded and compared on {report["images_compared"]} images: greatest difference {report["max_difference"]:g}.

| argument | value |
| --- | --- |
{rows}

Provenance:

```json
{json.dumps(meta["provenance"], indent=2)}
```
"""

"""quietvit's own folder: `teacher.safetensors` and `teacher.json`, read by `quietvit.load` or by plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor

from quietvit.backbones.trunk import Trunk
from quietvit.contracts import Features
from quietvit.weights.export.compare import check_batches, compare
from quietvit.weights.export.plain_code import needs_quietvit, plain_code, run_plain_code
from quietvit.weights.export.target import ExportOptions, Opened, Parity, Size, Target
from quietvit.weights.extractor import BackboneExtractor, load
from quietvit.weights.native import WEIGHTS_NAME, save_teacher

__all__ = ["TARGET"]

PLAIN = "plain PyTorch"
PLAIN_TOLERANCE = 1e-5  # issue 6: what "the same features" means in float32


def _refusal(extractor: BackboneExtractor, options: ExportOptions) -> str | None:
    return None


def _write(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
    save_teacher(
        folder,
        extractor.backbone,
        mean=extractor.mean,
        std=extractor.std,
        image_size=extractor.image_size,
        provenance=extractor.meta["provenance"],
        backbone_name=extractor.meta["backbone"]["name"],
    )


def _reopen(folder: Path, options: ExportOptions) -> Opened:
    return load(folder / WEIGHTS_NAME, device="cpu")


def _sizes(extractor: BackboneExtractor, options: ExportOptions) -> Sequence[Size]:
    native, stride = extractor.image_size, extractor.stride
    larger, smaller = native + 2 * stride, max(native // 2 // stride, 1) * stride  # in one image, for the sake of time
    return (native, native), (larger, smaller)


def _usage(extractor: BackboneExtractor, options: ExportOptions) -> str:
    classes = extractor.num_classes
    scores = f"scores = extractor.logits(images)  # [B {classes}], by the supervised head\n" if classes else ""
    side = extractor.image_size
    return (
        "import torch\n"
        "import quietvit\n"
        "\n"
        f'extractor = quietvit.load("{WEIGHTS_NAME}")\n'
        "mean, std = (torch.tensor(v).view(3, 1, 1) for v in (extractor.mean, extractor.std))\n"
        f"images = (torch.rand(1, 3, {side}, {side}) - mean) / std  # yours: RGB from 0 to 1, then normalised\n"
        "features = extractor(images)  # .cls [B D], .registers [B R D], .patches [B h w D]\n" + scores
    )


def _remarks(extractor: BackboneExtractor, options: ExportOptions) -> str:
    backbone = cast(Trunk, extractor.backbone)
    if reason := needs_quietvit(backbone):
        return f"The features can be computed by quietvit alone: {reason}."
    return f"Without quietvit, the same features at {extractor.image_size} px:\n\n```python\n{plain_code(backbone)}```"


def _further(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> Sequence[Parity]:
    """The code that the card prints, run on the file that the folder holds."""
    backbone = cast(Trunk, extractor.backbone)
    if needs_quietvit(backbone):
        return ()
    size = (extractor.image_size, extractor.image_size)
    batches = check_batches(extractor, size)
    answers = dict(zip(map(len, batches), run_plain_code(plain_code(backbone), folder, batches), strict=True))

    def opened(images: Tensor) -> Features:
        return answers[len(images)]

    return compare(extractor, opened, [size], reader=PLAIN, tolerance=PLAIN_TOLERANCE)


TARGET = Target(
    name="safetensors",
    about="quietvit's own folder: weights, JSON, and code that reads them with plain PyTorch",
    tolerance=0.0,
    refusal=_refusal,
    write=_write,
    reopen=_reopen,
    sizes=_sizes,
    usage=_usage,
    remarks=_remarks,
    further=_further,
)

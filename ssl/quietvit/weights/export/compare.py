"""How far an export is from the model it was made of, on images that are the same every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from quietvit.contracts import Features
from quietvit.data.scenes import Scenes
from quietvit.weights.export.target import Opened, Parity, Size
from quietvit.weights.extractor import BackboneExtractor

__all__ = ["check_batches", "check_parities", "compare"]

NUM_PICTURES, NUM_NOISE = 2, 1  # a batch of three, and one of one: enough to tell a batch size that was frozen (ours)


def check_batches(
    extractor: BackboneExtractor, size: Size
) -> tuple[Float[Tensor, "3 3 H W"], Float[Tensor, "1 3 H W"]]:
    """Normalised images to compare on, fp32 on the CPU: rendered scenes and noise, then the first of them alone."""
    scenes = Scenes("val", num_images=NUM_PICTURES)
    pixels = torch.stack([torch.from_numpy(scenes.load(i)) for i in range(NUM_PICTURES)]).permute(0, 3, 1, 2) / 255
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (extractor.mean, extractor.std))
    noise = torch.randn(NUM_NOISE, 3, *size, generator=torch.Generator().manual_seed(0))
    images = torch.cat(((pixels - mean) / std, noise))
    return images, images[:1].clone()


def compare(
    extractor: BackboneExtractor, opened: Opened, sizes: Sequence[Size], *, reader: str, tolerance: float
) -> list[Parity]:
    """Greatest absolute difference of every output at every size, over both `check_batches`.

    Class scores are among the outputs if the model has a head and `opened` gives `logits`. Raises ValueError if an
    output has another shape than the model's, naming it.
    """
    found = []
    for size in sizes:
        greatest: dict[str, float] = {}
        for images in check_batches(extractor, size):
            for output, difference in _differences(extractor, opened, images, reader).items():
                # max() would pass over what is not a number
                greatest[output] = (
                    max(greatest.get(output, 0.0), difference) if difference == difference else difference
                )
        found += [Parity(reader, output, size, difference, tolerance) for output, difference in greatest.items()]
    return found


def _differences(
    extractor: BackboneExtractor, opened: Opened, images: Float[Tensor, "B 3 H W"], reader: str
) -> dict[str, float]:
    ours, theirs = _outputs(extractor(images)), _outputs(opened(images))
    if extractor.num_classes and hasattr(opened, "logits"):
        ours["logits"], theirs["logits"] = extractor.logits(images), opened.logits(images)
    differences = {}
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            raise ValueError(
                f"{reader} reads {name} as {list(theirs[name].shape)} instead of {list(value.shape)} from the export: "
                "nothing was exported"
            )
        if value.numel():
            differences[name] = float((value - theirs[name].detach().cpu().float()).abs().max())
    return differences


def _outputs(features: Features) -> dict[str, Tensor]:
    return {"cls": features.cls, "registers": features.registers, "patches": features.patches}


def check_parities(parities: Sequence[Parity]) -> None:
    """Raises ValueError, naming output, size and difference, unless all are within their tolerance."""
    beyond = [
        f"{p.output} at {p.size[0]} x {p.size[1]} px by {p.difference:.3g}, where {p.tolerance:g} is allowed"
        for p in parities
        if not p.passes
    ]
    if beyond:
        reader = next(p.reader for p in parities if not p.passes)
        raise ValueError(
            f"the export, read by {reader}, differs from the model in {'; '.join(beyond)}: nothing was exported"
        )

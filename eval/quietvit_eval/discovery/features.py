"""From an image to the features that LOST works on, of a model or of the colours alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from quietvit.contracts import Extractor, Features
from quietvit_eval.discovery.lost import centred
from quietvit_eval.views import normalised

FACETS = ("queries", "keys", "values")  # in the order that attention has them

Image = UInt8[np.ndarray, "H W 3"]


@runtime_checkable
class AttentionReader(Protocol):
    """What an extractor also is if it can look into its attention; quietvit's own and other people's models can."""

    def attention_inputs(
        self, images: Float[Tensor, "B 3 H W"], block: int = -1
    ) -> tuple[Float[Tensor, "B A T d"], Float[Tensor, "B A T d"], Float[Tensor, "B A T d"]]:
        """Queries, keys and values of a block (from 0; -1 is the last), by head; patches are the last tokens."""
        ...


@dataclass(frozen=True)
class PatchFeatures:
    """Features of the patches of one image, row-major, on the grid, and the (height, width) it had before padding."""

    values: Float[Tensor, "N D"]
    grid: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class FeatureView:
    """How an image becomes features."""

    facet: str  # one of FACETS
    block: int  # from 0; -1: the last
    center: bool  # features less their mean over the image
    max_side: int | None  # the longer side in pixels at the most; None: as large as the image is

    def of(self, extractor: Extractor, image: Image, name: str) -> PatchFeatures:
        """The facet of every patch, heads side by side; [CLS] and registers are dropped.

        Raises ValueError for features that are no finite numbers; `name` of the image begins the message.
        """
        assert isinstance(extractor, AttentionReader)
        shrunk = at_most(image, self.max_side)
        height, width = shrunk.shape[:2]
        stride = extractor.stride
        x = normalised(extractor, torch.from_numpy(np.ascontiguousarray(shrunk)).permute(2, 0, 1)[None])
        padded = F.pad(x, (0, -width % stride, 0, -height % stride))
        grid = padded.shape[2] // stride, padded.shape[3] // stride
        facet = extractor.attention_inputs(padded, self.block)[FACETS.index(self.facet)]
        values = facet[0, :, -grid[0] * grid[1] :].transpose(0, 1).flatten(1)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: the model gives {self.facet} that are no finite numbers")
        return PatchFeatures(centred(values) if self.center else values, grid, (height, width))


def at_most(image: Image, side: int | None) -> Image:
    """The image, shrunk (area average) so that its longer side has `side` pixels if it had more."""
    height, width = image.shape[:2]
    if side is None or max(height, width) <= side:
        return image
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrunk: Image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
    return shrunk


class PatchColours:
    """The control without a model: the mean colour of each patch, less that of the image, as its every facet.

    Colours are those that another extractor would see, normalised and padded, in patches of its size.
    """

    embed_dim = 3

    def __init__(self, like: Extractor) -> None:
        self.stride, self.mean, self.std = like.stride, like.mean, like.std
        self.image_size, self.num_blocks = like.image_size, like.num_blocks

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        maps = F.avg_pool2d(images.float(), self.stride)
        patches = (maps - maps.mean((2, 3), keepdim=True)).permute(0, 2, 3, 1)
        return Features(maps.mean((2, 3)), maps.new_empty(len(maps), 0, 3), patches)

    def last_blocks(self, images: Float[Tensor, "B 3 H W"], num: int) -> Sequence[Features]:
        """The colours `num` times: there are no layers."""
        return [self(images)] * num

    def attention_inputs(self, images: Float[Tensor, "B 3 H W"], block: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """The colours thrice, with one head and no token but the patches, whatever the block."""
        colours = self(images).patches.flatten(1, 2)[:, None]
        return colours, colours, colours

    def identity(self) -> dict[str, Any]:
        """For the card."""
        return {"hash": f"patch-colours-{self.stride}"}

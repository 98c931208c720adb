"""What the rooms of the house hand to each other: plain tensors with a fixed meaning.

Legend of the shape letters used in every annotation of quietvit:

    B images of a batch      S side of a global crop   s side of a local crop   H W height, width in pixels
    N patch tokens           h w patch grid            D embedding width        R registers
    L blocks                 A attention heads         T tokens of a sequence   P patch side in pixels
    K prototypes             M masked patch tokens     G global crops (2)       l local crops per image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils._pytree import register_pytree_node

__all__ = ["BadSample", "Batch", "Extractor", "Features", "Targets"]


@dataclass(frozen=True)
class BadSample:
    """An image that could not be read, and was replaced by another one."""

    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One training batch as the loader makes it. Crops are crop-major: all first views, then all second views.

    Pixels stay uint8 until the training step normalises them on the device (four times less to move).
    """

    global_crops: UInt8[Tensor, "G*B 3 S S"]
    local_crops: UInt8[Tensor, "l*B 3 s s"]
    masks: Bool[Tensor, "G*B N"]  # True = hidden from the student
    mask_indices: Int[Tensor, " M"]  # positions of the masked patches in the flattened [G*B*N], ascending
    mask_weights: Float[Tensor, " M"]  # 1 / number of masked patches of the same crop
    indices: Int[Tensor, " B"]  # which samples of the source these are (after replacements)
    bad: tuple[BadSample, ...] = field(default=())

    @property
    def num_images(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, fn: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: fn(v) if isinstance(v, Tensor) else v for k, v in values.items()})


@dataclass(frozen=True)
class Targets:
    """What the teacher asks of the student: distributions over prototypes, fp32, rows sum to one."""

    cls: Float[Tensor, "G B K"]  # row g belongs to student view g and comes from the *other* view
    patches: Float[Tensor, "M K"]  # one row per masked patch, in the order of Batch.mask_indices


@dataclass(frozen=True)
class Features:
    """Output of a backbone for images of one size. Registers are apart: they never leak into `patches`."""

    cls: Float[Tensor, "B D"]
    registers: Float[Tensor, "B R D"]
    patches: Float[Tensor, "B h w D"]


# Engines that look for tensors in what a module returns (FSDP2's hooks, torch.export) find them in here.
register_pytree_node(
    Features,
    lambda f: ([f.cls, f.registers, f.patches], None),
    lambda values, _: Features(*values),
    serialized_type_name="quietvit.contracts.Features",
)


@runtime_checkable
class Extractor(Protocol):
    """The one evaluable signature: a frozen model, whoever trained it.

    `mean` and `std` are in units of [0, 1] RGB; images come normalised with them.
    """

    embed_dim: int
    num_blocks: int
    stride: int  # image sides must be multiples of this many pixels
    image_size: int  # the side it was trained at; evaluation may use another
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        """Features after the final norm."""
        ...

    def last_blocks(self, images: Float[Tensor, "B 3 H W"], num: int) -> Sequence[Features]:
        """Features of the last `num` blocks, earliest first, each passed through the final norm."""
        ...

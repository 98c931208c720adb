"""Linear classifiers side by side: all learning rates on the same input are one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

# DINOv2, for a batch of 256
LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
BLOCKS = (1, 4)  # DINOv2
MOMENTUM = 0.9  # DINOv2; no weight decay
INIT_STD = 0.01  # DINOv2; biases start at 0


@dataclass(frozen=True)
class Head:
    """One classifier of the grid. `lr` is for a batch of 256 images."""

    blocks: int
    avgpool: bool
    lr: float


@dataclass
class HeadGroup:
    """All heads with the same input: H learning rates side by side in one matrix, so a step is one product each way."""

    columns: slice  # of the flattened tokens [CLS_1 .. CLS_n | mean patch]
    heads: list[Head]
    weight: Float[Tensor, "W H C"]
    bias: Float[Tensor, "H C"]
    momenta: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B H C"]:
        """Of all heads; `x` are whole rows of features."""
        return (x[:, self.columns] @ self.weight.flatten(1)).view(len(x), *self.bias.shape) + self.bias

    def step(self, x: Float[Tensor, "B F"], labels: Int[Tensor, " B"], lrs: Float[Tensor, " H"]) -> None:
        """One SGD step on the sum over heads of the mean cross-entropy. Its gradient is softmax minus one-hot."""
        error = torch.softmax(self.logits(x), dim=-1)
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error.div_(len(x))
        gradients = ((x[:, self.columns].T @ error.flatten(1)).view_as(self.weight), error.sum(dim=0))
        for value, momentum, gradient in zip((self.weight, self.bias), self.momenta, gradients, strict=True):
            momentum.mul_(MOMENTUM).add_(gradient)
            value.addcmul_(momentum, lrs[:, None], value=-1)


def make_groups(
    num_blocks: int,
    embed_dim: int,
    num_classes: int,
    *,
    blocks: Sequence[int] = BLOCKS,
    lrs: Sequence[float] = LRS,
    pooled: Sequence[bool] = (False, True),
    generator: torch.Generator,
    device: torch.device,
) -> list[HeadGroup]:
    """The grid, for features of the last `num_blocks` blocks and the mean patch. Heads of one group start alike.

    `pooled`: without and with the mean patch; pixels are one vector an image and have the first only.
    """
    width = embed_dim
    groups = []
    for n in sorted({min(n, num_blocks) for n in blocks}):
        for avgpool in pooled:
            columns = slice((num_blocks - n) * width, (num_blocks + int(avgpool)) * width)
            start = torch.randn(columns.stop - columns.start, 1, num_classes, generator=generator) * INIT_STD
            groups.append(
                HeadGroup(
                    columns,
                    [Head(n, avgpool, lr) for lr in lrs],
                    start.repeat(1, len(lrs), 1).to(device),
                    torch.zeros(len(lrs), num_classes, device=device),
                )
            )
    return groups

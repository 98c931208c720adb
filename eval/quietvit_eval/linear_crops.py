"""The linear grid on random crops, as DINOv2 trains it: at every step one pass of the frozen model for all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from quietvit.contracts import Extractor
from quietvit_eval.data import EvalData, Split
from quietvit_eval.fit import Schedule, fit
from quietvit_eval.head_grid import MOMENTUM, HeadGroup
from quietvit_eval.label_views import LabelBatch, RandomView, label_batches
from quietvit_eval.views import normalised

BATCH = 128  # DINOv2, on each GPU
STEPS = 12_500  # DINOv2
VIEW = "random crops of 0.08 to 1 of the area, ratio 3/4 to 4/3, mirrored half of the time"


def train_on_crops(
    groups: Sequence[HeadGroup],
    extractor: Extractor,
    data: EvalData,
    part: Split,
    *,
    num_blocks: int,
    batch_size: int,
    steps: int,
    facts: Mapping[str, Any],
) -> None:
    """Train all heads in place, on new views of the images of `part` at every step; interrupted, it goes on later.

    Args:
        num_blocks: of how many last blocks the heads see [CLS].
        batch_size: images of a step, of all ranks together; rates are lr * batch_size / 256.
        facts: what tells this training from others of the same model, images and seed.

    Raises ValueError as `label_batches` and `fit`.
    """
    grid = HeadGrid(groups)

    def loss_of(batch: LabelBatch, step: int) -> Tensor:
        x = token_rows(extractor, batch.images, num_blocks).to(data.device)
        return grid.loss(x, batch.labels.to(data.device))

    def batches_from(first: int) -> Iterable[LabelBatch]:
        view = RandomView(data.transform.image_size)
        return label_batches(data, part, view, batch_size=batch_size, first=first, steps=steps)

    fit(
        grid,
        loss_of,
        batches_from,
        HeadwiseSgd(grid, scale=batch_size / 256),
        Schedule(steps, decay="cosine"),
        state=data.state_file("linear", facts),
        console=data.reading.console,
        what=f"{sum(len(g.heads) for g in groups)} linear heads",
    )


def token_rows(extractor: Extractor, images: UInt8[Tensor, "B 3 S S"], num_blocks: int) -> Float[Tensor, "B F"]:
    """[CLS] of the last blocks, earliest first, and the mean patch of the last, flattened: rows as the grid reads."""
    features = extractor.last_blocks(normalised(extractor, images), num_blocks)
    return torch.cat([*(f.cls for f in features), features[-1].patches.flatten(1, 2).mean(dim=1)], dim=1).float()


class HeadGrid(nn.Module):
    """Head groups as a module, for autograd: its parameters are the groups' own tensors."""

    def __init__(self, groups: Sequence[HeadGroup]) -> None:
        super().__init__()
        self.groups = list(groups)
        self.weights = nn.ParameterList([nn.Parameter(g.weight) for g in groups])
        self.biases = nn.ParameterList([nn.Parameter(g.bias) for g in groups])

    def loss(self, x: Float[Tensor, "B F"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """Sum over heads of the mean cross-entropy. A head whose loss is no longer finite does not count."""
        total = x.new_zeros(())
        for group, weight, bias in zip(self.groups, self.weights, self.biases, strict=True):
            logits = (x[:, group.columns] @ weight.flatten(1)).unflatten(1, bias.shape) + bias
            wanted = labels[:, None].expand(-1, len(group.heads))
            losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(dim=0)
            total = total + losses[losses.isfinite()].sum()
        return total


class HeadwiseSgd(torch.optim.Optimizer):
    """SGD with momentum, in which every head of a group has a rate of its own; "lr" multiplies them all."""

    def __init__(self, grid: HeadGrid, *, scale: float) -> None:
        """The rate of a head is its lr times `scale`."""
        of = zip(grid.groups, grid.weights, grid.biases, strict=True)
        groups = [{"params": [w, b], "rates": [h.lr * scale for h in g.heads]} for g, w, b in of]
        super().__init__(groups, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
                rates = torch.tensor(group["rates"], device=parameter.device) * group["lr"]
                parameter.addcmul_(state["momentum"], rates[:, None], value=-1)

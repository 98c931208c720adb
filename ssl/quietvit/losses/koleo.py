"""KoLeo: features spread over the sphere, each pushed away from its nearest neighbour (arXiv 1806.03198; DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from quietvit import dist

__all__ = ["koleo_loss", "koleo_over_views"]

# Features of unit length are known to about 1e-7 in float32. Nearer than this, the direction between two rows is
# rounding noise, and its 1/distance gradient (up to 2e7) would take over a clipped step: such pairs count in the
# loss, not in the gradient.
NOISE = 1e-6


def koleo_loss(
    x: Float[Tensor, "B D"], *, num_neighbours: int = 1, across_ranks: bool = False, eps: float = 1e-8
) -> Float[Tensor, ""]:
    """-(1 / B k) sum_i sum_{j in NN_k(i)} log(||x_i - x_j + eps|| + eps) on rows of unit length, in float32.

    Neighbours are the `num_neighbours` greatest dot products, a row itself left out; which they are is not
    differentiated, the distance is, on both sides. `across_ranks` looks for them among the rows of all ranks (DINOv3;
    equal B everywhere), else on this rank alone (DINOv2). eps = 1e-8, inside (added to every component) and outside,
    is DINOv2's.

    Equal rows give a finite loss and no gradient. With no other row there is no neighbour: the loss is 0, without
    gradient; with fewer than k others, k is that many.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps)
        everyone = dist.gather_rows(x) if across_ranks else x
        k = min(num_neighbours, len(everyone) - 1)
        if k < 1:
            return x.new_zeros(())
        first = dist.rank() * len(x) if across_ranks else 0
        neighbours = everyone[_nearest(x.detach(), everyone.detach(), k, first)]
        difference = x.unsqueeze(1) - neighbours + eps
        apart = difference.detach().norm(dim=-1, keepdim=True) > NOISE
        # Both branches of where() must have finite gradients: the noisy pairs are cut off before the norm.
        distance = torch.where(apart, difference, difference.detach()).norm(dim=-1)
        loss: Tensor = -(distance + eps).log().mean()
        return loss


def _nearest(x: Float[Tensor, "B D"], everyone: Float[Tensor, "W*B D"], k: int, first: int) -> Int[Tensor, "B k"]:
    """Rows of `everyone` most similar to each of `x`, where row i of x is row first + i of everyone."""
    similarity = x @ everyone.T
    own = torch.arange(len(x), device=x.device)
    similarity[own, own + first] = -torch.inf
    return similarity.topk(k, dim=-1).indices


def koleo_over_views(
    cls: Float[Tensor, "G B D"], *, crops: str = "both", num_neighbours: int = 1, across_ranks: bool = False
) -> Float[Tensor, ""]:
    """KoLeo of each global view's batch on its own (two views of one image are never neighbours), added up.

    `crops`: "both" adds the views (DINOv2's code; its weight of 0.1 then acts as 0.2), "first" takes the first view
    only (the text of DINOv2). Raises ValueError for another.
    """
    if crops not in ("both", "first"):
        raise ValueError(f"koleo_crops must be 'both' or 'first', not {crops!r}")
    views = cls if crops == "both" else cls[:1]
    return torch.stack([koleo_loss(v, num_neighbours=num_neighbours, across_ranks=across_ranks) for v in views]).sum()

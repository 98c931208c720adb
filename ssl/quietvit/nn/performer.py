"""Attention of linear cost by positive random features (Performer: Choromanski et al. 2021), safe from overflow.

The kernel is phi(q)'phi(k) with phi(x)_m = exp(w_m'x - |x|^2 / 2), one feature for each row w_m of a fixed matrix.
Evaluated as written, exponents of some tens overflow or make the denominator vanish. Both sums are therefore computed
relative to their largest terms; the quotient does not change:

    c_m = max over visible j of (w_m'k_j - |k_j|^2 / 2),     E_i = max over m of (w_m'q_i - |q_i|^2 / 2 + c_m)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["performer_attention", "random_features"]

MAX_EXPONENT = 80.0  # e^80 is finite in float32; beyond it the compatibility term has switched attention off anyway


def performer_attention(
    q: Float[Tensor, "b n d"],
    k: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n e"],
    w: Float[Tensor, "m d"],
    visible: Bool[Tensor, "b n"] | None = None,
    *,
    epsilon: float = 0.0,
) -> Float[Tensor, "b n e"]:
    """sum_j phi(q_i)'phi(k_j) v_j / (sum_j phi(q_i)'phi(k_j) + m epsilon) over the visible j; each image has one.

    Computed in float32 at least, also under autocast. The denominator is at least 1 before epsilon is added, so 0, the
    default, is safe. T2T-ViT has 1e-8 there, with phi divided by sqrt(m): where keys or queries are long, it dwarfs the
    true denominator and switches attention off, and its released weights may rely on that.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, w = (x.to(dtype) for x in (q, k, v, w))
        key_exponents = k @ w.T - k.square().sum(-1, keepdim=True) / 2  # [b n m]
        if visible is not None:
            key_exponents = key_exponents.masked_fill(~visible[..., None], -math.inf)
        key_max = key_exponents.detach().amax(1, keepdim=True)  # c: [b 1 m]; the quotient does not depend on it
        query_exponents = q @ w.T + key_max
        if epsilon:
            query_exponents = query_exponents - q.square().sum(-1, keepdim=True) / 2  # cancels without epsilon
        query_max = query_exponents.detach().amax(-1, keepdim=True)  # E: [b n 1]
        keys = (key_exponents - key_max).exp()
        queries = (query_exponents - query_max).exp()
        numerator = queries @ (keys.mT @ v)
        denominator = queries @ keys.sum(1)[..., None]
        if epsilon:
            denominator = denominator + len(w) * epsilon * (-query_max).clamp(max=MAX_EXPONENT).exp()
        return numerator / denominator


def random_features(
    features: int, dim: int, norm: float, generator: torch.Generator | None = None
) -> Float[Tensor, "m d"]:
    """Rows of length `norm`, orthogonal to each other in blocks of `dim` (Choromanski et al. 2021, section 3.2)."""
    blocks = []
    for first in range(0, features, dim):
        orthogonal, upper = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device="cpu"))
        orthogonal = orthogonal * upper.diagonal().sign()  # uniform over all rotations
        blocks.append(orthogonal.T[: features - first])
    return torch.cat(blocks) * norm

"""Cross-entropy between a distribution over prototypes and the student's logits, the atom of DINO and iBOT."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["soft_cross_entropy"]


def soft_cross_entropy(
    logits: Float[Tensor, "*rows K"], targets: Float[Tensor, "*rows K"], *, temp: float, mass: float = 1.0
) -> Float[Tensor, " *rows"]:
    """H(q, softmax(s / temp)) = -sum_k q_k log softmax(s / temp)_k for every row, in float32.

    Computed as mass * logsumexp(s / temp) - sum_k q_k s_k / temp, which spares the K-wide log-softmax. `mass` is what
    each row of `targets` sums to: 1 for one distribution, 2 for the sum of two. Targets get no gradient.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scaled = logits.float() / temp
        return mass * scaled.logsumexp(-1) - (targets.detach().float() * scaled).sum(-1)

"""Effective rank of a set of features: a collapse shows here before it shows anywhere else."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def rankme(features: Float[Tensor, "M D"]) -> float:
    """exp of the entropy of the singular values, normalised to sum to one (RankMe, arXiv 2210.02885, equation 1).

    Between 1 (all features along one line) and min(M, D). Features are taken as they are, not centred, as in the
    paper. The singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64: exact to about
    1e-8 of the greatest, and much cheaper than an SVD of [M, D]. Returns 0 for features that are all zero and nan where
    one is not finite.
    """
    assert features.ndim == 2, "rankme takes a matrix [M, D]"
    assert len(features) > 0, "rankme takes at least one row"
    x = features.detach().to("cpu" if features.device.type == "mps" else features.device, torch.float64)  # mps: no fp64
    if not bool(torch.isfinite(x).all()):
        return float("nan")
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = values.sum()
    if float(total) == 0:
        return 0.0
    share = values / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))

"""What depth heads are trained on: the scale-invariant log loss and the loss on gradients of log depth."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SIG_MEAN = 0.15  # share of the squared mean, DINOv2: 1 - lambda with lambda = 0.85 (Lee et al. 2019)
EPS = 1e-3  # metres added before the logarithm, DINOv2
SMALLEST = 1e-12  # below it the root's argument is held, or its gradient would be infinite at 0 (ours)
STRIDES = (1, 2, 4, 6)  # of the gradient loss, DINOv2

Maps = Float[Tensor, "B H W"]


def sig_loss(
    predicted: Maps, target: Maps, valid: Bool[Tensor, "B H W"], *, warm_up: bool = False
) -> Float[Tensor, ""]:
    """sqrt(Var(g) + 0.15 mean(g)^2) over all valid pixels, g = ln(p + 0.001) - ln(t + 0.001), Var with Bessel's count.

    During warm-up (DINOv2: the first 100 steps) the variance is left out. Without a valid pixel it is 0. (Eigen et al.
    2014, equation 4; Lee et al. 2019.)
    """
    g = torch.log(predicted[valid] + EPS) - torch.log(target[valid] + EPS)
    if len(g) == 0:
        return predicted.sum() * 0
    inside = SIG_MEAN * g.mean() ** 2
    if not warm_up and len(g) > 1:
        inside = inside + g.var()
    return torch.sqrt(inside.clamp_min(SMALLEST))


def gradient_loss(predicted: Maps, target: Maps, valid: Bool[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Absolute differences of g = ln(p + 0.001) - ln(t + 0.001) between pixels two apart, down and across.

    On maps taken at strides 1, 2, 4 and 6: their sum where both ends are valid over the number of valid pixels of that
    map, summed over strides. DINOv2's configuration has it, its code takes batch and channel for rows and columns.
    """
    g = torch.log(predicted + EPS) - torch.log(torch.where(valid, target, 1.0) + EPS)
    total = predicted.sum() * 0
    for stride in STRIDES:
        d, v = g[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = (d[:, 2:] - d[:, :-2]).abs()[v[:, 2:] & v[:, :-2]].sum()
        across = (d[:, :, 2:] - d[:, :, :-2]).abs()[v[:, :, 2:] & v[:, :, :-2]].sum()
        total = total + (down + across) / v.sum().clamp_min(1)
    return total

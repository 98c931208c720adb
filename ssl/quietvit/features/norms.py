"""Outlier tokens: patch tokens whose norm is far above that of the others ("Vision Transformers Need Registers").

Norms are those of the patch tokens *before* the final norm layer, which would flatten them to about sqrt(D). The paper
cuts DINOv2-g at 150 by eye; that number belongs to that model. Here the cut comes from the norms themselves.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

SPREADS = 5.0  # ours: a normal distribution of log norms puts 3e-7 of its mass above 5 standard deviations
LEAST_RATIO = 2.0  # ours: in the paper's figures outliers lie 2 to 10 times above the normal tokens
MAD_TO_STD = 1.4826  # standard deviation of a normal distribution whose median absolute deviation is one


@torch.no_grad()
def outlier_threshold(norms: Float[Tensor, "B N"]) -> float:
    """The norm above which a token counts as an outlier: median * max(2, exp(5 * 1.4826 * MAD of the log norms)).

    Median and MAD are taken over all tokens of all images together, so up to half of the tokens may be outliers
    without moving them. The factor 2 keeps a very narrow distribution from having outliers by rounding alone. Tokens of
    norm zero are left out of both; returns 0 if there are no others, nan where a norm is not finite.
    """
    values = norms.detach().float().flatten()
    if not bool(torch.isfinite(values).all()):
        return float("nan")
    values = values[values > 0]
    if len(values) == 0:
        return 0.0
    logs = values.log()
    centre = logs.median()
    spread = MAD_TO_STD * (logs - centre).abs().median()
    return float(torch.exp(centre + (SPREADS * spread).clamp(min=math.log(LEAST_RATIO))))


@torch.no_grad()
def outlier_share(norms: Float[Tensor, "B N"]) -> float:
    """Share of tokens, in [0, 1], with a norm above `outlier_threshold(norms)`; nan where a norm is not finite."""
    threshold = outlier_threshold(norms)
    return float("nan") if math.isnan(threshold) else float((norms > threshold).float().mean())

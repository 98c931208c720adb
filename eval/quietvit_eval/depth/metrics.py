"""Scores of one depth map: which pixels count, and the measures that the literature reports."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32

from quietvit_eval.depth.options import NYU_FRAME

EIGEN = (slice(45, 471), slice(41, 601))  # Eigen et al. 2014: of NYU's 480 x 640
GARG_ROWS, GARG_COLUMNS = (0.40810811, 0.99189189), (0.03594771, 0.96405229)  # Garg et al. 2016: shares of the sides

Map = Float[np.ndarray, "H W"]


def scored_pixels(
    target: Float32[np.ndarray, "H W"], *, min_depth: float, max_depth: float, crop: str
) -> Bool[np.ndarray, "H W"]:
    """Pixels that are measured, strictly between the limits and inside the crop ("eigen", "garg", "none").

    Raises ValueError for the Eigen crop of a map that is not 480 x 640: its rows and columns are absolute.
    """
    inside = np.zeros(target.shape, dtype=bool)
    inside[_window(target.shape, crop)] = True
    return inside & (target > min_depth) & (target < max_depth)


def _window(shape: tuple[int, ...], crop: str) -> tuple[slice, slice]:
    height, width = shape
    if crop == "none":
        return slice(0, height), slice(0, width)
    if crop == "garg":
        (top, bottom), (left, right) = GARG_ROWS, GARG_COLUMNS
        return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))
    if (height, width) != NYU_FRAME:
        raise ValueError(
            f"depth: eval_crop=eigen names rows and columns of 480 x 640, but a depth map is {height} x {width}: "
            "set eval_crop=none"
        )
    return EIGEN


def depth_scores(predicted: Map, target: Map, valid: Bool[np.ndarray, "H W"]) -> dict[str, float]:
    """Errors in metres, shares of good pixels and relative errors over the valid pixels of one image, in float64.

    With e = ln p - ln g: abs_rel mean |p - g| / g; sq_rel mean (p - g)^2 / g; rmse and mae in metres; rmse_log
    sqrt(mean e^2); log10 mean |log10 p - log10 g|; d1, d2, d3 the share with max(p / g, g / p) < 1.25, 1.25^2, 1.25^3;
    silog 100 sqrt(mean e^2 - (mean e)^2) (Eigen et al. 2014; the toolbox that DINOv2 used). Depths must be positive,
    and there must be a valid pixel.
    """
    p, g = predicted[valid].astype(np.float64), target[valid].astype(np.float64)
    error, log_error, ratio = p - g, np.log(p) - np.log(g), np.maximum(p / g, g / p)
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "abs_rel": float(np.mean(np.abs(error) / g)),
        "sq_rel": float(np.mean(error**2 / g)),
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "log10": float(np.mean(np.abs(np.log10(p) - np.log10(g)))),
        **{f"d{k}": float(np.mean(ratio < 1.25**k)) for k in (1, 2, 3)},
        "silog": float(100 * np.std(log_error)),
        "mae": float(np.mean(np.abs(error))),
    }


def aligned(predicted: Map, target: Map, valid: Bool[np.ndarray, "H W"]) -> Map:
    """a * predicted + b, with the scale and the shift of least squares over the valid pixels (as DINOv3's option).

    A prediction that is the same everywhere becomes the mean of the target.
    """
    p, g = predicted[valid].astype(np.float64), target[valid].astype(np.float64)
    variance = np.var(p)
    scale = np.mean((p - p.mean()) * (g - g.mean())) / variance if variance > 0 else 0.0
    out: Map = scale * (predicted - p.mean()) + g.mean()
    return out

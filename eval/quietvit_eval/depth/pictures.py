"""A test image, its depth, what was predicted and the error, side by side with bars in metres."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from quietvit.files import write_atomically

UNKNOWN = "#d9d9d9"  # light grey: in neither colour map
DEPTH_COLORS, ERROR_COLORS = "viridis", "magma"  # even in lightness, and readable without colour vision
PANEL = 3.0  # inches across one image (ours)


def draw_depth(
    path: Path,
    image: UInt8[np.ndarray, "H W 3"],
    target: Float[np.ndarray, "H W"],
    predicted: Float[np.ndarray, "H W"],
    valid: Bool[np.ndarray, "H W"],
    title: str,
) -> None:
    """Write the picture as PNG. Truth and prediction share one scale; pixels without a depth are grey.

    `valid`: the pixels that are scored; the error is grey elsewhere.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    known = target > 0
    shown = np.concatenate([target[known], predicted.ravel()])
    low, high = float(shown.min()), float(shown.max())
    depth_colors, error_colors = (colormaps[n].with_extremes(bad=UNKNOWN) for n in (DEPTH_COLORS, ERROR_COLORS))
    height = PANEL * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(4 * PANEL + 1.6, height + 0.7), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].imshow(image)
    axes[1].imshow(np.ma.masked_where(~known, target), cmap=depth_colors, vmin=low, vmax=high)
    scale = axes[2].imshow(predicted, cmap=depth_colors, vmin=low, vmax=high)
    error = np.ma.masked_where(~valid, np.abs(predicted - target))
    top = max(float(error.max()), 1e-3) if valid.any() else 1.0
    errors = axes[3].imshow(error, cmap=error_colors, vmin=0, vmax=top)
    truth = "depth" if known.all() else "depth (grey: not measured)"
    wrong = "error" if valid.all() else "error (grey: not scored)"
    for axis, name in zip(axes, ("image", truth, "predicted", wrong), strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(scale, ax=list(axes[1:3]), label="metres", fraction=0.03, pad=0.02)
    figure.colorbar(errors, ax=axes[3], label="metres", fraction=0.06, pad=0.04)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))

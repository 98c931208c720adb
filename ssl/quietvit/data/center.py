"""The view that is judged: shorter side resized, centre cut out. The same for live probes and offline evaluation."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "H W 3"]


def center_view(image: Pixels, size: int, *, resize: int | None = None) -> Pixels:
    """Resize the shorter side to `resize` pixels (bicubic, antialiased), then cut the central `size` x `size`.

    `resize=None` is `size`: nothing is lost at the border. DINOv2 evaluates with resize 256 and size 224.
    Raises ValueError if `resize` is smaller than `size`.
    """
    shorter = resize or size
    if shorter < size:
        raise ValueError(f"resize={shorter} is smaller than the crop of {size}: use at least {size}")
    height, width = image.shape[:2]
    if min(height, width) != shorter:
        scale = shorter / min(height, width)
        new = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])

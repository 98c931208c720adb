"""Blur against its sum in float64 and against torchvision's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torchvision.transforms.functional as TF
from PIL import Image

from quietvit.data.blur import gaussian_blur, gaussian_taps


def blur_by_the_sum(image: np.ndarray, sigma: float, kernel: int) -> np.ndarray:
    """Two-dimensional weights, pixel by pixel, indices mirrored at the borders."""
    radius = kernel // 2
    height, width, _ = image.shape
    weights = {
        (y, x): math.exp(-0.5 * (y * y + x * x) / sigma**2)
        for y in range(-radius, radius + 1)
        for x in range(-radius, radius + 1)
    }
    total = sum(weights.values())
    rows, cols = np.arange(height), np.arange(width)
    out = np.zeros(image.shape, np.float64)
    for (y, x), weight in weights.items():
        out += weight / total * image[mirror(rows + y, height)][:, mirror(cols + x, width)]
    return out


def mirror(index: np.ndarray, length: int) -> np.ndarray:
    index = np.abs(index)
    return np.where(index >= length, 2 * (length - 1) - index, index)


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.4, 0.6, 0.9, 1.3, 1.7, 2.0])
@pytest.mark.parametrize(("size", "kernel"), [(40, 9), (24, 5), (5, 9), (16, 3)])
def test_blur_is_its_sum(sigma: float, size: int, kernel: int) -> None:
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)  # the hardest case: noise
    error = gaussian_blur(image, sigma, kernel) - blur_by_the_sum(image, sigma, kernel)
    assert np.abs(error).max() < 2.5
    assert np.abs(error).mean() < 0.6  # of which rounding to whole levels is 0.25
    assert abs(error.mean()) < 0.1  # brightness is kept


@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    smooth = np.linspace(0, 255, 64)[:, None, None] * np.ones((1, 64, 3))
    image = (smooth + np.random.default_rng(0).normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
    expected = np.asarray(TF.gaussian_blur(Image.fromarray(image), [9, 9], [sigma, sigma]))
    error = np.abs(gaussian_blur(image, sigma, 9).astype(float) - expected)
    assert error.mean() < 0.2
    assert error.max() <= 2


@pytest.mark.parametrize("kernel", [1, 3, 9, 15])
def test_taps_sum_to_one_in_whole_256ths(kernel: int) -> None:
    lengths = []
    for sigma in np.linspace(0.1, 3.0, 59):
        taps = gaussian_taps(float(sigma), kernel)
        assert taps.sum() == 1.0
        np.testing.assert_array_equal(taps * 256, np.rint(taps * 256))
        np.testing.assert_array_equal(taps, taps[::-1])
        assert (taps > 0).all()
        assert len(taps) % 2 == 1
        assert len(taps) <= kernel
        assert taps[len(taps) // 2] == taps.max()
        lengths.append(len(taps))
    assert lengths == sorted(lengths)
    assert lengths[0] == 1  # sigma 0.1 does nothing
    assert lengths[-1] == kernel


def test_a_flat_image_stays_as_it_is() -> None:
    flat = np.full((20, 20, 3), 201, np.uint8)
    for sigma in (0.1, 0.7, 1.1, 2.0):
        np.testing.assert_array_equal(gaussian_blur(flat, sigma, 9), flat)

"""Colour operations against torchvision's functional ones on PIL images, at equal parameters."""

from __future__ import annotations

from itertools import permutations

import cv2
import numpy as np
import pytest
import torchvision.transforms.functional as TF
from PIL import Image

from quietvit.data.color import BRIGHTNESS, CONTRAST, HUE, SATURATION, Jitter, recolor, solarize

NEUTRAL = (1.0, 1.0, 1.0, 0.0)
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def photo(level: float, spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    total = np.zeros((96, 80, 3), np.float32)
    for cells, weight in ((3, 1.0), (12, 0.6), (96, 0.15)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        total += weight * cv2.resize(coarse, (80, 96), interpolation=cv2.INTER_CUBIC)
    return (total * spread + level).clip(0, 255).astype(np.uint8)


PHOTOS = {"plain": photo(120, 60), "bright": photo(215, 50, 1), "dark": photo(30, 40, 2), "flat": photo(120, 4, 3)}


def only(op: int, factor: float) -> Jitter:
    factors = tuple(factor if i == op else neutral for i, neutral in enumerate(NEUTRAL))
    return Jitter((op,), factors)  # type: ignore[arg-type]


def errors(out: np.ndarray, expected: Image.Image) -> np.ndarray:
    assert out.dtype == np.uint8
    assert out.shape == np.asarray(expected).shape
    difference: np.ndarray = out.astype(float) - np.asarray(expected)
    return difference


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("op", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.83, 1.0, 1.17, 1.4, 2.0])
def test_one_blend_is_within_one_level(name: str, op: int, factor: float) -> None:
    image = PHOTOS[name]
    error = errors(recolor(image, only(op, factor), grayscale=False), ADJUST[op](Image.fromarray(image), factor))
    assert np.abs(error).max() <= 1
    # Contrast: a mean gray next to a half may round to the other side. Saturation: PIL rounds gray first, which shows
    # where a whole multiple of it is all that is added (0 and 2).
    # Brightness: 1.17 * 100 is a hair under or over 117, as single precision has it.
    allowed = {BRIGHTNESS: 0.03, CONTRAST: abs(1 - factor) + 0.02, SATURATION: 0.35 if 0 < factor < 2 else 0.6}
    assert np.abs(error).mean() < allowed[op]
    if factor == 1:
        assert not error.any()


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.03, 0.0, 0.01, 0.1, 0.37])
def test_hue(name: str, turns: float) -> None:
    image = PHOTOS[name]
    error = errors(recolor(image, only(HUE, turns), grayscale=False), TF.adjust_hue(Image.fromarray(image), turns))
    assert np.abs(error).mean() < 1.2  # both compute on 8-bit hue and saturation, rounded differently
    assert abs(error.mean()) < 0.4


@pytest.mark.parametrize("name", PHOTOS)
def test_grayscale_is_within_one_level(name: str) -> None:
    image = PHOTOS[name]
    error = errors(recolor(image, None, grayscale=True), TF.rgb_to_grayscale(Image.fromarray(image), 3))
    assert np.abs(error).max() <= 1
    assert np.abs(error).mean() < 0.05


@pytest.mark.parametrize("order", list(permutations(range(4))))
@pytest.mark.parametrize(
    "factors",
    [
        (1.4, 0.6, 0.8, 0.1),  # clips early, then pulls together: fusing over the clipping would show
        (0.6, 1.4, 1.2, -0.1),
        (0.7, 0.7, 0.9, 0.05),  # nothing clips: one pass
        (1.4, 1.4, 1.2, -0.05),
    ],
)
def test_chains_stay_within_a_level_on_average(
    order: tuple[int, ...], factors: tuple[float, float, float, float]
) -> None:
    for name, image in PHOTOS.items():
        expected = Image.fromarray(image)
        for op in order:
            expected = ADJUST[op](expected, factors[op])
        jitter = Jitter(order, factors)
        error = errors(recolor(image, jitter, grayscale=False), expected)
        assert np.abs(error).mean() < 2.0, name
        assert abs(error.mean()) < 1.0, name
        gray = errors(recolor(image, jitter, grayscale=True), TF.rgb_to_grayscale(expected, 3))
        assert np.abs(gray).mean() < 1.5, name


def test_order_matters() -> None:
    """Else the permutations above would test one thing 24 times."""
    image, factors = PHOTOS["bright"], (1.4, 0.6, 0.8, 0.1)
    one = recolor(image, Jitter((0, 1, 2, 3), factors), grayscale=False).astype(float)
    other = recolor(image, Jitter((1, 0, 2, 3), factors), grayscale=False).astype(float)
    assert np.abs(one - other).mean() > 5


@pytest.mark.parametrize("threshold", [0, 100, 128, 256])
def test_solarize_is_exact(threshold: int) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = np.asarray(TF.solarize(Image.fromarray(ramp), threshold))
    np.testing.assert_array_equal(solarize(ramp, threshold), expected)


def test_the_input_is_never_changed() -> None:
    image = PHOTOS["plain"].copy()
    recolor(image, Jitter((3, 1, 0, 2), (1.4, 0.6, 0.8, 0.1)), grayscale=True)
    solarize(image, 128)
    np.testing.assert_array_equal(image, PHOTOS["plain"])

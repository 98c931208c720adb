"""Boxes against torchvision's own RandomResizedCrop, pixels against PIL."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from quietvit.data.resample import NUM_TRIES, Box, draw_box, resize_box

RATIO = (3 / 4, 4 / 3)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of several scales in three channels: edges, gradients and grain, some values at 0 and 255."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((3, 90.0), (12, 50.0), (48, 25.0), (400, 12.0)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        total += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (total + 120).clip(0, 255).astype(np.uint8)


def replay_torchvision(
    monkeypatch: pytest.MonkeyPatch, image: Image.Image, scale: tuple[float, float], u: list[float]
) -> tuple[int, ...]:
    """RandomResizedCrop.get_params with our uniform numbers in place of torch's."""
    tries = iter(x for pair in zip(u[:NUM_TRIES], u[NUM_TRIES:], strict=False) for x in pair)
    place = iter(u[2 * NUM_TRIES :])

    def uniform(_: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.tensor([float(low) + next(tries) * (float(high) - float(low))], dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([low + int(next(place) * (high - low))])

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform)
        patch.setattr(torch, "randint", randint)
        return tuple(RandomResizedCrop.get_params(image, list(scale), list(RATIO)))


@pytest.mark.parametrize(
    ("height", "width"), [(256, 384), (300, 256), (32, 32), (1000, 40), (40, 1000), (3, 5), (1, 1)]
)
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32), (1.0, 1.0)])
def test_boxes_are_torchvisions(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, scale: tuple[float, float]
) -> None:
    rng = np.random.default_rng(height * 7 + width)
    image = Image.new("RGB", (width, height))
    for _ in range(60):
        u = rng.random(2 * NUM_TRIES + 2).tolist()
        areas, aspects, place = u[:NUM_TRIES], u[NUM_TRIES : 2 * NUM_TRIES], (u[-2], u[-1])
        box = draw_box(height, width, scale=scale, ratio=RATIO, areas=areas, aspects=aspects, place=place)
        assert tuple(box) == replay_torchvision(monkeypatch, image, scale, u)
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width


@pytest.mark.parametrize(
    ("box", "size"),
    [
        (Box(10, 20, 230, 300), 224),  # smaller, with the aspect changed
        (Box(0, 0, 256, 341), 96),
        (Box(101, 33, 60, 71), 96),  # larger
        (Box(5, 7, 4, 3), 24),  # a few pixels, as from CIFAR
        (Box(255, 340, 1, 1), 16),
        (Box(3, 4, 96, 96), 96),  # as it is
    ],
)
def test_pixels_are_pils(box: Box, size: int) -> None:
    image = photo(256, 341)
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    out = resize_box(image, box, size)
    assert out.shape == (size, size, 3)
    assert out.dtype == np.uint8
    error = np.abs(out - expected)
    assert error.mean() < 0.1
    assert error.max() <= 8
    if (height, width) == (size, size):
        assert error.max() == 0


def test_nothing_aliases() -> None:
    """Stripes finer than the new grid become their mean, not a pattern: what antialiasing is for."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    out = resize_box(stripes, Box(0, 0, 256, 256), 90)
    assert np.abs(out[:, 4:-4].astype(float) - 127.5).max() < 8

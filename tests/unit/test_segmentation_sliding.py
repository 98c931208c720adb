"""Sliding windows, scales and flips against loops over pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quietvit_eval.segmentation.augment import keep_ratio, resized
from quietvit_eval.segmentation.sliding import WholeView, bands, classes_of, slide, starts

VIEW = WholeView(short_side=20, window=12, stride=8, scales=(1.0,), flip=False, keep_padding=False, chunk=3)
PATCH = 4


def per_pixel(windows: torch.Tensor) -> torch.Tensor:
    """Scores of a grid as fine as the pixels (patch 1): three classes from the colours."""
    x = windows.float() / 255
    return torch.stack([x[:, 0] - x[:, 1], x[:, 1] * x[:, 2], x[:, 2] - 0.5], dim=1) * 4


def of_patches(windows: torch.Tensor) -> torch.Tensor:
    """Scores of padded patches, as a model gives them; those at a window's border differ from those within."""
    x = per_pixel(windows)
    height, width = x.shape[-2:]
    missing = [-side % PATCH for side in (height, width)]
    pad = (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
    return F.avg_pool2d(F.pad(x, pad), PATCH)


def picture(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(5).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return resized(coarse, (height, width))


def tensor_of(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def test_windows_are_where_mmsegmentation_has_them() -> None:
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1024, 512, 341) == [0, 341, 512]
    assert starts(300, 512, 341) == [0]
    assert starts(513, 512, 341) == [0, 1]
    assert starts(1194, 512, 341) == [0, 341, 682]


@pytest.mark.parametrize("side", [5, 12, 13, 20, 21, 28, 47])
def test_windows_leave_no_pixel_out(side: int) -> None:
    for stride in (1, 5, 8, 12):
        seen = np.zeros(side, int)
        for first in starts(side, 12, stride):
            assert 0 <= first <= max(side - 12, 0)
            seen[first : first + 12] += 1
        assert seen.min() >= 1


@pytest.mark.parametrize("size", [(12, 12), (20, 27), (31, 12), (7, 30), (30, 7), (5, 6)])
@pytest.mark.parametrize("keep_padding", [False, True])
def test_scores_are_means_of_the_windows(size: tuple[int, int], keep_padding: bool) -> None:
    image = tensor_of(picture(*size))
    view = replace(VIEW, keep_padding=keep_padding)
    height, width = size
    h, w = min(12, height), min(12, width)
    total, count = torch.zeros(3, height, width, dtype=torch.float64), np.zeros(size)
    for top in starts(height, 12, 8):
        for left in starts(width, 12, 8):
            grid = of_patches(image[None, :, top : top + h, left : left + w]).double()
            whole = [h, w] if keep_padding else [h + -h % PATCH, w + -w % PATCH]
            fine = F.interpolate(grid, size=whole, mode="bilinear")[0]
            i, j = (0, 0) if keep_padding else ((-h % PATCH) // 2, (-w % PATCH) // 2)
            total[:, top : top + h, left : left + w] += fine[:, i : i + h, j : j + w]
            count[top : top + h, left : left + w] += 1
    expected = (total / torch.from_numpy(count)).float()
    for chunk in (1, 3, 100):
        found = slide(of_patches, image, replace(view, chunk=chunk), PATCH)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_constant_scores_stay_as_they_are() -> None:
    def constant(windows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, -2.0, 7.0]).view(1, 3, 1, 1).expand(len(windows), 3, 3, 3)

    found = slide(constant, torch.zeros(3, 29, 50, dtype=torch.uint8), VIEW, PATCH)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0, 7.0]).view(3, 1, 1).expand(3, 29, 50))


def test_no_more_windows_at_a_time_than_allowed() -> None:
    sizes: list[int] = []

    def counted(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        return of_patches(windows)

    slide(counted, tensor_of(picture(40, 40)), VIEW, PATCH)
    assert max(sizes) == 3
    assert sum(sizes) == len(starts(40, 12, 8)) ** 2


@pytest.mark.parametrize("size", [(7, 9), (20, 31), (64, 50), (1, 1)])
def test_bands_are_torchs_bilinear_rows(size: tuple[int, int]) -> None:
    maps = torch.randn(4, 13, 17, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    for most in (1, 4 * 60 * 3, 10**9):
        parts = list(bands(maps, size, most))
        torch.testing.assert_close(torch.cat([part for _, part in parts], dim=1), expected, atol=1e-5, rtol=1e-5)
        assert [row for band, _ in parts for row in range(band.start, band.stop)] == list(range(size[0]))
    assert len(list(bands(maps, (64, 50), 4 * 50 * 3))) == 22


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.7, 1.0, 1.6), True)])
def test_classes_are_those_of_the_mean_probability(scales: tuple[float, ...], flip: bool) -> None:
    image = picture(33, 47)
    mean = torch.zeros(3, 33, 47)
    for scale in scales:
        for mirrored in (False, True) if flip else (False,):
            small = resized(image, keep_ratio((33, 47), int(20 * scale)))
            scores = slide(of_patches, tensor_of(small[:, ::-1] if mirrored else small), VIEW, PATCH)
            at_pixels = F.interpolate(scores[None], size=(33, 47), mode="bilinear")[0].softmax(dim=0)
            mean += at_pixels.flip(-1) if mirrored else at_pixels
    found = classes_of(of_patches, image, replace(VIEW, scales=scales, flip=flip), PATCH)
    expected = mean.argmax(dim=0).numpy()
    assert found.shape == (33, 47)
    assert len(np.unique(expected)) == 3
    assert (found == expected).mean() > 0.998  # of nearly equal scores rounding may choose


def test_flips_of_a_symmetrical_model_change_nothing() -> None:
    image = picture(20, 44)  # whole patches and windows, so that a mirrored image has mirrored windows
    view = replace(VIEW, window=20, stride=8)
    plain = classes_of(of_patches, image, view, PATCH)
    assert (classes_of(of_patches, image, replace(view, flip=True), PATCH) == plain).mean() > 0.998

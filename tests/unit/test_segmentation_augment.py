"""Training views: sizes, crops, colours by colorsys, and pixels that stay with their classes."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.segmentation.augment import (
    Distortion,
    TrainView,
    crop_corner,
    distorted,
    draw_distortion,
    keep_ratio,
    nearest,
    resized,
)

PLAIN = TrainView(
    short_side=32, crop=24, ratio=(1.0, 1.0), max_share=1.0, flip=False, photometric=False, mean=(0.485, 0.456, 0.406)
)


def picture(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes 0 .. 4 and IGNORE in blocks of 8 pixels, each of its own grey."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-1, 5, (-(-height // 8), -(-width // 8))).astype(np.int16)
    target = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[:height, :width]
    return np.repeat((40 * (target + 1))[..., None], 3, axis=2).astype(np.uint8), target


def test_sizes_keep_the_ratio() -> None:
    assert keep_ratio((480, 640), 512) == (512, 683)
    assert keep_ratio((1000, 300), 150) == (500, 150)
    assert keep_ratio((1, 1000), 1) == (1, 1000)
    assert min(keep_ratio((300, 200), 0)) == 1


def test_targets_take_the_pixel_that_their_centre_lies_in() -> None:
    classes = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert np.array_equal(nearest(classes, (3, 4)), classes)
    assert np.array_equal(nearest(classes, (6, 8)), classes.repeat(2, 0).repeat(2, 1))
    new = nearest(classes, (5, 3))
    for i in range(5):
        for j in range(3):
            assert new[i, j] == classes[int((i + 0.5) * 3 / 5), int((j + 0.5) * 4 / 3)]
    assert new.dtype == np.int16


@pytest.mark.parametrize("size", [(40, 64), (16, 90), (17, 13), (200, 31)])
@pytest.mark.parametrize("seed", range(3))
def test_pixels_stay_with_their_classes(size: tuple[int, int], seed: int) -> None:
    view = replace(PLAIN, ratio=(0.5, 2.0), flip=True, max_share=0.75)
    image, target = view(*picture(*size), np.random.default_rng(seed))
    assert image.shape == (24, 24, 3)
    assert target.shape == (24, 24)
    assert (image.dtype, target.dtype) == (np.uint8, np.int16)
    counted = target != IGNORE
    same = image[..., 0] == 40 * (target + 1)  # not at the borders of the blocks, where the image is blended
    assert same[counted].mean() > 0.5
    assert len(np.unique(target)) > 1


def test_a_view_depends_on_its_random_numbers_alone() -> None:
    view = replace(PLAIN, ratio=(0.5, 2.0), flip=True, photometric=True, max_share=0.75)
    image, target = picture(50, 70)
    one, two, other = (view(image, target, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[0], other[0])


def test_small_images_are_padded_below_and_to_the_right() -> None:
    view = replace(PLAIN, short_side=10)
    image, target = picture(10, 15)
    whole, classes = view(image, target, np.random.default_rng(0))
    assert np.array_equal(whole[:10, :15], image)
    assert np.array_equal(classes[:10, :15], target)
    assert (classes[10:] == IGNORE).all()
    assert (classes[:, 15:] == IGNORE).all()
    normalised = (whole[12, 20] / 255 - np.array(view.mean)) / 0.225
    assert np.abs(normalised).max() < 0.5 / 255 / 0.225 + 1e-9  # half a grey level


def test_flips_and_scales_come_as_often_as_they_should() -> None:
    ramp = np.repeat(np.arange(24, dtype=np.uint8)[None, :, None] * 10, 24, axis=0).repeat(3, axis=2)
    target = np.zeros((24, 24), np.int16)
    view = replace(PLAIN, short_side=24, flip=True)
    turned = [view(ramp, target, np.random.default_rng(s))[0][0, 0, 0] > 100 for s in range(400)]
    assert 0.4 < np.mean(turned) < 0.6
    small = replace(PLAIN, short_side=20, crop=60, ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    sides = [(small(ramp, target, rng)[1][0] != IGNORE).sum() for _ in range(3000)]
    assert (min(sides), max(sides)) == (10, 39)  # int(20 r), r < 2
    assert np.mean(sides) == pytest.approx(24.5, abs=0.5)


def test_crops_of_nearly_one_class_are_drawn_again() -> None:
    # Class 1 is a strip of 4 columns in 100: a crop of 8 columns seldom meets it.
    target = np.zeros((8, 100), np.int16)
    target[:, 60:64] = 1

    def hits(max_share: float) -> float:
        corners = [crop_corner(target, 8, max_share, np.random.default_rng(s)) for s in range(300)]
        return float(np.mean([target[0, c : c + 8].sum() > 1 for _, c in corners]))

    once = 9 / 93  # columns 54 .. 62 have at least 2 of the strip's
    assert hits(1.0) == pytest.approx(once, abs=0.05)
    # 11 draws, but the last is not looked at: columns 55 .. 61 have at least 3, a share of 0.625 at most.
    assert hits(0.7) == pytest.approx(1 - (1 - 7 / 93) ** 10, abs=0.12)
    assert hits(0.7) > 3 * once


def test_pixels_that_do_not_count_have_no_share() -> None:
    target = np.full((8, 8), IGNORE, np.int16)
    target[0, :3] = (0, 0, 1)  # shares of 2/3 and 1/3
    target = np.tile(target, (1, 4))
    rng = np.random.default_rng(0)
    first = crop_corner(target, 8, 1.0, np.random.default_rng(0))
    assert crop_corner(target, 8, 0.99, rng) == first  # two classes everywhere: the first draw will do


def test_corners_cover_every_place() -> None:
    target = np.zeros((10, 12), np.int16)
    corners = {crop_corner(target, 9, 1.0, np.random.default_rng(s)) for s in range(300)}
    assert corners == {(i, j) for i in range(2) for j in range(4)}
    assert crop_corner(target, 50, 0.5, np.random.default_rng(0)) == (0, 0)


def naive(pixel: tuple[int, int, int], by: Distortion) -> np.ndarray:
    """By colorsys, in floats, clipped where bytes are."""
    x = np.clip(np.array(pixel, np.float64) + by.brightness, 0, 255)
    if not by.contrast_last:
        x = np.clip(x * by.contrast, 0, 255)
    h, s, v = colorsys.rgb_to_hsv(*(x / 255))
    x = 255 * np.array(colorsys.hsv_to_rgb((h + by.hue / 180) % 1, min(s * by.saturation, 1), v))
    return np.clip(x * by.contrast, 0, 255) if by.contrast_last else x


@pytest.mark.parametrize(
    "by",
    [
        Distortion(),
        Distortion(brightness=25.4),
        Distortion(brightness=-31),
        Distortion(contrast=0.6),
        Distortion(contrast=1.4, contrast_last=True),
        Distortion(saturation=0.5),
        Distortion(saturation=1.5),
        Distortion(hue=18),
        Distortion(hue=-17),
        Distortion(20, 1.3, False, 1.4, -9),
        Distortion(20, 1.3, True, 1.4, -9),
    ],
)
def test_colours_are_those_of_the_formulas(by: Distortion) -> None:
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)
    before = image.copy()
    new = distorted(image, by)
    expected = np.array([[naive(tuple(p), by) for p in row] for row in image])
    difference = np.abs(new.astype(np.float64) - expected)
    # 8 bits hold the hue in steps of 2 degrees: a wheel's sixth of 255 levels has 30 of them, 8.5 levels each.
    assert difference.max() < (14 if by.saturation != 1 or by.hue else 0.51)
    assert difference.mean() < 2
    assert np.array_equal(image, before)


def test_the_place_of_the_contrast_matters() -> None:
    image = np.full((2, 2, 3), (200, 100, 60), np.uint8)
    first, last = (distorted(image, Distortion(0, 1.5, late, 0.5, 0)) for late in (False, True))
    assert first[0, 0, 0] == 255
    assert first[0, 0].tolist() == pytest.approx(naive((200, 100, 60), Distortion(0, 1.5, False, 0.5, 0)), abs=1.5)
    assert last[0, 0].tolist() == pytest.approx([255, 225, 195], abs=1.5)
    assert abs(int(first[0, 0, 1]) - int(last[0, 0, 1])) > 20


def test_draws_have_their_coins_and_ranges() -> None:
    drawn = [draw_distortion(np.random.default_rng(s)) for s in range(2000)]
    for name, off in (("brightness", 0.0), ("contrast", 1.0), ("saturation", 1.0)):
        values = np.array([getattr(d, name) for d in drawn])
        assert 0.46 < (values != off).mean() < 0.54
        low, high = {"brightness": (-32, 32)}.get(name, (0.5, 1.5))
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    hues = np.array([d.hue for d in drawn])
    assert set(hues) == set(range(-18, 19))
    assert 0.46 < (hues != 0).mean() < 0.54  # 36/37 of a half
    assert 0.46 < np.mean([d.contrast_last for d in drawn]) < 0.54


def test_resized_is_bilinear() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[:, 1] = 100
    assert resized(image, (2, 4))[0, :, 0].tolist() == [0, 25, 75, 100]
    assert resized(image[:, ::-1], (2, 4))[0, :, 0].tolist() == [100, 75, 25, 0]

"""Training views for depth: image and depth stay together, unknown stays unknown, the same numbers give the same."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from quietvit_eval.depth.augment import DepthAugment, recoloured, rotated
from quietvit_eval.depth.options import DepthOptions

PLAIN = {"rotate": 0.0, "flip": False, "color": False}


def pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel tells its place: red and green its row, blue its column, depth both; some depths are unknown."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y % 256, y // 256, x % 256], axis=-1).astype(np.uint8)
    depth = (1 + y * 1000 + x).astype(np.float32)
    depth[np.random.default_rng(seed).random(depth.shape) < 0.1] = 0
    return image, depth


def agree(image: np.ndarray, depth: np.ndarray) -> bool:
    """Whether each known depth lies on the pixel it belongs to."""
    place = image.astype(int)
    expected = 1 + (place[..., 0] + 256 * place[..., 1]) * 1000 + place[..., 2]
    known = depth > 0
    return bool((depth[known] == expected[known]).all() and known.any())


def augment(**options: Any) -> DepthAugment:
    return DepthAugment(DepthOptions(**{**PLAIN, "crop": (20, 24), **options}))


def test_crops_and_flips_keep_depth_on_its_pixel() -> None:
    image, depth = pair(40, 50)
    seen = set()
    for seed in range(30):
        a, d = augment(flip=True)(image, depth, np.random.default_rng(seed))
        assert (a.shape, a.dtype, d.shape, d.dtype) == ((20, 24, 3), np.uint8, (20, 24), np.float32)
        assert agree(a, d)
        seen.add((int(a[0, 0, 0]), bool(a[0, 0, 2] > a[0, -1, 2])))
    assert {mirrored for _, mirrored in seen} == {True, False}
    assert len({top for top, _ in seen}) > 10


def test_crops_reach_every_corner() -> None:
    image, depth = pair(21, 25)
    tops = {tuple(augment()(image, depth, np.random.default_rng(s))[0][0, 0]) for s in range(40)}
    assert tops == {(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)}


def test_small_images_are_surrounded_with_the_unknown() -> None:
    image, depth = pair(11, 30)
    a, d = augment()(image + 1, depth, np.random.default_rng(0))
    assert a.shape == (20, 24, 3)
    assert not a[:4].any()
    assert not a[15:].any()
    assert not d[:4].any()
    assert not d[15:].any()
    assert a[4:15].all(axis=(0, 1)).any()


def test_nyus_frame_is_cut_off_images_of_its_size_only() -> None:
    for shape, corner, framed in (((480, 640), (45, 43), (427, 565)), ((480, 641), (0, 0), (480, 641))):
        image, depth = pair(*shape)
        a, d = augment(train_crop="nyu").framed(image, depth)
        assert a.shape[:2] == d.shape == framed
        assert tuple(a[0, 0]) == (corner[0], 0, corner[1])
    image, _ = augment(train_crop="none").framed(*pair(480, 640))
    assert image.shape[:2] == (480, 640)


def test_the_resize_is_that_of_the_whole_image_and_mixes_no_depths() -> None:
    image, depth = pair(480, 640)
    a, d = augment(train_crop="nyu", resize=240).framed(image, depth)
    assert a.shape[:2] == d.shape == (214, 282)
    assert set(np.unique(d)) <= set(np.unique(depth))
    a, d = augment(resize=60).framed(*pair(30, 45))
    assert a.shape[:2] == d.shape == (60, 90)
    image, depth = pair(64, 64)
    assert augment(resize=64).framed(image, depth)[0] is image
    half = augment(resize=32).framed(image, depth)[1]
    rows = [float(v) // 1000 for v in half[:, 3] if v]
    assert max(rows) >= 62  # the last row is still there: nothing is shifted by half the image


def test_rotation() -> None:
    depth = np.zeros((41, 61), np.float32)
    depth[20, 50], depth[:, 20] = 3, 2
    image = np.repeat((depth[..., None] * 80).astype(np.uint8), 3, axis=-1)
    a, d = rotated(image, depth, 90.0)
    assert np.argwhere(d == 3).tolist() == [[0, 30]]  # from 20 right of the centre to 20 above it
    assert set(np.unique(d)) == {0, 2, 3}
    assert a[0, 30, 0] == 240
    a, d = rotated(np.full((40, 60, 3), 200, np.uint8), np.full((40, 60), 5, np.float32), 2.5)
    assert a[20, 30, 0] == 200
    assert d[20, 30] == 5
    assert not a[0, 0].any()
    assert d[0, 0] == 0  # what comes in at the corners is unknown
    angles = {
        augment(rotate=2.5, crop=(40, 60))(*pair(40, 60), np.random.default_rng(s))[1].tobytes() for s in range(8)
    }
    assert 1 < len(angles) < 8  # some are left alone


def test_colours_by_formula() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    factors = np.array([0.9, 1.0, 1.3])
    for quirk in (False, True):
        out = recoloured(image, 1.1, factors, quirk=quirk)
        for value in (0, 1, 100, 200, 255):
            curve = value**1.1 if quirk else 255 * (value / 255) ** 1.1
            expected = [min(255, round(curve * f)) for f in factors]
            assert out.reshape(-1, 3)[value].tolist() == expected
    assert recoloured(image, 0.9, np.ones(3), quirk=False)[-1, -1].tolist() == [255] * 3
    assert recoloured(image, 0.9, np.ones(3), quirk=True)[-1, -1].tolist() == [147] * 3  # 255^0.9: darker by 0.57
    np.testing.assert_array_equal(recoloured(image, 1.0, np.ones(3), quirk=True), image)


def test_colours_leave_depth_alone_and_follow_their_ranges() -> None:
    image, depth = np.full((20, 24, 3), 100, np.uint8), np.full((20, 24), 2, np.float32)
    found = [augment(color=True, gamma=0.0, tint=0.0)(image, depth, np.random.default_rng(s)) for s in range(60)]
    assert all((d == 2).all() for _, d in found)
    values = [int(a[0, 0, 0]) for a, _ in found]
    assert all(len(np.unique(a)) == 1 for a, _ in found)  # without tint all channels alike
    assert 15 < sum(v == 100 for v in values) < 45  # every second is left alone
    assert 75 <= min(values) < 85
    assert 115 < max(values) <= 125


def test_the_same_numbers_give_the_same_view_in_any_process() -> None:
    image, depth = pair(60, 70)
    full = augment(rotate=2.5, flip=True, color=True)
    copy = pickle.loads(pickle.dumps(full))
    for seed in range(5):
        a, d = full(image, depth, np.random.default_rng(seed))
        b, e = copy(image, depth, np.random.default_rng(seed))
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(d, e)
    assert image[3, 5].tolist() == [3, 0, 5]

"""Multi-crop: what is drawn, how often, and that what is rendered is what torchvision would make of it."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from quietvit.data.crops import MultiCrop, View

TINY = MultiCrop(global_size=24, local_size=12, blur_kernel=5, blur_sigma=(0.1, 0.6))


def picture(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 230, width)[None, :, None] * np.linspace(0.5, 1.0, height)[:, None, None]
    tint = np.array([1.0, 0.8, 0.6])
    noise = rng.normal(0, 8, (height, width, 3))
    pixels: np.ndarray = np.clip(ramp * tint + noise, 0, 255).astype(np.uint8)
    return pixels


def many_views(crop: MultiCrop, images: int, height: int = 90, width: int = 120) -> list[tuple[View, ...]]:
    rng = np.random.default_rng(5)
    return [crop.draw(height, width, rng) for _ in range(images)]


def assert_uniform(values: list[float], low: float, high: float) -> None:
    """Kolmogorov-Smirnov at one in ten thousand."""
    x = np.sort((np.array(values) - low) / (high - low))
    assert x[0] >= 0
    assert x[-1] <= 1
    steps = np.arange(len(x) + 1) / len(x)
    distance = max(np.abs(x - steps[1:]).max(), np.abs(x - steps[:-1]).max())
    assert distance < 2.23 / math.sqrt(len(x))


def test_shapes_and_types() -> None:
    globals_, locals_ = MultiCrop(global_size=64, local_size=32, num_local=5)(picture(), np.random.default_rng(0))
    assert [v.shape for v in globals_] == [(64, 64, 3)] * 2
    assert [v.shape for v in locals_] == [(32, 32, 3)] * 5
    for view in globals_ + locals_:
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (1, 1), (2, 300), (300, 2), (23, 25)])
def test_images_smaller_than_the_crop(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        globals_, locals_ = TINY(picture(*shape), rng)
        assert {v.shape for v in globals_} == {(24, 24, 3)}
        assert {v.shape for v in locals_} == {(12, 12, 3)}


def test_no_local_views() -> None:
    globals_, locals_ = replace(TINY, num_local=0, num_global=1)(picture(), np.random.default_rng(0))
    assert (len(globals_), locals_) == (1, [])


def test_all_randomness_comes_from_the_generator() -> None:
    image = picture()
    one = TINY(image, np.random.default_rng([3, 17, 2]))
    np.random.default_rng().random()
    again = pickle.loads(pickle.dumps(TINY))(image, np.random.default_rng([3, 17, 2]))
    other = TINY(image, np.random.default_rng([3, 17, 3]))
    for x, y in zip(one[0] + one[1], again[0] + again[1], strict=True):
        np.testing.assert_array_equal(x, y)
    assert any(not np.array_equal(x, y) for x, y in zip(one[0] + one[1], other[0] + other[1], strict=True))


def test_every_image_takes_equally_many_numbers() -> None:
    """Whatever fits, fails or is switched off: so a setting never shifts the draws of anything else."""
    used = set()
    for crop in (TINY, replace(TINY, jitter_prob=0.0, flip_prob=0.0, blur="paper"), replace(TINY, color_strength=0.5)):
        for shape in ((90, 120), (1, 500)):
            rng = np.random.default_rng(1)
            crop.draw(*shape, rng)
            used.add(rng.random())
    assert len(used) == 1


def test_changing_one_probability_changes_nothing_else() -> None:
    plain = many_views(TINY, 20)
    no_flip = many_views(replace(TINY, flip_prob=0.0, blur="paper"), 20)
    for views, changed in zip(plain, no_flip, strict=True):
        for a, b in zip(views, changed, strict=True):
            assert a._replace(flip=False, blur_sigma=None) == b._replace(blur_sigma=None)


def test_calling_is_drawing_then_rendering() -> None:
    image = picture()
    globals_, locals_ = TINY(image, np.random.default_rng(8))
    views = TINY.draw(90, 120, np.random.default_rng(8))
    for pixels, view in zip(globals_ + locals_, views, strict=True):
        np.testing.assert_array_equal(pixels, TINY.render(image, view))


def test_the_image_may_be_read_only_or_turned_and_is_never_changed() -> None:
    image = picture()
    kept = image.copy()
    expected = TINY(image, np.random.default_rng(0))
    np.testing.assert_array_equal(image, kept)
    frozen = image.copy()
    frozen.flags.writeable = False
    backwards = image[::-1, ::-1].copy()[::-1, ::-1]  # the same pixels with negative strides
    for other in (frozen, backwards):
        for x, y in zip(expected, TINY(other, np.random.default_rng(0)), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("bad", [np.zeros((5, 5, 3)), np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8)])
def test_other_images_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="convert it to RGB"):
        TINY(bad, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_global": 0}, "num_global"),
        ({"blur": "always"}, "reference_as_run"),
        ({"local_scale": (0.0, 0.3)}, "local_scale"),
        ({"global_scale": (0.5, 1.2)}, "global_scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"jitter_prob": 1.5}, "jitter_prob"),
        ({"contrast": -0.1}, "contrast"),
        ({"hue": 0.3, "color_strength": 2.0}, "half a turn"),
        ({"blur_kernel": 4}, "odd"),
        ({"local_size": 4}, "at most 7"),
        ({"global_size": 0}, "global_size"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MultiCrop(**settings)


# ---- The distribution


def test_how_often_each_step_happens() -> None:
    draws = many_views(MultiCrop(blur="paper"), 3000)
    for kind, views in {
        "first": [d[0] for d in draws],
        "second": [d[1] for d in draws],
        "local": [v for d in draws for v in d[2:]],
    }.items():
        expected = {
            "flip": (0.5, [v.flip for v in views]),
            "jitter": (0.8, [v.jitter is not None for v in views]),
            "grayscale": (0.2, [v.grayscale for v in views]),
            "blur": ({"first": 1.0, "second": 0.1, "local": 0.5}[kind], [v.blur_sigma is not None for v in views]),
            "solarize": ({"first": 0.0, "second": 0.2, "local": 0.0}[kind], [v.solarize for v in views]),
        }
        for step, (p, happened) in expected.items():
            assert abs(np.mean(happened) - p) <= 4 * math.sqrt(p * (1 - p) / len(views)), (kind, step)


def test_factors_are_uniform_in_torchvisions_ranges() -> None:
    crop = MultiCrop(color_strength=1.5, saturation=0.8)  # 1 - 1.2 < 0: cut at 0
    jitters = [v.jitter for d in many_views(crop, 500) for v in d if v.jitter is not None]
    for op, (low, high) in enumerate(((0.4, 1.6), (0.4, 1.6), (0.0, 2.2), (-0.15, 0.15))):
        assert_uniform([j.factors[op] for j in jitters], low, high)
    sigmas = [v.blur_sigma for d in many_views(crop, 500) for v in d if v.blur_sigma is not None]
    assert_uniform(sigmas, 0.1, 2.0)


def test_all_orders_of_jitter_are_equally_likely() -> None:
    counts = Counter(v.jitter.order for d in many_views(MultiCrop(), 600) for v in d if v.jitter is not None)
    expected = counts.total() / 24
    assert len(counts) == 24
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 60  # chi-square, 23 degrees of freedom


def test_boxes_cover_area_aspect_and_place_uniformly() -> None:
    height = width = 3000  # large, so that whole pixels do not show
    crop = MultiCrop(global_scale=(0.1, 0.5))  # up to here a box of any aspect fits at the first try
    draws = many_views(crop, 700, height, width)
    for views, (low, high) in (
        ([v for d in draws for v in d[:2]], (0.1, 0.5)),
        ([v for d in draws for v in d[2:]], (0.05, 0.32)),
    ):
        boxes = [v.box for v in views]
        slack = 2e-3
        assert_uniform([b.height * b.width / (height * width) for b in boxes], low - slack, high + slack)
        assert_uniform([math.log(b.width / b.height) for b in boxes], math.log(3 / 4) - slack, math.log(4 / 3) + slack)
        assert_uniform([b.top / (height - b.height) for b in boxes], 0, 1)
        assert_uniform([b.left / (width - b.width) for b in boxes], 0, 1)
        # Area and aspect of one box, and boxes of neighbouring views, have nothing to do with each other.
        area = np.array([b.height * b.width for b in boxes], float)
        aspect = np.array([b.width / b.height for b in boxes])
        assert abs(np.corrcoef(area, aspect)[0, 1]) < 4 / math.sqrt(len(boxes))
        assert abs(np.corrcoef(area[1:], area[:-1])[0, 1]) < 4 / math.sqrt(len(boxes))


# ---- The pixels


def torchvision_view(image: Image.Image, view: View, crop: MultiCrop) -> Image.Image:
    """The same parameters through torchvision's functional operations on PIL, in DINOv2's order."""
    out = TF.resized_crop(image, *view.box, [view.size, view.size], InterpolationMode.BICUBIC)
    if view.flip:
        out = TF.hflip(out)
    if view.jitter is not None:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for op in view.jitter.order:
            out = adjust[op](out, view.jitter.factors[op])
    if view.grayscale:
        out = TF.rgb_to_grayscale(out, 3)
    if view.blur_sigma is not None:
        out = TF.gaussian_blur(out, [crop.blur_kernel] * 2, [view.blur_sigma] * 2)
    if view.solarize:
        out = TF.solarize(out, crop.solarize_threshold)
    assert isinstance(out, Image.Image)
    return out


@pytest.mark.parametrize("blur", ["reference_as_run", "paper"])
def test_whole_views_are_torchvisions(blur: Any) -> None:
    crop = MultiCrop(global_size=64, local_size=32, blur=blur)
    rng = np.random.default_rng(2)
    mean_errors = []
    for seed in range(12):
        image = picture(100, 130, seed)
        for view in crop.draw(100, 130, rng):
            ours = crop.render(image, view).astype(float)
            theirs = np.asarray(torchvision_view(Image.fromarray(image), view, crop)).astype(float)
            mean_errors.append(np.abs(ours - theirs).mean())
    assert np.mean(mean_errors) < 0.6
    assert max(mean_errors) < 2.5


# ---- How far a decoder may reduce


def test_min_side_is_where_the_smallest_crop_is_not_enlarged() -> None:
    crop = MultiCrop()
    assert crop.min_side == 430
    assert MultiCrop(num_local=0).min_side == math.ceil(224 / math.sqrt(0.32))
    smallest = math.sqrt(crop.local_scale[0] * crop.min_side**2)
    assert smallest >= crop.local_size > smallest - 1
    assert MultiCrop(reduced_decode=False).min_side is None

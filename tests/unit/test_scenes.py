"""The embedded data set: reproducible pictures, masks and depth true to geometry, labels that pixels do not tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quietvit.data.scenes import Scenes
from quietvit.data.scenes.draws import Draws, uniforms
from quietvit.data.scenes.patterns import BACKGROUNDS, MATERIALS
from quietvit.data.scenes.solids import SOLIDS, Polytope, Rays, Revolution

NUM_CHECKED = 24
GOLDEN_UNIFORMS = [0.8817035384837327, 0.28917661385918403, 0.8710360723907997]
GOLDEN_MEANS = [
    [120.344, 118.938, 129.538],
    [78.119, 97.526, 90.43],
    [81.693, 92.017, 87.644],
    [93.184, 90.905, 104.971],
]
GOLDEN_LABELS = [[0, 1, 0, 2], [3, 0, 3, 3], [4, 2, 3, 6]]


def test_the_streams_are_raw_pcg64_words() -> None:
    """Numbers computed once with NumPy 2.4: labels must never change with NumPy or the machine."""
    np.testing.assert_array_equal(uniforms(0, 1, 2, num=3), GOLDEN_UNIFORMS)
    draws = Draws(0, 1, 2)
    first = [draws.uniform() for _ in range(600)]
    assert sorted(first[:256]) == sorted(uniforms(0, 1, 2, num=256).tolist())
    assert len(set(first)) == 600  # the refilled pool goes on with the stream
    fresh = Draws(0, 1, 2).branch(5)
    assert draws.branch(5).uniform() == fresh.uniform()  # a branch does not depend on what was read before
    assert fresh.uniform() not in first


def test_pictures_are_functions_of_seed_split_and_index() -> None:
    """Order of access, length and instance change nothing; seed and split change everything."""
    a, b = Scenes("train", num_images=9), Scenes("train", num_images=5)
    forward = [a.load(i) for i in range(5)]
    backward = [b.load(i) for i in reversed(range(5))][::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one, other)
    for name in b.labels:
        np.testing.assert_array_equal(a.labels[name][:5], b.labels[name])
    others = [Scenes(s, num_images=5, seed=k).load(0) for s, k in (("val", 0), ("test", 0), ("train", 1))]
    pictures = [*forward, *others]
    assert len({p.tobytes() for p in pictures}) == len(pictures)


def test_pictures_have_not_changed() -> None:
    """Mean colours of four pictures. If this fails on purpose, raise VERSION: scores are no longer comparable."""
    data = Scenes("test", num_images=4)
    means = np.stack([data.load(i).reshape(-1, 3).mean(axis=0) for i in range(4)])
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.05)
    assert [data.labels[k].tolist() for k in ("shape", "material", "background")] == GOLDEN_LABELS


def test_splits_share_no_picture() -> None:
    pictures = [
        Scenes(s, num_images=40, image_size=16).load(i).tobytes() for s in ("train", "val", "test") for i in range(40)
    ]
    assert len(set(pictures)) == len(pictures)


def test_labels_are_balanced_and_independent() -> None:
    """No label helps to guess another: chi squared of each pair's table against independence."""
    data = Scenes("train", num_images=20_000)
    for name, other in (("shape", "material"), ("shape", "background"), ("material", "background")):
        table = np.zeros((len(data.classes[name]), len(data.classes[other])))
        np.add.at(table, (data.labels[name], data.labels[other]), 1)
        expected = len(data) / table.size
        degrees = table.size - 1
        assert ((table - expected) ** 2 / expected).sum() < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("image_size", [48, 64, 97])
def test_types_and_shapes(image_size: int) -> None:
    data = Scenes("val", num_images=3, image_size=image_size)
    scene = data.render(2)
    assert scene.image.shape == (image_size, image_size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.image.flags.c_contiguous
    assert scene.segmentation.shape == scene.depth.shape == (image_size, image_size)
    assert scene.segmentation.dtype == np.int64
    assert scene.depth.dtype == np.float32
    np.testing.assert_array_equal(data.load(2, min_side=16), scene.image)
    assert scene.labels == {k: int(v[2]) for k, v in data.labels.items()}
    assert set(data.classes) == set(data.labels) >= {"class", "shape", "material", "background"}


@pytest.mark.parametrize("category", ["shape", "material"])
def test_the_main_solid_carries_the_label(category: str) -> None:
    """Its category is on many pixels and more than any other solid's, unless another one has the same."""
    data = Scenes("train", num_images=NUM_CHECKED, category=category)
    for i in range(NUM_CHECKED):
        scene = data.render(i)
        counts = np.bincount(scene.segmentation.ravel(), minlength=1 + len(data.classes[category]))
        assert counts[1:].argmax() == scene.labels[category]
        assert counts[1:].max() > 0.06 * scene.segmentation.size


def test_depth_is_metric_and_solids_stand_before_the_stage() -> None:
    """Depth of a room of a few metres; a solid is nearer than the wall and floor seen around it."""
    data = Scenes("train", num_images=NUM_CHECKED)
    for i in range(NUM_CHECKED):
        scene = data.render(i)
        assert np.isfinite(scene.depth).all()
        assert scene.depth.min() > 0.5
        assert scene.depth.max() < 12
        solid = scene.segmentation > 0
        # Below a foot the floor is nearer by right; beside and above a solid everything is farther.
        left, right, above = (slice(None), slice(0, -1)), (slice(None), slice(1, None)), slice(0, -1)
        for out, inner in ((left, right), (right, left), (above, slice(1, None))):
            edge = solid[inner] & ~solid[out]
            assert edge.any()
            assert (scene.depth[out] > scene.depth[inner])[edge].all()


def test_the_same_scene_at_another_size() -> None:
    """Half the size shows the same scene: masks agree almost everywhere, depth to a percent on the median pixel."""
    large, small = (Scenes("test", num_images=6, image_size=s) for s in (128, 64))
    for i in range(6):
        a, b = large.render(i), small.render(i)
        assert (a.segmentation[::2, ::2] == b.segmentation).mean() > 0.95
        assert np.median(np.abs(a.depth[::2, ::2] / b.depth - 1)) < 0.01
        pooled = a.image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(pooled - b.image).mean() < 8


@pytest.mark.parametrize("name", SOLIDS)
def test_hits_lie_on_the_surface(name: str) -> None:
    """First hits satisfy the solid's inequality with equality; nothing before them, or on a miss, is inside."""
    solid, yaw = SOLIDS[name], 0.7
    eye = (0.2, 0.9, -2.0)
    at = np.linspace(-0.6, 0.6, 41, dtype=np.float32)
    ahead = np.ones((41, 1), dtype=np.float32)
    near = solid.nearness(Rays(eye, at[None, :], -at[:, None], ahead), yaw)
    assert 0.02 < (near > 0).mean() < 0.8
    direction = np.stack(np.broadcast_arrays(at[None, :], -at[:, None], ahead)).astype(np.float64)
    for t in np.linspace(0.5, 4.0, 141):
        point = np.array(eye)[:, None, None] + t * direction
        inside = _inside(solid, _turned(point, yaw)) > 1e-3
        assert not (inside & (near == 0)).any()
        assert not (inside & (near > 0) & (t * near < 1 - 1e-3)).any()
    hit = near > 0
    points = _turned(np.array(eye)[:, None] + direction[:, hit] / near[hit], yaw)
    np.testing.assert_allclose(_inside(solid, points), 0, atol=2e-4)
    surface = solid.surface(*points.astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(surface.normal, axis=0), 1, atol=1e-4)
    assert (_inside(solid, points + 0.02 * surface.normal) < 0).mean() > 0.98  # outwards (rims may differ)
    assert ((surface.normal * _turned(direction[:, hit], yaw)).sum(axis=0) < 1e-2).mean() > 0.98  # towards the eye


def _turned(p: np.ndarray, yaw: float) -> np.ndarray:
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.stack([p[0] * cos - p[2] * sin, p[1], p[0] * sin + p[2] * cos])


def _inside(solid: Revolution | Polytope, p: np.ndarray) -> np.ndarray:
    """Smallest slack of the inequalities that define the solid: positive inside, zero on the surface."""
    if isinstance(solid, Polytope):
        planes = zip(solid.normals, solid.offsets, strict=True)
        slack: np.ndarray = np.min([o - np.tensordot(n, p, axes=1) for n, o in planes], axis=0)
        return slack
    a, b, c = solid.profile
    slack = np.min([a + b * p[1] + c * p[1] ** 2 - p[0] ** 2 - p[2] ** 2, p[1], solid.height - p[1]], axis=0)
    return slack


@pytest.mark.parametrize("name", [*MATERIALS, *BACKGROUNDS])
def test_patterns_are_fields_in_the_unit_interval(name: str) -> None:
    u, v = np.meshgrid(*[np.linspace(-9, 9, 90, dtype=np.float32)] * 2)
    field = {**MATERIALS, **BACKGROUNDS}[name](u, v, Draws(3))
    assert field.dtype == np.float32
    assert field.shape == u.shape
    assert field.min() >= 0
    assert field.max() <= 1
    assert (np.ptp(field) > 0.5) == (name != "plain")


def test_pixels_do_not_tell_the_labels() -> None:
    """20-NN on raw pixels (cosine) stays near chance for a small bank.

    A larger bank tells more: see benchmarks/results/scenes-speed.json for 4,000 pictures, which a score must beat.
    """
    sets = [Scenes("train", num_images=600), Scenes("test", num_images=300)]
    bank, queries = (np.stack([d.load(i) for i in range(len(d))]).reshape(len(d), -1) / np.float32(255) for d in sets)
    queries -= bank.mean(axis=0)
    bank -= bank.mean(axis=0)
    similarity = queries @ bank.T / np.linalg.norm(bank, axis=1)
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    accuracy = {}
    for name in ("shape", "material", "background"):
        votes = np.eye(len(sets[0].classes[name]))[sets[0].labels[name][nearest]].sum(axis=1)
        accuracy[name] = (votes.argmax(axis=1) == sets[1].labels[name]).mean()
    assert accuracy["shape"] < 0.30, accuracy  # chance is 0.125
    assert accuracy["material"] < 0.18, accuracy
    assert accuracy["background"] < 0.21, accuracy


def test_names_and_fingerprints() -> None:
    base = Scenes("val", num_images=5)
    assert base.item_name(3) == "scenes/val/000003"
    assert base.fingerprint() == Scenes("val", num_images=5).fingerprint()
    others = [
        Scenes("train", num_images=5),
        Scenes("val", num_images=6),
        Scenes("val", num_images=5, image_size=32),
        Scenes("val", num_images=5, seed=1),
        Scenes("val", num_images=5, category="shape"),
    ]
    assert len({d.fingerprint() for d in [base, *others]}) == 6


def test_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        Scenes("training")
    with pytest.raises(ValueError, match="'shape' or 'material'"):
        Scenes(category="colour")
    with pytest.raises(ValueError, match="positive"):
        Scenes(num_images=0)
    with pytest.raises(IndexError, match="no index 5"):
        Scenes(num_images=5).load(5)
    with pytest.raises(IndexError, match="no index -1"):
        Scenes(num_images=5).load(-1)

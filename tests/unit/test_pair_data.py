"""Images with targets: batches depend on seed and step alone, bad pairs are replaced; blocks and padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quietvit.contracts import Features
from quietvit.data.decode import UnreadableImage
from quietvit_eval.blocks import check_blocks, read_blocks, spread_blocks
from quietvit_eval.dense_data.pairs import METRES, PairSource, open_pairs
from quietvit_eval.extract import Reading
from quietvit_eval.pair_data import PairData, choose_pairs
from quietvit_eval.views import center_pad, feature_maps, padding, to_pixels


class Numbers:
    """Image and target both filled with the index."""

    name, kind, class_names = "numbers", "classes", [str(i) for i in range(20)]

    def __init__(self, count: int = 10, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        return np.full((4, 6, 3), index, np.uint8), np.full((4, 6), index, np.int16)

    def item_name(self, index: int) -> str:
        return f"{index}.png"

    def fingerprint(self) -> str:
        return f"numbers-{self.count}"


def data(source: PairSource, folder: Path | None = None, seed: int = 0, limit: int | None = None) -> PairData:
    train, test = choose_pairs(source, limit, seed), choose_pairs(source, limit, seed + 1)
    return PairData(train, test, None, Reading(), seed, torch.device("cpu"), "abc", folder)


def jitter(image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the number in the target and puts a random one into the image."""
    return np.full_like(image, rng.integers(256)), target


def drawn(pairs: PairData, first: int, steps: int) -> list[tuple[list[int], list[int]]]:
    batches = pairs.batches(jitter, batch_size=4, first=first, steps=steps)
    return [(b.images[:, 0, 0, 0].tolist(), b.targets[:, 0, 0].tolist()) for b in batches]


def test_batches_depend_on_seed_and_step_alone() -> None:
    whole = drawn(data(Numbers()), 0, 8)
    assert drawn(data(Numbers()), 5, 8) == whole[5:]
    assert drawn(data(Numbers(), seed=1), 0, 8) != whole
    seen = [n for _, targets in whole for n in targets]
    assert sorted(seen[:10]) == list(range(10))  # every pair once a pass
    assert sorted(seen[10:20]) == list(range(10))
    assert len({tuple(noise) for noise, _ in whole}) == 8


def test_bad_pairs_are_replaced_in_training_and_left_out_of_the_test() -> None:
    pairs = data(Numbers(broken=(3, 7)))
    seen = [n for _, targets in drawn(pairs, 0, 10) for n in targets]
    assert len(seen) == 40
    assert not {3, 7} & set(seen)
    rows = [p.row for p in pairs.pairs("test", "numbers")]
    assert rows == [0, 1, 2, 4, 5, 6, 8, 9]
    about = pairs.about()
    assert (about["train"]["unreadable"], about["test"]["unreadable"]) == (2, 2)
    assert about["test"]["unreadable_names"] == ["3.png", "7.png"]
    assert pairs.fresh("other").about()["test"]["unreadable"] == 0  # each extractor counts its own

    broken = data(Numbers(broken=tuple(range(10))))
    with pytest.raises(ValueError, match=r"20 pairs in a row of numbers cannot be read; the last: \d.png: cut short"):
        drawn(broken, 0, 1)
    assert list(broken.pairs("test", "numbers")) == []
    with pytest.raises(ValueError, match=r"none of the 10 pairs of numbers can be read; the first: 0.png"):
        broken.merged({})


def test_limits_and_state_files(tmp_path: Path) -> None:
    chosen = choose_pairs(Numbers(), 4, 0)
    assert len(chosen) == 4
    assert sorted(set(chosen.indices)) == list(chosen.indices)
    assert list(choose_pairs(Numbers(), 99, 0).indices) == list(range(10))
    with pytest.raises(ValueError, match="at least 1"):
        choose_pairs(Numbers(), 0, 0)
    with pytest.raises(ValueError, match="holds no pairs"):
        choose_pairs(Numbers(0), None, 0)

    pairs = data(Numbers(), tmp_path)
    file = pairs.state_file("segmentation", {"lr": 1})
    assert file is not None
    assert file == data(Numbers(), tmp_path).state_file("segmentation", {"lr": 1})
    others = [
        pairs.state_file("segmentation", {"lr": 2}),
        pairs.fresh("def").state_file("segmentation", {"lr": 1}),
        replace(pairs, seed=1).state_file("segmentation", {"lr": 1}),
        data(Numbers(9), tmp_path).state_file("segmentation", {"lr": 1}),
        data(Numbers(), tmp_path, limit=5).state_file("segmentation", {"lr": 1}),
    ]
    assert len({file, *others}) == 6
    assert pairs.fresh(None).state_file("segmentation", {}) is None
    assert data(Numbers()).state_file("segmentation", {}) is None


def test_tables_name_the_nearest_and_refuse_unknown_options() -> None:
    scenes = open_pairs(METRES, "scenes", None, split="val", num_images=2)
    image, depth = scenes.load(1)
    assert image.shape[:2] == depth.shape
    assert depth.dtype == np.float32
    with pytest.raises(ValueError, match="did you mean 'scenes'"):
        open_pairs(METRES, "scene", None, split="val")
    with pytest.raises(ValueError, match="no option 'num_image'"):
        open_pairs(METRES, "scenes", None, split="val", num_image=2)


class Plain:
    """An extractor without insight: `last_blocks` alone. Patch tokens are the mean colour times the block's number."""

    embed_dim, num_blocks, stride, image_size = 3, 4, 4, 8
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __call__(self, images: torch.Tensor) -> Features:
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        patches = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        out = []
        for block in range(self.num_blocks - num, self.num_blocks):
            registers = torch.full((len(images), 2, 3), 1e6)  # must never reach a map
            out.append(Features(torch.full((len(images), 3), 100.0 + block), registers, patches * (block + 1)))
        return out


class Insightful(Plain):
    def blocks(self, images: torch.Tensor, which: list[int], *, norm: bool) -> list[Features]:
        found = [self.last_blocks(images, 4)[i] for i in which]
        return found if norm else [Features(f.cls, f.registers, f.patches + 1000) for f in found]


def test_blocks_from_extractors_with_and_without_insight() -> None:
    images = torch.rand(2, 3, 8, 12)
    assert len(read_blocks(Plain(), images, [2, 3], norm=True)) == 2
    for which, norm in (([1], True), ([3], False), ([0, 3], True)):
        with pytest.raises(ValueError, match="gives only its last blocks after the final norm"):
            check_blocks(Plain(), which, norm=norm)
        assert len(read_blocks(Insightful(), images, which, norm=norm)) == len(which)
    for which in ([4], [], [2, 1], [-1], [1, 1]):
        with pytest.raises(ValueError, match="the model has 4, numbered from 0"):
            check_blocks(Insightful(), which, norm=True)
    assert spread_blocks(12) == [2, 5, 8, 11]
    assert spread_blocks(40) == [9, 19, 29, 39]
    assert spread_blocks(7, 1) == [6]
    with pytest.raises(ValueError, match="has 3"):
        spread_blocks(3)


def test_maps_hold_patches_and_cls_in_order_and_never_registers() -> None:
    images = torch.randint(256, (2, 3, 7, 10), dtype=torch.uint8)
    maps = feature_maps(Insightful(), images, [1, 3], norm=True, with_cls=True)
    assert maps.shape == (2, 12, 2, 3)
    padded = F.pad(images.float() / 255, (1, 1, 0, 1))
    mean = F.avg_pool2d(padded, 4)
    torch.testing.assert_close(maps[:, 0:3], 2 * mean)
    assert (maps[:, 3:6] == 101).all()
    torch.testing.assert_close(maps[:, 6:9], 4 * mean)
    assert (maps[:, 9:12] == 103).all()


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (9, 5)])
def test_a_ramp_comes_back_where_it_was(size: tuple[int, int]) -> None:
    """Pixel columns averaged per patch and enlarged again lie on the same line, away from the border."""
    stride = 4
    ramp = torch.arange(float(size[1])).expand(1, 1, *size)
    left = padding(size[1], stride)[0]
    wide = center_pad(ramp, stride).shape[-1]
    line = (torch.arange(float(wide)) - left).expand(1, 1, size[0] + -size[0] % stride, wide)  # no zeros at the border
    back = to_pixels(F.avg_pool2d(line, stride), size, stride)
    assert back.shape[-2:] == size
    inside = slice(max(0, 2 - left), wide - 2 - left)
    torch.testing.assert_close(back[0, 0, :, inside], ramp[0, 0][:, inside])
    squeezed = to_pixels(F.avg_pool2d(line, stride), size, stride, keep_padding=True)
    assert torch.equal(squeezed, back) == (size[0] % stride == size[1] % stride == 0)

"""Tasks `segmentation` and `segmentation-patches` from pairs to cards: scores foretold, resuming, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from quietvit.contracts import Features
from quietvit.data.decode import UnreadableImage
from quietvit_eval.cards import Card, read_per_image
from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.evaluate import evaluate
from quietvit_eval.extract import Reading
from quietvit_eval.pair_data import PairData, choose_pairs
from quietvit_eval.resampling import rescored
from quietvit_eval.segmentation.linear import SegmentationOptions, train_head
from quietvit_eval.segmentation.patches import SegmentationPatchesOptions

TINTS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]])
NAMES = ["red", "green", "blue"]


class Colours:
    """Cells of 8 pixels in the colours of three classes, some void; images of several sizes. Some cannot be read."""

    kind = "classes"

    def __init__(self, split: str, count: int, *, names: Sequence[str] = NAMES, broken: Sequence[int] = ()) -> None:
        self.name, self.count, self.broken = f"colours/{split}", count, broken
        self.class_names = list(names)
        self.offset = {"train": 0, "test": 1000}[split]

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        rng = np.random.default_rng(index + self.offset)
        cells = rng.integers(-1, 3, (3 + index % 2, 4)).astype(np.int16)
        target = cells.repeat(8, axis=0).repeat(8, axis=1)
        image = np.where((target != IGNORE)[..., None], TINTS[target], rng.integers(0, 256, (*target.shape, 3)))
        return np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8), target

    def item_name(self, index: int) -> str:
        return f"{index:03d}.png"

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}"


class MeanColour:
    """A patch's feature is its mean colour; that of the block before, noise."""

    embed_dim, num_blocks, stride, image_size = 3, 2, 4, 32
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> Features:
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: torch.Tensor, num: int) -> Sequence[Features]:
        self.seen.append(tuple(images.shape))
        with torch.inference_mode():
            patches = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)
            noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
            none = images.new_empty(len(images), 0, 3)
            return [Features(p.mean(dim=(1, 2)), none, p) for p in (noise, patches)[2 - num :]]

    def identity(self) -> dict[str, Any]:
        return {"hash": "mean-colour"}


PAIRS = (Colours("train", 12), Colours("test", 10, broken=(3,)))
SMALL: dict[str, Any] = {
    "short_side": 24, "crop": 16, "stride": 11, "batch_size": 4, "steps": 60, "warmup_steps": 5, "lr": 0.1,
    "pictures": 2, "photometric": False,
}  # fmt: skip
PATCHES: dict[str, Any] = {"side": 32, "pictures": 2, "max_patches": 480}


def card(task: str, options: dict[str, Any], out: Path | None = None, **more: Any) -> Card:
    pairs = more.pop("pairs", PAIRS)
    return evaluate(MeanColour(), [task], pairs, options={task: options}, out_dir=out, **more)[0]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("segmentation", SMALL),
        ("segmentation", {**SMALL, "blocks": 2, "scales": (0.8, 1.2), "flip_test": True, "average": "valid"}),
        ("segmentation", {**SMALL, "blocks": (1,), "decay": "cosine", "dropout": 0.1, "photometric": True}),
        ("segmentation-patches", PATCHES),
        ("segmentation-patches", {**PATCHES, "method": "logistic", "blocks": 2, "cs": (1e-3, 1.0)}),
    ],
)
def test_colours_are_told_apart(task: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = card(task, options, tmp_path)
    assert found.scores["mIoU"] > 0.8
    assert found.scores["aAcc"] > 0.9
    assert found.main == "mIoU"
    assert found.data["test"]["unreadable_names"] == ["003.png"]
    assert list(found.details["classes"]) == NAMES
    ious = [c["IoU"] for c in found.details["classes"].values()]
    assert np.mean(ious) == pytest.approx(found.scores["mIoU"])
    counted = sum(int((PAIRS[1].load(i)[1] != IGNORE).sum()) for i in range(10) if i != 3)
    assert sum(c["pixels"] for c in found.details["classes"].values()) == counted
    (file,) = tmp_path.glob("*.json")
    per_image = read_per_image(file)
    assert per_image.rule == "iou"
    assert per_image.names == [f"{i:03d}.png" for i in range(10) if i != 3]
    assert rescored(per_image, "mIoU", np.ones(9, np.int64)) == pytest.approx(found.scores["mIoU"])
    pictures = [tmp_path / name for name in found.details["pictures"]]
    assert [p.name.split("_")[-1] for p in pictures] == ["000.png", "005.png"]
    assert sorted(pictures) == sorted((tmp_path / "pictures").iterdir())
    assert all(Image.open(p).size[0] > 700 for p in pictures)


def test_the_noise_of_the_block_before_tells_nothing(tmp_path: Path) -> None:
    class WithBlocks(MeanColour):
        def blocks(self, images: torch.Tensor, which: Sequence[int], *, norm: bool) -> Sequence[Features]:
            both = self.last_blocks(images, 2)
            return [both[i] for i in which]

    last, before = (
        evaluate(WithBlocks(), ["segmentation"], PAIRS, options={"segmentation": {**SMALL, "blocks": which}})[0]
        for which in ((1,), (0,))
    )
    assert last.scores["mIoU"] > 0.8 > 0.5 > before.scores["mIoU"]
    assert last.protocol_key() != before.protocol_key()


def test_a_size_asked_for_replaces_the_recipes() -> None:
    options = SegmentationOptions().at(256)
    assert (options.short_side, options.crop, options.window, options.stride) == (256, 256, None, 170)
    assert SegmentationOptions().at(None) == SegmentationOptions()
    small = SegmentationOptions(crop=640, short_side=640, window=512, stride=320).at(64)
    assert (small.short_side, small.crop, small.window, small.stride) == (64, 64, 51, 32)
    assert SegmentationOptions().at(1).stride == 1
    found = card("segmentation", SMALL, image_size=24)
    assert (found.protocol["short_side"], found.protocol["crop"], found.protocol["stride"]) == (24, 24, 16)
    assert card("segmentation-patches", PATCHES, image_size=16).protocol["side"] == 16


def pair_data(folder: Path | None) -> PairData:
    splits = [choose_pairs(source, None, 0) for source in PAIRS]
    return PairData(splits[0], splits[1], None, Reading(batch_size=3), 0, torch.device("cpu"), "some-model", folder)


def test_an_interrupted_head_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = SegmentationOptions(**{**SMALL, "dropout": 0.3, "steps": 12})
    whole = train_head(MeanColour(), pair_data(None), options)

    class Interrupted(MeanColour):
        def last_blocks(self, images: torch.Tensor, num: int) -> Sequence[Features]:
            if len(self.seen) == 14:  # the seventh step: a batch of 4 goes through in parts of 3
                raise KeyboardInterrupt
            return super().last_blocks(images, num)

    with pytest.raises(KeyboardInterrupt):
        train_head(Interrupted(), pair_data(tmp_path), options)
    assert len(list((tmp_path / "heads").iterdir())) == 1
    other = MeanColour()
    resumed = train_head(other, pair_data(tmp_path), options)
    assert len(other.seen) == 2 * 5
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=lambda m, name=name: f"{name}: {m}")
    third = MeanColour()
    train_head(third, pair_data(tmp_path), replace(options, stride=4, scales=(2.0,), flip_test=True))
    assert third.seen == []  # a finished head is taken for other tests too
    train_head(third, pair_data(tmp_path), replace(options, average="valid"))
    assert len(third.seen) == 2 * 12


def test_memory_bounds_do_not_change_scores() -> None:
    for task, options in (("segmentation", SMALL), ("segmentation-patches", PATCHES)):
        one, many = (card(task, options, batch_size=size) for size in (1, 50))
        assert one.scores == pytest.approx(many.scores, abs=2e-3)
        assert one.protocol_key() == many.protocol_key()


@pytest.mark.parametrize("task", ["segmentation", "segmentation-patches"])
def test_splits_of_unlike_classes_are_refused(task: str) -> None:
    options = {"segmentation": SMALL, "segmentation-patches": PATCHES}[task]
    other = (PAIRS[0], Colours("test", 10, names=["green", "red", "blue"]))
    with pytest.raises(ValueError, match=r"same classes in the same order; train has 3: red, green, blue, test 3: gr"):
        card(task, options, pairs=other)
    with pytest.raises(ValueError, match="at least 2 classes"):
        card(task, options, pairs=(Colours("train", 3, names=["x"]), Colours("test", 3, names=["x"])))
    with pytest.raises(ValueError, match="last 3 blocks asked for; the model has 2"):
        card(task, {**options, "blocks": 3})
    with pytest.raises(ValueError, match="none of the 2 pairs"):
        card(task, options, pairs=(PAIRS[0], Colours("test", 2, broken=(0, 1))))


class Void(Colours):
    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, target = super().load(index)
        return image, np.full_like(target, IGNORE)


@pytest.mark.parametrize("task", ["segmentation", "segmentation-patches"])
def test_void_images(task: str) -> None:
    options = {"segmentation": SMALL, "segmentation-patches": PATCHES}[task]
    with pytest.raises(ValueError, match="no pixel of colours/test has a class"):
        card(task, options, pairs=(PAIRS[0], Void("test", 4)))
    if task == "segmentation-patches":
        with pytest.raises(ValueError, match="no patch of the 4 train images of colours/train has a class"):
            card(task, options, pairs=(Void("train", 4), PAIRS[1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 300}, "a warm-up of 1500 steps leaves none of the 300 .* set warmup_steps too, e.g. to 11"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"stride": 513}, "a stride of 513 leaves gaps between windows of 512"),
        ({"window": 300}, "a stride of 341 leaves gaps between windows of 300"),
        ({"window": 0, "stride": 1}, "window must be at least 1"),
        ({"average": "mean"}, "average is all or valid, not 'mean'"),
        ({"decay": "linear"}, "decay is"),
        ({"ratio": (2.0, 0.5)}, "ratio"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"scales": ()}, "scales"),
        ({"scales": (0.0,)}, "scales"),
        ({"blocks": 0}, "blocks"),
        ({"blocks": ()}, "blocks"),
        ({"max_share": 0.0}, "max_share"),
        ({"dropout": 1.0}, "dropout"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lr": 0.0}, "lr"),
        ({"pictures": -1}, "pictures"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationOptions(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "svm"}, "method is knn or logistic, not 'svm'"),
        ({"metrics": ("cosine", "dot")}, "metrics are"),
        ({"metrics": ()}, "metrics are"),
        ({"ks": (0,)}, "ks are"),
        ({"cs": (0.0,)}, "cs are"),
        ({"held_out": 1.0}, "held_out"),
        ({"max_patches": 0}, "max_patches"),
        ({"max_iter": 0}, "max_iter"),
        ({"side": 0}, "side"),
        ({"blocks": ()}, "blocks"),
        ({"pictures": -1}, "pictures"),
    ],
)
def test_options_of_patches_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationPatchesOptions(**given)


def test_patches_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="a side of 30 pixels is not whole patches of 4: use 28 or 32"):
        card("segmentation-patches", {**PATCHES, "side": 30})
    with pytest.raises(ValueError, match="max_patches 11 is less than one of each of the 12 train images"):
        card("segmentation-patches", {**PATCHES, "max_patches": 11})
    with pytest.raises(ValueError, match="at least 2 train images"):
        card("segmentation-patches", PATCHES, pairs=(Colours("train", 1), PAIRS[1]))

"""The depth task from pairs to a card: a head that can learn does, views are as documented, errors say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.data.decode import UnreadableImage
from quietvit.weights import save_teacher
from quietvit_eval.cards import Card, read_card, read_per_image
from quietvit_eval.depth.options import DepthOptions
from quietvit_eval.depth.pictures import draw_depth
from quietvit_eval.depth.predict import DepthModel, chosen_blocks, make_head
from quietvit_eval.depth.task import DepthTask
from quietvit_eval.evaluate import DataSpec, evaluate
from quietvit_eval.pair_data import PairData

SIDES = ((24, 32), (30, 29), (21, 40))


class Tinted:
    """Photographs whose red channel tells the depth, 25 bytes for a metre; no two of one size follow each other."""

    kind = "metres"
    class_names: Sequence[str] = ()

    def __init__(self, split: str, count: int, *, blank: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.name, self.count, self.blank, self.broken = f"tinted/{split}", count, blank, broken
        self.offset = {"train": 0, "val": 1000}[split]

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        rng = np.random.default_rng(index + self.offset)
        height, width = SIDES[index % 3]
        slope = np.linspace(0, rng.uniform(-2, 2), width)[None] + np.linspace(0, rng.uniform(-2, 2), height)[:, None]
        depth = (rng.uniform(2, 8) + slope).clip(1, 9.5).astype(np.float32)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[..., 0] = np.rint(25 * depth)
        depth[rng.random(depth.shape) < 0.1] = 0
        if index in self.blank:
            depth[:] = 0
        return image, depth

    def item_name(self, index: int) -> str:
        return f"{index:04d}.png"

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}"


class Means:
    """Features of a patch: its mean colour and squares of it; padding shows as a colour of its own."""

    embed_dim, num_blocks, stride, image_size = 8, 4, 8, 32
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> Features:
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        self.seen.append(images)
        rgb = nn.functional.avg_pool2d(images, 8)
        maps = torch.cat([rgb, rgb.square(), rgb[:, :1] ** 3, rgb[:, :1] ** 4], dim=1).permute(0, 2, 3, 1)
        return [Features(maps.mean((1, 2)), maps.new_empty(len(maps), 0, 8), maps) for _ in range(num)]

    def identity(self) -> dict[str, Any]:
        return {"hash": "means"}


SOURCES = (Tinted("train", 40), Tinted("val", 9))
QUICK: dict[str, Any] = {
    "norm": True, "with_cls": False, "batch_norm": True, "upsample": 1, "bins": 32, "crop": (21, 29),
    "train_crop": "none", "eval_crop": "none", "rotate": 0.0, "color": False, "batch_size": 8, "steps": 120,
    "lr": 0.03, "warmup_steps": 10, "sig_warmup": 10, "pictures": 2,
}  # fmt: skip


def card(sources: Any = SOURCES, *, extractor: Any = None, size: int | None = None, out: Any = None, **kw: Any) -> Card:
    options = {"depth": {**QUICK, **kw}}
    return evaluate(extractor or Means(), ["depth"], sources, options=options, image_size=size, out_dir=out)[0]


def test_depth_that_the_features_tell_is_learnt(tmp_path: Path) -> None:
    """Guessing the mean depth is wrong by 1.9 m."""
    sources = (Tinted("train", 40, broken=(3,)), Tinted("val", 9, blank=(4,), broken=(6,)))
    found = card(sources, out=tmp_path)
    truth = [sources[1].load(i)[1] for i in range(9) if i not in (4, 6)]
    mean = np.concatenate([t[t > 0] for t in truth]).mean()
    guess = np.mean([np.sqrt(np.mean((t[t > 0] - mean) ** 2)) for t in truth])
    assert found.main == "rmse"
    assert not found.higher_is_better
    assert found.scores["rmse"] < 0.35 * guess
    assert found.scores["d1"] > 0.8
    assert found.details["images_without_depth"] == 1
    assert found.details["images_without_depth_names"] == ["0004.png"]
    assert found.data["train"]["unreadable_names"] == ["0003.png"]
    assert found.data["test"]["unreadable_names"] == ["0006.png"]
    (path,) = tmp_path.glob("*.json")
    assert read_card(path) == found
    rows = read_per_image(path)
    assert rows.names == [f"{i:04d}.png" for i in range(9) if i not in (4, 6)]
    assert {k: pytest.approx(float(v.mean())) for k, v in rows.values.items()} == found.scores
    assert len(found.details["pictures"]) == 2  # the first and the last
    for name in found.details["pictures"]:
        assert Image.open(tmp_path / name).size[0] > 800


@pytest.mark.parametrize(
    "options",
    [
        {"head": "dpt", "layers": 4, "with_cls": True, "batch_size": 2},
        {"head": "dpt", "layers": 4, "with_cls": True, "batch_size": 2, "bins": 0},
        {"bins": 0, "with_cls": True, "layers": 4, "upsample": 4},
        {"decay": "one_cycle", "gradient_weight": 0.0, "keep_padding": True, "align": True},
        {"resize": 40, "crop": (32, 32), "rotate": 5.0, "color": True, "color_quirk": True, "eval_crop": "garg"},
    ],
)
def test_every_variant_runs_and_gives_depths_in_range(options: dict[str, Any]) -> None:
    found = card(**{**options, "steps": 3, "warmup_steps": 0})
    assert all(np.isfinite(list(found.scores.values())))
    assert found.scores["mae"] <= found.scores["rmse"] < 10
    assert found.protocol["head"] == options.get("head", "linear")


def test_alignment_can_only_help() -> None:
    plain, better = card(steps=5), card(steps=5, align=True)
    assert better.scores["rmse"] < plain.scores["rmse"]
    assert plain.protocol_key() != better.protocol_key()


def model(extractor: Any = None, **options: Any) -> DepthModel:
    settings = DepthOptions(**{**QUICK, **options})
    extractor = extractor or Means()
    head = make_head(extractor, settings, 0).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return DepthModel(extractor, head, settings, device=torch.device("cpu"), most=64)


def test_the_whole_image_is_seen_padded_to_whole_patches_with_its_mirror_image() -> None:
    image = Tinted("val", 9).load(1)[0]
    extractor = Means()
    depth = model(extractor).predict(image)
    assert depth.shape == (30, 29)
    assert depth.dtype == np.float32
    (views,) = extractor.seen
    assert views.shape == (2, 3, 32, 32)  # 30 x 29, 1 pixel before and after, 1 before and 2 after
    normal = (torch.from_numpy(image).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(views[0, :, 1:31, 1:30], normal)
    torch.testing.assert_close(views[1, :, 1:31, 1:30], normal.flip(-1))
    assert not views[:, :, 0].any()
    assert not views[:, :, :, 30:].any()
    single = model(flip_test=False)
    expected = (single.predict(image) + single.predict(image[:, ::-1])[:, ::-1]) / 2
    np.testing.assert_allclose(depth, expected, rtol=1e-5)
    assert np.abs(single.predict(image) - depth).max() > 0.01
    np.testing.assert_allclose(model().predict(image[:, ::-1]), depth[:, ::-1], rtol=1e-5)


def test_predictions_are_clamped_and_come_back_at_the_images_own_size() -> None:
    image = Tinted("val", 9).load(2)[0]
    far = model(bins=0, max_depth=6.0)
    with torch.no_grad():
        far.head.conv.bias.fill_(100)  # type: ignore[union-attr,operator]
    assert set(np.unique(far.predict(image))) == {np.float32(6)}
    extractor = Means()
    depth = model(extractor, resize=42).predict(image)
    assert depth.shape == (21, 40)
    assert extractor.seen[0].shape[-2:] == (48, 80)  # 42 x 80 in whole patches


def test_features_are_made_few_at_a_time_and_alike() -> None:
    images = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8)
    whole, few = model(), model()
    few.most = 2
    torch.testing.assert_close(few.depth(images), whole.depth(images))
    assert [len(x) for x in few.extractor.seen] == [2, 2, 1]  # type: ignore[attr-defined]


class StopError(Exception):
    pass


class Interrupted(PairData):
    def batches(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, batch in enumerate(super().batches(*args, **kwargs)):
            if i == 4:
                raise StopError
            yield batch


def test_an_interrupted_head_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 10, "rotate": 3.0, "color": True, "decay": "one_cycle"}
    whole = card(out=tmp_path / "a", **options)
    with monkeypatch.context() as patch:
        patch.setattr("quietvit_eval.evaluate.PairData", Interrupted)
        with pytest.raises(StopError):
            card(out=tmp_path / "b", **options)
    resumed = card(out=tmp_path / "b", **options)
    assert resumed.details["steps_now"] == 6
    assert resumed.scores == whole.scores
    again = card(out=tmp_path / "b", **{**options, "flip_test": False, "pictures": 0, "align": True})
    assert again.details["steps_now"] == 0  # the head does not depend on how it is tested
    assert again.scores != whole.scores
    assert card(out=tmp_path / "b", **{**options, "lr": 0.01}).details["steps_now"] == 10


def test_a_damaged_state_is_trained_anew(tmp_path: Path) -> None:
    whole = card(out=tmp_path, steps=4)
    (state,) = (tmp_path / "heads").iterdir()
    state.write_bytes(state.read_bytes()[:50])
    again = card(out=tmp_path, steps=4)
    assert again.details["steps_now"] == 4
    assert again.scores == whole.scores


def test_a_size_asked_for_stands_on_the_card(tmp_path: Path) -> None:
    found = card(size=64, steps=3)
    assert (found.details["resize"], found.details["crop"]) == (64, [56, 56])
    assert found.protocol["image_size"] == 64
    assert found.protocol["resize"] == 64
    assert "square" in found.protocol["crop"]
    json.dumps(found.protocol)


class Classes(Tinted):
    kind = "classes"


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (SOURCES, {"crop": (416, 544)}, r"crop of 416 x 544 does not fit into images of 24 x 32 \(tinted/train\): set"),
        (SOURCES, {"eval_crop": "eigen"}, "a depth map is 24 x 32: set eval_crop=none"),
        (SOURCES, {"layers": 4, "with_cls": True, "norm": False}, "Means gives only its last blocks after the final"),
        (SOURCES, {"layer_indices": (0, 9)}, r"blocks \[0, 9\] asked for; the model has 4"),
        (SOURCES, {"layers": 9}, "9 blocks asked for; the model has 4"),
        (SOURCES, {"lr": 1e30, "steps": 50, "batch_norm": False}, "loss of the head is"),
        ((SOURCES[0], Tinted("val", 2, blank=(0, 1))), {"steps": 1}, "no pixel of tinted/val can be scored"),
        ((SOURCES[0], Tinted("val", 2, broken=(0, 1))), {"steps": 1}, "none of the 2 pairs of tinted/val can be read"),
        ((Classes("train", 3), Classes("val", 3)), {}, "tinted/train holds classes, but the task depth needs metres"),
    ],
)
def test_what_cannot_be_scored(sources: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        card(sources, **options)


def test_a_width_that_dpt_cannot_divide_is_told_before_any_work() -> None:
    extractor = Means()
    extractor.embed_dim = 12
    options = DepthOptions(head="dpt", layers=4, norm=True)
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        DepthTask().check(extractor, 0, options)


def test_blocks() -> None:
    extractor = Means()
    extractor.num_blocks = 24
    assert chosen_blocks(extractor, DepthOptions()) == [23]
    assert chosen_blocks(extractor, DepthOptions(layers=4)) == [5, 11, 17, 23]
    assert chosen_blocks(extractor, DepthOptions(layer_indices=(4, 11, 17, 23))) == [4, 11, 17, 23]


def test_pictures_show_what_is_unknown(tmp_path: Path) -> None:
    image, target = Tinted("val", 9).load(0)
    target[:12] = 0
    path = tmp_path / "deep" / "a.png"
    draw_depth(path, image, target, target.clip(1) + 0.5, target > 0, "a picture")
    grey = (np.asarray(Image.open(path).convert("RGB")) == 217).all(axis=-1).mean()
    draw_depth(path, image, target.clip(1), target.clip(1) + 0.5, target >= 0, "a picture")
    assert (np.asarray(Image.open(path).convert("RGB")) == 217).all(axis=-1).mean() < 0.01 < 0.1 < grey
    draw_depth(path, image, target * 0, target.clip(1), target < 0, "nothing known")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_heads_start_alike_and_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = make_head(Means(), DepthOptions(), 1), make_head(Means(), DepthOptions(), 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(one.state_dict(), two.state_dict())
    assert not torch.equal(make_head(Means(), DepthOptions(), 2).conv.weight, one.conv.weight)  # type: ignore[union-attr,arg-type]


def test_a_model_of_ours_on_scenes(tmp_path: Path) -> None:
    """Without the final norm, blocks by number, and its random-init control: untrained, so the same."""
    torch.manual_seed(5)
    backbone = make_backbone(
        "vit", embed_dim=16, depth=4, num_heads=2, patch_size=4, image_size=16, num_registers=2, init="xavier"
    )
    save_teacher(tmp_path, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=16, provenance={"seed": 5})
    options = {**QUICK, "norm": False, "with_cls": True, "layer_indices": [1, 3], "crop": [16, 16], "steps": 6}
    spec = DataSpec("scenes", options={"image_size": 16, "num_images": 12})
    cards = evaluate(tmp_path, ["depth"], spec, random_init=True, options={"depth": options}, device="cpu")
    assert [c.subject for c in cards] == ["model", "random-init"]
    assert cards[0].scores == cards[1].scores
    assert cards[0].label == "metres"
    assert cards[0].num_classes == 0
    assert cards[0].details["blocks"] == [1, 3]
    assert cards[0] != replace(cards[0], seed=1)

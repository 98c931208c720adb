"""Feature extraction: the right rows in the right order, unreadable images left out, registers never averaged in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from quietvit.backbones import make_backbone
from quietvit.contracts import BadSample
from quietvit.data.decode import UnreadableImage
from quietvit.weights.extractor import BackboneExtractor
from quietvit_eval.data import choose_splits
from quietvit_eval.extract import Reading, extract
from quietvit_eval.transform import EvalTransform, choose_transform, eval_size

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


class Pictures:
    """Noise pictures in memory, some of them broken."""

    def __init__(self, count: int = 12, side: int = 16, broken: tuple[int, ...] = (), classes: str = "abc") -> None:
        self.name, self.count, self.side, self.broken = "pictures", count, side, broken
        self.classes = {"class": list(classes)}
        self.labels = {"class": np.arange(count) % len(classes)}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        return np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)

    def item_name(self, index: int) -> str:
        return f"{index:03d}.png"

    def fingerprint(self) -> str:
        return f"pictures-{self.count}-{self.side}"


def model(**changes: Any) -> BackboneExtractor:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 4, "image_size": 16}
    backbone = make_backbone("vit", **{**arguments, **changes})
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": MEAN, "std": STD},
        "image_size": 16,
        "provenance": {"seed": 0},
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


WHOLE = EvalTransform(16, 16, "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_features_of_their_images(workers: int) -> None:
    extractor, source = model(num_registers=2), Pictures(broken=(2, 7))
    reading = Reading(batch_size=4, workers=workers)
    tokens = extract(extractor, source, [1, 2, 3, 5, 7, 11], WHOLE, blocks=2, reading=reading)
    assert tokens.indices.tolist() == [1, 3, 5, 11]
    assert [(b.name, b.reason) for b in tokens.skipped] == [("002.png", "cut short"), ("007.png", "cut short")]
    for row, index in zip(tokens.values, (1, 3, 5, 11), strict=True):
        pixels = torch.from_numpy(source.load(index)).permute(2, 0, 1) / 255
        image = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        first, last = extractor.last_blocks(image[None], 2)
        expected = torch.stack([first.cls[0], last.cls[0], last.patches[0].reshape(16, 8).mean(0)])
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(tokens.cls, tokens.values[:, 1])


def test_arrays_beyond_memory_live_in_a_file_that_is_removed(tmp_path: Path) -> None:
    source = Pictures(broken=(5,))
    inside = extract(model(), source, range(12), WHOLE, blocks=1, reading=Reading(memory=12 * 2 * 8 * 4))
    outside = extract(model(), source, range(12), WHOLE, blocks=1, reading=Reading(memory=767, scratch=tmp_path))
    assert (inside.mapped, outside.mapped) == (False, True)
    assert torch.equal(outside.values, inside.values)
    assert torch.equal(outside.indices, inside.indices)
    assert outside.skipped == inside.skipped == (BadSample("005.png", "cut short"),)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_images_and_tells_their_speed() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    extract(model(), Pictures(broken=(3,)), range(12), WHOLE, blocks=1, reading=Reading(5, console=console), what="pix")
    assert "pix" in (said := console.file.getvalue())  # type: ignore[attr-defined]
    assert "12/12" in said
    assert "images/s" in said
    quiet = Console(file=io.StringIO())
    extract(model(), Pictures(), range(12), WHOLE, blocks=1, reading=Reading(5, console=quiet))
    assert quiet.file.getvalue().strip() == ""  # type: ignore[attr-defined]


def test_nothing_readable_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"none of the 3 images.*000\.png: cut short"):
        extract(model(), Pictures(broken=(0, 1, 2)), range(3), WHOLE, blocks=1, reading=Reading())


def test_photographs_lose_their_border_and_small_pictures_do_not() -> None:
    assert choose_transform(Pictures(side=300), 224).resize == 256
    small = choose_transform(Pictures(side=250), 224)
    assert small.resize == 224
    assert "small" in small.rule
    assert choose_transform(Pictures(side=16, broken=(0,)), 16).resize == 16
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    view = EvalTransform(16, 20, "x")(image)
    assert torch.equal(view, torch.from_numpy(image[2:18, 7:23]).permute(2, 0, 1))


def test_the_side_to_score_at() -> None:
    extractor = model()
    assert eval_size(extractor) == 16
    extractor.image_size = 518
    extractor.stride = 14
    assert eval_size(extractor) == 224
    extractor.stride = 16
    extractor.image_size = 200
    assert eval_size(extractor) == 192
    assert eval_size(extractor, 256) == 256
    with pytest.raises(ValueError, match="use 240 or 256"):
        eval_size(extractor, 250)


def test_test_classes_are_matched_by_name_and_unknown_labels_left_out() -> None:
    train, test = Pictures(classes="abcd"), Pictures(classes="dab")
    test.labels["class"] = np.array([0, 1, 2, -1] * 3)
    first, second, names = choose_splits(train, test, label="class", limit_train=None, limit_test=None, seed=0)
    assert names == ["a", "b", "c", "d"]
    assert second.indices.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert second.labels.tolist() == [3, 0, 1] * 3
    assert first.labels.tolist() == train.labels["class"].tolist()
    with pytest.raises(ValueError, match="1 classes of pictures are not in pictures: c"):
        choose_splits(test, train, label="class", limit_train=None, limit_test=None, seed=0)
    with pytest.raises(ValueError, match="no label set 'colour'; its label sets: class"):
        choose_splits(train, test, label="colour", limit_train=None, limit_test=None, seed=0)


def test_limits_draw_the_same_images_for_the_same_seed() -> None:
    source = Pictures(count=40)
    draws = [choose_splits(source, source, label="class", limit_train=9, limit_test=5, seed=s)[:2] for s in (0, 0, 1)]
    assert len(draws[0][0].indices) == 9
    assert len(draws[0][1].indices) == 5
    assert draws[0][0].indices.tolist() == draws[1][0].indices.tolist() != draws[2][0].indices.tolist()
    assert draws[0][0].labels.tolist() == source.labels["class"][draws[0][0].indices].tolist()
    with pytest.raises(ValueError, match="leaves nothing"):
        choose_splits(source, source, label="class", limit_train=0, limit_test=None, seed=0)

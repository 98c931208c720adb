"""The discovery task from images with boxes to a card: objects that keys tell are found, biases are chosen on train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.data.decode import UnreadableImage
from quietvit.weights import load, save_teacher
from quietvit_eval.cards import Card, find_cards, read_card, read_per_image
from quietvit_eval.discovery.features import FeatureView, PatchColours, at_most
from quietvit_eval.discovery.lost import discover
from quietvit_eval.discovery.options import DiscoveryOptions
from quietvit_eval.discovery.pictures import FOUND, SEED, TRUE, draw, sheet
from quietvit_eval.evaluate import evaluate
from quietvit_launch import cli

P = 8
SIDES = ((40, 56), (37, 50), (61, 33))  # the latter two are no multiples of the patch


class Bright:
    """Dark images, each with one bright rectangle of whole patches in a corner or inside; `truth` may lie about it."""

    kind = "boxes"
    class_names: Sequence[str] = ()

    def __init__(self, split: str, count: int, *, truth: str = "object", broken: tuple[int, ...] = ()) -> None:
        self.name, self.count, self.truth, self.broken = f"bright/{split}", count, truth, broken
        self.root = Path(split)

    def __len__(self) -> int:
        return self.count

    def box(self, index: int) -> list[int]:
        height, width = SIDES[index % 3]
        if index % 2:
            return [P, P, 3 * P, 3 * P]
        return [width // P * P - P, height // P * P - P, width, height]  # to the lower right corner

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        height, width = SIDES[index % 3]
        left, top, right, bottom = self.box(index)
        image = np.zeros((height, width, 3), np.uint8)
        image[top:bottom, left:right] = 255
        boxes = {"object": [[0, 0, 1, 1], [left, top, right, bottom]], "all": [[0, 0, width, height]]}[self.truth]
        return image, np.array(boxes, np.float64)

    def item_name(self, index: int) -> str:
        return f"{index:04d}.png"

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}-{self.truth}"


class Light:
    """Keys say bright or dark, values too but with a constant beside it, queries always the same. [CLS] and two
    registers come first, and would rule everything if they leaked."""

    embed_dim, num_blocks, stride, image_size = 4, 3, P, 32
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong = wrong
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> Features:
        raise AssertionError("features are not asked for")

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        raise AssertionError("features are not asked for")

    def attention_inputs(
        self, images: torch.Tensor, block: int = -1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.seen.append(tuple(images.shape))
        light = torch.nn.functional.avg_pool2d(images, P)[:, 0].flatten(1).sign() + self.wrong  # padding is 0
        first = torch.full((len(light), 3), 1e6)

        def heads(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.cat([first, x], 1) for x in (a, b)], dim=1)[..., None]

        return heads(light * 0 + 1, light * 0), heads(light, light * 0), heads(light, light * 0 + 2)

    def identity(self) -> dict[str, Any]:
        return {"hash": "light"}


SOURCES = (Bright("train", 6), Bright("val", 7, broken=(4,)))


def card(sources: Any = SOURCES, *, extractor: Any = None, size: int | None = None, out: Any = None, **kw: Any) -> Card:
    found = evaluate(
        extractor or Light(), ["discovery"], sources, options={"discovery": kw}, image_size=size, out_dir=out
    )
    return found[0]


def test_objects_that_keys_tell_are_found(tmp_path: Path) -> None:
    found = card(out=tmp_path)
    assert found.scores == {"CorLoc": 1.0, "IoU": 1.0}
    assert (found.main, found.higher_is_better, found.label, found.num_classes) == ("CorLoc", True, "boxes", 0)
    assert set(found.data) == {"test"}  # no bias was chosen on train
    assert (found.data["test"]["images"], found.data["test"]["unreadable_names"]) == (7, ["0004.png"])
    assert found.details["images_tied"] == found.details["images_without_box"] == 0
    assert found.details["interval_95"] == [1.0, 1.0]
    shares = [np.prod(np.diff(np.reshape(SOURCES[1].box(i), (2, 2)), axis=0)) / np.prod(SIDES[i % 3]) for i in range(7)]
    assert found.details["area_of_boxes"] == pytest.approx(np.mean([shares[i] for i in range(7) if i != 4]))
    (path,) = tmp_path.glob("*.json")
    assert read_card(path) == found
    rows = read_per_image(path)
    assert rows.names == [f"{i:04d}.png" for i in range(7) if i != 4]
    assert rows.values["IoU"].tolist() == [1.0] * 6
    (picture,) = found.details["pictures"]
    assert np.asarray(Image.open(tmp_path / picture)).std() > 20


def test_images_are_padded_to_whole_patches_below_and_to_the_right() -> None:
    model = Light()
    card(extractor=model, sources=(Bright("train", 3), Bright("val", 3)))
    assert model.seen == [(1, 3, 40, 56), (1, 3, 40, 56), (1, 3, 64, 40)]


def test_corloc_by_hand() -> None:
    """Queries say nothing: the box is the whole image, which only one who calls everything an object takes for one."""
    found = card(facet="queries")
    assert found.scores["CorLoc"] == 0
    boxes = [np.prod(np.diff(np.reshape(SOURCES[1].box(i), (2, 2)), axis=0)) / np.prod(SIDES[i % 3]) for i in range(7)]
    assert found.scores["IoU"] == pytest.approx(np.mean([boxes[i] for i in range(7) if i != 4]))
    assert found.details["images_tied"] == 6
    assert found.details["images_tied_names"][0] == "0000.png"
    assert found.details["area_of_boxes"] == 1
    whole = card(facet="queries", sources=(SOURCES[0], Bright("val", 7, truth="all")))
    assert whole.scores["CorLoc"] == 1
    assert whole.details["CorLoc_without_features"] == {"whole image": 1.0, "half of it, in the middle": 1.0}
    nothing = card(bias=-9.0)
    assert nothing.scores == {"CorLoc": 0.0, "IoU": 0.0}
    assert (nothing.details["images_without_box"], nothing.details["area_of_boxes"]) == (6, 0)


def test_the_bias_is_chosen_on_train_images_alone() -> None:
    """Similarities of values are 3 and 5: none but a bias of -3 parts them, and 0 finds the whole image."""
    fixed = card(facet="values")
    assert (fixed.scores["CorLoc"], fixed.details["images_tied"]) == (0, 6)
    levels = (0.02, 0.9)
    held_out = card(facet="values", select="held_out", levels=levels)
    assert held_out.scores["CorLoc"] == 1
    assert (held_out.details["bias"], held_out.details["level"]) == (pytest.approx(-3), 0.02)
    assert set(held_out.data) == {"train", "test"}
    tried = held_out.details["sweep"]
    assert [(c["level"], c["corloc"], c["tied"], c["without_box"]) for c in tried] == [
        (None, 0.0, 6, 0), (0.02, 1.0, 0, 0), (0.9, 0.0, 6, 6),
    ]  # fmt: skip
    lying = (Bright("train", 6, truth="all"), SOURCES[1])
    misled = card(facet="values", select="held_out", levels=levels, sources=lying)
    assert (misled.scores["CorLoc"], misled.details["bias"]) == (0, 0)
    oracle = card(facet="values", select="val", levels=levels, sources=lying)
    assert (oracle.scores["CorLoc"], oracle.details["bias"]) == (1, pytest.approx(-3))
    assert "optimistic" in oracle.protocol["choice"]
    assert set(oracle.data) == {"test"}
    assert len({c.protocol_key() for c in (fixed, held_out, oracle)}) == 3


def test_centring_takes_a_constant_away() -> None:
    assert card(facet="values", center=True).scores["CorLoc"] == 1


def test_a_longer_side_at_the_most(tmp_path: Path) -> None:
    assert at_most(np.zeros((30, 60, 3), np.uint8), 20).shape == (10, 20, 3)
    assert at_most(np.zeros((30, 60, 3), np.uint8), 60).shape == (30, 60, 3)
    assert at_most(np.zeros((1, 60, 3), np.uint8), 20).shape == (1, 20, 3)

    class Large(Bright):
        """Four times as large as its boxes, which are scaled with it."""

        def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            image, boxes = super().load(index)
            return image.repeat(4, 0).repeat(4, 1), boxes * 4

    model = Light()
    found = card(extractor=model, sources=(SOURCES[0], Large("val", 1)), size=56)
    assert model.seen == [(1, 3, 40, 56)]
    assert (found.scores["IoU"], found.protocol["image_size"]) == (1.0, 56)


def test_what_cannot_be_scored_is_refused() -> None:
    class Blind:
        embed_dim, num_blocks, stride, image_size = 4, 1, P, 32
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

        def __call__(self, images: torch.Tensor) -> Features: ...

        def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]: ...

    class Masks(Bright):
        kind = "classes"

    same = Bright("val", 7)
    for arguments, message in (
        ({"extractor": Blind()}, r"Blind does not tell its keys: give it a method attention_inputs\(images, block\)"),
        ({"block": 3}, "block 3 asked for; the model has 3"),
        ({"extractor": Light(float("nan"))}, "0000.png: the model gives keys that are no finite numbers"),
        ({"sources": (same, same), "select": "held_out"}, "7 of the 7 train images are test images too"),
        ({"sources": (Masks("train", 3), same)}, "holds classes, but the task discovery needs boxes"),
        ({"sources": (SOURCES[0], Bright("val", 2, broken=(0, 1)))}, "none of the 2 pairs .* 0000.png: cut short"),
        (
            {"sources": (Bright("train", 2, broken=(0, 1)), same), "select": "held_out"},
            "none of the 2 pairs of bright/train",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            card(**arguments)
    assert card(sources=(same, same)).scores["CorLoc"] == 1  # with a fixed bias train is not read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"facet": "key"}, "facet is one of keys, queries, values, not 'key'"),
        ({"select": "test"}, "select is one of fixed, held_out, val"),
        ({"select": "val", "bias": 1.0}, "select=val chooses the bias; leave bias=1 out"),
        ({"bias": float("nan")}, "bias is a number"),
        ({"levels": ()}, "levels are shares"),
        ({"levels": (0.0, 0.5)}, "levels are shares"),
        ({"k": 0}, "k is a whole number from 1"),
        ({"pictures": -1}, "pictures is a whole number from 0"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscoveryOptions(**given)


# ---- features


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = make_backbone(
        "vit", patch_size=P, embed_dim=24, depth=2, num_heads=3, image_size=32, num_registers=2, init="xavier"
    )
    save_teacher(folder, backbone, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2), image_size=32, provenance={"seed": 0})
    return folder


def test_a_model_s_facets_are_its_patches_heads_side_by_side(tmp_path: Path) -> None:
    model = load(make_model(tmp_path), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (19, 30, 3), dtype=np.uint8)
    x = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.2
    padded = torch.zeros(1, 3, 24, 32)
    padded[0, :, :19, :30] = x
    inputs = dict(zip(("queries", "keys", "values"), model.attention_inputs(padded, 0), strict=True))
    for facet, [tokens] in inputs.items():
        view = FeatureView(facet, 0, False, None).of(model, image, "it")
        assert (view.grid, view.size) == ((3, 4), (19, 30))
        expected = torch.cat([head[3:] for head in tokens], dim=1)  # after [CLS] and two registers
        torch.testing.assert_close(view.values, expected, rtol=1e-5, atol=1e-5)
        middle = FeatureView(facet, 0, True, None).of(model, image, "it").values
        torch.testing.assert_close(middle, view.values - view.values.mean(0))


def test_colours_are_means_of_patches_less_that_of_the_image() -> None:
    control = PatchColours(Light())  # type: ignore[arg-type]
    images = torch.rand(2, 3, 16, 24)
    expected = images.unfold(2, P, P).unfold(3, P, P).mean((4, 5))  # [B 3 h w]
    expected = (expected - expected.mean((2, 3), keepdim=True)).permute(0, 2, 3, 1)
    torch.testing.assert_close(control(images).patches, expected)
    for facet in control.attention_inputs(images, 1):
        torch.testing.assert_close(facet[:, 0], expected.flatten(1, 2))
    found = discover(control(images).patches[0].flatten(0, 1), (2, 3))
    assert not found.tied


# ---- the command


def test_the_command_scores_a_model_and_its_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    data = tmp_path / "VOC2007"
    (data / "Annotations").mkdir(parents=True)
    (data / "JPEGImages").mkdir()
    for i in range(10):
        image, boxes = Bright("val", 10).load(3 * i)  # whole patches: padding would be a colour of its own
        Image.fromarray(image).save(data / "JPEGImages" / f"{i}.jpg", quality=95)
        left, top, right, bottom = boxes[1].astype(int).tolist()
        corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        (data / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><object><bndbox>{corners}</bndbox></object></annotation>"
        )
    out = tmp_path / "cards"
    words = ["--model", str(model), "--data", str(data), "--device", "cpu", "--out", str(out)]
    command = ["eval", "discovery", "select=held_out", "levels=[0.3, 0.6]", *words, "--pixels", "--random-init"]
    assert cli.main(command) == 0
    cards = {c.subject: c for c in find_cards(out).values()}
    assert set(cards) == {"model", "random-init", "pixels"}
    assert (cards["model"].data["train"]["images"], cards["model"].data["test"]["images"]) == (2, 8)
    assert cards["pixels"].scores["CorLoc"] == 1  # colour is all there is
    assert cards["model"].model["hash"] == cards["random-init"].model["hash"]  # the fresh model of that seed
    shown = " ".join(capsys.readouterr().out.split())
    assert "bias chosen on 2 of voc:" in shown
    assert "four in five by hash of the name" in shown

    assert cli.main(["eval", "lost-voc07", *words, "--limit-test", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "DINO ViT-S/16 61.9" in shown
    assert "Not comparable with these: this command has other --limit-test." in shown
    assert "3 images of voc:" in shown
    assert "all (10 images)" in shown
    assert cli.main(["eval", "lost-voc07", *words, "--test-split", "val", "bias=1"]) == 0
    assert "this command has other bias, --test-split." in " ".join(capsys.readouterr().out.split())
    assert cli.main(["eval", "discovery", *words, "--kind", "csv"]) == 2
    assert "looked for a CSV with the columns" in capsys.readouterr().err


def test_pictures_show_boxes_region_and_seed() -> None:
    image = np.full((50, 90, 3), 128, np.uint8)
    mask = np.zeros((7, 12), bool)
    mask[2:4, 5:8] = True
    shown = draw(
        image, np.array([[8.0, 8, 24, 24]]), np.array([40.0, 16, 64, 32]), mask=mask, seed=2 * 12 + 5,
        covered=(8, 8), title="it",
    )  # fmt: skip
    scale = shown.boxes.shape[1] / 90
    assert shown.boxes.shape == shown.region.shape == (240, round(90 * scale), 3)

    def extent(panel: np.ndarray, colour: tuple[int, int, int]) -> list[float]:
        rows, columns = np.nonzero((panel == colour).all(2))
        return [columns.min() / scale, rows.min() / scale, (columns.max() + 1) / scale, (rows.max() + 1) / scale]

    assert extent(shown.boxes, TRUE) == pytest.approx([8, 8, 24, 24], abs=1)
    assert extent(shown.boxes, FOUND) == pytest.approx([40, 16, 64, 32], abs=1)
    assert extent(shown.region, SEED) == pytest.approx([40, 16, 48, 24], abs=1)
    inside, outside = (shown.region[int(y * scale), int(x * scale)] for x, y in ((60, 28), (12, 12)))
    assert inside.tolist() == [round(0.4 * 128 + 0.6 * c) for c in FOUND]
    assert outside.tolist() == [32, 32, 32]
    page = sheet([shown, shown, shown])
    assert page.shape[0] > 2 * 240

"""The command on models whose artifacts are planted: which tokens, from which block on and how large is known."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planted import expected_norms, planted_vit
from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.data.decode import UnreadableImage
from quietvit.weights.extractor import BackboneExtractor
from quietvit.weights.native import save_teacher
from quietvit_eval.inspect.artifacts import Options, Subject, examine
from quietvit_eval.inspect.layers import across_blocks, coarse, is_high, measure, spread_of, threshold_of
from quietvit_eval.inspect.over_time import checkpoints_of, from_gauge
from quietvit_eval.inspect.page import sentences
from quietvit_eval.inspect.tokens import ImageSet, choose_images, norms_by_block, stem_tokens
from quietvit_eval.transform import EvalTransform
from quietvit_eval.views import normalised
from quietvit_launch.cli import main
from quietvit_launch.inspecting import layer_numbers

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Pictures:
    """Noise of 32 x 32 pixels, the same for the same number; labels by chance."""

    def __init__(self, count: int, *, labelled: bool = True, broken: Sequence[int] = (), side: int = 32) -> None:
        self.count, self.broken, self.side = count, set(broken), side
        self.name = f"pictures ({count})"
        labels = np.random.default_rng(9).integers(0, 2, count)
        self.labels = {"class": labels} if labelled else {}
        self.classes = {"class": ["a", "b"]} if labelled else {}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        if index in self.broken:
            raise UnreadableImage(f"{index}.png", "broken on purpose")
        noise = np.random.default_rng(index).normal(127, 64, (self.side, self.side, 3))
        return noise.clip(0, 255).astype(np.uint8)

    def item_name(self, index: int) -> str:
        return f"{index}.png"

    def fingerprint(self) -> str:
        return "f" * 12


def extractor_of(backbone: torch.nn.Module, side: int = 32) -> BackboneExtractor:
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": MEAN, "std": STD},
        "image_size": side,
        "provenance": {},
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


def clean_vit(**arguments: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 4, "image_size": 32, "num_registers": 0}
    return make_backbone("vit", **(options | arguments), init="xavier").eval()


def look(model: Any, source: Any, **options: Any) -> dict[str, Any]:
    """What is found about one model."""
    result, _ = examine([Subject("model", lambda: model)], source, Options(**options))
    found: dict[str, Any] = result["models"][0]
    return found


def words(found: dict[str, Any]) -> str:
    return " ".join(sentences(found))


# ---- the planted model


@pytest.mark.parametrize(
    ("block", "amount", "marked", "registers"), [(2, 60.0, [0, 27], 0), (1, 90.0, [9, 10, 63], 3), (3, 40.0, [36], 1)]
)
def test_planted_artifacts_are_diagnosed_exactly(
    block: int,
    amount: float,
    marked: list[int],
    registers: int,
) -> None:
    backbone = planted_vit(block=block, amount=amount, positions=marked, num_registers=registers)
    model, source = extractor_of(backbone), Pictures(40)
    found = look(model, source, probes=False, batch_size=7)
    for layer in found["layers"]:
        verdict = layer["patches"]
        assert verdict["kind"] == ("outliers" if layer["block"] >= block else "none")
        assert verdict["tokens"] == 40 * 64  # no [CLS] and no register among them
        assert verdict["share"] == pytest.approx(len(marked) / 64 if layer["block"] >= block else 0.0)
        assert len(layer["registers"]) == registers
    pixels = torch.stack([torch.from_numpy(source.load(i)).permute(2, 0, 1) for i in range(40)])
    expected = expected_norms(backbone, normalised(model, pixels), marked, block=block, amount=amount)
    last = found["layers"][-1]["patches"]
    high, rest = expected[-1][:, marked].log().mean(), np.delete(expected[-1].numpy(), marked, axis=1)
    assert last["ratio"] == pytest.approx(float(high.exp() / np.exp(np.log(rest).mean())), rel=0.02)
    assert rest.max() < last["cutoff"] < expected[-1][:, marked].min()
    share = np.array(found["places"]["share"]).ravel()
    assert np.flatnonzero(share).tolist() == marked
    assert set(share[marked]) == {1.0}
    assert found["places"]["images_with"] == 40
    assert found["probed"]["threshold"]["kind"] == "outliers"
    assert f"{100 * len(marked) / 64:.2f} % of the patch tokens" in found["decision"]["sentence"]
    word = "are" if block == 0 else f"They begin after block {block}"
    assert word in found["decision"]["blocks"]


def test_large_registers_do_not_leak_into_patches_or_maps() -> None:
    backbone = planted_vit(positions=[5], num_registers=4, amount=0.0)
    with torch.no_grad():
        backbone.register_tokens.mul_(100)
        backbone.cls_token.mul_(30)
    found = look(extractor_of(backbone), Pictures(20), probes=False)
    last = found["layers"][-1]
    assert last["patches"]["kind"] == "none"
    assert last["patches"]["max_over_median"] < 3
    assert min(r["median"] for r in last["registers"]) > 20 * last["patches"]["median"]
    assert last["cls"]["median"] > 10 * last["patches"]["median"]
    assert np.array(found["places"]["share"]).shape == (8, 8)


def test_a_clean_model_is_not_accused_and_the_stand_in_is_said() -> None:
    found = look(extractor_of(clean_vit()), Pictures(60), probes=False)
    assert [layer["patches"]["kind"] for layer in found["layers"]] == ["none"] * 3
    assert "no outliers" in found["decision"]["sentence"]
    assert "times the median" in found["decision"]["sentence"]
    assert "kurtosis" in found["decision"]["sentence"]
    assert found["decision"]["share"] == 0
    assert found["probed"]["threshold"]["kind"] == "stand-in"
    assert found["probed"]["tokens"] / found["probed"]["of"] == pytest.approx(0.02, abs=0.001)
    assert "They are no outliers: they only stand where outliers would" in words(found)


def test_probes_tell_planted_outliers_from_the_rest() -> None:
    """Marked tokens keep their position vectors, so that place is known from all of them; pixels are in the stem."""
    model = extractor_of(planted_vit(block=1, amount=60.0, positions=[5, 40], num_registers=2, embed_dim=64))
    found = look(model, Pictures(60), draws=2)
    local = found["local"]
    assert local["tokens"] == {"high": 36, "rest": 18 * 62}
    assert local["trained_on"]["tokens_pixels"] == 42 * 64
    assert local["top1"]["high"]["value"] == 1.0  # two places of their own, which one can tell
    assert local["chance"]["top1"] == 1 / 64
    assert local["top1"]["rest"]["value"] > 3 / 64
    assert local["pixel_error"]["rest"]["value"] < 0.5 * local["pixel_error_of_mean"]["rest"]["value"]
    same = found["one_token"]["same_images"]
    assert {s["token"] for s in same["scores"]} == {
        "[CLS]", "mean of patches", "high", "rest", "register 0", "register 1"
    }  # fmt: skip
    assert found["one_token"]["dropped"] == 0
    assert found["neighbours"]["high"]["tokens"] == 120


class Shades(Pictures):
    """The class is how bright the picture is."""

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        shade = 60 * int(self.labels["class"][index])
        return (super().load(index) // 2 + shade).astype(np.uint8)


def test_labels_meet_the_tokens_of_their_own_images() -> None:
    """The blocks of the planted model move nothing between tokens: patches know the shade, [CLS] cannot."""
    model = extractor_of(planted_vit(block=1, amount=60.0, positions=[5, 40], num_registers=1))
    found = look(model, Shades(120, broken=[3, 50]), images=90)["one_token"]
    scores = {s["token"]: s["top1"] for s in found["same_images"]["scores"]}
    assert scores["mean of patches"] == 1.0
    assert min(scores["rest"], scores["high"]) > 0.75
    assert scores["[CLS]"] == scores["register 0"] == found["same_images"]["chance"] < 0.75


def test_norms_seen_by_the_observer_are_those_of_the_blocks() -> None:
    model = extractor_of(clean_vit(num_registers=2))
    x = torch.randn(3, 3, 32, 32)
    found = norms_by_block(model, x, [0, 2])
    assert sorted(found) == [0, 2]
    for block, features in zip((0, 2), model.blocks(x, [0, 2], norm=False), strict=True):
        torch.testing.assert_close(found[block].patches, features.patches.norm(dim=-1).flatten(1))
        torch.testing.assert_close(found[block].registers, features.registers.norm(dim=-1))
        torch.testing.assert_close(found[block].cls, features.cls.norm(dim=-1))


def test_the_stem_is_that_before_any_position() -> None:
    for name in ("vit", "t2t_vit"):
        torch.manual_seed(0)
        backbone = make_backbone(name, size="nano", patch_size=16, image_size=64)
        model, x = extractor_of(backbone, 64), torch.randn(2, 3, 64, 64)
        stem = stem_tokens(model, x)
        assert stem is not None
        torch.testing.assert_close(stem.flatten(1, 2), backbone.tokenize(x, None)[0])
        with torch.no_grad():
            backbone.pos_embed.copy_(torch.randn_like(backbone.pos_embed))
        assert torch.equal(stem, stem_tokens(model, x))


# ---- sets of images


def test_unreadable_images_are_left_out_and_named() -> None:
    found = look(extractor_of(clean_vit()), Pictures(12, broken=[0, 7]), probes=True)
    assert (found["images"], found["unreadable"], found["unreadable_names"]) == (10, 2, ["0.png", "7.png"])
    with pytest.raises(ValueError, match=r"none of the 3 images .* the first: 0.png: broken on purpose"):
        look(extractor_of(clean_vit()), Pictures(3, broken=range(3)))


def test_few_images_no_labels_and_one_patch_are_said_not_failed() -> None:
    few = look(extractor_of(clean_vit()), Pictures(3))
    assert few["local"]["skipped"] == few["one_token"]["skipped"] == "3 images are too few: probes need 10"
    assert "only 3 images" in words(few)
    unlabelled = look(extractor_of(clean_vit()), Pictures(20, labelled=False))
    assert unlabelled["one_token"]["skipped"] == "the data have no labels of that name"
    assert "top1" in unlabelled["local"]
    single = extractor_of(clean_vit(patch_size=32))
    one = look(single, Pictures(20))
    assert one["neighbours"] == {"skipped": "a grid of one patch has no neighbours"}
    assert "top1" not in one["local"]
    assert "pixel_error" in one["local"]


def test_images_are_drawn_once_for_all_models() -> None:
    model = extractor_of(clean_vit())
    some = choose_images(Pictures(50), model, limit=8, seed=3)
    assert len(set(some.indices.tolist())) == 8
    assert sorted(some.indices.tolist()) == some.indices.tolist()
    again = choose_images(Pictures(50), extractor_of(planted_vit()), limit=8, seed=3)
    assert np.array_equal(some.indices, again.indices)
    assert not np.array_equal(some.indices, choose_images(Pictures(50), model, limit=8, seed=4).indices)
    with pytest.raises(ValueError, match="has no images"):
        choose_images(Pictures(0), model, limit=8, seed=3)


# ---- layers


def test_blocks_are_chosen_and_wrong_ones_said() -> None:
    assert Options().blocks(3) == ([0, 1, 2], 2)
    assert Options(layers=(0,), probe_layer=1).blocks(4) == ([0, 1, 3], 1)
    for options, number in ((Options(layers=(4,)), 4), (Options(probe_layer=-5), -5), (Options(probe_layer=9), 9)):
        with pytest.raises(ValueError, match=f"there is no block {number}: the model has 4"):
            options.blocks(4)
    with pytest.raises(ValueError, match="draws must be 1 or more, not 0"):
        Options(draws=0)


def test_histograms_for_the_page_hold_all_tokens_and_quantiles_are_right() -> None:
    model, source = extractor_of(clean_vit(num_registers=1)), Pictures(30)
    images = ImageSet(source, np.arange(30), EvalTransform(32, 32, "test"))
    norms, images = measure(model, images, [1, 2], probed=2, what="test")
    edges, (patches, cls) = coarse([norms.patches, norms.cls])
    assert np.sum(patches, axis=1).tolist() == [30 * 64] * 2
    assert np.sum(cls, axis=1).tolist() == [30] * 2
    assert len(edges) == len(patches[0]) + 1
    expected = np.histogram(norms.at_probed, edges)[0]
    assert np.abs(expected - patches[1]).sum() <= 4  # a norm on an edge may fall either way
    spread = spread_of(norms.patches, 1)
    for name, share in (("low", 0.05), ("median", 0.5), ("high", 0.95)):
        assert spread[name] == pytest.approx(np.quantile(norms.at_probed, share), rel=0.015)
    high = is_high(norms, threshold_of(norms))
    assert high.shape == (30, 64)


def test_words_about_blocks() -> None:
    class Verdict:
        def __init__(self, bimodal: bool) -> None:
            self.bimodal = bimodal

    def said(*having: bool) -> str:
        return across_blocks(range(len(having)), [Verdict(h) for h in having])  # type: ignore[arg-type, misc]

    assert said(False, False) == "No block that was read has outliers."
    assert said(False, True, True) == "They begin after block 1 and stay to the end."
    assert said(True, True) == "All blocks that were read have outliers."
    assert said(True, True, False) == "Blocks with outliers: 0, 1; they are gone after the last block."
    assert said(True, False, True) == "Blocks with outliers: 0, 2."


def test_norms_that_are_not_finite_are_an_error() -> None:
    backbone = clean_vit()
    with torch.no_grad():
        backbone.blocks[1].mlp.fc2.bias[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        look(extractor_of(backbone), Pictures(12))


class OwnModel:
    """A user's extractor that shows nothing but normed features."""

    embed_dim, num_blocks, stride, image_size, mean, std = 8, 4, 8, 32, MEAN, STD

    def __call__(self, images: torch.Tensor) -> Features:
        patches = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)[..., :8]
        return Features(patches.mean((1, 2)), patches.new_empty(len(images), 0, 8), patches)

    def last_blocks(self, images: torch.Tensor, num: int) -> Sequence[Features]:
        return [self(images)] * num


class OpenModel(OwnModel):
    """One that shows its blocks, the deeper the larger."""

    def blocks(self, images: torch.Tensor, which: Sequence[int], *, norm: bool) -> Sequence[Features]:
        features = self(images)
        scaled = [Features(*(getattr(features, n) * (1 + b) for n in ("cls", "registers", "patches"))) for b in which]
        return [features] * len(which) if norm else scaled


def test_models_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"OwnModel gives its features only after the final norm.*method blocks"):
        look(OwnModel(), Pictures(12))
    found = look(OpenModel(), Pictures(12))
    medians = [layer["patches"]["median"] for layer in found["layers"]]
    np.testing.assert_allclose(np.array(medians) / medians[0], [1, 2, 3, 4], rtol=0.02)
    assert found["neighbours"] == {"skipped": "this model does not show its stem"}
    assert found["model"]["hash"] is None


# ---- over time, and the command


def save(backbone: torch.nn.Module, folder: Path) -> None:
    save_teacher(folder, backbone, mean=MEAN, std=STD, image_size=32, provenance={"seed": 0})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second checkpoint has artifacts, and whose third is cut short."""
    run = tmp_path_factory.mktemp("runs") / "photos"
    for step, amount in ((100, 0.0), (200, 60.0)):
        backbone = planted_vit(amount=amount, positions=[5, 6])
        save(backbone, run / "checkpoints" / f"step_{step:08d}")
    save(backbone, run)
    cut = run / "checkpoints" / "step_00000300" / "teacher.safetensors"
    cut.parent.mkdir()
    cut.write_bytes((run / "teacher.safetensors").read_bytes()[:1000])
    lines = [{"step": s, "artifacts/share": v} for s, v in ((50, 0.0), (150, 0.03), (200, 0.031))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    episode = {"began_step": 150, "layer": 2, "blocks": [2, 3], "share": 0.03, "ratio": 9.0, "max_share": 0.031,
               "ended_step": None}  # fmt: skip
    (run / "artifacts.json").write_text(json.dumps({"num_registers": 0, "episodes": [episode]}))
    return run


def test_what_the_run_wrote_is_read(run_folder: Path, tmp_path: Path) -> None:
    found = from_gauge(run_folder)
    assert found is not None
    assert (found["steps"], found["shares"]) == ([50, 150, 200], [0.0, 0.03, 0.031])
    assert found["episodes"][0]["began_step"] == 150
    assert from_gauge(tmp_path) is None
    (tmp_path / "artifacts.json").write_text('{"episodes": 3}')
    broken = from_gauge(tmp_path)
    assert broken is not None
    assert "cannot be read" in broken["broken"]
    steps, problems = checkpoints_of(run_folder)
    assert [step for step, _ in steps] == [100, 200]
    assert len(problems) == 1
    with pytest.raises(ValueError, match="no checkpoints to follow"):
        checkpoints_of(tmp_path)


def test_the_command_writes_one_page_about_a_run_and_another_model(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "clean", tmp_path / "made" / "here"
    save(clean_vit(num_registers=2), other)
    words = ["inspect", "artifacts", "--model", str(run_folder), "--model", str(other), "--data", "scenes"]
    words += ["--data-option", "num_images=30", "--data-option", "image_size=32", "--label", "class", "--checkpoints"]
    assert main([*words, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "there are outliers: 3.12 % of the patch tokens" in " ".join(printed.split())
    result = json.loads((out / "result.json").read_text())
    run, clean = result["models"]
    assert [c["step"] for c in run["checkpoints"]["checkpoints"]] == [100, 200]
    assert [c["verdicts"][-1]["kind"] for c in run["checkpoints"]["checkpoints"]] == ["none", "outliers"]
    assert len(run["checkpoints"]["broken"]) == 1
    assert clean["checkpoints"] is None
    assert clean["decision"]["kind"] == "none"
    assert re.fullmatch(r"[0-9a-f]{16,}", run["model"]["hash"])
    assert result["data"]["fingerprint"]
    page = (out / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert "The run&#39;s own gauge saw artifacts from step 150 on" in page
    assert all(word not in page for word in ("nan", "None", "{{", "#010203"))
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {p.name for p in out.glob("*.png")} >= {"shares.png", "model0_norms.png", "model0_steps.png"}
    assert not list(out.glob(".*"))


def test_wrong_words_are_answered(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["inspect", "artifacts", "--data", "scenes", "--device", "cpu", "--model"]
    cases = {
        "there is no model at": [*start, "nowhere"],
        "write `all`, or numbers of blocks": [*start, str(run_folder), "--layers", "last"],
        "there is no block 9": [*start, str(run_folder), "--probe-layer", "9"],
        "is a file": [*start, str(run_folder), "--out", str(run_folder / "metrics.jsonl")],
        "none of the models is a run folder": [*start, str(run_folder / "teacher.safetensors"), "--checkpoints"],
        "is no multiple of 4 pixels": [*start, str(run_folder), "--size", "33"],
    }
    for said, words in cases.items():
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert layer_numbers("3, 1,1") == (1, 3)
    assert layer_numbers("all") is None

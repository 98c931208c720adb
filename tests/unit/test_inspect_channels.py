"""Dead and loud channels where they were planted; moments against numpy; stems, dense trunks; the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quietvit.data.sources import open_source
from quietvit_eval.inspect.channels import Moments, inspect_features, judge_channels, read_layers
from quietvit_eval.inspect.sample import Looks
from quietvit_launch.cli import main
from tiny_models import PatchPixels, build, extractor_of, save_run, write_images


def test_moments_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    parts = [3 + torch.randn(n, 4, 5, 6) * torch.arange(1, 7) for n in (1, 3, 2)]
    parts = [p + torch.tensor([0, 0, 0, 0, 0, 1e3]) for p in parts]
    moments = Moments()
    for part in parts:
        moments.add(part)
    whole = torch.cat(parts).double().flatten(0, 2).numpy()
    np.testing.assert_allclose(moments.mean, whole.mean(0))
    np.testing.assert_allclose(moments.spread, whole.std(0))
    np.testing.assert_allclose(moments.size, np.sqrt((whole**2).mean(0)))


def values(seed: int = 0, channels: int = 40) -> torch.Tensor:
    return torch.randn(4, 8, 8, channels, generator=torch.Generator().manual_seed(seed))


def test_planted_channels_are_named() -> None:
    x = values()
    x[..., 3] = 0
    x[..., 7] = 2.5  # the same everywhere
    x[..., 11] *= 0.005
    x[..., 12] *= 0.05  # weak, not dead
    x[..., 20] *= 30
    x[..., 21] += 50
    moments = Moments()
    for part in x.split(1):
        moments.add(part)
    report = judge_channels(moments)
    assert report.dead == [3, 7, 11]
    assert report.loud == [20, 21]
    assert report.dead_share == 3 / 40
    assert report.usual == pytest.approx(1, abs=0.1)


def test_a_clean_layer_is_not_accused() -> None:
    for seed in range(20):
        moments = Moments()
        moments.add(values(seed) * 1e-4)  # the scale of a layer is not its channels' fault
        report = judge_channels(moments)
        assert (report.dead, report.loud) == ([], [])


def test_a_layer_that_is_dead_for_the_most_part() -> None:
    x = values()
    x[..., 10:] = 0
    moments = Moments()
    moments.add(x)
    assert judge_channels(moments).dead == list(range(10, 40))
    x[..., :10] = torch.arange(10.0)
    moments = Moments()
    moments.add(x)
    assert judge_channels(moments).dead_share == 1
    moments = Moments()
    moments.add(torch.zeros(1, 4, 4, 5))
    assert judge_channels(moments).dead == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("vit", {"patch embedding": (4, 6, 24)}),
        ("t2t", {"soft split 1": (8, 12, 16), "stem": (4, 6, 24)}),
        ("t2t of three splits", {"soft split 1": (8, 12, 16), "soft split 2": (4, 6, 16), "stem": (2, 3, 24)}),
    ],
)
def test_layers_are_stem_and_blocks_without_registers(name: str, stem: dict[str, tuple[int, ...]]) -> None:
    backbone = build(name)
    extractor = extractor_of(backbone)
    images = torch.randn(2, 3, 32, 48)
    layers = read_layers(extractor, images)
    assert list(layers) == [*stem, "block 0", "block 1", "block 2"]
    for layer, shape in stem.items():
        assert layers[layer].shape == (2, *shape)
    tokens = backbone.tokens([images])[0][:, 1 + backbone.num_registers :]
    torch.testing.assert_close(layers["block 2"].flatten(1, 2), tokens)
    torch.testing.assert_close(layers[list(stem)[-1]].flatten(1, 2), backbone.tokenize(images, None)[0])


def test_soft_splits_are_laid_out_as_the_stem_lays_them_out() -> None:
    backbone = build("t2t")
    images = torch.randn(1, 3, 32, 48)
    stem = backbone.tokens_to_token
    found = read_layers(extractor_of(backbone), images)["soft split 1"]
    split = stem.splits[1]
    weight = stem.project.weight.view(24, 16, split.kernel, split.kernel)
    again = torch.nn.functional.conv2d(
        found.permute(0, 3, 1, 2), weight, stem.project.bias, stride=split.stride, padding=split.padding
    )
    torch.testing.assert_close(again.flatten(2).mT, backbone.tokenize(images, None)[0])


def test_channels_that_a_dense_trunk_has_not_written_are_not_counted() -> None:
    extractor = extractor_of(build("dense"))
    images = torch.randn(8, 3, 32, 32)
    layers = read_layers(extractor, images)
    assert [name for name in layers if name.startswith("block")] == ["block 3", "block 4"]  # after the transition
    widths = [layers[f"block {i}"].shape[-1] for i in (3, 4)]
    assert widths == [extractor.embed_dim - 6, extractor.embed_dim]
    padded = extractor.blocks(images, [3], norm=False)[0].patches
    assert not padded[..., -6:].any()
    assert torch.equal(padded[..., :-6], layers["block 3"])


def test_a_planted_channel_is_framed_on_the_page_and_named_in_the_result(tmp_path: Path) -> None:
    backbone = build("vit")
    with torch.no_grad():
        for parameter in (backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias):
            parameter[1] = 0
    source = open_source("auto", str(write_images(tmp_path / "images", 4)))
    done = inspect_features(extractor_of(backbone), source, tmp_path / "out", looks=Looks(), shown=1)
    facts = json.loads(done.result.read_text())
    assert facts["layers"][0]["name"] == "patch embedding"
    assert facts["layers"][0]["dead"] == [1]
    assert facts["layers"][0]["dead_share"] == pytest.approx(1 / 24, rel=1e-5)
    assert facts["layers"][1]["dead"] == []  # positions and the block write into it
    picture = np.asarray(Image.open(done.pictures[0])).astype(int)
    orange = (abs(picture - np.array([213, 94, 0])).sum(-1) < 30).nonzero()
    # a frame of one panel: 72 pixels high and wide, in the first row
    assert orange[0].max() - orange[0].min() == orange[1].max() - orange[1].min() == 71
    assert orange[0].min() == 26


def test_a_model_of_one_s_own_is_read_where_it_can_be(tmp_path: Path) -> None:
    source = open_source("auto", str(write_images(tmp_path / "images", 3)))
    done = inspect_features(PatchPixels(), source, tmp_path / "out", looks=Looks(), order="varied", channels=99)
    facts = json.loads(done.result.read_text())
    assert [layer["name"] for layer in facts["layers"]] == ["block 0", "block 1"]
    assert facts["final_norm"] is True
    assert "after the final norm" in done.lines[0]


def test_mistakes_are_told(tmp_path: Path) -> None:
    source = open_source("auto", str(write_images(tmp_path / "images", 2)))
    with pytest.raises(ValueError, match="no block 3 to be read: this model has block 0 to block 2"):
        inspect_features(extractor_of(build("vit")), source, tmp_path / "out", looks=Looks(), layers=[0, 3])
    with pytest.raises(ValueError, match="order must be one of first, varied, not 'last'"):
        inspect_features(extractor_of(build("vit")), source, tmp_path / "out", looks=Looks(), order="last")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = save_run(tmp_path / "run", "t2t"), write_images(tmp_path / "images", 5, broken=1)
    words = ["inspect", "features", "--model", str(run), "--data", str(images), "--device", "cpu"]
    assert main([*words, "--shown", "3", "--layers", "0,2", "--batch-size", "2"]) == 0
    out = run / "inspect" / "features"
    facts = json.loads((out / "features.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "features.json", "features_1.png", "features_2.png", "features_3.png",
    ]  # fmt: skip
    assert len(facts["shown"]) == 3
    assert facts["data"]["images"] == 5
    told = capsys.readouterr().out
    assert "over 5 images" in told
    assert "soft split 1" in told
    assert main([*words, "--layers", "0,x"]) == 2
    assert "write the numbers of blocks" in capsys.readouterr().err

"""Attention maps against softmax as loops, against the block's own output, and planted ones; averages; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from quietvit.backbones import Trunk
from quietvit.data.sources import open_source
from quietvit_eval.inspect.attention import (
    attention_rows,
    average_attention,
    inspect_attention,
    likeness,
    read_attention,
)
from quietvit_eval.inspect.sample import Looks, Sample
from quietvit_eval.views import normalised
from quietvit_launch.cli import main
from tiny_models import BACKBONES, PatchPixels, build, extractor_of, save_run, write_images


def attended(backbone: Trunk, images: Tensor, block: int) -> Tensor:
    """What the block's attention hands to its last projection [B T D]."""
    seen: list[Tensor] = []
    handle = backbone.blocks[block].attn.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    backbone(images)
    handle.remove()
    return seen[0].unflatten(0, (len(images), -1))


@pytest.mark.parametrize("name", BACKBONES)
def test_rows_times_values_are_what_the_block_computes(name: str) -> None:
    backbone = build(name).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens = 1 + backbone.num_registers
    for block in (0, backbone.num_blocks - 1):
        q, k, v = backbone.attention_inputs(images, block)
        rows = attention_rows(q, k, tokens)
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
        ours = (rows @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours, attended(backbone, images, block)[:, :tokens])


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_are_the_softmax_over_all_tokens_at_their_patches(name: str) -> None:
    extractor = extractor_of(build(name))
    images = torch.randn(2, 3, 32, 48)
    found = read_attention(extractor, images)
    q, k, _ = (x.double().numpy() for x in extractor.attention_inputs(images))
    registers, (h, w) = extractor.backbone.num_registers, (32 // extractor.stride, 48 // extractor.stride)
    assert found.tokens == ["CLS", *(f"register {i}" for i in range(registers))]
    for image, head, token in [(0, 0, 0), (1, q.shape[1] - 1, registers)]:
        products = [float(np.dot(q[image, head, token], key)) / math.sqrt(q.shape[3]) for key in k[image, head]]
        weights = [math.exp(p - max(products)) for p in products]
        row = [value / sum(weights) for value in weights]
        naive = np.array(row[1 + registers :]).reshape(h, w)
        np.testing.assert_allclose(found.maps[image, head, token].numpy(), naive, rtol=1e-4, atol=1e-6)
        shares = [row[0], sum(row[1 : 1 + registers]), naive.sum()]
        np.testing.assert_allclose(found.mass[image, head, token].numpy(), shares, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mass.sum(-1), torch.ones_like(found.mass[..., 0]))
    torch.testing.assert_close(found.maps.sum((-1, -2)), found.mass[..., 2])


class Planted(PatchPixels):
    """[CLS] looks at patch (1, 2) alone, the only register at [CLS]."""

    def attention_inputs(self, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        w = images.shape[3] // 4
        k = torch.eye(2 + w * (images.shape[2] // 4))
        q = torch.zeros_like(k)
        q[0, 2 + w + 2] = q[1, 0] = 1e4
        return tuple(x.expand(len(images), 2, -1, -1) for x in (q, k, k))  # type: ignore[return-value]


def test_planted_attention_is_found_where_it_was_put() -> None:
    found = read_attention(Planted(), torch.zeros(3, 3, 16, 20))
    wanted = torch.zeros(4, 5)
    wanted[1, 2] = 1
    assert found.tokens == ["CLS", "register 0"]
    assert torch.equal(found.maps[:, :, 0], wanted.expand(3, 2, 4, 5))
    assert torch.equal(found.maps[:, :, 1], torch.zeros(3, 2, 4, 5))
    assert found.mass[1, 1].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_likeness_is_a_correlation() -> None:
    maps = torch.rand(4, 3, 3, 5, 6)
    maps[:, :, 2] = 0.5 * maps[:, :, 1] + 0.1
    found = likeness(maps)
    assert found[1, 2] == pytest.approx(1)
    one = [np.corrcoef(m.mean(0)[0].flatten(), m.mean(0)[1].flatten())[0, 1] for m in maps.double()]
    assert found[0, 1] == pytest.approx(np.mean(one))


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_the_average_is_over_images_whatever_the_batch(tmp_path: Path, batch: int) -> None:
    source = open_source("auto", str(write_images(tmp_path / "images", 5, broken=1)))
    extractor = extractor_of(build("vit"))
    sample = Sample(extractor, source, Looks(batch_size=batch), images=6)
    mean = average_attention(extractor, sample, -1)
    views = torch.stack([sample.view(source.load(i)) for i in range(6) if "broken" not in source.item_name(i)])
    each = [read_attention(extractor, normalised(extractor, one[None])) for one in views]
    assert mean.images == len(each) == 5
    torch.testing.assert_close(mean.maps, torch.cat([e.maps for e in each]).double().mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mean.mass, torch.cat([e.mass for e in each]).double().mean(0), rtol=1e-5, atol=1e-7)
    assert sample.about()["unreadable_names"] == ["broken_0.png"]
    assert sample.about()["images"] == 5


def test_images_are_drawn_with_the_seed(tmp_path: Path) -> None:
    source = open_source("auto", str(write_images(tmp_path / "images", 12)))
    extractor = extractor_of(build("vit"))
    drawn = [Sample(extractor, source, Looks(4, seed=seed)).indices.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(d == sorted(set(d)) and len(d) == 4 for d in drawn)
    assert Sample(extractor, source, Looks(99)).indices.tolist() == list(range(12))


def write(tmp_path: Path, **given: Any) -> Any:
    source = open_source("auto", str(tmp_path / "images"))
    return inspect_attention(extractor_of(build("vit")), source, tmp_path / "out", looks=Looks(3), **given)


def test_mistakes_are_told(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="PatchPixels does not show its attention: give it a method attention_inputs"):
        read_attention(PatchPixels(), images)
    write_images(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="there is no block 3: this model has 3, 0 to 2, or from the last down -1 to"):
        write(tmp_path, block=3)
    with pytest.raises(ValueError, match="average over one image"):
        write(tmp_path, average=1)
    (tmp_path / "images" / "image_0.png").unlink()
    with pytest.raises(ValueError, match="average over one image"):
        write(tmp_path, average=5)
    (tmp_path / "images" / "image_1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images drawn from .* can be read; the first: image_1\.png"):
        write(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_model_without_other_tokens_and_one_that_overflows() -> None:
    class Bare(PatchPixels):
        def attention_inputs(self, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor, Tensor]:
            q = torch.zeros(len(images), 1, images.shape[2] * images.shape[3] // 16, 4)
            return q, q, q

    class Broken(Planted):
        def attention_inputs(self, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().attention_inputs(images, block)
            return q * torch.inf, k, v

    with pytest.raises(ValueError, match=r"Bare has 16 tokens for 4 x 4 patches: none is a \[CLS\]"):
        read_attention(Bare(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="no finite numbers"):
        read_attention(Broken(), torch.zeros(1, 3, 16, 16))


def test_the_command_writes_pages_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = save_run(tmp_path / "run"), write_images(tmp_path / "images", 4)
    words = ["--model", str(run), "--data", str(images), "--device", "cpu", "--images", "2", "--average", "4"]
    assert main(["inspect", "attention", *words, "--layer", "-2", "--smooth"]) == 0
    out = run / "inspect" / "attention"
    told = capsys.readouterr().out
    facts = json.loads((out / "attention.json").read_text())
    names = {f"attention{end}.png" for end in ("", "_average", "_heads_cls", "_heads_register_0", "_heads_register_1")}
    assert {p.name for p in out.iterdir()} == names | {"attention.json"}
    assert set(facts["pictures"]) == names
    assert facts["block"] == 1
    assert len(facts["model"]["hash"]) == 64
    assert np.array(facts["average"]["maps"]["register 1"]).shape == (4, 4)
    assert sum(facts["mass"]["shares"]["CLS"].values()) == pytest.approx(1, abs=1e-5)
    assert f"wrote {out / 'attention.json'}" in told
    assert "mean over 4 images and 3 heads" in told
    assert Image.open(out / "attention.png").size[1] > 2 * 144


def test_the_command_tells_a_model_of_one_s_own_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom quietvit.contracts import Features\n\n\n"
        "class Own:\n    embed_dim, num_blocks, stride, image_size = 3, 1, 4, 16\n"
        "    mean = std = (0.5, 0.5, 0.5)\n\n"
        "    def __call__(self, images):\n        p = torch.nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)\n"
        "        return Features(p.mean((1, 2)), p.new_empty(len(p), 0, 3), p)\n\n"
        "    def last_blocks(self, images, num):\n        return [self(images)] * num\n"
    )
    images = write_images(tmp_path / "images", 2)
    words = ["--model", f"{tmp_path / 'own.py'}:Own", "--data", str(images)]
    assert main(["inspect", "attention", *words]) == 2
    assert "Own does not show its attention" in capsys.readouterr().err
    assert main(["inspect", "pca", *words]) == 0
    assert (tmp_path / "inspect" / "pca" / "pca.png").is_file()

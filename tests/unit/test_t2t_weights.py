"""T2T-ViT files in the official wrapping: numbers of their authors' code, what is read off the shapes, and refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quietvit
from quietvit.backbones import make_backbone
from quietvit.backbones.t2t_vit import OFFICIAL, T2T_SIZES
from quietvit.weights import load_released, random_like, save_teacher
from quietvit.weights.family import Hints
from quietvit.weights.native import load_strictly, weights_hash
from quietvit.weights.t2t import infer_arguments
from quietvit_launch import cli
from reference import VECTORS, Case, case

MODELS = ("performer", "performer_224", "transformer", "se", "ghost", "dense")
SHAPES = json.loads((VECTORS / "07_t2t" / "state_dict_shapes.json").read_text())["models"]


def vectors(name: str) -> tuple[Case, dict[str, Tensor], int]:
    """A reference case, its weights as released ones are stored (float32), and its number of heads."""
    c = case(f"07_t2t/t2t_vit_{name}")
    return c, {k: v.float() for k, v in c.weights().items()}, c.info["constructor"]["num_heads"]


def released(folder: Path, state: dict[str, Tensor], *, prefix: str = "module.", **others: Any) -> Path:
    """A file as T2T-ViT's were released."""
    path = folder / "81.5_T2T_ViT_14.pth.tar"
    torch.save({**others, "state_dict_ema": {prefix + k: v for k, v in state.items()}}, path)
    return path


def small(**changes: Any) -> Any:
    """A model of an official kind with two heads 64 wide, moved away from its start."""
    torch.manual_seed(0)
    given = {"embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "token_dim": 16, "image_size": 48}
    arguments = {**OFFICIAL, "num_classes": 5, "stem_attention": "performer_official", **given, **changes}
    backbone = make_backbone("t2t_vit", **arguments)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return backbone.eval()


def official(backbone: Any) -> dict[str, Tensor]:
    """Its weights without those that a supervised model lacks."""
    return {k: v for k, v in backbone.state_dict().items() if k not in ("mask_token", "register_tokens")}


@pytest.mark.parametrize("name", MODELS)
def test_files_give_the_numbers_of_their_authors(tmp_path: Path, name: str) -> None:
    c, state, heads = vectors(name)
    model = quietvit.load(released(tmp_path, state), device="cpu", num_heads=heads)
    stored = c.inputs("forward")["x_bytes"].float()
    for run in ("forward", "forward_faint_image"):
        images = (stored - 128) / 64 * float(c.info["runs"][run]["settings"].get("x_scale", 1.0))
        c.check(run, "logits", model.logits(images))
    c.check("forward", "features", model((stored - 128) / 64).cls)
    assert model.num_classes == c.info["constructor"]["num_classes"]
    assert model.image_size == c.info["constructor"]["img_size"]
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not model.backbone.mask_token.any()


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [("t2t_vit_7", "7", 4_310_222), ("t2t_vit_14", "14", 21_545_550), ("t2t_vit_t_14", "t-14", 21_541_070)],
)
def test_official_key_lists_meet_the_inferred_architecture(name: str, size: str, parameters: int) -> None:
    with torch.device("meta"):
        tensors = {k: torch.empty(shape) for k, shape in SHAPES[name].items()}
        arguments = infer_arguments(tensors)
        heads = arguments["embed_dim"] // 64
        backbone = make_backbone("t2t_vit", **arguments, num_heads=heads)
        load_strictly(backbone, {"mask_token": torch.empty(1, arguments["embed_dim"]), **tensors}, what=name)
    expected = {"stem_attention": "performer_official", "token_dim": 64, **T2T_SIZES[size]}
    assert {**arguments, "num_heads": heads} == {
        **OFFICIAL, **expected, "image_size": 224, "num_classes": 1000,
    }  # fmt: skip
    assert sum(v.numel() for v in tensors.values()) == parameters


VARIANTS: dict[str, dict[str, Any]] = {
    "transformer": {"stem_attention": "transformer"},
    "qkv bias": {"qkv_bias": True},
    "no head": {"num_classes": 0},
    "another grid": {"image_size": 80},
    "narrow stem": {"token_dim": 6},
    "se": {"attention_layer": "se"},
    "ghost": {"attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0},
    "ghost with qkv bias": {"attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0, "qkv_bias": True},
    "dense": {"dense_groups": "2-1-3", "growth": 16, "depth": 8, "num_heads": 8},
    "one dense group": {"dense_groups": "2", "growth": 24, "num_heads": 8},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_but_the_heads_is_read_off_names_and_shapes(tmp_path: Path, name: str) -> None:
    backbone = small(**VARIANTS[name])
    loaded, meta = load_released(released(tmp_path, official(backbone)))
    assert {k: backbone.arguments[k] for k in meta["backbone"]["arguments"]} == meta["backbone"]["arguments"]
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).cls, backbone(images).cls)


def test_the_number_of_heads_comes_from_the_caller_the_name_or_the_width(tmp_path: Path) -> None:
    state = official(small())

    def heads(path: Path, num_heads: int | None = None) -> tuple[int, str]:
        backbone, meta = load_released(path, Hints(num_heads=num_heads))
        return backbone.blocks[0].attn.num_heads, meta["provenance"]["heads"]  # type: ignore[index,union-attr,return-value]

    plain = released(tmp_path, state)
    assert heads(plain) == (2, "2, each 64 wide")
    assert heads(plain, 4) == (4, "4, as asked for")
    named = plain.rename(tmp_path / "81.5_T2T_ViT_14_ResNeXt.pth.tar")
    assert heads(named) == (32, "32, since the file's name says resnext")
    assert heads(released(tmp_path, state, arch="T2t_vit_14_resnext")) == (32, '32, since its "arch" says resnext')
    with pytest.raises(
        ValueError, match=r"T2T_ViT_14\.pth\.tar, read as t2t_vit: width 128 cannot be divided among 3 attention heads"
    ):
        load_released(plain.with_name("81.5_T2T_ViT_14.pth.tar"), Hints(num_heads=3))
    narrow = released(tmp_path, vectors("performer")[1])
    with pytest.raises(ValueError, match=r"width 48 is no multiple of 64.*give num_heads"):
        load_released(narrow)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_averaged_weights_come_first_then_the_last_ones_then_the_file_itself(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.pth"
    average, last = small(), small()
    with torch.no_grad():
        last.cls_token.add_(1.0)
    states = {
        "state_dict_ema": {prefix + k: v for k, v in official(average).items()},
        "state_dict": {prefix + k: v for k, v in official(last).items()},
    }
    others = {"epoch": 309, "arch": "t2t_vit_14", "metric": 81.5, "optimizer": {"state": {0: {"step": 1}}}}

    def check(content: dict[str, Any], expected: Any, entry: str) -> None:
        torch.save(content, path)
        loaded, meta = load_released(path)
        assert {k: float(v.sum()) for k, v in loaded.state_dict().items() if k != "mask_token"} == {
            k: float(v.sum()) for k, v in official(expected).items()
        }
        assert meta["provenance"]["entry"] == entry
        assert meta["provenance"]["source"] == "t2t_vit"

    check({**others, **states}, average, "state_dict_ema")
    check({**others, "state_dict": states["state_dict"]}, last, "state_dict")
    check(states["state_dict"], last, "")


def test_registers_are_added_and_nothing_else_changes(tmp_path: Path) -> None:
    path = released(tmp_path, official(small()))
    plain = quietvit.load(path, device="cpu")
    model = quietvit.load(path, device="cpu", num_registers=3)
    images = torch.randn(2, 3, 64, 48)
    features, before = model(images), plain(images)
    assert features.registers.shape == (2, 3, 128)
    assert features.patches.shape == before.patches.shape == (2, 4, 3, 128)
    assert not torch.equal(features.cls, before.cls)  # there is more to attend to
    assert model.backbone.state_dict().keys() - plain.backbone.state_dict().keys() == {"register_tokens"}
    with torch.no_grad():  # but with no say in attention, they change nothing
        for loaded in (plain, model):
            for block in loaded.backbone.blocks:
                block.attn.qkv.weight[256:] = 0  # type: ignore[union-attr,index,operator]
    assert torch.allclose(model(images).cls, plain(images).cls, atol=1e-6)
    assert torch.allclose(model(images).patches, plain(images).patches, atol=1e-6)
    state = {**official(small()), "register_tokens": torch.zeros(1, 3, 128)}
    with pytest.raises(ValueError, match="1 keys unexpected: register_tokens"):
        load_released(released(tmp_path, state))
    with pytest.raises(ValueError, match=r"register_tokens \(1, 3, 128\) instead of \(1, 4, 128\)"):
        load_released(released(tmp_path, state), Hints(num_registers=4))


def test_the_head_survives_the_export_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = released(tmp_path, official(small(image_size=32)))
    assert cli.main(["export", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "greatest difference 0)" in capsys.readouterr().out
    before, after = quietvit.load(path, device="cpu"), quietvit.load(tmp_path / "out", device="cpu")
    assert weights_hash(before.backbone) == weights_hash(after.backbone)
    images = torch.randn(2, 3, 48, 32)
    assert torch.equal(before.logits(images), after.logits(images))
    assert torch.equal(before(images).patches, after(images).patches)
    assert after.num_classes == 5
    assert after.meta["provenance"] == before.meta["provenance"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained with labels by T2T-ViT" in card
    assert "[B 5], by the supervised head" in card
    control = random_like(after)
    assert control.logits(images).shape == (2, 5)
    assert weights_hash(control.backbone) == weights_hash(random_like(before).backbone) != weights_hash(after.backbone)
    with_registers, meta = load_released(path, Hints(num_registers=2))
    file = save_teacher(
        tmp_path / "r2", with_registers, mean=after.mean, std=after.std, image_size=32, provenance=meta["provenance"],
        backbone_name="t2t_vit",
    )  # fmt: skip
    assert torch.equal(
        quietvit.load(file, device="cpu").logits(images), quietvit.load(path, "cpu", num_registers=2).logits(images)
    )


def test_a_model_without_a_head_has_no_logits(tmp_path: Path) -> None:
    model = quietvit.load(released(tmp_path, official(small(num_classes=0))), device="cpu")
    assert model.num_classes == 0
    with pytest.raises(ValueError, match="no supervised head"):
        model.logits(torch.randn(1, 3, 48, 48))


def test_the_table_must_be_the_sinusoids(tmp_path: Path) -> None:
    state = official(small())
    drifted = {**state, "pos_embed": state["pos_embed"] + 2e-4}  # by the rounding of a weight average
    halved = {**state, "pos_embed": state["pos_embed"].bfloat16()}
    for fine in (drifted, halved):
        path = released(tmp_path, fine)
        assert torch.equal(load_released(path)[0].pos_embed, fine["pos_embed"].float())  # type: ignore[arg-type]
    patches = state["pos_embed"][:, 1:].mT.unflatten(2, (3, 3))
    resized = torch.nn.functional.interpolate(patches, (4, 4), mode="bicubic").flatten(2).mT
    for other, side in (
        (torch.cat((state["pos_embed"][:, :1], resized), 1), 4),
        (state["pos_embed"] + 0.02 * torch.randn(1, 10, 128), 3),
        (state["pos_embed"] * torch.nan, 3),
    ):
        with pytest.raises(ValueError, match=f"not the sinusoids of T2T-ViT for {side} x {side} patches"):
            load_released(released(tmp_path, {**state, "pos_embed": other}))


def test_files_that_do_not_fit_say_why(tmp_path: Path) -> None:
    state = official(small())

    def refuse(changes: dict[str, Tensor | None], message: str) -> None:
        changed = {k: v for k, v in {**state, **changes}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            quietvit.load(released(tmp_path, changed), device="cpu")  # type: ignore[arg-type]

    refuse({"blocks.1.norm2.bias": None}, r"1 keys missing: blocks\.1\.norm2\.bias")
    refuse({"tokens_to_token.attention2.w": None}, r"1 keys missing: tokens_to_token\.attention2\.w")
    refuse({"head.bias": None}, r"1 keys missing: head\.bias")
    refuse({"blocks.0.ls1.gamma": torch.ones(128)}, r"1 keys unexpected: blocks\.0\.ls1\.gamma")
    refuse({"norm.bias": torch.zeros(64)}, r"norm\.bias \(64,\) instead of \(128,\)")
    refuse({"pos_embed": torch.zeros(1, 9, 128)}, "8 patches is not square")
    refuse({"cls_token": torch.zeros(128)}, r"cannot have the shapes cls_token \(128,\)")
    refuse({"cls_token": None}, r"not a T2T-ViT backbone: it lacks cls_token\. It holds \d+ tensors: pos_embed")
    refuse(
        {"tokens_to_token.attention1.w": None, "tokens_to_token.attention1.kqv.weight": None},
        r"neither a Performer .* nor a transformer .*It holds: tokens_to_token\.attention1\.",
    )
    torch.save({"state_dict_ema": {"module.cls_token": state["cls_token"], "cls_token": state["cls_token"]}},
               tmp_path / "two.pth")  # fmt: skip
    with pytest.raises(ValueError, match="two tensors that are both 'cls_token'"):
        load_released(tmp_path / "two.pth")
    torch.save({"net": state, "acc": 98.3}, tmp_path / "transfer.pth")  # of its transfer code: another normalisation
    with pytest.raises(ValueError, match=r"of no family.*Found: \d+ tensors \(cls_token, .*\) under net, acc"):
        quietvit.load(tmp_path / "transfer.pth")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_released(tmp_path / "nothing.pth")


def test_the_family_is_told_by_the_keys_not_the_name(tmp_path: Path) -> None:
    vit = make_backbone("vit", embed_dim=64, depth=1, num_heads=1, patch_size=4, image_size=8).eval()
    path = tmp_path / "81.5_T2T_ViT_14.pth.tar"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()}}, path)
    assert quietvit.load(path, device="cpu").meta["provenance"]["source"] == "dinov2"
    with pytest.raises(ValueError, match="adds untrained registers to T2T-ViT files; this is a dinov2 one"):
        quietvit.load(path, device="cpu", num_registers=2)
    other = released(tmp_path, official(small())).rename(tmp_path / "dinov2_vits14_pretrain.pth")
    assert quietvit.load(other, device="cpu").meta["provenance"]["source"] == "t2t_vit"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, "epoch": 3}, path)
    with pytest.raises(
        ValueError,
        match=r"T2T-ViT has .*tokens_to_token.*DINOv2 backbone has .*patch_embed\.proj.*"
        r"Found: 2 tensors \(conv1\.weight, fc\.bias\) under state_dict, epoch",
    ):
        quietvit.load(path)
    native = save_teacher(tmp_path, vit, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8, provenance={})
    with pytest.raises(ValueError, match="says itself how many heads and registers"):
        quietvit.load(native, num_registers=1)


class Payload:
    """Pickled, it would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_truncated_files_and_files_with_code_are_refused(tmp_path: Path) -> None:
    state = official(small())
    path = released(tmp_path, state)
    whole = path.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="truncated"):
            quietvit.load(path)
    released(tmp_path, state, args=Payload(tmp_path / "ran"))
    with pytest.raises(ValueError, match="would run code"):
        quietvit.load(path)
    assert not (tmp_path / "ran").exists()
    released(tmp_path, state, args=argparse.Namespace(model="t2t_vit_14"))  # as its training code saves
    with pytest.raises(ValueError, match=r"holds a argparse\.Namespace .*would run code.*save its weights alone"):
        quietvit.load(path)

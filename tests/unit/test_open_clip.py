"""CLIP's visual towers against open_clip's own class, with random weights: tokens, sizes, variants, refusals."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quietvit.weights import load
from quietvit.weights.family import CLIP
from quietvit.weights.native import weights_hash

transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
open_clip_model = pytest.importorskip("open_clip.model")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"act_layer": transformer.QuickGELU},
    "layer_scale": {"ls_init_value": 0.3},
    "no_ln_pre": {"no_ln_pre": True},
    "ln_after_pool": {"final_ln_after_pool": True},
    "patch_dropout": {"patch_dropout": 0.5},
    "sinusoids": {"pos_embed_type": "sin_cos_2d"},
    "narrow_mlp": {"mlp_ratio": 4.9231},  # of ViT-bigG-14
}


def tower(*, image_size: int = 24, **changes: Any) -> Any:
    """open_clip's VisionTransformer, every parameter away from where it starts."""
    torch.manual_seed(0)
    plain: dict[str, Any] = {
        "patch_size": 8, "width": 128, "layers": 3, "heads": 2, "mlp_ratio": 4.0, "output_dim": 16,
        "act_layer": nn.GELU,
    }  # fmt: skip
    made = transformer.VisionTransformer(image_size=image_size, **{**plain, **changes}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def whole_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower inside a CLIP model, whose text tower has blocks of the same names."""
    text = {
        "positional_embedding": torch.randn(77, 32),
        "text_projection": torch.randn(32, 16),
        "token_embedding.weight": torch.randn(100, 32),
        "ln_final.weight": torch.randn(32),
        "logit_scale": torch.tensor(4.6),
        "transformer.resblocks.0.ln_1.weight": torch.randn(32),
        "transformer.resblocks.7.ln_1.weight": torch.randn(32),
    }
    return {**{f"visual.{k}": v for k, v in state.items()}, **text}


def theirs(model: Any, images: Tensor) -> Tensor:
    """All tokens after ln_post, from open_clip's own parts."""
    with torch.no_grad():
        return model.ln_post(model.transformer(model._embeds(images)))


def ours(model: Any, images: Tensor) -> Tensor:
    features = model(images)
    assert features.registers.shape[1] == 0
    return torch.cat((features.cls[:, None], features.patches.flatten(1, 2)), dim=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_are_those_of_open_clip_at_its_own_and_other_sizes(tmp_path: Path, name: str) -> None:
    source = tower(**VARIANTS[name])
    state = source.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in whole_clip(state).items()}}, tmp_path / "a.pt")
    activation = "quick_gelu" if name == "quick_gelu" else None
    model = load(tmp_path / "a.pt", device="cpu", activation=activation)
    assert (model.mean, model.std) == CLIP
    assert (model.image_size, model.stride) == (24, 8)
    for side in (24, 40, 16):
        images = torch.randn(2, 3, side, side)
        reference = source
        if side != 24:
            reference = tower(image_size=side, **VARIANTS[name])
            resized = {f"visual.{k}": v for k, v in state.items()}
            holder = nn.Module()
            holder.visual = reference
            open_clip_model.resize_pos_embed(resized, holder)
            reference.load_state_dict({k.removeprefix("visual."): v for k, v in resized.items()})
        torch.testing.assert_close(ours(model, images), theirs(reference, images), atol=1e-5, rtol=0)


def test_the_pooled_feature_is_the_projected_class_token(tmp_path: Path) -> None:
    for name in ("plain", "ln_after_pool"):
        source = tower(**VARIANTS[name])
        save_file(source.state_dict(), tmp_path / "tower.safetensors")
        images = torch.randn(2, 3, 24, 24)
        cls = load(tmp_path / "tower.safetensors", device="cpu")(images).cls
        with torch.no_grad():
            torch.testing.assert_close(cls @ source.proj, source(images), atol=1e-5, rtol=0)


def test_a_wrong_activation_shows() -> None:
    images = torch.randn(2, 3, 24, 24)
    plain, quick = tower(), tower(act_layer=transformer.QuickGELU)
    quick.load_state_dict(plain.state_dict())
    assert float((theirs(plain, images) - theirs(quick, images)).abs().max()) > 1e-3


def test_the_tower_alone_the_whole_model_and_any_wrapper_are_the_same(tmp_path: Path) -> None:
    state = tower().state_dict()
    hashes = set()
    for content in (state, whole_clip(state), {"state_dict": {f"module.{k}": v for k, v in whole_clip(state).items()}},
                    {f"_orig_mod.{k}": v for k, v in whole_clip(state).items()}):  # fmt: skip
        torch.save(content, tmp_path / "clip.pt")
        model = load(tmp_path / "clip.pt", device="cpu")
        hashes.add(weights_hash(model.backbone))
        notes = model.meta["provenance"]["notes"]
        assert any("projection" in note for note in notes)
        assert any("mask token: zeros" in note for note in notes)
        assert any("7 other tensors are left out" in note for note in notes) == (len(content) != len(state))
    assert len(hashes) == 1


def test_weights_of_openai_are_known_by_their_entries(tmp_path: Path) -> None:
    source = tower(act_layer=transformer.QuickGELU)
    entries = {k: torch.tensor(v) for k, v in (("input_resolution", 24), ("context_length", 77), ("vocab_size", 49408))}
    torch.save({**whole_clip(source.state_dict()), **entries}, tmp_path / "openai.pt")
    model = load(tmp_path / "openai.pt", device="cpu")
    assert model.meta["provenance"]["activation"].startswith("quick_gelu, as in all weights of OpenAI")
    images = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(ours(model, images), theirs(source, images), atol=1e-5, rtol=0)


def test_a_configuration_beside_the_file_says_what_names_cannot(tmp_path: Path) -> None:
    source = tower(heads=4, act_layer=transformer.QuickGELU)
    config: dict[str, Any] = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 128, "head_width": 32}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(whole_clip(source.state_dict()), tmp_path / "open_clip_model.safetensors")
    images = torch.randn(1, 3, 24, 24)
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        model = load(path, device="cpu")
        assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        torch.testing.assert_close(ours(model, images), theirs(source, images), atol=1e-5, rtol=0)
    asked = load(tmp_path, device="cpu", num_heads=2, activation="gelu", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert asked.mean == (0.5, 0.5, 0.5)
    arguments = asked.meta["backbone"]["arguments"]
    assert (arguments["num_heads"], arguments["activation"]) == (2, "gelu")
    for broken in ("{", "[]", '{"model_cfg": {}}', '{"model_cfg": {"vision_cfg": {"width": 1, "head_width": 0}}}'):
        (tmp_path / "open_clip_config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"open_clip_config\.json is broken, or no configuration of open_clip"):
            load(tmp_path, device="cpu")


def test_towers_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    state = tower().state_dict()

    def refuse(content: dict[str, Tensor], message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load(path, device="cpu")

    pooled = partial(tower, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    refuse(whole_clip(pooled().state_dict()), "read as open_clip: its tower pools with attention")
    resnet = {"visual.layer1.0.conv1.weight": torch.zeros(2, 2), "visual.conv1.weight": torch.zeros(2, 3, 3, 3)}
    refuse(resnet, "its tower is a ResNet")
    refuse({"visual.trunk.stages.0.blocks.0.conv_dw.weight": torch.zeros(2)}, "a model of timm that is no plain ViT")
    refuse(whole_clip({k: v for k, v in state.items() if k != "transformer.resblocks.1.attn.in_proj_bias"}),
           r"1 keys missing: blocks\.1\.attn\.qkv\.bias")  # fmt: skip
    refuse(whole_clip({**state, "transformer.resblocks.0.ln_attn.weight": torch.zeros(128)}),
           r"1 keys unexpected: transformer\.resblocks\.0\.ln_attn\.weight")  # fmt: skip
    refuse({**state, "positional_embedding": torch.zeros(9, 128)}, "8 patches is not square")
    refuse({k: v for k, v in state.items() if k != "ln_post.weight"}, "lacks norm.weight")
    refuse(whole_clip({k: v for k, v in state.items() if k != "class_embedding"}), "lacks cls_token")


def test_published_widths_have_their_numbers_of_heads() -> None:
    """Of every ViT in open_clip's own list that quietvit could read."""
    from quietvit.weights.family import Hints, count_heads

    folder = Path(open_clip_model.__file__).parent / "model_configs"
    checked = 0
    for file in sorted(folder.glob("ViT-*.json")):
        vision = json.loads(file.read_text())["vision_cfg"]
        if "timm_model_name" in vision or "width" not in vision:
            continue
        heads, _ = count_heads(vision["width"], Hints())
        assert heads == vision["width"] // vision.get("head_width", 64), file.name
        checked += 1
    assert checked > 20


def test_a_tower_of_timm_inside_a_clip_model_is_read_as_one_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    source = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    source.eval()
    state = {f"visual.trunk.{k}": v for k, v in source.state_dict().items()}
    save_file({**state, "visual.head.proj.weight": torch.zeros(8, 64), "logit_scale": torch.ones(1)}, tmp_path / "clip")
    with pytest.raises(ValueError, match="does not tell which mean"):
        load(tmp_path / "clip", device="cpu")
    model = load(tmp_path / "clip", device="cpu", mean=CLIP[0], std=CLIP[1])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(model, images), source.forward_features(images), atol=1e-5, rtol=0)
    assert "a tower of timm in a CLIP model; its projection is left out" in model.meta["provenance"]["notes"]

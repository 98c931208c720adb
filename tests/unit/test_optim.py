"""Parameter groups, schedules on an optimizer, and clipping of each submodule on its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quietvit import optim
from quietvit.nn.heads import ProjectionHead


class Backbone(nn.Module):
    """The names that matter, T2T stem included."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 4))
        self.register_tokens = nn.Parameter(torch.ones(1, 2, 4))
        self.table = nn.Parameter(torch.ones(3), requires_grad=False)
        self.tokens_to_token = nn.ModuleDict({"project": nn.Linear(3, 4), "norm1": nn.LayerNorm(3)})
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4), "norm1": nn.LayerNorm(4)}) for _ in range(12))
        self.norm_pre = nn.LayerNorm(4)
        self.norm = nn.LayerNorm(4)


def groups_of(decay_tokens: bool) -> tuple[dict[str, tuple[float, float, bool]], list[dict]]:
    head = ProjectionHead(4, 6, 5, 3, weight_norm="trained")
    groups = optim.parameter_groups(
        {"backbone": Backbone(), "dino_head": head},
        num_blocks=12,
        layer_decay=0.5,
        patch_embed_lr_mult=0.2,
        decay_tokens=decay_tokens,
    )
    return {n: (g["lr_mult"], g["wd_mult"], g["is_last_layer"]) for g in groups for n in g["names"]}, groups


def test_rates() -> None:
    found, groups = groups_of(decay_tokens=False)
    stem = 0.2 * 0.5**13
    assert found["backbone.cls_token"] == (0.5**13, 0.0, False)
    assert found["backbone.pos_embed"] == (0.5**13, 0.0, False)
    assert found["backbone.tokens_to_token.project.weight"] == (stem, 1.0, False)
    assert found["backbone.tokens_to_token.project.bias"] == (stem, 0.0, False)
    assert found["backbone.tokens_to_token.norm1.weight"] == (stem, 0.0, False)
    assert found["backbone.norm_pre.weight"] == (0.5**13, 0.0, False)
    assert found["backbone.norm_pre.bias"] == (0.5**13, 0.0, False)
    assert found["backbone.blocks.0.fc.weight"] == (0.5**12, 1.0, False)
    assert found["backbone.blocks.11.fc.weight"] == (0.5, 1.0, False)  # not block 1
    assert found["backbone.blocks.11.norm1.weight"] == (0.5, 0.0, False)
    assert found["backbone.norm.weight"] == (1.0, 0.0, False)
    assert found["dino_head.mlp.0.weight"] == (1.0, 1.0, False)
    assert found["dino_head.last_layer.weight_v"] == (1.0, 1.0, True)
    assert found["dino_head.last_layer.weight_g"] == (1.0, 0.0, True)
    assert "backbone.table" not in found  # frozen
    keys = [(g["lr_mult"], g["wd_mult"], g["is_last_layer"]) for g in groups]
    assert len(keys) == len(set(keys))


def test_reference_decays_tokens() -> None:
    found, _ = groups_of(decay_tokens=True)
    for name in (
        "backbone.cls_token",
        "backbone.pos_embed",
        "backbone.register_tokens",
        "dino_head.last_layer.weight_g",
    ):
        assert found[name][1] == 1.0, name


def test_every_trainable_parameter_once() -> None:
    _, groups = groups_of(decay_tokens=True)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == sum(len(g["names"]) for g in groups)


def test_schedule_and_freeze() -> None:
    _, groups = groups_of(decay_tokens=True)
    optimizer = optim.make_optimizer(groups)
    optim.apply_schedule(optimizer, lr=0.1, last_layer_lr=0.0, weight_decay=0.3)
    before = {id(p): p.detach().clone() for g in groups for p in g["params"]}
    for group in groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 0.1 * group["lr_mult"])
        assert group["weight_decay"] == 0.3 * group["wd_mult"]
        for p in group["params"]:
            assert torch.equal(p, before[id(p)]) == group["is_last_layer"]


def test_no_step_before_a_schedule() -> None:
    _, groups = groups_of(decay_tokens=True)
    optimizer = optim.make_optimizer(groups)
    assert all(g["lr"] == 0.0 and g["weight_decay"] == 0.0 for g in optimizer.param_groups)


def test_clip_each_on_its_own() -> None:
    modules = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    for value, module in zip((10.0, 0.01), modules.values(), strict=True):
        for p in module.parameters():
            p.grad = torch.full_like(p, value)
    norms = optim.clip_by_module(modules, max_norm=3.0)
    assert norms["a"].item() == pytest.approx(10 * math.sqrt(8))
    assert norms["b"].item() == pytest.approx(0.01 * math.sqrt(8))
    after = {k: math.sqrt(sum(float(p.grad.square().sum()) for p in m.parameters())) for k, m in modules.items()}
    assert after["a"] == pytest.approx(3.0, rel=1e-5)
    assert after["b"] == pytest.approx(0.01 * math.sqrt(8), rel=1e-5)


def test_clip_names_the_broken_module() -> None:
    modules = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    for module in modules.values():
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    modules["b"].bias.grad[0] = math.nan
    norms = optim.clip_by_module(modules, max_norm=3.0)
    assert norms["a"].isfinite()
    assert not norms["b"].isfinite()
    assert modules["a"].weight.grad.isfinite().all()

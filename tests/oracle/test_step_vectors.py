"""Whole training steps against DINOv2's own: losses, gradients, clipping, AdamW, EMA; how DINOv3 adds its losses up."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quietvit import optim
from quietvit.backbones import make_backbone
from quietvit.contracts import Batch
from quietvit.losses.dino import dino_losses
from quietvit.losses.ibot import ibot_loss
from quietvit.losses.koleo import koleo_over_views
from quietvit.methods.dinov2 import DinoV2
from quietvit.schedules import Cosine, Linear, Schedules
from reference import VECTORS, Case, case

STEPS = ["ssl_centering_shared_head", "ssl_sinkhorn_separate_heads"]


def head_of(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_prototypes": config["head_n_prototypes"],
        "hidden_dim": config["head_hidden_dim"],
        "bottleneck_dim": config["head_bottleneck_dim"],
        "num_layers": config["head_nlayers"],
        "weight_norm": "trained",  # DINOv2
    }


def method_of(stored: Case) -> DinoV2:
    config = stored.info["constructor"]["config"]
    student = config["student"]
    method = DinoV2(
        lambda: make_backbone(
            "vit",
            **stored.info["constructor"]["backbone"],
            patch_size=student["patch_size"],
            image_size=config["crops"]["global_crops_size"],
            num_registers=student["num_register_tokens"],
            ffn={"mlp": "mlp", "swiglufused": "swiglu"}[student["ffn_layer"]],
            layer_scale=student["layerscale"],
            drop_path=student["drop_path_rate"],
            pos_interpolation="offset" if student["interpolate_offset"] else "size",
            pos_antialias=student["interpolate_antialias"],
        ),
        head=head_of(config["dino"]),
        ibot_head=head_of(config["ibot"]) if config["ibot"]["separate_head"] else None,
        centering={"centering": "softmax"}.get(config["train"]["centering"], config["train"]["centering"]),
        koleo_weight=config["dino"]["koleo_loss_weight"],
    )
    method.student.load_state_dict(stored.weights("student"), strict=True)
    method.teacher.load_state_dict(stored.weights("teacher"), strict=True)
    return method.train()


def batch_of(stored: Case, masks: Tensor) -> Batch:
    inputs = stored.inputs("one_step")
    masks = masks.bool()
    counts = masks.sum(1)
    num_images = len(masks) // 2
    return Batch(
        global_crops=inputs["collated_global_crops"],
        local_crops=inputs["collated_local_crops"],
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1.0 / counts.clamp_min(1)).repeat_interleave(counts),
        indices=torch.arange(num_images),
    )


def displayed(losses: dict[str, Tensor], koleo_weight: float) -> dict[str, Tensor]:
    """The names and factors under which the original shows its losses (see the notes of the case)."""
    return {
        "dino_local_crops_loss": losses["dino_local"],
        "dino_global_crops_loss": losses["dino_global"],
        "koleo_loss": losses["koleo"] * koleo_weight / 2,
        "ibot_loss": losses["ibot"] / 2,
    }


def total_of(method: DinoV2, losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([method.loss_weights[k] * v for k, v in losses.items()]).sum()


@pytest.mark.parametrize("name", STEPS)
def test_losses_and_gradients(name: str) -> None:
    stored = case(f"06_training/{name}")
    method = method_of(stored)
    weight = method.loss_weights["koleo"]
    inputs = stored.inputs("one_step")
    batch = batch_of(stored, inputs["collated_masks"])
    assert torch.equal(batch.mask_indices, inputs["mask_indices_list"])
    torch.testing.assert_close(batch.mask_weights, inputs["masks_weight"])
    temp = stored.info["runs"]["one_step"]["settings"]["teacher_temp"]
    losses = method.study(batch, method.teach([batch], temp=temp)[0])
    total_of(method, losses).backward()
    for key, value in displayed(losses, weight).items():
        stored.check("one_step", f"loss/{key}", value)
    grads = {n: p.grad for n, p in method.student.named_parameters()}
    assert all(g is not None for g in grads.values())  # every parameter is used
    for key in stored.outputs("one_step"):
        if key.startswith("grad/"):
            stored.check("one_step", key, grads[key.removeprefix("grad/")])
    order = stored.info["runs"]["one_step"]["grad_l2_norms_order"]
    stored.check("one_step", "grad_l2_norms", torch.stack([grads[n].norm() for n in order]))
    again = method.study(batch, method.teach([batch], temp=temp)[0])
    for key, value in displayed(again, weight).items():
        if f"loss_second_call/{key}" in stored.outputs("one_step"):
            stored.check("one_step", f"loss_second_call/{key}", value)


def schedules_of(config: dict[str, Any]) -> Schedules:
    epoch, settings, teacher = config["train"]["OFFICIAL_EPOCH_LENGTH"], config["optim"], config["teacher"]
    steps = settings["epochs"] * epoch
    return Schedules(
        lr=Cosine(settings["lr"], settings["min_lr"], steps, warmup_steps=settings["warmup_epochs"] * epoch),
        weight_decay=Cosine(settings["weight_decay"], settings["weight_decay_end"], steps),
        momentum=Cosine(teacher["momentum_teacher"], teacher["final_momentum_teacher"], steps),
        teacher_temp=Linear(
            teacher["warmup_teacher_temp"], teacher["teacher_temp"], teacher["warmup_teacher_temp_epochs"] * epoch
        ),
        last_layer_freeze_steps=settings["freeze_last_layer_epochs"] * epoch,
    )


@pytest.mark.parametrize("name", STEPS)
def test_four_iterations(name: str) -> None:
    stored = case(f"06_training/{name}")
    config = stored.info["constructor"]["config"]
    settings = config["optim"]
    method = method_of(stored)
    weight = method.loss_weights["koleo"]
    groups = optim.parameter_groups(
        method.trainable(),
        num_blocks=2,
        layer_decay=settings["layerwise_decay"],
        patch_embed_lr_mult=settings["patch_embed_lr_mult"],
        decay_tokens=True,
    )
    optimizer = optim.make_optimizer(groups, betas=(settings["adamw_beta1"], settings["adamw_beta2"]))
    schedules = schedules_of(config)
    order = stored.info["runs"]["training_loop"]["parameter_order"]
    temps = stored.info["runs"]["training_loop"]["settings"]["teacher_temp_per_iteration"]
    log: dict[str, list[float]] = {}
    norms: list[Tensor] = []
    moments: dict[str, list[Tensor]] = {f"{w}_{k}": [] for w in ("student", "teacher") for k in ("l2", "sum")}
    for i in range(4):
        at = schedules.at(i)
        assert at.teacher_temp == pytest.approx(temps[i])
        batch = batch_of(stored, stored.inputs("training_loop")[f"collated_masks_{i}"])
        centers = [m.center.clone() for m in (method.cls_center, method.patch_center) if m is not None]
        losses = method.study(batch, method.teach([batch], temp=at.teacher_temp)[0])
        total_of(method, losses).backward()
        clipped = optim.clip_by_module(method.trainable(), settings["clip_grad"])
        norms.append(torch.stack([clipped[k] for k in method.trainable()]))
        optim.apply_schedule(optimizer, lr=at.lr, last_layer_lr=at.last_layer_lr, weight_decay=at.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        method.follow(at.momentum)
        shown = {k: v.item() for k, v in displayed(losses, weight).items()}
        line = shown | {"total_loss": sum(shown.values()), "current_batch_size": float(batch.num_images)}
        line |= {"lr": at.lr, "wd": at.weight_decay, "mom": at.momentum, "last_layer_lr": at.last_layer_lr}
        for key, value in line.items():
            log.setdefault(key, []).append(value)
        for who, model in (("student", method.student), ("teacher", method.teacher)):
            state = model.state_dict()
            moments[f"{who}_l2"].append(torch.stack([state[n].norm() for n in order]))
            moments[f"{who}_sum"].append(torch.stack([state[n].sum() for n in order]))
    ours = {f"log/{k}": torch.tensor(v) for k, v in log.items()} | {"clip_total_norms": torch.stack(norms)}
    ours |= {f"{k}_per_step": torch.stack(v) for k, v in moments.items()}
    ours |= {f"student_final/{n}": v for n, v in method.student.state_dict().items()}
    ours |= {f"teacher_final/{n}": v for n, v in method.teacher.state_dict().items()}
    if centers:  # the original moves its centers when it next uses them: it ends with those of the last iteration
        ours |= {"dino_center_final": centers[0], "ibot_center_final": centers[1][None]}
    for key in stored.outputs("training_loop"):
        stored.check("training_loop", key, ours[key])


EMA = case("06_training/ema")


@pytest.mark.parametrize("run", EMA.info["runs"])
def test_ema(run: str) -> None:
    def network(who: str) -> nn.Module:
        model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
        model.load_state_dict({k.removeprefix(f"{who}/"): v for k, v in EMA.inputs(run).items() if k.startswith(who)})
        return model

    method = DinoV2(lambda: Bare(network("student")), head={"num_prototypes": 4, "hidden_dim": 4, "bottleneck_dim": 4})
    method.teacher["backbone"].load_state_dict(Bare(network("teacher")).state_dict())
    method.follow(EMA.info["runs"][run]["settings"]["momentum"])
    for key, value in method.teacher["backbone"].inner.state_dict().items():
        EMA.check(run, f"teacher/{key}", value)


class Bare(nn.Module):
    """Something with parameters that calls itself a backbone."""

    embed_dim = 5

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_dinov3_weighting() -> None:
    stored = case("06_training/losses_v3")
    weights = stored.info["constructor"]
    inputs = stored.inputs("losses")
    names = [
        "student_global_cls_after_head",
        "student_global_cls_pre_head",
        "student_local_cls_after_head",
        "student_masked_patch_after_head",
    ]
    globals_, cls, local, patches = (inputs[n].requires_grad_() for n in names)
    # DINOv3 keeps the teacher's views in the student's order and drops the diagonal: with two views, that is the swap.
    targets = inputs["teacher_cls_centered"].flip(0)
    dino_local, dino_global = dino_losses(local, globals_, targets, temp=0.1)
    ibot = ibot_loss(
        patches,
        inputs["teacher_masked_patch_centered"],
        inputs["masks_weight"],
        num_crops=len(inputs["masks"]),
        temp=0.1,
    )
    koleo = koleo_over_views(cls, crops="both")
    num_local = len(local) * 2
    total = (
        weights["dino_loss_weight"] * (dino_local + dino_global)
        + weights["koleo_loss_weight"] * koleo
        + weights["ibot_loss_weight"] * ibot
    )
    total.backward()
    stored.check("losses", "total", total)
    # shown before its scale: the mean over pairs, over views
    stored.check("losses", "loss/dino_local_crops_loss", dino_local * (num_local + 2) / num_local)
    stored.check("losses", "loss/dino_global_crops_loss", dino_global * (num_local + 2) / 2)
    stored.check("losses", "loss/koleo_loss", koleo / 2)
    stored.check("losses", "loss/ibot_loss", ibot)
    for name in names:
        stored.check("losses", f"grad/{name}", inputs[name].grad)


# ---- parameter groups


def module_of(names: dict[str, list[int]]) -> nn.Module:
    """A module whose parameters have these (dotted) names and shapes."""
    root = nn.Module()
    for name, shape in names.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return root


GROUPS = json.loads((VECTORS / "04_schedules" / "param_groups.json").read_text())["runs"]


@pytest.mark.parametrize("run", GROUPS, ids=[r["label"] for r in GROUPS])
def test_parameter_groups(run: dict[str, Any]) -> None:
    modules = {k: module_of({p["name"]: p["shape"] for p in run[k]}) for k in ("backbone", "head")}
    groups = optim.parameter_groups(
        modules,
        num_blocks=run["backbone_constructor"]["depth"],
        layer_decay=run["settings"]["lr_decay_rate"],
        patch_embed_lr_mult=run["settings"]["patch_embed_lr_mult"],
        decay_tokens=True,
    )
    ours = {n: (g["lr_mult"], g["wd_mult"], g["is_last_layer"]) for g in groups for n in g["names"]}
    stored = {f"{k}.{p['name']}": p for k in modules for p in run[k]}
    assert ours.keys() == stored.keys()
    for name, p in stored.items():
        assert ours[name][0] == pytest.approx(p["lr_multiplier"], rel=1e-12), name
        assert ours[name][1:] == (p["wd_multiplier"], p["is_last_layer"]), name
    # The original fuses within each submodule, quietvit over all of them: the same rates on the same numbers.
    optimizer = optim.make_optimizer(groups)
    optim.apply_schedule(optimizer, lr=1e-3, last_layer_lr=5e-4, weight_decay=0.04)
    counted: dict[tuple[float, float], int] = {}
    for group in optimizer.param_groups:
        key = (round(group["lr"], 12), round(group["weight_decay"], 12))
        counted[key] = counted.get(key, 0) + sum(p.numel() for p in group["params"])
    expected: dict[tuple[float, float], int] = {}
    applied = run["after_apply_optim_scheduler(lr=1e-3, wd=0.04, last_layer_lr=5e-4)"]
    for rates, group in zip(applied, run["fused_groups_backbone_then_head"], strict=True):
        key = (round(rates["lr"], 12), round(rates["weight_decay"], 12))
        expected[key] = expected.get(key, 0) + group["numbers"]
    assert counted == expected


def test_parameter_groups_of_dinov3() -> None:
    run = json.loads((VECTORS / "04_schedules" / "param_groups_v3.json").read_text())
    settings = run["settings"]
    groups = optim.parameter_groups(
        {"backbone": module_of({p["name"]: [1] for p in run["table"]})},
        num_blocks=settings["depth"],
        layer_decay=settings["lr_decay_rate"],
        patch_embed_lr_mult=settings["patch_embed_lr_mult"],
        decay_tokens=True,
    )
    ours = {n.removeprefix("backbone."): (g["lr_mult"], g["wd_mult"]) for g in groups for n in g["names"]}
    for p in run["table"]:
        assert ours[p["name"]] == (pytest.approx(p["lr_multiplier"], rel=1e-12), p["wd_multiplier"]), p["name"]

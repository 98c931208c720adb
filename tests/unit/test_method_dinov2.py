"""DINOv2's method: who sees what, who learns from whom, and one batch cut into several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.contracts import Batch
from quietvit.methods import METHODS
from quietvit.methods.dinov2 import DinoV2
from quietvit.train.accumulate import split

HEAD = {"num_prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8}
NAMES = ["dino_local", "dino_global", "ibot", "koleo"]


def method_of(**options: Any) -> DinoV2:
    torch.manual_seed(0)
    options = {"head": HEAD} | options
    method = DinoV2(
        lambda: make_backbone(
            "vit", embed_dim=16, depth=2, num_heads=2, patch_size=4, image_size=16, num_registers=2, layer_scale=1.0
        ),
        **options,
    )
    # Far enough from its start that targets are not flat, and the teacher not the student.
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    method.follow(0.5)
    return method


def batch_of(images: int = 4, *, num_local: int = 3, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def pixels(num: int, side: int) -> Tensor:
        return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=generator)

    masks = torch.zeros(2 * images, 16, dtype=torch.bool)
    if masked:
        for crop in range(0, 2 * images, 2):
            masks[crop, torch.randperm(16, generator=generator)[: 2 + crop]] = True
    counts = masks.sum(1)
    return Batch(
        global_crops=pixels(2 * images, 16),
        local_crops=pixels(num_local * images, 8),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1.0 / counts.clamp_min(1)).repeat_interleave(counts),
        indices=torch.arange(images),
    )


def total_of(method: DinoV2, losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([method.loss_weights[k] * v for k, v in losses.items()]).sum()


def test_in_the_table() -> None:
    assert METHODS["dinov2"] is DinoV2


@pytest.mark.parametrize("ibot_head", [None, HEAD | {"num_prototypes": 7}])
@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax"])
@pytest.mark.parametrize("num_local", [0, 3])
def test_one_step(ibot_head: dict[str, Any] | None, centering: str, num_local: int) -> None:
    method = method_of(ibot_head=ibot_head, centering=centering)
    batch = batch_of(num_local=num_local)
    [targets] = method.teach([batch], temp=0.05)
    assert targets.cls.shape == (2, 4, 12)
    assert targets.patches.shape == (len(batch.mask_indices), 7 if ibot_head else 12)
    for rows in (targets.cls, targets.patches):
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    losses = method.study(batch, targets)
    assert list(losses) == NAMES == list(method.loss_weights)
    assert all(v.shape == () and v.dtype is torch.float32 for v in losses.values())
    total_of(method, losses).backward()
    for name, p in method.student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in method.teacher.parameters())
    assert list(method.trainable()) == ["backbone", "dino_head", *(["ibot_head"] if ibot_head else [])]


def test_targets_come_from_the_other_view_unmasked() -> None:
    method = method_of(centering="softmax")
    batch = batch_of()
    [targets] = method.teach([batch], temp=0.05)
    teacher = method.teacher
    with torch.no_grad():
        features = teacher["backbone"](method.normalise(batch.global_crops))
        cls = (teacher["dino_head"](features.cls) / 0.05).softmax(-1)
        patches = (teacher["dino_head"](features.patches.flatten(1, 2)) / 0.05).softmax(-1)
    torch.testing.assert_close(targets.cls[0], cls[4:])  # the student's first view learns from the second
    torch.testing.assert_close(targets.cls[1], cls[:4])
    torch.testing.assert_close(targets.patches, patches[batch.masks])


def test_student_is_masked_and_local_views_are_not() -> None:
    """Pixels under the mask change the teacher's answer, and nothing of what the student does."""
    method = method_of()
    batch = batch_of()
    [targets] = method.teach([batch], temp=0.05)
    hidden = batch.masks.view(-1, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    other = Batch(**{**vars(batch), "global_crops": torch.where(hidden, 255 - batch.global_crops, batch.global_crops)})
    before, after = method.study(batch, targets), method.study(other, targets)
    for name in NAMES:
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(method.teach([other], temp=0.05)[0].patches, targets.patches)


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax"])
@pytest.mark.parametrize("ibot_denominator", ["all_crops", "masked_crops"])
def test_accumulation_keeps_the_objective(centering: str, ibot_denominator: str) -> None:
    """Targets, losses and gradients of one batch of 4 are those of 2 micro-batches of 2 (KoLeo apart)."""
    batch = batch_of()
    results = []
    for parts in (1, 2):
        method = method_of(centering=centering, ibot_denominator=ibot_denominator, koleo_weight=0.0)
        micro = split(batch, parts)
        targets = method.teach(micro, temp=0.05)
        losses = dict.fromkeys(NAMES, 0.0)
        for part, target in zip(micro, targets, strict=True):
            found = method.study(part, target)
            (total_of(method, found) / parts).backward()
            losses = {k: losses[k] + found[k].item() / parts for k in NAMES}
        grads = {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}
        results.append((torch.cat([t.cls for t in targets], 1), losses, grads, dict(method.named_buffers())))
    (cls, losses, grads, buffers), (cls_cut, losses_cut, grads_cut, buffers_cut) = results
    torch.testing.assert_close(cls_cut, cls)
    for name in NAMES[:3]:
        assert losses_cut[name] == pytest.approx(losses[name], rel=1e-5), name
    for name, grad in grads.items():
        torch.testing.assert_close(grads_cut[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffers_cut[name], buffer)


def test_center_moves_once_per_effective_batch() -> None:
    method = method_of(centering="softmax")
    batch = batch_of()
    method.teach(split(batch, 2), temp=0.05)
    assert method.cls_center is not None
    with torch.no_grad():
        scores = method.teacher["dino_head"](method.teacher["backbone"](method.normalise(batch.global_crops)).cls)
    torch.testing.assert_close(method.cls_center.center[0], 0.1 * scores.mean(0))


def test_denominators() -> None:
    batch = batch_of()  # half of the crops are masked
    losses = []
    for denominator in ("all_crops", "masked_crops"):
        method = method_of(ibot_denominator=denominator)
        losses.append(method.study(batch, method.teach([batch], temp=0.05)[0])["ibot"].item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


@pytest.mark.parametrize("ibot_denominator", ["all_crops", "masked_crops"])
def test_without_masks(ibot_denominator: str) -> None:
    method = method_of(ibot_denominator=ibot_denominator, ibot_head=HEAD, centering="softmax")
    batch = batch_of(masked=False)
    losses = method.study(batch, method.teach([batch], temp=0.05)[0])
    assert losses["ibot"].item() == 0.0
    total_of(method, losses).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.student.parameters())
    assert method.patch_center is not None
    assert method.patch_center.center.isfinite().all()


def test_teacher_never_trains() -> None:
    method = method_of()
    for mode in (True, False, True):
        method.train(mode)
        assert method.student.training is mode
        assert not any(m.training for m in method.teacher.modules())
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert method.eval() is method


def test_teacher_starts_as_the_student() -> None:
    method = DinoV2(lambda: make_backbone("vit", embed_dim=16, depth=1, num_heads=2, image_size=28), head=HEAD)
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[k], teacher[k]) for k in student)
    assert all(student[k].data_ptr() != teacher[k].data_ptr() for k in student)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_follow(momentum: float) -> None:
    method = method_of(head=HEAD | {"use_bn": True})
    method.student["dino_head"].mlp[1].running_mean.fill_(3.0)
    student = {k: v.clone() for k, v in method.student.named_parameters()}
    before = {k: v.clone() for k, v in method.teacher.named_parameters()}
    method.follow(momentum)
    for name, value in method.teacher.named_parameters():
        expected = momentum * before[name].double() + (1 - momentum) * student[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
        assert momentum < 1.0 or torch.equal(value, before[name])
    assert (method.teacher["dino_head"].mlp[1].running_mean == 3).all()
    assert all(torch.equal(v, student[k]) for k, v in method.student.named_parameters())


def test_normalise() -> None:
    method = method_of(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    crops = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2) * 10
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    torch.testing.assert_close(method.normalise(crops), (crops / 255 - mean) / std)
    floats = torch.randn(2, 3, 4, 4)
    assert method.normalise(floats) is floats


def test_bf16_autocast() -> None:
    method = method_of(centering="softmax")
    batch = batch_of()
    exact = method.study(batch, method.teach([batch], temp=0.05)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [targets] = method_of(centering="softmax").teach([batch], temp=0.05)
        losses = method.study(batch, targets)
    assert targets.cls.dtype is targets.patches.dtype is torch.float32
    for name, value in losses.items():
        assert value.dtype is torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1, abs=0.05), name


def test_state_round_trip() -> None:
    one, other = method_of(centering="softmax"), method_of(centering="softmax")
    batch = batch_of()
    one.teach([batch], temp=0.05)
    other.load_state_dict(one.state_dict(), strict=True)
    a, b = one.teach([batch], temp=0.05)[0], other.teach([batch], temp=0.05)[0]
    assert torch.equal(a.cls, b.cls)
    assert torch.equal(a.patches, b.patches)


@pytest.mark.parametrize("option", ["centering", "ibot_denominator", "koleo_crops"])
def test_unknown_option(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        method_of(**{option: "other"})


@pytest.mark.parametrize("option", ["init", "weight_norm"])
def test_unknown_head_option(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        method_of(head=HEAD | {option: "other"})


def test_frozen_prototypes_keep_unit_length() -> None:
    method = method_of()
    head = method.student["dino_head"]
    assert not head.last_layer.weight_g.requires_grad
    head.last_layer.weight_g.data.fill_(1.0)
    assert head(torch.randn(20, 16)).abs().max() <= 1 + 1e-5
    assert "dino_head.last_layer.weight_g" in dict(method.student.named_parameters())

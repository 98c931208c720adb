"""The head's batch norm and loss against torch's own and naive loops; dropout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.segmentation.head import FrozenInputBatchNorm, SegmentationHead, pixel_loss

CHANNELS, CLASSES, PATCH, SIDE = 5, 3, 4, 10


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of the 3 x 3 patches that cover 10 pixels, far from 0; many targets are void, those of image 0 all."""
    generator = torch.Generator().manual_seed(2)
    maps = 3 * torch.randn(count, CHANNELS, 3, 3, generator=generator) + 50
    targets = torch.randint(-1, CLASSES, (count, SIDE, SIDE), generator=generator)
    targets[0] = IGNORE
    return maps, targets


def head(dropout: float = 0.0) -> SegmentationHead:
    return SegmentationHead(CHANNELS, CLASSES, dropout=dropout, generator=torch.Generator().manual_seed(0))


def test_the_head_starts_as_mmsegmentation_has_it() -> None:
    wide = SegmentationHead(400, 50, dropout=0.0, generator=torch.Generator().manual_seed(0))
    assert float(wide.conv.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert float(wide.conv.weight.detach().mean()) == pytest.approx(0, abs=3e-4)
    assert not wide.conv.bias.any()
    again = SegmentationHead(400, 50, dropout=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wide.conv.weight, again.conv.weight)


def test_batch_norm_is_torchs() -> None:
    maps, _ = batch()
    ours, theirs = FrozenInputBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS).double()
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, -0.5)
    for step in range(3):
        x = maps * (1 + step)
        one, two = ours(x), theirs(x.double())
        torch.testing.assert_close(one.double(), two, atol=1e-4, rtol=1e-4)
        direction = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
        (one * direction).sum().backward()
        (two * direction.double()).sum().backward()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad.double(), getattr(theirs, name).grad, atol=1e-3, rtol=1e-4)
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(state[name].double(), value.double(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(maps).double(), theirs.eval()(maps.double()), atol=1e-4, rtol=1e-4)


def naive_loss(logits: torch.Tensor, targets: torch.Tensor, average: str, keep_padding: bool) -> float:
    total, count = 0.0, 0
    whole = F.interpolate(logits.double(), size=(SIDE, SIDE) if keep_padding else (12, 12), mode="bilinear")
    offset = 0 if keep_padding else 1
    for b in range(len(targets)):
        for i in range(SIDE):
            for j in range(SIDE):
                label = int(targets[b, i, j])
                if label == IGNORE:
                    continue
                scores = whole[b, :, i + offset, j + offset].tolist()
                total += math.log(sum(math.exp(s) for s in scores)) - scores[label]
                count += 1
    return total / (targets.numel() if average == "all" else count)


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("keep_padding", [False, True])
def test_the_loss_is_the_mean_over_pixels(average: str, keep_padding: bool) -> None:
    maps, targets = batch()
    logits = head()(maps).detach().mul(30).requires_grad_()
    loss = pixel_loss(logits, targets, PATCH, average=average, keep_padding=keep_padding)
    assert float(loss.detach()) == pytest.approx(naive_loss(logits.detach(), targets, average, keep_padding), rel=1e-5)
    loss.backward()
    probe = torch.zeros_like(logits)
    probe[1, 2, 1, 0] = 0.05
    rise = [naive_loss((logits + sign * probe).detach(), targets, average, keep_padding) for sign in (1, -1)]
    assert float(logits.grad[1, 2, 1, 0]) == pytest.approx((rise[0] - rise[1]) / 0.1, rel=1e-2)
    assert not logits.grad[0].any()


def test_a_batch_without_a_pixel_that_counts_has_no_loss() -> None:
    maps, targets = batch()
    for average in ("all", "valid"):
        loss = pixel_loss(head()(maps[:1]), targets[:1], PATCH, average=average, keep_padding=False)
        assert float(loss.detach()) == 0


def test_dropout_leaves_whole_channels_out_in_training_alone() -> None:
    maps, _ = batch()
    dropping = head(0.5)
    seen: list[torch.Tensor] = []
    dropping.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dropping(maps)
    gone = (seen[0] == 0).flatten(2)
    assert torch.equal(gone.all(dim=2), gone.any(dim=2))
    assert 0 < gone[:, :, 0].float().mean() < 1
    assert torch.equal(seen[0][~gone.view_as(maps)], 2 * maps[~gone.view_as(maps)])
    dropping.eval()(maps)
    assert torch.equal(seen[1], maps)

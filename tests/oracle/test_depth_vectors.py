"""Depth heads, losses and metrics against numbers of the original evaluation code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quietvit_eval.blocks import spread_blocks
from quietvit_eval.depth.heads import LinearHead, expected_depth
from quietvit_eval.depth.losses import gradient_loss, sig_loss
from quietvit_eval.depth.metrics import depth_scores, scored_pixels
from quietvit_eval.depth.options import DepthOptions
from quietvit_eval.views import to_pixels
from reference import VECTORS, Case, case


def maps_of(stored: Case, run: str) -> torch.Tensor:
    """The four maps, each followed by its [CLS] everywhere, as `feature_maps` lays them out."""
    x = stored.inputs(run)
    parts = []
    for i in range(4):
        parts += [x[f"map_{i}"], x[f"cls_{i}"][:, :, None, None].expand(-1, -1, *x[f"map_{i}"].shape[-2:])]
    return torch.cat(parts, dim=1)


def head_with(weights: dict[str, torch.Tensor], options: DepthOptions) -> LinearHead:
    head = LinearHead(64, options).eval()
    head.load_state_dict({k.replace("conv_depth", "conv"): v for k, v in weights.items()})
    return head


@pytest.mark.parametrize(
    ("run", "weights", "bins"), [("linear_norm", "weights", 256), ("regression", "weights_regression", 0)]
)
def test_linear_head(run: str, weights: str, bins: int) -> None:
    stored = case("08_eval/depth_head")
    head = head_with(stored.weights(weights), DepthOptions(layers=4, bins=bins, upsample=4))
    depth = head(maps_of(stored, "linear_norm"))[:, None]
    stored.check(run, "depth", depth)
    size = tuple(stored.info["runs"][run]["settings"]["image_size"])
    whole = to_pixels(depth.clamp(0.001, 10), size, 15, keep_padding=True)
    stored.check(run, "whole_inference", whole[:, :, ::3, ::3])


def test_linear_head_of_dinov3() -> None:
    stored = case("08_eval/depth_head_v3")
    run = "linear_bins_linear_norm"
    head = head_with(stored.weights(), DepthOptions(layers=4, bins=64, upsample=1))
    stored.check(run, "depth", head(maps_of(stored, run))[:, None])


def test_untrained_logits_give_the_middle_of_the_range() -> None:
    depth = expected_depth(torch.zeros(1, 256, 2, 3), min_depth=0.001, max_depth=10.0)
    torch.testing.assert_close(depth, torch.full((1, 2, 3), 5.0005))


def test_blocks() -> None:
    stored = json.loads((VECTORS / "08_eval" / "depth_layers.json").read_text())
    for depth, kinds in stored["dinov3_by_depth"].items():
        assert spread_blocks(int(depth), 1) == kinds["LAST"]
        if depth != "24":
            assert spread_blocks(int(depth), 4) == kinds["FOUR_EVEN_INTERVALS"]
    large = stored["released_linear4"]["vit_large"]
    assert large == stored["dinov3_by_depth"]["24"]["FOUR_EVEN_INTERVALS"] == [4, 11, 17, 23]
    assert spread_blocks(24, 4) == [5, 11, 17, 23]
    assert DepthOptions(layer_indices=tuple(large)).num_blocks == 4


@pytest.mark.parametrize("name", ["depth_losses", "depth_losses_batch2"])
def test_losses(name: str) -> None:
    stored = case(f"08_eval/{name}")
    x = stored.inputs("losses")
    predicted, target = x["pred"][:, 0].requires_grad_(), x["gt"][:, 0]
    valid = (target > 0) & (target <= 10.0)
    loss = sig_loss(predicted, target, valid)
    stored.check("losses", "sigloss", 10 * loss)
    (gradient,) = torch.autograd.grad(10 * loss, predicted)
    stored.check("losses", "grad/sigloss_pred", gradient[:, None])
    warm_steps = stored.info["runs"]["losses"]["settings"]["warm_iter"]
    calls = [sig_loss(predicted, target, valid, warm_up=step < warm_steps) for step in range(4)]
    stored.check("losses", "sigloss_warmup_calls", torch.stack(calls))
    stored.check("losses", "v3_sigloss_warmup_calls", torch.stack(calls))
    stored.check("losses", "sigloss_no_max_depth", sig_loss(predicted, target, target > 0))


@pytest.mark.parametrize("name", ["depth_losses", "depth_losses_batch2"])
def test_gradient_loss_is_what_the_original_gives_for_one_map(name: str) -> None:
    stored = case(f"08_eval/{name}")
    x = stored.inputs("losses")
    predicted, target = x["pred"][:1, 0].requires_grad_(), x["gt"][:1, 0]
    loss = 0.5 * gradient_loss(predicted, target, (target > 0) & (target <= 10.0))
    stored.check("losses", "gradient_2d", loss)
    (gradient,) = torch.autograd.grad(loss, predicted)
    stored.check("losses", "grad/gradient_2d_pred", gradient[0])


def test_metrics() -> None:
    stored = case("08_eval/depth_metrics")
    x = {k: v.numpy() for k, v in stored.inputs("metrics").items()}
    names = {"a1": "d1", "a2": "d2", "a3": "d3", "log_10": "log10"}
    settings = stored.info["runs"]["metrics"]["settings"]
    rows = []
    for predicted, target in zip(x["pred"].astype(np.float64), x["gt"].astype(np.float64), strict=True):
        valid = scored_pixels(target, min_depth=0.001, max_depth=10.0, crop="none")
        scores = depth_scores(predicted.clip(0.001, 10.0), target, valid)
        rows.append([scores[names.get(c, c)] for c in settings["columns_v3"]])
    table = torch.tensor(rows, dtype=torch.float64)
    stored.check("metrics", "per_image", table[:, :9])
    stored.check("metrics", "mean", table[:, :9].mean(dim=0))
    stored.check("metrics", "v3_per_image", table)

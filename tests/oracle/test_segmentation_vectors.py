"""Segmentation heads, intersection over union and padding against numbers of the original code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.segmentation.head import SegmentationHead
from quietvit_eval.segmentation.metrics import count_pixels, per_class, scores_of_counts
from quietvit_eval.segmentation.sliding import bands
from quietvit_eval.views import center_pad, to_pixels
from reference import Case, case

NAMES = {"bn": "norm", "conv_seg": "conv", "batchnorm_layer": "norm", "conv": "conv"}


def head_of(stored: Case) -> SegmentationHead:
    weights = {}
    for name, value in stored.weights().items():
        module, parameter = name.split(".")
        weights[f"{NAMES[module]}.{parameter}"] = value
    classes, channels = weights["conv.weight"].shape[:2]
    head = SegmentationHead(channels, classes, dropout=0.0, generator=torch.Generator())
    head.load_state_dict(weights)
    return head.eval()


def maps_of(stored: Case) -> torch.Tensor:
    inputs = stored.inputs("eval")
    return torch.cat([inputs[name] for name in sorted(inputs)], dim=1)


@pytest.mark.parametrize("name", ["segmentation_head", "segmentation_head_ms", "segmentation_head_v3"])
def test_heads(name: str) -> None:
    stored = case(f"08_eval/{name}")
    head, maps = head_of(stored), maps_of(stored)
    stored.check("eval", "logits", head(maps))
    if "train" in stored.info["runs"]:
        head.train()
        stored.check("train", "logits", head(maps))
        stored.check("train", "running_mean_after", head.norm.running_mean)
        stored.check("train", "running_var_after", head.norm.running_var)
        assert int(head.norm.num_batches_tracked) == 1


def test_logits_at_pixels() -> None:
    stored = case("08_eval/segmentation_head_v3")
    logits = head_of(stored)(maps_of(stored))
    size = (20, 21)
    stored.check("eval", "predict", to_pixels(logits, size, stride=4, keep_padding=True))
    banded = [torch.cat([part for _, part in bands(one, size, most=500)], dim=1) for one in logits]
    stored.check("eval", "predict", torch.stack(banded))


@pytest.mark.parametrize("name", ["miou", "miou_reduce_zero"])
def test_intersection_over_union(name: str) -> None:
    stored = case(f"08_eval/{name}")
    settings = stored.info["runs"]["miou"]["settings"]
    inputs = {k: v.numpy().astype(np.int16) for k, v in stored.inputs("miou").items()}
    labels = inputs["label"]
    ignored = labels == settings["ignore_index"]
    if settings["reduce_zero_label"]:
        ignored |= labels == 0
        labels = labels - 1
    labels = np.where(ignored, IGNORE, labels)
    num = settings["num_classes"]
    counts = np.sum([count_pixels(p, t, num) for p, t in zip(inputs["pred"], labels, strict=True)], axis=0)
    intersection, predicted, target = counts
    union = predicted + target - intersection
    stored.check(
        "miou", "area_intersect_union_pred_label", torch.from_numpy(np.stack([intersection, union, predicted, target]))
    )
    iou, _ = per_class(*counts)
    stored.check("miou", "iou_per_class", torch.from_numpy(np.nan_to_num(iou, nan=-1)).float())
    scores = scores_of_counts(*counts)
    for ours, theirs in (("mIoU", "mIoU"), ("mAcc", "acc"), ("aAcc", "aAcc")):
        stored.check("miou", f"metric/{theirs}", torch.tensor(scores[ours]))


@pytest.mark.parametrize("run", ["p14_30x41", "p14_28x28", "p16_17x33"])
def test_padding_to_whole_patches(run: str) -> None:
    stored = case("08_eval/center_padding")
    patch, images = stored.info["runs"][run]["settings"]["multiple"], stored.inputs(run)["x"]
    padded = center_pad(images, patch)
    stored.check(run, "y", padded)
    # And off again: maps as fine as the pixels come back as the pixels themselves.
    assert torch.equal(to_pixels(padded, images.shape[-2:], patch), images)

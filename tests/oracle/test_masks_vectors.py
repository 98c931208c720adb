"""Masks and collate against the originals: statistics of many draws, and one collated batch exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from quietvit.data.collate import Views, collate
from quietvit.data.masks import batch_masks, block_mask, mask_counts
from reference import VECTORS, case

DRAWS = 1200
SIGMAS = 5.0  # of the difference of two means; about 100 comparisons below


def table(name: str) -> list[dict[str, Any]]:
    settings: list[dict[str, Any]] = json.loads((VECTORS / "05_masking" / f"{name}.json").read_text())["settings"]
    return settings


REQUESTS = [(s, r) for s in table("mask_statistics") for r in s["per_request"]]


def close(values: np.ndarray, mean: float, std: float, draws: int, what: str) -> None:
    """Means of our draws and of the stored ones differ by no more than SIGMAS standard errors."""
    error = math.sqrt(max(std, float(values.std())) ** 2 * (1 / len(values) + 1 / draws))
    assert abs(values.mean() - mean) <= SIGMAS * error + 1e-9, f"{what}: {values.mean()} against {mean} +- {error}"


@pytest.mark.parametrize(("setting", "request_"), REQUESTS, ids=lambda x: str(x.get("requested", x.get("label"))))
def test_block_masks(setting: dict[str, Any], request_: dict[str, Any]) -> None:
    height, width = setting["constructor"]["input_size"]
    exact = "DINOv3" in setting["label"]
    requested = request_["requested"]
    rng = np.random.default_rng(requested)
    masks = np.stack(
        [
            block_mask(
                (height, width),
                requested,
                rng,
                max_fraction=setting["constructor"]["max_num_patches"] / (height * width),
                exact=exact,
            )
            for _ in range(DRAWS)
        ]
    )
    draws = request_["draws"]
    counts = masks.sum((1, 2))
    assert counts.max() <= requested
    close(counts, request_["count"]["mean"], request_["count"]["std"], draws, "count")
    share = request_["share_reaching_exactly_the_request"]
    close(counts == requested, share, math.sqrt(share * (1 - share)), draws, "exact")
    for axis, name in ((2, "rows_touched"), (1, "columns_touched")):
        stored = request_[name]
        close(masks.any(axis).sum(1), stored["mean"], stored["std"], draws, name)
    # of the hidden cells that have such a neighbour
    right = (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2)) / np.maximum(masks[:, :, :-1].sum((1, 2)), 1)
    below = (masks[:, 1:] & masks[:, :-1]).sum((1, 2)) / np.maximum(masks[:, :-1].sum((1, 2)), 1)
    std = request_["per_draw_std_of_right_share"]
    close(right, request_["share_of_masked_cells_whose_right_neighbour_is_masked"], std, draws, "right")
    close(below, request_["same_for_the_cell_below"], std, draws, "below")
    # Cells of one mask are not independent, so these get a plain bound: 5 sigma of a cell's share, as if alone.
    coverage = masks.mean(0)
    shares = np.array(request_["coverage_map_rounded"])
    bound = SIGMAS * np.sqrt(np.maximum(shares * (1 - shares), 0.005) * (1 / DRAWS + 1 / draws)) + 5e-4
    assert (np.abs(coverage - shares) <= bound).all()


@pytest.mark.parametrize("stored", table("collate_statistics"), ids=lambda s: s["settings"]["generator"])
def test_batches_of_masks(stored: dict[str, Any]) -> None:
    settings = stored["settings"]
    side = math.isqrt(settings["n_tokens"])
    num_crops = settings["images"] * settings["global_crops_per_image"]
    ratio = tuple(settings["mask_ratio_min_max"])
    options = {"probability": settings["mask_sample_probability"], "ratio": ratio}
    largest = mask_counts(num_crops, side * side, **options)
    assert largest == stored["largest_request_per_masked_crop"]
    assert [sum(largest)] == stored["upperbound"]
    exact = settings["generator"] == "dinov3"
    rng = np.random.default_rng(1)
    draws = 150
    batches = np.stack([batch_masks(num_crops, (side, side), **options, rng=rng, exact=exact) for _ in range(draws)])
    counts = np.sort(batches.sum(2), axis=1)
    masked = (counts > 0).sum(1)
    assert masked.min() == stored["images_with_a_mask"]["min"]
    assert masked.max() == stored["images_with_a_mask"]["max"]
    total = stored["total_masked"]
    close(counts.sum(1), total["mean"], total["std"], stored["draws"], "total")
    by_crop = stored["sorted_count_per_crop"]
    for i in range(num_crops):
        close(counts[:, i], by_crop["mean"][i], by_crop["std"][i], stored["draws"], f"crop {i}")
        assert counts[:, i].max() <= by_crop["max"][i] + 1
    share = settings["mask_sample_probability"]
    for i, position in enumerate(stored["masked_share_per_position"]):
        close(batches.any(2)[:, i], position, math.sqrt(share * (1 - share)), stored["draws"], f"position {i}")


def test_collate() -> None:
    """The stored crops are floats: they are brought to bytes here, before and after alike."""
    stored = case("05_masking/collate_batch")
    inputs, outputs = stored.inputs("batch"), stored.outputs("batch")
    low, high = inputs["global_crops"].min(), inputs["global_crops"].max()

    def to_bytes(x: torch.Tensor) -> torch.Tensor:
        return ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)

    def views(x: torch.Tensor) -> list[np.ndarray]:
        return list(to_bytes(x).permute(0, 2, 3, 1).numpy())

    samples = [
        Views(views(g), views(c), index)
        for index, (g, c) in enumerate(zip(inputs["global_crops"], inputs["local_crops"], strict=True))
    ]
    batch = collate(samples, inputs["masks"].bool().numpy())
    assert torch.equal(batch.global_crops, to_bytes(outputs["collated_global_crops"]))
    assert torch.equal(batch.local_crops, to_bytes(outputs["collated_local_crops"]))
    stored.check("batch", "mask_indices_list", batch.mask_indices)
    stored.check("batch", "masks_weight", batch.mask_weights)
    assert batch.mask_indices.numel() == outputs["n_masked_patches"].item()
    settings = stored.info["runs"]["batch"]["settings"]
    most = mask_counts(
        6, settings["n_tokens"], probability=settings["mask_probability"], ratio=tuple(settings["mask_ratio_tuple"])
    )
    assert sum(most) == outputs["upperbound"].item()

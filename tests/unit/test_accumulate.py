"""One batch cut into micro-batches is the same batch, and gives the same gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quietvit.contracts import BadSample, Batch
from quietvit.train.accumulate import split
from quietvit.train.loop import Training
from tiny_run import make_images, tiny_training


def batch_of(images: int, *, num_local: int = 3) -> Batch:
    """Pixels say which view of which image they belong to; the first mask is empty, the others grow."""

    def crops(views: int, side: int) -> Tensor:
        names = torch.arange(views)[:, None] * 20 + torch.arange(images)
        return names.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()

    masks = torch.arange(16).expand(2 * images, 16) < torch.arange(2 * images)[:, None]
    counts = masks.sum(1)
    return Batch(
        global_crops=crops(2, 4),
        local_crops=crops(num_local, 2) if num_local else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1.0 / counts.clamp_min(1)).repeat_interleave(counts),
        indices=torch.arange(images) + 100,
        bad=(BadSample("a.jpg", "cut off"),),
    )


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_nothing_is_lost_doubled_or_moved(parts: int, num_local: int) -> None:
    batch = batch_of(8, num_local=num_local)
    micro = split(batch, parts)
    size = 8 // parts
    assert [m.num_images for m in micro] == [size] * parts
    for p, m in enumerate(micro):
        for i in range(size):
            image = p * size + i
            assert int(m.indices[i]) == 100 + image
            for view in range(2):
                assert int(m.global_crops[view * size + i, 0, 0, 0]) == 20 * view + image
                assert torch.equal(m.masks[view * size + i], batch.masks[view * 8 + image])
            for view in range(num_local):
                assert int(m.local_crops[view * size + i, 0, 0, 0]) == 20 * view + image
        # The list of masked patches, as loops over the crops.
        listed = [(c * 16 + n, 1 / int(mask.sum())) for c, mask in enumerate(m.masks) for n in range(16) if mask[n]]
        assert m.mask_indices.tolist() == [position for position, _ in listed]
        assert torch.equal(m.mask_weights, torch.tensor([weight for _, weight in listed]))
        assert m.mask_weights.dtype == batch.mask_weights.dtype
    assert [b for m in micro for b in m.bad] == list(batch.bad)  # reported once


def gradients(training: Training, batch: Batch, parts: int) -> dict[str, Tensor]:
    method = training.method
    method.zero_grad()
    micro = split(batch, parts)
    for m, targets in zip(micro, method.teach(micro, temp=0.05), strict=True):  # type: ignore[operator]
        losses = method.study(m, targets)  # type: ignore[operator]
        total = torch.stack([method.loss_weights[k] * v / parts for k, v in losses.items()]).sum()  # type: ignore[index]
        total.backward()
    return {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("denominator", ["all_crops", "masked_crops"])
def test_gradients_are_those_of_the_whole_batch(tmp_path: Path, denominator: str) -> None:
    training = tiny_training(
        tmp_path / "run",
        make_images(tmp_path / "images"),
        "objective.koleo_weight=0",  # looks for neighbours inside a micro-batch, so it may differ
        "model.drop_path=0",
        f"objective.ibot_denominator={denominator}",
        "health.images=0",
    )
    batch = next(training.batches(0))
    whole = gradients(training, batch, 1)
    assert len(whole) > 20
    largest = max(float(g.abs().max()) for g in whole.values())
    for parts in (2, 4):
        cut = gradients(training, batch, parts)
        assert cut.keys() == whole.keys()
        for name, gradient in whole.items():
            # Sums in another order: some gradients (biases of keys) are rounding noise around an exact zero.
            torch.testing.assert_close(
                cut[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=f"{name}, {parts} parts"
            )

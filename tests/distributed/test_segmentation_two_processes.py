"""The segmentation head over two gloo processes: norm, loss and gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.segmentation.head import SegmentationHead, pixel_loss
from quietvit_eval.segmentation.patches import _gathered

CHANNELS, CLASSES, PATCH, SIDE = 5, 3, 4, 10


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Maps far from 0; the targets of the first image, and so many of the first process, are void."""
    generator = torch.Generator().manual_seed(2)
    maps = 3 * torch.randn(4, CHANNELS, 3, 3, generator=generator) + 50
    targets = torch.randint(-1, CLASSES, (4, SIDE, SIDE), generator=generator)
    targets[0] = IGNORE
    return maps, targets


def step(maps: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    head = SegmentationHead(CHANNELS, CLASSES, dropout=0.0, generator=torch.Generator().manual_seed(0))
    out = {}
    for average in ("all", "valid"):
        head.zero_grad()
        loss = pixel_loss(head(maps), targets, PATCH, average=average, keep_padding=False)
        loss.backward()
        out |= {f"{average}/{name}": p.grad.clone() for name, p in head.named_parameters()}
        out[f"{average}/loss"] = loss.detach()
    return out | {name: value for name, value in head.state_dict().items() if "running" in name}


def work(rank: int, folder: str) -> None:
    """What each process does with its share; results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    maps, targets = batch()
    out = step(maps[rank::2], targets[rank::2])
    out["rows"] = _gathered(torch.full((1 + 2 * rank, 2), float(rank)))  # one row here, three there
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in step(*batch()).items():
        mean = (first[name] + second[name]) / 2  # as `fit` averages gradients
        torch.testing.assert_close(mean, value, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        if "running" in name:
            torch.testing.assert_close(first[name], second[name])
    assert not torch.allclose(first["valid/loss"], second["valid/loss"])
    for out in (first, second):
        assert out["rows"][:, 0].tolist() == [0, 1, 1, 1]

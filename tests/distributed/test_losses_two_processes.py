"""Losses and targets over two gloo processes: the originals' numbers, and those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from quietvit.losses.centering import SoftmaxCentering, sinkhorn_knopp
from quietvit.losses.koleo import koleo_loss
from reference import case

RUNS = ["rank0", "rank1"]
TEMP = 0.07


def work(rank: int, folder: str) -> None:
    """What each process does with its inputs; results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    given: dict[str, Tensor] = torch.load(f"{folder}/in{rank}.pt", weights_only=True)
    out: dict[str, Any] = {}
    out["sinkhorn_cls"] = sinkhorn_knopp(given["teacher"], TEMP)
    out["sinkhorn_patch"] = sinkhorn_knopp(given["teacher_patch"], TEMP)
    out["sinkhorn_large"] = sinkhorn_knopp(given["teacher_patch"] * 1e4, TEMP)
    out["sinkhorn_one_sided"] = sinkhorn_knopp(given["one_sided"], TEMP)
    for name, rows, average in [
        ("cls", given["teacher"], "rows"),
        ("patch", given["teacher"], "ranks"),
        ("patch_ranks", given["teacher_patch"], "ranks"),
        ("patch_rows", given["teacher_patch"], "rows"),
        ("one_sided", given["one_sided"], "rows"),
    ]:
        centering = SoftmaxCentering(rows.shape[1], average=average)
        centering(rows, TEMP)
        out[f"{name}_center"] = centering.center.clone()
        out[f"{name}_probs_after_update"] = centering(rows, TEMP)
    features = given["features"].requires_grad_()
    out["koleo_distributed"] = koleo_loss(features, across_ranks=True)
    out["koleo_distributed"].backward()
    out["grad/koleo_feat"] = features.grad
    out["koleo_alone"] = koleo_loss(features)
    torch.save({k: v.detach() for k, v in out.items()}, f"{folder}/out{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def given() -> list[dict[str, Tensor]]:
    stored = case("03_losses/two_processes")
    inputs = [dict(stored.inputs(run)) for run in RUNS]
    inputs[0]["one_sided"] = inputs[0]["teacher_patch"]
    inputs[1]["one_sided"] = inputs[1]["teacher_patch"][:0]  # no masked patch on the second process
    return inputs


@pytest.fixture(scope="module")
def results(given: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("two")
    for rank, inputs in enumerate(given):
        torch.save(inputs, folder / f"in{rank}.pt")
    mp.spawn(work, args=(str(folder),), nprocs=2, join=True)
    return [torch.load(folder / f"out{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_vectors(results: list[dict[str, Tensor]], rank: int) -> None:
    stored = case("03_losses/two_processes")
    run = RUNS[rank]
    ours = results[rank]
    for name in stored.outputs(run):
        value = ours[name]
        if name in ("patch_center", "patch_probs_after_update"):
            value = value.unsqueeze(0)
        stored.check(run, name, value)


@pytest.mark.parametrize("name", ["sinkhorn_cls", "sinkhorn_patch", "sinkhorn_large", "sinkhorn_one_sided"])
def test_sinkhorn_of_two_is_that_of_one(
    given: list[dict[str, Tensor]], results: list[dict[str, Tensor]], name: str
) -> None:
    key = {"sinkhorn_cls": "teacher", "sinkhorn_one_sided": "one_sided"}.get(name, "teacher_patch")
    whole = torch.cat([g[key] for g in given]) * (1e4 if name == "sinkhorn_large" else 1.0)
    torch.testing.assert_close(torch.cat([r[name] for r in results]), sinkhorn_knopp(whole, TEMP), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "key"), [("cls", "teacher"), ("patch_rows", "teacher_patch"), ("one_sided", "one_sided")]
)
def test_center_of_two_is_that_of_one(
    given: list[dict[str, Tensor]], results: list[dict[str, Tensor]], name: str, key: str
) -> None:
    whole = torch.cat([g[key] for g in given])
    assert torch.equal(results[0][f"{name}_center"], results[1][f"{name}_center"])
    torch.testing.assert_close(results[0][f"{name}_center"], 0.1 * whole.mean(0, keepdim=True))


def test_center_as_a_mean_of_means(given: list[dict[str, Tensor]], results: list[dict[str, Tensor]]) -> None:
    """DINOv2's patch center weighs processes equally, however many masked patches each has (here 9 and 5)."""
    means = torch.stack([g["teacher_patch"].mean(0) for g in given])
    torch.testing.assert_close(results[0]["patch_ranks_center"][0], 0.1 * means.mean(0))
    assert not torch.allclose(results[0]["patch_ranks_center"], results[0]["patch_rows_center"], atol=1e-4)


def test_koleo_of_two_is_that_of_one(given: list[dict[str, Tensor]], results: list[dict[str, Tensor]]) -> None:
    whole = torch.cat([g["features"] for g in given]).detach().requires_grad_()
    loss = koleo_loss(whole)
    loss.backward()
    mean = (results[0]["koleo_distributed"] + results[1]["koleo_distributed"]) / 2
    torch.testing.assert_close(mean, loss.detach())
    grads = torch.cat([r["grad/koleo_feat"] for r in results]) / 2
    assert whole.grad is not None
    torch.testing.assert_close(grads, whole.grad, atol=1e-6, rtol=1e-4)
    for rank in range(2):  # without across_ranks each process keeps to itself
        torch.testing.assert_close(results[rank]["koleo_alone"], koleo_loss(given[rank]["features"]).detach())

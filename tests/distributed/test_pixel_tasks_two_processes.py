"""Segmentation and depth from pairs to cards over two gloo processes: every test image once, one card for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from quietvit.backbones import make_backbone
from quietvit.weights import save_teacher
from quietvit_eval.cards import read_per_image
from quietvit_eval.dense_data.pairs import CLASSES, METRES, open_pairs
from quietvit_eval.evaluate import evaluate

SIDE, TRAIN, TEST = 32, 8, 7
COMMON = {"steps": 4, "warmup_steps": 0, "batch_size": 4, "pictures": 2}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "segmentation": (CLASSES, {**COMMON, "short_side": SIDE, "crop": SIDE, "stride": SIDE, "ratio": (1.0, 1.0)}),
    "depth": (METRES, {
        **COMMON, "norm": True, "train_crop": "none", "crop": (SIDE, SIDE), "rotate": 0.0, "eval_crop": "none",
        "bins": 8, "upsample": 1,
    }),
}  # fmt: skip


def judge(folder: Path, out: Path) -> dict[str, Any]:
    """Scores and pictures of both tasks; cards go to `out`."""
    found = {}
    for task, (target, options) in TASKS.items():
        pairs = tuple(
            open_pairs(target, "scenes", None, split=split, num_images=count, image_size=SIDE)
            for split, count in (("train", TRAIN), ("val", TEST))
        )
        (card,) = evaluate(folder, [task], pairs, options={task: options}, out_dir=out / task, device="cpu")
        found[task] = {"scores": card.scores, "pictures": card.details["pictures"], "data": card.data}
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = judge(Path(folder), Path(folder) / "two")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("model")
    backbone = make_backbone("vit", embed_dim=16, depth=4, num_heads=2, patch_size=8, image_size=SIDE, init="xavier")
    save_teacher(path, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=SIDE, provenance={})
    mp.spawn(work, args=(str(path),), nprocs=2)  # type: ignore[no-untyped-call]
    return path


def test_both_ranks_return_the_same_and_the_first_writes_it(folder: Path) -> None:
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for task in TASKS:
        (card,) = (folder / "two" / task).glob("*.json")
        assert json.loads(card.read_text())["scores"] == first[task]["scores"]
        names = read_per_image(card).names
        assert len(names) == len(set(names)) == TEST
        assert len(first[task]["pictures"]) == 2
        assert all((folder / "two" / task / name).is_file() for name in first[task]["pictures"])


def head(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("heads/*.safetensors")
    return load_file(file)


def test_the_head_is_that_of_one_process_where_the_loss_is_a_mean(folder: Path) -> None:
    one = judge(folder, folder / "one")
    two = json.loads((folder / "0.json").read_text())
    ours = head(folder / "two" / "segmentation")
    for name, value in head(folder / "one" / "segmentation").items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert two["segmentation"]["scores"] == pytest.approx(one["segmentation"]["scores"], abs=2e-3)  # a pixel or two
    # SigLoss is no mean over images: each rank has that of its own share, as each GPU of the original had.
    assert two["depth"]["scores"].keys() == one["depth"]["scores"].keys()
    assert two["depth"]["data"] == one["depth"]["data"]

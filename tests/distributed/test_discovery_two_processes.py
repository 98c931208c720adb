"""Object discovery over two gloo processes: the bias, the score and the sheet of pictures are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from quietvit.backbones import make_backbone
from quietvit.weights import save_teacher
from quietvit_eval.discovery.data import open_boxes
from quietvit_eval.evaluate import evaluate

BROKEN = "04"


def judge(folder: Path, out: Path) -> dict[str, Any]:
    sources = tuple(open_boxes("csv", str(folder), split=split) for split in ("train", "val"))
    options = {"discovery": {"select": "held_out", "levels": (0.2, 0.5), "pictures": 3}}
    (card,) = evaluate(folder, ["discovery"], sources, options=options, out_dir=out, device="cpu")
    return {"scores": card.scores, "details": card.details, "data": card.data}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = judge(Path(folder), Path(folder) / "two")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    torch.manual_seed(5)
    backbone = make_backbone("vit", embed_dim=16, depth=2, num_heads=2, patch_size=8, image_size=32, init="xavier")
    save_teacher(tmp_path, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32, provenance={})
    lines = ["name,xmin,ymin,xmax,ymax"]
    rng = np.random.default_rng(0)
    for i in range(13):
        pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        left, top = rng.integers(0, 10, 2)
        pixels[top : top + 16, left : left + 24] //= 4
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        lines.append(f"{i:02d},{left},{top},{left + 24},{top + 16}")
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    (tmp_path / f"{BROKEN}.png").write_bytes(b"no image")

    mp.spawn(work, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    one = json.loads(json.dumps(judge(tmp_path, tmp_path / "one")))
    assert first == second == one
    assert sum(part["unreadable"] for part in one["data"].values()) == 1
    assert len(one["details"]["sweep"]) == 3
    (picture,) = one["details"]["pictures"]
    two_pixels, one_pixels = (np.asarray(Image.open(tmp_path / out / picture)) for out in ("two", "one"))
    np.testing.assert_array_equal(two_pixels, one_pixels)

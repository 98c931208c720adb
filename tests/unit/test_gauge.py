"""The artifact gauge on models whose artifacts are known by construction, in runs that it must not change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from planted import expected_norms, paint, planted_vit
from quietvit.backbones import make_backbone
from quietvit.features.norms import judge
from quietvit.nn.packing import unpack
from quietvit.train import checkpoint
from quietvit.train.gauge import ArtifactGauge, Episodes
from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from tiny_run import make_images, said, tiny_training


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def pictures(num: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(seed))


def reading(backbone: Any, *batches: Tensor) -> dict[str, float]:
    gauge = ArtifactGauge(backbone, every=1, steps=1)
    with gauge.watching(1), torch.no_grad():
        for batch in batches:
            backbone([batch], [None])
    return gauge.read()


# ---- the construction itself


@pytest.mark.parametrize("by_colour", [False, True])
def test_planted_tokens_have_the_norms_that_were_planted(by_colour: bool) -> None:
    marked, block, amount = [5, 20, 63], 1, 50.0
    backbone = planted_vit(block=block, amount=amount, positions=None if by_colour else marked, num_registers=2)
    batch = paint(pictures(6), marked) if by_colour else pictures(6)
    seen: list[Tensor] = []
    with backbone.observing(lambda i, x, groups: seen.append(unpack(x, groups)[0][:, 3:].norm(dim=-1))):
        backbone(batch)
    expected = expected_norms(backbone, batch, marked, block=block, amount=amount)
    torch.testing.assert_close(torch.stack(seen).double(), expected, rtol=1e-5, atol=1e-5)


# ---- reading


@pytest.mark.parametrize(("block", "amount", "marked"), [(0, 40.0, [9]), (2, 60.0, [0, 63]), (3, 140.0, [7, 8, 9, 30])])
def test_gauge_and_judge_find_layer_share_and_ratio(block: int, amount: float, marked: list[int]) -> None:
    backbone = planted_vit(block=block, amount=amount, positions=marked, num_registers=3)
    batches = [pictures(8, seed=1), pictures(8, seed=2)]
    values = reading(backbone, *batches)
    norms = expected_norms(backbone, torch.cat(batches), marked, block=block, amount=amount)
    usual, high = norms[block].log(), norms[block, :, marked].log().mean()
    others = torch.ones(64, dtype=torch.bool)
    others[marked] = False
    truth = math.exp(high - usual[:, others].mean())
    for i in range(4):
        assert values[f"artifacts/share/block_{i:02}"] == (len(marked) / 64 if i >= block else 0.0)
        verdict = judge(norms[i])
        assert verdict.bimodal == (i >= block)
        assert values[f"artifacts/median/block_{i:02}"] == pytest.approx(float(norms[i].median()), rel=0.01)
        assert values[f"artifacts/spread/block_{i:02}"] == pytest.approx(
            float(norms[i].log().std(correction=0)), rel=0.01
        )
    assert values["artifacts/share"] == values["artifacts/max_share"] == len(marked) / 64
    assert values["artifacts/ratio"] == pytest.approx(truth, rel=0.01)


def test_class_token_and_registers_are_measured_apart() -> None:
    backbone: Any = make_backbone("vit", embed_dim=24, depth=2, num_heads=2, patch_size=4, image_size=16).eval()
    with torch.no_grad():
        backbone.register_tokens.copy_(torch.tensor([100.0, 300, 200, 400]).view(1, 4, 1) / math.sqrt(24))
        backbone.cls_token.fill_(50 / math.sqrt(24))
    values = reading(backbone, pictures(5, 16))
    assert values["artifacts/share"] == 0.0
    assert values["artifacts/cls/block_01"] == pytest.approx(50, rel=0.02)
    assert values["artifacts/registers/block_01"] == pytest.approx(
        200, rel=0.02
    )  # torch's median: the lower middle one
    assert "artifacts/ratio" not in values


def test_norms_that_are_not_finite_show() -> None:
    backbone = planted_vit(amount=math.inf)
    values = reading(backbone, pictures(2))
    assert math.isnan(values["artifacts/share"])
    assert math.isnan(values["artifacts/max_share"])
    assert values["artifacts/share/block_00"] == 0.0


def test_nothing_is_counted_on_other_steps() -> None:
    backbone = planted_vit()
    gauge = ArtifactGauge(backbone, every=10, steps=25)
    assert [s for s in range(1, 26) if gauge.due(s)] == [10, 20, 25]
    with gauge.watching(9):
        backbone(pictures(2))
    assert gauge.read() == {}
    assert not ArtifactGauge(backbone, every=0, steps=25).due(25)


def test_one_observer_at_a_time() -> None:
    backbone: Any = planted_vit()
    with backbone.observing(print), pytest.raises(ValueError, match="observed already"), backbone.observing(print):
        pass
    with backbone.observing(lambda *seen: None):  # free again
        backbone(pictures(1))


@pytest.mark.parametrize("kind", ["t2t_vit", "dense", "compiled", "bf16"])
def test_every_kind_of_trunk_can_be_read(kind: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 32}
    if kind == "dense":
        options |= {"depth": 4, "dense_groups": "2-1", "growth": 16, "patch_size": 4}
    elif kind != "t2t_vit":
        options |= {"patch_size": 4}
    backbone: Any = make_backbone("t2t_vit" if kind == "t2t_vit" else "vit", **options).eval()
    if kind == "compiled":
        for block in backbone.blocks:
            block.compile(backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "bf16"):
        values = reading(backbone, pictures(3))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "bf16"):
        last = backbone.last_blocks(pictures(3), 1, norm=False)[0]
    norms = last.patches.flatten(1, 2).float().norm(dim=-1)
    at = f"block_{backbone.num_blocks - 1:02}"
    assert values[f"artifacts/median/{at}"] == judge(norms).median
    assert values[f"artifacts/cls/{at}"] == pytest.approx(float(last.cls.float().norm(dim=-1).median()), rel=1e-5)


# ---- when they began


def shares(*last: float, ratio: float = 8.0) -> dict[str, float]:
    """A reading of a model of as many blocks as there are shares."""
    values = {f"artifacts/share/block_{i:02}": s for i, s in enumerate(last)}
    return {**values, "artifacts/share": last[-1], "artifacts/max_share": max(last), "artifacts/ratio": ratio}


def test_beginning_and_end_are_told_once_and_recorded(tmp_path: Path) -> None:
    episodes = Episodes(tmp_path, num_registers=0)
    history = [(100, 0.0), (200, 0.02), (300, 0.0), (400, 0.012), (500, 0.02), (600, 0.03), (700, 0.0), (800, 0.0)]
    told = {step: episodes.add(step, shares(0.0, share, share)) for step, share in history}
    assert told == {
        **{step: [] for step, _ in history},
        500: [
            "artifacts since step 400, blocks 1-2, 1.2 % of the patch tokens at 8 times the usual norm: registers "
            "(model.num_registers=4) remove them"
        ],
        800: ["no artifacts any more since step 700: they had begun at step 400"],
    }
    record = json.loads((tmp_path / "artifacts.json").read_text())
    assert record == {
        "num_registers": 0,
        "episodes": [
            {
                "began_step": 400,
                "layer": 1,
                "blocks": [1, 2],
                "share": 0.012,
                "ratio": 8.0,
                "max_share": 0.03,
                "ended_step": 700,
            }
        ],
    }


def test_a_model_with_registers_is_told_something_else(tmp_path: Path) -> None:
    episodes = Episodes(tmp_path, num_registers=4)
    assert episodes.add(1, shares(0.0, 0.1)) == []
    [sentence] = episodes.add(2, shares(0.0, 0.1))
    assert sentence.startswith("artifacts since step 1, block 1, 10.0 %")
    assert "the 4 registers of this model do not take them in" in sentence


def test_replayed_readings_lead_to_the_same_record(tmp_path: Path) -> None:
    """A run resumed from before the artifacts has none on record; one resumed later goes on as if nothing was."""
    history = [(10 * i, shares(0.0, 0.05 if i > 3 else 0.0)) for i in range(1, 8)]
    whole = Episodes(tmp_path, num_registers=0)
    told = [whole.add(step, values) for step, values in history]
    record = (tmp_path / "artifacts.json").read_bytes()
    for cut in range(8):
        resumed = Episodes(tmp_path, num_registers=0)
        resumed.replay([{"step": step, **values} for step, values in history[:cut]])
        assert (tmp_path / "artifacts.json").exists() == (cut >= 5)
        assert [resumed.add(step, values) for step, values in history[cut:]] == told[cut:]
        assert (tmp_path / "artifacts.json").read_bytes() == record


def test_a_broken_reading_changes_nothing(tmp_path: Path) -> None:
    episodes = Episodes(tmp_path, num_registers=0)
    episodes.add(1, shares(0.1))
    assert episodes.add(2, shares(math.nan)) == []
    assert episodes.add(3, shares(0.1)) != []
    assert episodes.episodes[0].began_step == 1


# ---- in a run


def gauges_of(run_dir: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run_dir / "metrics.jsonl") if "artifacts/share" in r]


@pytest.mark.parametrize("extra", [(), ("train.accumulate=2", "parallel.checkpointing=full")])
def test_a_run_with_the_gauge_is_bit_equal_to_one_without(images: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    states = []
    for every in (0, 3):
        training = tiny_training(tmp_path / str(every), images, "train.steps=7", f"health.gauge_every={every}", *extra)
        run(training)
        found = checkpoint.find(tmp_path / str(every))
        assert found is not None
        states.append(checkpoint.read_whole(found))
        losses = [r for r in read_metrics(tmp_path / str(every) / "metrics.jsonl") if "loss/total" in r]
        states[-1] |= {f"losses {k}": torch.tensor([r[k] for r in losses]) for k in losses[0] if k.startswith("loss/")}
    assert states[0].keys() == states[1].keys()
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []
    assert gauges_of(tmp_path / "0") == []
    assert [r["step"] for r in gauges_of(tmp_path / "3")] == [3, 6, 7]
    assert "artifacts 0.0 %" in said(training)


def plant(backbone: Any) -> None:
    """Patch 3 of every global crop becomes an artifact."""
    with torch.no_grad():
        backbone.pos_embed[0, 4] = 40.0


def test_artifacts_of_a_run_are_told_and_survive_a_resume(images: Path, tmp_path: Path) -> None:
    settings = ("health.gauge_every=2", "train.steps=12", "checkpoint.every=8", "optim.lr=1e-5")
    training = tiny_training(tmp_path, images, *settings)
    for model in (training.method.teacher, training.method.student):
        plant(model["backbone"])  # type: ignore[index]
    run(training)
    assert said(training).count("artifacts since step 2, blocks 0-1, 6.2 % of the patch tokens") == 1
    record = json.loads((tmp_path / "artifacts.json").read_text())
    [episode] = record["episodes"]
    assert (episode["began_step"], episode["layer"], episode["share"]) == (2, 0, 1 / 16)
    assert all(r["artifacts/share"] == 1 / 16 for r in gauges_of(tmp_path))
    assert "artifacts 6.2 %" in said(training)

    checkpoint.complete(tmp_path)[-1].rename(tmp_path / "gone")  # as if killed after step 8
    (tmp_path / "artifacts.json").unlink()
    again = tiny_training(tmp_path, images, *settings)
    run(again)
    assert "artifacts since" not in said(again)
    assert json.loads((tmp_path / "artifacts.json").read_text()) == record
    assert [r["step"] for r in gauges_of(tmp_path)] == [2, 4, 6, 8, 10, 12]

"""Twenty steps with fixed seeds give the losses they gave before: data, augmentation, masks, objective and optimizer.

A change of any of them shows here. If it is meant, write the numbers anew and say in the commit why they moved:

    OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python tests/golden/test_golden_steps.py

The pictures come from a formula and the run from tests/tiny.yaml, so nothing else can move them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from quietvit.files import write_text
from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from tiny_run import make_images, tiny_training

STORED = Path(__file__).with_name("steps.json")
# Both centerings and both kinds of head, accumulation in one of them; both backbones.
CASES: dict[str, tuple[str, ...]] = {
    "sinkhorn_knopp": (),
    "softmax, separate heads, accumulated": (
        "objective.centering=softmax",
        "objective.separate_heads=true",
        "objective.ibot_head.num_prototypes=12",
        "objective.ibot_head.hidden_dim=32",
        "objective.ibot_head.weight_norm=trained",
        "objective.ibot_denominator=masked_crops",
        "train.accumulate=2",
        "masks.probability=0.25",
        "crops.blur=paper",
    ),
    "t2t_vit": ("model.backbone=t2t_vit", "model.size=nano", "model.stem.token_dim=16"),
}


def numbers(folder: Path, overrides: tuple[str, ...]) -> dict[str, list[float]]:
    """Every loss and gradient norm of the 20 steps, and the health figures at their end."""
    run_dir = folder / "run"
    training = tiny_training(run_dir, make_images(folder / "images"), *overrides)
    assert run(training).step == 20
    records: list[Any] = read_metrics(run_dir / "metrics.jsonl")
    steps = [r for r in records if "loss/total" in r]
    assert [r["step"] for r in steps] == [*range(1, 21)]
    curves = {k: [r[k] for r in steps] for k in steps[0] if k.startswith(("loss/", "grad_norm/"))}
    health = [r for r in records if r["step"] == 20 and "health/rank" in r]
    return curves | {k: [v] for k, v in health[0].items() if k.startswith("health/")}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_what_they_were(tmp_path: Path, name: str) -> None:
    stored = json.loads(STORED.read_text())[name]
    found = numbers(tmp_path, CASES[name])
    assert found.keys() == stored.keys()
    for key, values in stored.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=1e-6), f"{key}: see the head of this file"


def write_anew() -> None:
    found = {}
    for name, overrides in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            curves = numbers(Path(folder), overrides)
        found[name] = {k: [float(f"{v:.8g}") for v in values] for k, values in curves.items()}
    rows = ",\n".join(
        f" {json.dumps(name)}: {{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in c.items()) + "\n }"
        for name, c in found.items()
    )
    write_text(STORED, "{\n" + rows + "\n}\n")


if __name__ == "__main__":
    write_anew()

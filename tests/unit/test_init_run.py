"""Runs that begin with a model: the same features at step 0, a backbone at rest first, and the same after a resume."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from quietvit.backbones import make_backbone
from quietvit.build import build_training
from quietvit.config.load import ConfigError, load_config
from quietvit.contracts import Batch
from quietvit.train import checkpoint
from quietvit.train.loop import Training, run
from quietvit.train.metrics import read_metrics
from quietvit.weights import load, save_teacher
from quietvit.weights.native import weights_hash
from quietvit_launch.job import Job, begin, run_job, withdraw
from tiny_run import make_images, said, tiny_training

RECIPE = """
data: {source: folder, workers: 0}
crops: {global_size: 32, local_size: 16, num_local: 2, blur_kernel: 3}
model: {drop_path: 0.2}
objective: {head: {num_prototypes: 24, hidden_dim: 32, bottleneck_dim: 16, init: xavier}}
optim: {lr: 1e-3, scaling: none, warmup: 0.2, freeze_last_layer: 0.0}
train: {steps: 8, batch_size: 8, threads: 1, device: cpu, precision: fp32}
health: {every: 4, images: 8, size: 32}
checkpoint: {every: 4}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run folder of `tests/tiny.yaml`: two registers, patch 8, grid 4 x 4."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    run(tiny_training(folder, images, "train.steps=4", "optim.lr=1e-2"))
    return folder


def training_from(model: Path, run_dir: Path, images: Path, *overrides: str) -> Training:
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe = run_dir.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    config = load_config(str(recipe), [f"data.path={images}", f"init.from={model}", *overrides])
    return build_training(config, run_dir, Console(file=io.StringIO(), width=200))


def backbones(training: Training) -> tuple[nn.Module, nn.Module]:
    method: Any = training.method
    return method.student["backbone"], method.teacher["backbone"]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def saved(run_dir: Path) -> dict[str, Tensor]:
    found = checkpoint.find(run_dir)
    assert found is not None
    return checkpoint.read_whole(found)


def test_both_backbones_begin_as_the_model_is(trained: Path, images: Path, tmp_path: Path) -> None:
    source = load(trained, "cpu")
    training = training_from(trained, tmp_path / "run", images)
    pixels = torch.randn(3, 3, 48, 32)
    for backbone in backbones(training):
        assert weights_hash(backbone) == weights_hash(source.backbone)
        now, before = backbone.eval()(pixels), source(pixels)
        assert torch.equal(now.cls, before.cls)
        assert torch.equal(now.patches, before.patches)
        assert torch.equal(now.registers, before.registers)
    assert backbones(training)[0].drop_rates == [0.2, 0.2]  # the run's own
    assert "begins with: source (vit, weights " in said(training)
    assert "nothing changed). The heads are new" in said(training)
    teacher = training.method.teacher["dino_head"].state_dict()  # type: ignore[index]
    first = checkpoint.read_whole(checkpoint.find(trained))  # type: ignore[arg-type]
    assert not any(
        torch.equal(v, first[f"method.teacher.dino_head.{k}"])
        for k, v in teacher.items()
        if "weight" in k and "_g" not in k
    )


def test_more_registers_change_little_at_first_and_are_said(trained: Path, images: Path, tmp_path: Path) -> None:
    source = load(trained, "cpu")
    training = training_from(trained, tmp_path / "run", images, "model.num_registers=4")
    pixels = torch.randn(3, 3, 32, 32)
    now, before = backbones(training)[1](pixels), source(pixels)
    assert now.registers.shape[1] == 4
    cosine = torch.nn.functional.cosine_similarity(now.cls, before.cls).min()
    assert 0.9 < float(cosine) < 1 - 1e-7
    assert "registers 2 -> 4" in said(training)
    with pytest.raises(ConfigError, match=r"model\.num_registers=0, but .*source has 2 registers"):
        training_from(trained, tmp_path / "other", images, "model.num_registers=0")


@pytest.mark.parametrize("patch", [4, 16])
def test_another_patch_trains(trained: Path, images: Path, tmp_path: Path, patch: int) -> None:
    training = training_from(trained, tmp_path / "run", images, f"model.patch_size={patch}", "train.steps=2")
    assert backbones(training)[0].native_grid == (32 // patch, 32 // patch)
    assert run(training).step == 2
    teacher = load(tmp_path / "run", "cpu")
    assert (teacher.stride, teacher.image_size) == (patch, 32)
    about = teacher.meta["provenance"]["init"]
    assert about["file"] == "source"
    assert about["hash"] == weights_hash(load(trained, "cpu").backbone)
    assert about["changes"][0] == f"patch 8 -> {patch} px (pseudo-inverse resize)"
    assert about["provenance"]["step"] == 4


def test_a_dinov2_file_without_registers(images: Path, tmp_path: Path) -> None:
    """As released: heads 64 wide, a position table of another grid, offset interpolation, no mask token in use."""
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "image_size": 70, "num_registers": 0}
    released = make_backbone("vit", **shape, pos_interpolation="offset", pos_antialias=False).eval()
    torch.save(released.state_dict(), tmp_path / "tiny.pth")
    crops = ("crops.global_size=28", "crops.local_size=14", "health.size=28", "train.steps=2")
    training = training_from(tmp_path / "tiny.pth", tmp_path / "run", images, "model.num_registers=4", *crops)
    pixels = torch.randn(2, 3, 28, 42)
    plain = training_from(tmp_path / "tiny.pth", tmp_path / "plain", images, *crops)
    assert torch.equal(backbones(plain)[1](pixels).cls, released(pixels).cls)
    assert run(training).step == 2
    teacher = load(tmp_path / "run", "cpu")
    assert (teacher.image_size, teacher.backbone.num_registers) == (70, 4)
    about = teacher.meta["provenance"]["init"]
    assert (about["file"], about["changes"]) == ("tiny.pth", ["registers 0 -> 4"])
    assert teacher.meta["backbone"]["arguments"]["pos_interpolation"] == "offset"


def test_crops_must_suit_the_models_patch(trained: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"crops\.global_size=36 is not a multiple of the patch \(8 px\)"):
        training_from(trained, tmp_path / "run", images, "crops.global_size=36")
    with pytest.raises(ConfigError, match=r"model\.embed_dim=64, there it is 32"):
        training_from(trained, tmp_path / "run", images, "model.embed_dim=64")


def test_a_tokens_to_token_model_with_its_own_normalisation(images: Path, tmp_path: Path) -> None:
    backbone = make_backbone(
        "t2t_vit", embed_dim=32, depth=2, num_heads=2, token_dim=16, image_size=32, patch_size=8, num_registers=0
    )
    file = save_teacher(
        tmp_path, backbone, mean=[0.5] * 3, std=[0.25] * 3, image_size=32, provenance={}, backbone_name="t2t_vit"
    )
    training = training_from(file, tmp_path / "run", images, "model.num_registers=2", "train.steps=2")
    assert run(training).step == 2
    teacher = load(tmp_path / "run", "cpu")
    assert teacher.meta["backbone"]["name"] == "t2t_vit"
    assert (teacher.mean, teacher.std) == ((0.5,) * 3, (0.25,) * 3)
    assert teacher.meta["provenance"]["init"]["changes"] == ["registers 0 -> 2"]
    with pytest.raises(ConfigError, match=r"write data\.mean=\[0\.5,0\.5,0\.5\] data\.std=\[0\.25,0\.25,0\.25\]"):
        training_from(file, tmp_path / "other", images, "data.std=[0.2,0.2,0.2]")


def test_the_backbone_rests_and_then_learns(trained: Path, images: Path, tmp_path: Path) -> None:
    accumulated = ("train.accumulate=2", "init.freeze_steps=4")
    training = training_from(trained, tmp_path / "run", images, *accumulated)
    student, teacher = backbones(training)
    before, head = weights(student), weights(training.method.student["dino_head"])  # type: ignore[index]
    states: list[tuple[bool, bool]] = []
    follow = training.method.follow

    def followed(momentum: float) -> None:
        follow(momentum)  # type: ignore[operator]
        states.append((equal(weights(student), before), equal(weights(teacher), before)))

    training.method.follow = followed  # type: ignore[assignment]
    run(training)
    assert states == [(True, True)] * 4 + [(False, False)] * 4
    assert not equal(weights(training.method.student["dino_head"]), head)  # type: ignore[index]
    assert "step 4: from here on the backbone learns too" in said(training)
    steps = {k: int(v) for k, v in saved(tmp_path / "run").items() if k.endswith(".step")}
    own = "optimizer.student.backbone."
    assert {v for k, v in steps.items() if k.startswith(own)} == {4}
    assert {v for k, v in steps.items() if not k.startswith(own)} == {8}
    norms = [r["grad_norm/backbone"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/total" in r]
    assert all(float(str(n)) > 0 for n in norms)


def test_the_first_step_after_the_thaw_is_that_of_a_new_optimizer(trained: Path, images: Path, tmp_path: Path) -> None:
    """AdamW with bias correction moves each weight by lr times a sign, whatever the gradients were while it rested."""
    still = (
        "init.freeze_steps=4",
        "train.steps=5",
        "optim.weight_decay=[0,0]",
        "optim.layer_decay=1.0",
        "optim.clip=1e9",
    )
    training = training_from(trained, tmp_path / "run", images, *still)
    student = backbones(training)[0]
    before = weights(student)["blocks.0.mlp.fc1.weight"]
    run(training)
    moved = (student.state_dict()["blocks.0.mlp.fc1.weight"] - before).abs()
    [lr] = [r["lr"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["step"] == 5 and "lr" in r]
    assert float(moved.median()) == pytest.approx(float(str(lr)), rel=1e-2)


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_cut_and_resumed_is_the_same_run(trained: Path, images: Path, tmp_path: Path, cut: int) -> None:
    settings = ("init.freeze_steps=4", "model.num_registers=3")
    model = tmp_path / "model"
    model.mkdir()
    (model / "teacher.safetensors").write_bytes((trained / "teacher.safetensors").read_bytes())
    run(training_from(model, tmp_path / "whole", images, *settings))
    first = training_from(model, tmp_path / "cut", images, *settings)
    batches = first.batches

    def interrupting(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start), start + 1):
            if step == cut:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    first.batches = interrupting
    assert run(first).step == cut
    (model / "teacher.safetensors").unlink()  # a resumed run does without
    second = training_from(model, tmp_path / "cut", images, *settings)
    assert "registers 2 -> 3" in said(second)
    run(second)
    one, other = saved(tmp_path / "cut"), saved(tmp_path / "whole")
    assert equal(one, other)


def test_the_rest_has_a_length_by_itself(trained: Path, images: Path, tmp_path: Path) -> None:
    """20 images in batches of 8 are a pass of 3 steps; a tenth of the run is the most."""
    assert training_from(trained, tmp_path / "a", images, "train.steps=40").freeze_steps == 3
    assert training_from(trained, tmp_path / "b", images, "train.steps=20").freeze_steps == 2
    assert training_from(trained, tmp_path / "c", images, "init.freeze_steps=0").freeze_steps == 0
    with pytest.raises(ConfigError, match="of 8 steps none is left for the backbone"):
        training_from(trained, tmp_path / "d", images, "init.freeze_steps=8")
    assert tiny_training(tmp_path / "e", images).freeze_steps == 0


def test_a_note_that_cannot_be_read(trained: Path, images: Path, tmp_path: Path) -> None:
    run(training_from(trained, tmp_path / "run", images, "train.steps=1"))
    note = tmp_path / "run" / "init.json"
    assert json.loads(note.read_text())["name"] == "vit"
    note.write_text(note.read_text()[:50])
    with pytest.raises(ValueError, match=r"init\.json says what this run began with, and cannot be read"):
        training_from(trained, tmp_path / "run", images, "train.steps=1")


PROBE = """
import contextlib, io, json, sys
from quietvit_launch.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        answers.append((main(words), err.getvalue(), "torch" in sys.modules))
print(json.dumps(answers))
"""


def test_wrong_settings_are_answered_at_once(tmp_path: Path) -> None:
    expected = {
        "init.from=/nowhere/x.pth: there is no such file or folder": ["init.from=/nowhere/x.pth"],
        "Did you mean 'init.freeze_steps'": ["init.from=x", "init.freeze_step=3"],
        "'init.freeze_steps' takes a value of type int": ["init.from=x", "init.freeze_steps=many"],
        "choose stop, rewind, off": ["init.guard=of"],
        "fresh weights have nothing to keep": ["init.freeze_steps=3"],
        "a factor between 0 and 1": ["init.guard_lr_factor=1.5"],
        "model.size=null: give a value": ["model.size=null"],
        "init.guard_patience=0: must be at least 1": ["init.guard_patience=0"],
        "none is left for the backbone": ["init.from=x", "init.freeze_steps=480"],
    }
    lines = [["train", "quickstart", *overrides, "--out", str(tmp_path / "out")] for overrides in expected.values()]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(lines)], capture_output=True, text=True, timeout=120, check=True
    )
    for message, (code, said_there, torch_there) in zip(expected, json.loads(done.stdout), strict=True):
        assert message in said_there
        assert (code, torch_there) == (2, False), message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_leaves_nothing(tmp_path: Path, images: Path) -> None:
    model = tmp_path / "model.pth"
    model.write_bytes(b"PK\x03\x04 cut short")
    job = Job("quickstart", (f"data.path={images}", "data.source=folder", "data.options=null", f"init.from={model}",
              "train.batch_size=8", "train.device=cpu"), str(tmp_path / "out"))  # fmt: skip
    withdraw(begin(job))  # it is there, which is all that is looked at
    with pytest.raises(ValueError, match=r"model\.pth"):
        run_job(job, Console(quiet=True))
    assert not (tmp_path / "out").exists()

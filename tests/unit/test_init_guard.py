"""The forgetting guard: runs that forget are stopped or rewound, others are left alone, whatever interrupts them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor, nn

from quietvit.backbones import make_backbone
from quietvit.build import build_training
from quietvit.config.load import load_config
from quietvit.contracts import Batch
from quietvit.dist import gather_objects, whole
from quietvit.train import checkpoint
from quietvit.train.guard import ForgottenError, Guard, Rules, table
from quietvit.train.loop import Training, TrainingStoppedError, run
from quietvit.train.metrics import read_metrics
from quietvit.weights import load, save_teacher
from quietvit.weights.native import weights_hash
from tiny_run import make_images, said

RECIPE = """
data: {source: folder, workers: 0}
crops: {global_size: 16, local_size: 8, num_local: 2, blur_kernel: 3}
model: {drop_path: 0.0}
objective: {head: {num_prototypes: 24, hidden_dim: 32, bottleneck_dim: 16, init: xavier}}
optim: {lr: 1e-5, scaling: none, warmup: 0.0, freeze_last_layer: 0.0}
teacher: {momentum: [0.0, 0.0]}
train: {steps: 8, batch_size: 8, threads: 1, device: cpu, precision: fp32}
health: {every: 2, images: 8, size: 16}
checkpoint: {every: 2}
init: {freeze_steps: 2, guard_patience: 1, guard_margin: 20}
"""
ABSURD = "optim.lr=1.0"
STOP, REWIND = "init.guard=stop", "init.guard=rewind"


@dataclass
class Distance:
    """A probe whose k-NN tells how far the weights are from where they began: 100 there, 0 far away."""

    start: dict[str, Tensor]
    labels: bool = True

    def look(self, backbone: nn.Module) -> dict[str, float]:
        far = max(float((whole(v) - self.start[k]).abs().max()) for k, v in backbone.state_dict().items())
        values = {"rank": 20 / (1 + far), "outlier_share": 0.0}
        return values | {"knn": 100 / (1 + far)} if self.labels else values


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, the model to begin with, and the recipe."""
    folder = tmp_path_factory.mktemp("guard")
    make_images(folder / "images", side=16)
    torch.manual_seed(5)
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16, "init": "xavier"}
    model = make_backbone("vit", **shape, num_registers=0)
    save_teacher(folder, model, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], image_size=16, provenance={})
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def training_in(place: Path, run_dir: Path, *overrides: str, labels: bool = True) -> Training:
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = [f"data.path={place / 'images'}", f"init.from={place / 'teacher.safetensors'}", *overrides]
    config = load_config(str(place / "recipe.yaml"), settings)
    training = build_training(config, run_dir, Console(file=io.StringIO(), width=200))
    begun = load(place / "teacher.safetensors", "cpu").backbone.state_dict()
    training.probe = cast(Any, Distance(begun, labels))
    return training


def note(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "guard.json").read_text())
    return found


def looks(run_dir: Path) -> dict[int, float]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return {int(str(r["step"])): float(str(r["health/knn"])) for r in records if "health/knn" in r}


def lrs(run_dir: Path) -> list[float]:
    return [float(str(r["lr"])) for r in read_metrics(run_dir / "metrics.jsonl") if "lr" in r]


def state_of(run_dir: Path) -> dict[str, Tensor]:
    found = checkpoint.find(run_dir)
    assert found is not None
    return checkpoint.read_whole(found)


def cut_at(training: Training, step: int) -> None:
    """Ask for a stop in `step` (counted from 1)."""
    batches = training.batches

    def interrupting(start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(start), start + 1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    training.batches = interrupting


def test_a_run_that_forgets_is_stopped_and_the_good_model_is_its_teacher(place: Path, tmp_path: Path) -> None:
    training = training_in(place, tmp_path, ABSURD, STOP)
    with pytest.raises(TrainingStoppedError) as stopped:
        run(training)
    message = str(stopped.value)
    assert "the model forgets what it began with: k-NN 100.0 at the start, " in message
    assert "best kept (step 2)" in message
    assert f"is kept in {tmp_path / 'checkpoints' / 'step_00000002'}" in message
    assert "half of optim.lr" in message
    begun = load(place / "teacher.safetensors", "cpu").backbone
    assert weights_hash(load(tmp_path, "cpu").backbone) == weights_hash(begun)  # at rest until step 2
    found = note(tmp_path)
    assert (found["outcome"], found["start"]["knn"], found["best"]["step"]) == ("stopped", 100.0, 2)
    assert found["now"]["knn"] < 80
    assert found["table"] in message
    assert looks(tmp_path)[0] == 100.0
    with pytest.raises(TrainingStoppedError, match=r"this run was stopped at its last look: the model forgets"):
        run(training_in(place, tmp_path, ABSURD, STOP))
    assert run(training_in(place, tmp_path, ABSURD, "init.guard=off")).step == 8


def test_a_run_that_forgets_is_rewound_and_recovers(place: Path, tmp_path: Path) -> None:
    settings = (ABSURD, REWIND, "init.guard_lr_factor=1e-5")
    run(training_in(place, tmp_path / "off", "init.guard=off", ABSURD))
    full = lrs(tmp_path / "off")
    training = training_in(place, tmp_path / "run", *settings)
    assert run(training).step == 8
    assert "now (step 4)" in said(training)
    assert "rewound to step 2 (1 of at most 3 times); the learning rate is 1e-05 of the schedule's" in said(training)
    found = note(tmp_path / "run")
    assert (found["outcome"], found["lr_factor"], found["bad"]) == ("finished", 1e-5, 0)
    [rewound] = found["rewinds"]
    assert (rewound["from"], rewound["to"], rewound["lr_factor"]) == (4, 2, 1e-5)
    assert rewound["knn"] < 80
    assert lrs(tmp_path / "run") == [*full[:2], *(1e-5 * lr for lr in full[2:])]
    assert all(knn > 80 for knn in looks(tmp_path / "run").values())
    factors = [r["guard/lr_factor"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "guard/lr_factor" in r]
    assert factors == [1.0, 1.0, 1e-5, 1e-5, 1e-5]
    # Rewound is what it says: the same as to have gone on from step 2 at that rate with a new process.
    steps = state_of(tmp_path / "run")["optimizer.student.backbone.cls_token.step"]
    assert int(steps) == 6
    cut = training_in(place, tmp_path / "cut", *settings)
    cut_at(cut, 5)
    calls = []
    inner = cut.batches
    cut.batches = lambda start: (calls.append(start), inner(start))[1]  # type: ignore[assignment]
    assert run(cut).step == 5
    assert calls == [0, 2]
    assert run(training_in(place, tmp_path / "cut", *settings)).step == 8
    one, other = state_of(tmp_path / "cut"), state_of(tmp_path / "run")
    assert all(torch.equal(one[k], other[k]) for k in other)
    assert lrs(tmp_path / "cut") == lrs(tmp_path / "run")


def test_rewinds_come_to_an_end(place: Path, tmp_path: Path) -> None:
    training = training_in(place, tmp_path, ABSURD, REWIND, "init.guard_lr_factor=0.9", "init.guard_rewinds=2")
    with pytest.raises(TrainingStoppedError, match=r"more than 20 points below\. It was rewound 2 times before"):
        run(training)
    assert [r["lr_factor"] for r in note(tmp_path)["rewinds"]] == pytest.approx([0.9, 0.81])
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000000", "step_00000002"]
    assert [s for s in (tmp_path / "checkpoints").iterdir() if s.name.startswith(".")] == []


def test_a_healthy_run_is_not_touched(place: Path, tmp_path: Path) -> None:
    guarded = training_in(place, tmp_path / "on", STOP)
    run(guarded)
    run(training_in(place, tmp_path / "off", "init.guard=off"))
    one, other = state_of(tmp_path / "on"), state_of(tmp_path / "off")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert note(tmp_path / "on")["outcome"] == "finished"
    assert not (tmp_path / "off" / "guard.json").exists()
    assert "start (step 0)" in said(guarded)
    assert "k-NN, %" in said(guarded)


def test_patience_survives_a_resume(place: Path, tmp_path: Path) -> None:
    settings = (ABSURD, STOP, "init.guard_patience=2")
    with pytest.raises(TrainingStoppedError, match="2 looks in a row"):
        run(training_in(place, tmp_path / "whole", *settings))
    assert note(tmp_path / "whole")["now"]["step"] == 6
    cut = training_in(place, tmp_path / "cut", *settings)
    cut_at(cut, 5)
    run(cut)
    assert "1 more such look(s), and the guard acts" in said(cut)
    with pytest.raises(TrainingStoppedError, match="2 looks in a row"):
        run(training_in(place, tmp_path / "cut", *settings))
    assert {k: v for k, v in note(tmp_path / "cut").items() if k not in ("verdict", "table")} == {
        k: v for k, v in note(tmp_path / "whole").items() if k not in ("verdict", "table")
    }


def test_at_the_last_step_nothing_is_waited_for(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match=r"the last look more than 20 points below"):
        run(training_in(place, tmp_path, ABSURD, STOP, "init.guard_patience=9", "train.steps=4"))


def test_the_best_checkpoint_outlives_keep(place: Path, tmp_path: Path) -> None:
    settings = (ABSURD, STOP, "init.guard_patience=9", "checkpoint.keep=1")
    with pytest.raises(TrainingStoppedError, match=r"kept in .*step_00000002"):
        run(training_in(place, tmp_path, *settings))
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000006"]


def test_without_labels_only_a_fall_of_rank_is_warned_of(place: Path, tmp_path: Path) -> None:
    training = training_in(place, tmp_path, ABSURD, STOP, labels=False)
    assert run(training).step == 8
    assert "guard: no labels, hence no k-NN to see forgetting by" in said(training)
    assert "the rank of the features fell from" in said(training)
    assert "step_00000000" not in [p.name for p in checkpoint.complete(tmp_path)]
    assert note(tmp_path)["outcome"] == "finished"


def rules(**others: Any) -> Rules:
    return Rules(**{"action": "stop", "margin": 5.0, "patience": 2, "rewinds": 1, "lr_factor": 0.5, **others})


def test_the_rate_of_a_rewound_run_stays_when_the_guard_is_turned_off(place: Path, tmp_path: Path) -> None:
    first = training_in(place, tmp_path, ABSURD, REWIND, "init.guard_lr_factor=1e-5")
    batches = first.batches
    started: list[int] = []

    def interrupting(start: int) -> Iterator[Batch]:
        started.append(start)
        for batch in batches(start):
            if len(started) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    first.batches = interrupting
    assert run(first).step == 3
    second = training_in(place, tmp_path, ABSURD, "init.guard=off")
    run(second)
    assert lrs(tmp_path)[-1] < 1e-5
    assert note(tmp_path)["outcome"] == "running"  # as it was left
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.meta["guard"]["lr_factor"] == 1e-5


def test_a_guard_that_was_off_at_the_start_has_nothing_to_compare_with(place: Path, tmp_path: Path) -> None:
    first = training_in(place, tmp_path, ABSURD, "init.guard=off")
    cut_at(first, 3)
    run(first)
    second = training_in(place, tmp_path, ABSURD, STOP)
    assert run(second).step == 8
    assert "guard: nobody looked at the model that this run began with" in said(second)


def test_margin_and_patience(tmp_path: Path) -> None:
    guard = Guard(tmp_path, rules())
    told = [guard.judge(step, {"knn": knn, "rank": 9.0}, last=False) for step, knn in enumerate([50, 45, 44.9, 46, 44])]
    assert [len(sentences) for sentences in told] == [1, 0, 1, 0, 1]  # 45.0 is within the margin of 5
    assert guard.figures() == {"guard/knn_below_start": 6.0, "guard/bad_looks": 1.0, "guard/lr_factor": 1.0}
    with pytest.raises(ForgottenError, match=r"k-NN 50\.0 at the start, 40\.0 at step 5; 2 looks in a row"):
        guard.judge(5, {"knn": 40.0}, last=False)


def test_labels_that_go_away_are_no_fault(tmp_path: Path) -> None:
    """health.* may change when a run is resumed."""
    guard = Guard(tmp_path, rules())
    guard.judge(0, {"knn": 50.0, "rank": 9.0}, last=False)
    assert guard.judge(2, {"rank": 4.0}, last=True)[0].startswith("the rank of the features fell from 9.0")
    assert not guard.saving(2)["good"]
    assert guard.finish().splitlines()[1].split()[-1] == "-"


def test_only_what_was_looked_at_and_good_is_marked_so(tmp_path: Path) -> None:
    guard = Guard(tmp_path, rules(patience=9))
    guard.judge(0, {"knn": 50.0}, last=False)
    assert guard.saving(0)["good"]
    assert not guard.saving(1)["good"]  # saved at a signal, without a look
    guard.judge(2, {"knn": 48.0}, last=False)
    assert (guard.saving(2)["good"], guard.best_step) == (True, 0)
    guard.judge(4, {"knn": 30.0}, last=False)
    assert (guard.saving(4)["good"], guard.best_step) == (False, 0)
    again = Guard(tmp_path, rules())
    again.resume(json.loads(json.dumps(guard.saving(4))))
    assert (again.bad, again.best_step, again.start) == (1, 0, {"step": 0.0, "knn": 50.0})


def test_the_table() -> None:
    lines = table({"step": 0, "knn": 51.25, "rank": 30.0}, None, {"step": 40, "knn": 9.0, "rank": 2.0}).splitlines()
    assert lines[0].split("  ")[-1].strip() == "now (step 40)"
    assert [line.split() for line in lines[1:]] == [["k-NN,", "%", "51.2", "-", "9"], ["rank", "30", "-", "2"]]
    assert len({len(line) for line in lines}) == 1


def test_a_checkpoint_half_dropped_is_none(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the rewind removes files: what is left has no checkpoint's name, and the run goes on from step 2."""
    settings = (ABSURD, REWIND, "init.guard_lr_factor=1e-5", "init.guard_patience=2")

    remove = shutil.rmtree

    def killed(path: Path, **kwargs: Any) -> None:
        if path.name.startswith(".writing_dropped"):
            raise KeyboardInterrupt
        remove(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("quietvit.train.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(training_in(place, tmp_path, *settings))
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000000", "step_00000002"]
    assert run(training_in(place, tmp_path, *settings)).step == 8
    assert len(note(tmp_path)["rewinds"]) == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def two(rank: int, place: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for strategy in ("ddp", "fsdp"):
        settings = (ABSURD, REWIND, "init.guard_lr_factor=1e-5", f"parallel.strategy={strategy}")
        training = training_in(Path(place), Path(folder) / strategy, *settings)
        ends = gather_objects((run(training).step, training.guard.lr_factor if training.guard else 0.0))
        assert ends == [(8, 1e-5)] * 2
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_rest_forget_and_rewind_together(place: Path, tmp_path: Path) -> None:
    mp.spawn(two, (str(place), str(tmp_path)), 2)  # type: ignore[no-untyped-call]
    for strategy in ("ddp", "fsdp"):
        assert [r["to"] for r in note(tmp_path / strategy)["rewinds"]] == [2]
        assert int(state_of(tmp_path / strategy)["optimizer.student.backbone.cls_token.step"]) == 6

"""A T2T-ViT through everything a ViT goes through: the job, live health, resume, export, evaluation, embedding."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from quietvit.backbones import BACKBONES
from quietvit.build import build_backbone, build_method
from quietvit.config import resolve
from quietvit.config.load import load_config
from quietvit.config.schema import ModelConfig
from quietvit.nn.tokens_to_token import SOFT_SPLITS, STEM_ATTENTION
from quietvit.optim import parameter_groups
from quietvit.train import checkpoint
from quietvit.train.loop import Training, run
from quietvit.train.metrics import read_metrics
from quietvit.weights import load, random_like
from quietvit.weights.native import weights_hash
from quietvit_eval.evaluate import DataSpec, evaluate
from quietvit_launch.cli import main
from quietvit_launch.job import Job, run_job
from tiny_run import make_images, tiny_training

STEPS = 6
# Registers, masks with their loss, and stochastic depth are on; labels of the embedded data set feed the live k-NN.
SETTINGS = (
    "model.backbone=t2t_vit", "model.size=nano", "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
    "model.stem.token_dim=16", "model.num_registers=3", "model.image_size=32", "model.layer_scale=0.1",
    "model.drop_path=0.2", "data.options.num_images=40", "data.options.image_size=32", "crops.global_size=32",
    "crops.local_size=16", "crops.num_local=2", "objective.ibot_weight=1.0", "objective.head.num_prototypes=24",
    "objective.head.hidden_dim=32", f"train.steps={STEPS}", "train.batch_size=8", "train.threads=1", "train.seed=11",
    "train.device=cpu", "train.precision=fp32", "health.every=3", "health.images=8", "health.bank=16", "health.size=32",
    "checkpoint.every=3",
)  # fmt: skip


def train(out: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert run_job(Job("quickstart", SETTINGS, str(out)), console) == 0
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tensors(run_dir: Path) -> dict[str, Tensor]:
    found = checkpoint.find(run_dir)
    assert found is not None
    assert found.step == STEPS
    return checkpoint.read_whole(found)


def curves(run_dir: Path) -> list[dict[str, object]]:
    """Losses, gradient norms and health figures, without the times."""
    kept = ("step", "loss/", "grad_norm/", "health/")
    return [{k: v for k, v in r.items() if k.startswith(kept)} for r in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("t2t") / "run"
    assert "model: t2t_vit nano, patch 8, 3 registers" in train(run_dir)
    return run_dir


# ---- one run, and what is done with it


def test_every_loss_and_every_health_figure_is_there(trained: Path) -> None:
    records = curves(trained)
    steps = [r for r in records if "loss/total" in r]
    assert [r["step"] for r in steps] == [*range(1, STEPS + 1)]
    for name in ("total", "dino_local", "dino_global", "ibot", "koleo"):
        assert all(isinstance(r[f"loss/{name}"], float) for r in steps), name
    assert any(r["loss/ibot"] for r in steps)  # some crops were masked
    looks = [r for r in records if "health/rank" in r]
    assert [r["step"] for r in looks] == [0, 3, 6]
    assert all(isinstance(v, float) and math.isfinite(v) for r in looks for k, v in r.items() if k != "step")
    assert {"health/knn", "health/rank"} <= set(looks[0])


def test_resumed_from_the_middle_it_is_the_same_run(trained: Path, tmp_path: Path) -> None:
    cut = tmp_path / "run"
    shutil.copytree(trained, cut)
    shutil.rmtree(cut / "checkpoints" / f"step_{STEPS:08d}")  # as if it had been killed before that was written
    assert f"from step 3 of {STEPS}" in train(cut)
    before, after = tensors(trained), tensors(cut)
    assert before.keys() == after.keys()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    assert curves(cut) == curves(trained)


def test_random_features_are_drawn_once_and_stay(trained: Path) -> None:
    """They are buffers: the student's is the teacher's, no moment belongs to them, a resumed run has them."""
    stored = tensors(trained)
    start = build_backbone_of_the_run()
    names = [k for k, _ in start.named_buffers()]
    assert names == ["tokens_to_token.attention1.w"]  # one stage: patches of 8
    for name in names:
        for part in ("student", "teacher"):
            assert torch.equal(stored[f"method.{part}.backbone.{name}"], start.get_buffer(name)), part
    assert [k for k in stored if k.startswith("optimizer.") and ".w." in k] == []
    moved = stored["method.student.backbone.tokens_to_token.attention1.kqv.weight"]
    assert not torch.equal(moved, start.get_parameter("tokens_to_token.attention1.kqv.weight"))


def build_backbone_of_the_run() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)  # as quietvit.build does before it makes the method
        backbone = build_method(load_config("quickstart", SETTINGS)).student["backbone"]
    assert isinstance(backbone, torch.nn.Module)
    return backbone


def test_the_random_control_is_the_very_start(trained: Path) -> None:
    model = load(trained, device="cpu")
    control = random_like(model)
    assert control.meta["provenance"] == {"random_init": True, "seed": 11, "seed_of_run": True}
    assert weights_hash(control.backbone) == weights_hash(build_backbone_of_the_run())
    assert weights_hash(control.backbone) != weights_hash(model.backbone)
    other = random_like(model, seed=12).backbone
    assert not torch.equal(other.tokens_to_token.attention1.w, model.backbone.tokens_to_token.attention1.w)  # type: ignore[union-attr]


def test_an_export_is_the_model_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "teacher.json").read_text())["backbone"]["name"] == "t2t_vit"
    assert "t2t_vit backbone" in (tmp_path / "out" / "README.md").read_text()
    a, b = load(trained, device="cpu"), load(tmp_path / "out", device="cpu")
    assert (a.stride, a.image_size, a.embed_dim, a.num_blocks) == (8, 32, 32, 2)
    assert weights_hash(a.backbone) == weights_hash(b.backbone)
    images = torch.randn(2, 3, 40, 24)
    for x, y in zip(a.last_blocks(images, 2), b.last_blocks(images, 2), strict=True):
        assert x.patches.shape == (2, 5, 3, 32)
        assert x.registers.shape == (2, 3, 32)
        for part in ("cls", "registers", "patches"):
            assert torch.equal(getattr(x, part), getattr(y, part)), part
    teacher = {k.removeprefix("method.teacher.backbone."): v for k, v in tensors(trained).items()}
    assert all(torch.equal(v, teacher[k]) for k, v in b.backbone.state_dict().items())


def test_it_is_scored_beside_its_random_control(trained: Path) -> None:
    data = DataSpec("scenes", options={"num_images": 60, "image_size": 32})
    cards = evaluate(
        trained, ["knn", "linear"], data, random_init=True, options={"linear": {"steps": 10, "batch_size": 16}},
        device="cpu", limit_test=20,
    )  # fmt: skip
    assert [(c.subject, c.task) for c in cards] == list(itertools.product(("model", "random-init"), ("knn", "linear")))
    assert all(0 <= c.scores[c.main] <= 1 for c in cards)
    assert cards[0].model["backbone"]["name"] == "t2t_vit"
    assert cards[0].protocol["image_size"] == 32
    assert cards[2].model["hash"] == weights_hash(build_backbone_of_the_run())


def test_a_folder_is_embedded(trained: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 3, side=32)
    out = tmp_path / "out.npz"
    assert main(["embed", str(images), "--model", str(trained), "--out", str(out), "--device", "cpu"]) == 0
    with np.load(out, allow_pickle=False) as stored:
        assert stored["names"].tolist() == ["000.png", "001.png", "002.png"]
        assert stored["embeddings"].shape == (3, 32)
        assert np.isfinite(stored["embeddings"]).all()
        assert np.ptp(stored["embeddings"], axis=0).max() > 0


# ---- every variant takes a step


VARIANTS: dict[str, tuple[str, ...]] = {
    "performer": (),
    "performer_official": ("model.stem.attention=performer_official",),
    "transformer": ("model.size=t-14", "model.stem.token_dim=16"),
    "recompute": ("model.stem.recompute=true",),
    "bf16": ("train.precision=bf16", "train.accumulate=2"),
    "patches of 16": ("model.patch_size=16", "crops.local_size=32"),
    "wide": ("model.size=14-wide",),
    "split heads": ("model.size=14-resnext", "model.num_heads=16"),
    "se": ("model.size=14-se",),
    "ghost": ("model.size=16-ghost",),
    "dense": ("model.size=dense", "model.embed_dim=64", "model.depth=22", "model.num_heads=8"),
}


def t2t_training(run_dir: Path, images: Path, *settings: str) -> Training:
    """tests/tiny.yaml (stochastic depth 0.2, masks, registers) with the other backbone."""
    given = ("model.backbone=t2t_vit", "model.size=7", "health.images=0", *settings)
    return tiny_training(run_dir, images, *given)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images", 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_every_variant(images: Path, tmp_path: Path, variant: str) -> None:
    settings = ("train.steps=1", "optim.warmup=0", "optim.freeze_last_layer=0", "teacher.momentum=[0.75,0.75]")
    training = t2t_training(tmp_path, images, *settings, *VARIANTS[variant])
    student, teacher = training.method.student, training.method.teacher
    assert isinstance(student, torch.nn.Module)
    assert isinstance(teacher, torch.nn.Module)
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    buffers = {k: v.clone() for k, v in student.named_buffers()}
    assert run(training).step == 1
    [step] = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss/total" in r]
    assert "skipped" not in step
    assert all(isinstance(v, float) and math.isfinite(v) for k, v in step.items() if k.startswith(("loss/", "grad")))
    for (name, now), new in zip(teacher.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * before[name] + 0.25 * new, atol=1e-7, rtol=1e-5)
    idle = [k for k, v in student.named_parameters() if v.requires_grad and torch.equal(v, before[k])]
    assert idle == []  # all parts of the variant learn
    for part in (student, teacher):
        assert all(torch.equal(v, buffers[k]) for k, v in part.named_buffers())
    assert len(buffers) == (0 if variant == "transformer" else 2 if variant == "patches of 16" else 1)


def test_recomputing_the_stem_changes_no_number(images: Path, tmp_path: Path) -> None:
    stored = []
    for recompute in ("false", "true"):
        folder = tmp_path / recompute
        run(t2t_training(folder, images, "train.steps=3", f"model.stem.recompute={recompute}"))
        found = checkpoint.find(folder)
        assert found is not None
        stored.append(checkpoint.read_whole(found))
    assert [k for k in stored[0] if not torch.equal(stored[0][k], stored[1][k])] == []


# ---- rates and decay of its parameters

ONE_LAYER = {"tokens_to_token": 0, "cls_token": 0, "mask_token": 0, "register_tokens": 0, "pos_embed": 0, "norm": -1}


# What a block of the variant has that others have not, so that no name goes by unseen.
PARTS: dict[str, tuple[str, ...]] = {
    "nano": ("tokens_to_token.attention1.kqv.weight",),
    "t-14": ("tokens_to_token.attention2.attn.qkv.weight",),
    "14-se": ("blocks.13.attn.se_layer.fc.0.weight",),
    "16-ghost": ("blocks.0.attn.cheap_operation_q.weight", "blocks.15.mlp.cheap_operation3.weight"),
    "dense": ("blocks.21.dense_linear.weight", "blocks.3.linear.weight"),
}


@pytest.mark.parametrize("size", PARTS)
@pytest.mark.parametrize("positions", ["learned", "sinusoid"])
def test_layer_decay(size: str, positions: str) -> None:
    with torch.device("meta"):
        model = BACKBONES["t2t_vit"](**{**BACKBONES["t2t_vit"].SIZES[size], "positions": positions, "num_classes": 7})
    model.head.requires_grad_(False)  # training is done without one
    groups = parameter_groups(
        {"backbone": model}, num_blocks=model.num_blocks, layer_decay=0.5, patch_embed_lr_mult=0.2, decay_tokens=True
    )
    found = {n.removeprefix("backbone."): (g["lr_mult"], g["wd_mult"]) for g in groups for n in g["names"]}
    assert set(PARTS[size]) <= set(found)
    assert set(found) == {k for k, p in model.named_parameters() if p.requires_grad}
    assert ("pos_embed" in found) == (positions == "learned")
    top = model.num_blocks + 1
    for name, (lr, decay) in found.items():
        first, *rest = name.split(".")
        layer = int(rest[0]) + 1 if first == "blocks" else ONE_LAYER[first] % (top + 1)
        assert lr == pytest.approx(0.5 ** (top - layer) * (0.2 if first == "tokens_to_token" else 1.0)), name
        assert decay == (0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0), name
    assert not [k for k in found if k.endswith(".w") or k.startswith("head")]


def test_no_supervised_head_is_trained() -> None:
    method = build_method(load_config("quickstart", SETTINGS))
    assert not [k for k, _ in method.named_parameters() if ".backbone.head." in k]


# ---- recipes, and what is got wrong


@pytest.mark.parametrize("recipe", ["quickstart", "cifar10", "own_images", "imagenet_short"])
def test_two_settings_turn_a_recipe_into_one_for_t2t(recipe: str) -> None:
    size = "nano" if recipe in ("quickstart", "cifar10") else "14"
    config = load_config(recipe, ["model.backbone=t2t_vit", f"model.size={size}"])
    resolve.check(config)
    with torch.device("meta"):
        model = build_backbone(config)
    table = BACKBONES["t2t_vit"].SIZES[size]
    assert (model.embed_dim, model.num_blocks, model.num_registers) == (table["embed_dim"], table["depth"], 4)
    assert model.stride == config.model.patch_size


def test_what_the_check_knows_without_torch_is_what_the_stem_takes() -> None:
    assert resolve.STEM_ATTENTION == STEM_ATTENTION
    assert set(resolve.STEM_PATCHES) == set(SOFT_SPLITS)
    assert ModelConfig().patch_size in SOFT_SPLITS


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("own_images", ["model.backbone=t2t_vit"], ["size of t2t_vit 'small'", "known: nano, micro, 7, 10", "t-14"]),
        ("quickstart", ["model.backbone=t2t_vit", "model.size=t14"], ["'t14'; nearest: t-14, 14"]),
        ("quickstart", ["model.size=14"], ["unknown size of vit '14'; known: nano"]),
        ("quickstart", ["model.backbone=t2t"], ["unknown backbone 't2t'; nearest: t2t_vit"]),
        ("quickstart", ["model.backbone=t2t_vit", "model.stem.token_dim=33"], ["token_dim must be even"]),
        ("quickstart", ["model.backbone=t2t_vit", "model.size=dense", "model.depth=4"], ["set depth to 22, not 4"]),
    ],
)
def test_mistakes_that_the_backbone_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, settings: list[str], words: list[str]
) -> None:
    data = make_images(tmp_path / "images", 4)
    path = [f"data.path={data}"] if recipe == "own_images" else ["data.options.num_images=4"]
    small = ["train.batch_size=2", "train.threads=1", "train.device=cpu"]
    assert main(["train", recipe, *settings, *path, *small, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert [w for w in words if w not in message] == []
    assert not (tmp_path / "run").exists()

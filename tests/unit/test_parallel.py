"""What one process can tell of the engine: choices, recomputation, compiled blocks, a group for a shard of its own."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quietvit.config.load import ConfigError, load_config
from quietvit.config.resolve import check
from quietvit.train import checkpoint, parallel
from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from quietvit.train.parallel import parallelise, pick_strategy
from tiny_run import RECIPE, make_images, tiny_training

SHORT = ("train.steps=3", "health.images=6")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return trained(tmp_path_factory.mktemp("plain") / "run", images)


def trained(run_dir: Path, images: Path, *overrides: str) -> Path:
    run(tiny_training(run_dir, images, *SHORT, *overrides))
    return run_dir


def figures(run_dir: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss/", "grad_norm/", "health/")
    return [{k: v for k, v in r.items() if k.startswith(kept)} for r in read_metrics(run_dir / "metrics.jsonl")]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find(run_dir)
    assert found is not None
    return checkpoint.read_whole(found)


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """The same run; with tolerance 0 bit for bit. Stochastic depth is on: what is recomputed must draw alike."""
    for a, b in zip(figures(one), figures(other), strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if "qkv.bias" in name and tolerance:  # the keys' part has no gradient but rounding
            value, second[name] = (t.unflatten(0, (3, -1))[[0, 2]] if t.ndim else t for t in (value, second[name]))
        torch.testing.assert_close(second[name], value, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_number(plain: Path, images: Path, tmp_path: Path, kind: str) -> None:
    assert_close(plain, trained(tmp_path / "run", images, f"parallel.checkpointing={kind}"), 0.0)


def test_one_sharded_process_makes_its_group_and_takes_it_down(plain: Path, images: Path, tmp_path: Path) -> None:
    again = trained(tmp_path / "run", images, "parallel.strategy=fsdp")
    assert not torch.distributed.is_initialized()
    assert_close(plain, again, 0.0)
    assert figures(again) == figures(plain)


def test_the_group_is_taken_down_after_an_error_too(images: Path, tmp_path: Path) -> None:
    training = tiny_training(tmp_path / "run", images, *SHORT, "parallel.strategy=fsdp")
    assert torch.distributed.is_initialized()

    def failing(start: int) -> Any:
        raise OSError("no data")

    training.batches = failing
    with pytest.raises(OSError, match="no data"):
        run(training)
    assert not torch.distributed.is_initialized()


class Products(TorchDispatchMode):
    """Counts the matrix products and the attentions among what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def work_of_backward(kind: str) -> Counter[str]:
    """What the backward pass of a nano model computes under a kind of recomputation."""
    from quietvit.backbones import make_backbone

    torch.manual_seed(0)
    model = make_backbone("vit", size="nano", patch_size=8, image_size=32, depth=2)
    parts = nn.ModuleDict({"backbone": model})
    method = nn.ModuleDict({"student": parts, "teacher": parts})
    parallelise(
        method, strategy="none", checkpointing=kind, compile_blocks=False, device=torch.device("cpu"),
        precision=torch.float32,
    )  # fmt: skip
    [features] = model([torch.randn(2, 3, 32, 32)], [None])
    with Products() as counted:
        features.cls.square().sum().backward()
    return counted.seen


def test_what_is_computed_again() -> None:
    none, selective, full = (work_of_backward(kind) for kind in ("none", "selective", "full"))
    forward = {"native_layer_norm": 4, "addmm": 8}  # two norms and four products in each of two blocks
    assert none["native_layer_norm"] == 0
    for name, calls in forward.items():
        assert full[name] - none[name] == calls
    assert selective["native_layer_norm"] == 4
    assert selective["addmm"] == none["addmm"]
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert (none[flash], selective[flash], full[flash]) == (0, 0, 2)


@pytest.mark.slow
def test_compiled_blocks(plain: Path, images: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and none is installed")
    calm = ("model.drop_path=0.0",)  # a compiled block draws other random numbers
    one = trained(tmp_path / "eager", images, *calm)
    other = trained(tmp_path / "compiled", images, *calm, "parallel.compile=true")
    assert_close(one, other, 1e-5)


# ---- choices


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.strategy=zero", "parallel.strategy='zero': choose auto, none, ddp, fsdp"),
        ("parallel.checkpointing=some", "parallel.checkpointing='some': choose none, selective, full"),
        ("parallel.timeout=0", "parallel.timeout=0.0: seconds, more than 0"),
        ("parallel.timeout=.nan", "parallel.timeout=nan: seconds, more than 0"),
    ],
)
def test_wrong_settings_are_answered_at_once(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(load_config(str(RECIPE), ["data.path=.", setting]))
    assert message in str(error.value)


def test_settings_and_engine_know_the_same_choices() -> None:
    for name in parallel.STRATEGIES:
        check(load_config(str(RECIPE), ["data.path=.", f"parallel.strategy={name}"]))
    for name in parallel.CHECKPOINTING:
        check(load_config(str(RECIPE), ["data.path=.", f"parallel.checkpointing={name}"]))


def test_strategy_by_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [pick_strategy(name) for name in parallel.STRATEGIES] == ["none", "none", "none", "fsdp"]
    monkeypatch.setattr(parallel.dist, "world_size", lambda: 2)
    assert [pick_strategy(name) for name in ("auto", "ddp", "fsdp")] == ["ddp", "ddp", "fsdp"]
    with pytest.raises(ValueError, match=r"parallel\.strategy=none, but 2 processes run: choose ddp, fsdp or auto"):
        pick_strategy("none")
    with pytest.raises(ValueError, match="choose auto, none, ddp, fsdp"):
        pick_strategy("zero")


def test_a_batch_that_processes_cannot_share(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietvit.build.dist.world_size", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"train\.batch_size=8 cannot be shared evenly by 3 processes .* multiple of 3"
    ):
        tiny_training(tmp_path, images, "parallel.strategy=ddp")

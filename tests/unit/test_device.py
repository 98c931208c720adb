"""Device, precision and memory: what "auto" picks, and batches that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from quietvit.backbones import Trunk, make_backbone
from quietvit.build import step_shapes
from quietvit.config.load import load_config
from quietvit.config.schema import CropsConfig, ModelConfig, RunConfig
from quietvit.train import device as device_module
from quietvit.train.device import (
    GIB,
    Shapes,
    fitting_batch,
    peak_memory,
    pick_device,
    pick_precision,
    step_memory,
)
from tiny_run import make_images, tiny_training

CPU = torch.device("cpu")
# ViT-S/16 with the short recipe's crops and head.
SMALL = Shapes(
    parameters=22_000_000 + 22_000_000,
    embed_dim=384,
    depth=12,
    ffn_values=2 * 1536,
    stem_values=0,
    global_tokens=201,
    local_tokens=41,
    num_local=8,
    masked_per_image=58.8,
    prototypes=65536,
    patch_prototypes=65536,
)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "no CUDA device.*use cpu or auto"), ("cuda:1", "no CUDA"), ("mps", "no MPS"), ("gpu", "choose auto")],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pick_device(name)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f"}, torch.float32),  # bf16 by emulation is many times slower
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_auto_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: torch.dtype) -> None:
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: flags)
    assert pick_precision("auto", CPU) is expected
    assert pick_precision("fp32", CPU) is torch.float32
    assert pick_precision("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_precision_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda")) is expected


def test_auto_precision_on_mps_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: {"avx512_bf16"})
    assert pick_precision("auto", torch.device("mps")) is torch.float32


def test_peak_memory_sees_what_was_held() -> None:
    before = peak_memory(CPU)
    held = torch.ones(64 * 1024 * 1024)  # 256 MiB, every page touched
    del held
    assert peak_memory(CPU) >= max(before, 256 * 1024**2)
    assert peak_memory(CPU) < 256 * GIB  # bytes, not KiB times too much


@given(batch=st.integers(1, 500), more=st.integers(1, 50), size=st.sampled_from([2, 4]), parts=st.integers(1, 8))
def test_memory_grows_with_everything(batch: int, more: int, size: int, parts: int) -> None:
    def need(shapes: Shapes = SMALL, batch: int = batch, size: int = size, parts: int = parts) -> int:
        return step_memory(shapes, batch, bytes_per_value=size, accumulate=parts)

    assert need(batch=batch + more) > need()
    assert need(parts=parts + more) > need()  # targets of all micro-batches are held at once
    assert need(parts=2 * parts) < need(batch=2 * batch)  # or accumulation would be good for nothing
    assert need(size=4) >= need(size=2)
    parts_of_it = ("parameters", "embed_dim", "depth", "ffn_values", "stem_values", "global_tokens")
    for field in (*parts_of_it, "prototypes", "patch_prototypes"):
        assert need(replace(SMALL, **{field: getattr(SMALL, field) + more})) > need(), field
    assert need() > 20 * SMALL.parameters


@given(free=st.floats(0.1, 400), accumulate=st.integers(1, 9), most=st.integers(2, 256), size=st.sampled_from([2, 4]))
def test_a_batch_that_fits_and_none_greater(free: float, accumulate: int, most: int, size: int) -> None:
    room = int(free * GIB)

    def fits(batch: int) -> bool:
        micro = batch // accumulate
        return step_memory(SMALL, micro, bytes_per_value=size, accumulate=accumulate) < 0.6 * room

    try:
        batch = fitting_batch(SMALL, room, bytes_per_value=size, accumulate=accumulate, most=most)
    except ValueError:
        assert 2 * accumulate > most or not fits(2 * accumulate)
        return
    micro = batch // accumulate
    assert batch == micro * accumulate <= most  # what the loop can split
    assert micro >= 2
    assert micro & (micro - 1) == 0
    assert fits(batch)
    assert 2 * batch > most or not fits(2 * batch)


def test_when_nothing_fits_it_says_what_would_help() -> None:
    with pytest.raises(ValueError, match=r"a batch of 2 images needs about \d\.\d GiB and 1\.0 GiB are free.*smaller"):
        fitting_batch(SMALL, GIB, bytes_per_value=4, accumulate=1)
    with pytest.raises(ValueError, match=r"a batch of 8 images needs"):
        fitting_batch(SMALL, GIB, bytes_per_value=4, accumulate=4)
    with pytest.raises(ValueError, match=r"4 micro-batches of at least 2 images make a batch of 8, and at most 5"):
        fitting_batch(SMALL, 400 * GIB, bytes_per_value=4, accumulate=4, most=5)


@pytest.mark.parametrize(("ffn", "linears"), [("mlp", ("fc1", "fc2")), ("swiglu", ("w12", "w3"))])
def test_shapes_are_those_of_the_model(tmp_path: Path, ffn: str, linears: tuple[str, str]) -> None:
    overrides = [f"model.ffn={ffn}", "objective.separate_heads=true", "objective.ibot_head.num_prototypes=12"]
    training = tiny_training(tmp_path / "run", make_images(tmp_path / "images"), *overrides, "health.images=0")
    student = training.method.student
    assert isinstance(student, nn.ModuleDict)
    shapes = step_shapes(load_config(str(Path(__file__).parents[1] / "tiny.yaml"), overrides), student)
    batch = next(training.batches(0))
    tokens = []
    student["backbone"].blocks[0].register_forward_pre_hook(lambda block, args: tokens.extend(args[1]))  # type: ignore[union-attr, index]
    widths = {}
    for name in linears:
        layer = getattr(student["backbone"].blocks[0].mlp, name)  # type: ignore[union-attr, index]
        widths[name] = (layer.in_features, layer.out_features)
    training.method.study(batch, training.method.teach([batch], temp=0.05)[0])  # type: ignore[operator]
    assert tokens == [(16, shapes.global_tokens), (8 * shapes.num_local, shapes.local_tokens)]
    first, second = (widths[name] for name in linears)
    gate = 2 * second[0] if ffn == "swiglu" else 0  # SiLU(a) and its product with b are kept besides a and b
    assert shapes.ffn_values == first[1] + (gate or second[0])
    assert shapes.parameters == sum(p.numel() for p in student.parameters())
    assert (shapes.prototypes, shapes.patch_prototypes) == (24, 12)
    assert shapes.masked_per_image * 8 == pytest.approx(len(batch.mask_indices), rel=0.3)


# ---- the estimate against what autograd keeps


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `forward`, the parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []  # holds them, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
@pytest.mark.parametrize("attention", ["performer", "performer_official", "transformer"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_kept_by_a_tokens_to_token_stem(attention: str, patch_size: int, recompute: bool, masked: bool) -> None:
    model = make_backbone(
        "t2t_vit", embed_dim=32, depth=1, num_heads=2, patch_size=patch_size, stem_attention=attention,
        recompute=recompute,
    )  # fmt: skip
    images = torch.randn(4, 3, 96, 96)
    mask = torch.rand(4, (96 // patch_size) ** 2) < 0.3 if masked else None
    found = kept_bytes(model, lambda: model.tokenize(images, mask)[0])
    assert 4 * 4 * model.stem_values(96) == pytest.approx(found, rel=0.15)
    larger = 4 * 4 * model.stem_values(192)
    assert larger == pytest.approx(4 * found, rel=0.15)  # linear in the pixels: no attention matrix is kept


@pytest.mark.parametrize("attention", ["performer", "transformer"])
def test_a_stem_in_half_precision_keeps_at_least_what_is_estimated(attention: str) -> None:
    """The estimate takes all of it for bf16; norms and the Performer keep parts in fp32."""
    model = make_backbone("t2t_vit", size="14", depth=1, stem_attention=attention)
    images = torch.randn(4, 3, 128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        found = kept_bytes(model, lambda: model.tokenize(images, None)[0])
    assert 0.7 * found < 2 * 4 * model.stem_values(128) < found


def test_a_patch_stem_is_not_counted() -> None:
    assert make_backbone("vit", size="nano").stem_values(224) == 0


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"depth": 4},
    "se": {"depth": 4, "attention_layer": "se"},
    "ghost": {"depth": 4, "attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0},
    "dense": {"depth": 8, "dense_groups": "3-4", "growth": 32, "mlp_ratio": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stem", ["vit", "t2t_vit"])
def test_values_kept_by_a_whole_backbone(stem: str, variant: str) -> None:
    model: Trunk = make_backbone(stem, embed_dim=64, num_heads=2, patch_size=8, layer_scale=0.0, **VARIANTS[variant])
    images = torch.randn(4, 3, 96, 96)
    found = kept_bytes(model, lambda: model(images).cls) / 4
    config = RunConfig(model=ModelConfig(patch_size=8), crops=CropsConfig(global_size=96, num_local=0))
    shapes = replace(step_shapes(config, nn.ModuleDict({"backbone": model})), prototypes=0, patch_prototypes=0)
    assert shapes.global_tokens == 144 + 5
    teacher = replace(shapes, depth=0, stem_values=0)  # one block's values of both crops stand for the teacher
    estimate = (
        step_memory(shapes, 1, bytes_per_value=4) - step_memory(teacher, 1, bytes_per_value=4)
    ) / 2  # two global crops
    assert estimate == pytest.approx(found, rel=0.25)


def test_local_crops_pass_the_stem_too() -> None:
    model = make_backbone("t2t_vit", size="nano", patch_size=8)
    student = nn.ModuleDict({"backbone": model})

    def stem_values(num_local: int) -> int:
        crops = CropsConfig(global_size=96, local_size=48, num_local=num_local)
        return step_shapes(RunConfig(model=ModelConfig(patch_size=8), crops=crops), student).stem_values

    assert stem_values(0) == 2 * model.stem_values(96)
    assert stem_values(5) - stem_values(0) == 5 * model.stem_values(48)

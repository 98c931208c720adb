"""`quietvit.load`: every layer and kind against the blocks themselves, and what happens to a frozen module."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn

import quietvit
from quietvit.backbones import make_backbone
from quietvit.contracts import Extractor, Features
from quietvit.data.center import center_view
from quietvit.data.decode import UnreadableImage, decode_file
from quietvit.weights import load, random_like, save_teacher
from quietvit.weights.extractor import BackboneExtractor
from quietvit.weights.reader import FeatureReader
from quietvit_eval.evaluate import DataSpec, evaluate

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit", "patch_size": 8, "num_registers": 2},
    "offset": {"name": "vit", "patch_size": 8, "num_registers": 0, "pos_interpolation": "offset"},
    "t2t": {"name": "t2t_vit", "token_dim": 16, "num_registers": 3},
    "dense": {"name": "t2t_vit", "token_dim": 16, "num_registers": 2, "dense_groups": "2-2", "growth": 8, "depth": 5},
}


def make(which: str = "vit", **changes: Any) -> Any:
    arguments = {"embed_dim": 32, "depth": 5, "num_heads": 2, "image_size": 32, **MODELS[which], **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = make_backbone(arguments.pop("name"), **arguments)
        with torch.no_grad():  # away from starting values: registers and layer scale would hardly show
            for parameter in backbone.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        which: save_teacher(
            folder / which, make(which), mean=MEAN, std=STD, image_size=32, provenance={"step": 3, "seed": 5},
            backbone_name=MODELS[which]["name"],
        )
        for which in MODELS
    }  # fmt: skip


def images(height: int = 32, width: int = 48, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width + batch))


def states(backbone: Any, x: Tensor) -> list[Tensor]:
    """What every block puts out, [B T D], caught by hooks."""
    caught: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: caught.append(out)) for block in backbone.blocks]
    with torch.no_grad():
        backbone(x)
    for hook in hooks:
        hook.remove()
    return [state.reshape(len(x), -1, state.shape[-1]) for state in caught]


def expected(backbone: Any, state: Tensor, kind: str, *, norm: bool, x: Tensor) -> Tensor:
    """One value by hand: tokens cut by position, the patch grid filled cell by cell."""
    if norm:
        state = nn.functional.layer_norm(
            state,
            state.shape[-1:],
            backbone.norm.weight[: state.shape[-1]],
            backbone.norm.bias[: state.shape[-1]],
            1e-6,
        ).detach()
    full = state.new_zeros(*state.shape[:2], backbone.embed_dim)
    full[..., : state.shape[-1]] = state
    registers = backbone.num_registers
    if kind == "cls":
        return full[:, 0]
    if kind == "registers":
        return full[:, 1 : 1 + registers]
    rows, columns = x.shape[2] // backbone.stride, x.shape[3] // backbone.stride
    dense = torch.full((len(x), backbone.embed_dim, rows, columns), torch.nan)
    for row in range(rows):
        for column in range(columns):
            dense[:, :, row, column] = full[:, 1 + registers + row * columns + column]
    return dense


# ---- values


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("which", MODELS)
def test_every_layer_and_kind_is_what_the_blocks_put_out(files: dict[str, Path], which: str, norm: bool) -> None:
    backbone, x = make(which), images()
    raw = states(backbone, x)
    first = backbone.first_readable_block
    assert first == (3 if which == "dense" else 0)
    kinds = ("cls", "patches") + (("registers",) if backbone.num_registers else ())
    layers = list(range(first, 5))
    for kind in kinds:
        read = quietvit.load(files[which], "cpu", layers=layers, kind=kind, norm=norm)
        for layer, value in zip(layers, read(x), strict=True):
            torch.testing.assert_close(
                value, expected(backbone, raw[layer], kind, norm=norm, x=x), atol=2e-6, rtol=1e-5
            )
            assert value.is_contiguous() or kind != "patches"
    last = quietvit.load(files[which], "cpu", kind="cls", norm=norm)(x)
    torch.testing.assert_close(last, expected(backbone, raw[-1], "cls", norm=norm, x=x), atol=2e-6, rtol=1e-5)


def test_layers_come_in_the_order_asked_for(files: dict[str, Path]) -> None:
    x = images()
    single = [quietvit.load(files["vit"], "cpu", layers=i, kind="cls")(x) for i in range(5)]
    asked = quietvit.load(files["vit"], "cpu", layers=[3, -1, 0, 3, -5], kind="cls")(x)
    assert [next(i for i, one in enumerate(single) if torch.allclose(one, v, atol=1e-6)) for v in asked] == [
        3,
        4,
        0,
        3,
        0,
    ]
    (only,) = quietvit.load(files["vit"], "cpu", layers=(-2,), kind="cls")(x)  # a sequence of one is a list of one
    assert torch.equal(only, single[3])
    assert torch.equal(quietvit.load(files["vit"], "cpu", layers=np.int64(3), kind="cls")(x), single[3])
    ranged = quietvit.load(files["vit"], "cpu", layers=range(2, 4), kind="cls")(x)
    assert [torch.allclose(v, single[i], atol=1e-6) for v, i in zip(ranged, (2, 3), strict=True)] == [True, True]


def test_all_keeps_channels_last_and_patches_puts_them_first(files: dict[str, Path]) -> None:
    x = images()
    features = quietvit.load(files["vit"], "cpu", layers=2)(x)
    assert isinstance(features, Features)
    dense = quietvit.load(files["vit"], "cpu", layers=2, kind="patches")(x)
    assert features.patches.shape == (2, 4, 6, 32)
    assert dense.shape == (2, 32, 4, 6)
    assert torch.equal(dense.permute(0, 2, 3, 1), features.patches)
    several = quietvit.load(files["vit"], "cpu", layers=[2, 4])(x)
    assert [f.patches.shape for f in several] == [(2, 4, 6, 32)] * 2
    assert torch.equal(several[0].cls, features.cls)


def test_registers_never_leak_into_dense_maps(files: dict[str, Path]) -> None:
    """A token that no patch may hold is written over the registers behind the last block."""
    for which in ("vit", "t2t"):
        read = quietvit.load(files[which], "cpu", kind="patches", norm=False)
        x, registers = images(), read.meta["backbone"]["arguments"]["num_registers"]
        before = read(x)

        def mark(_module: nn.Module, _inputs: Any, out: Tensor, registers: int = registers) -> Tensor:
            tokens = out.reshape(2, -1, out.shape[-1]).clone()
            tokens[:, : 1 + registers] = 1e4
            return tokens.reshape(out.shape)

        read.backbone.blocks[-1].register_forward_hook(mark)  # type: ignore[index]
        after = read(x)
        assert torch.equal(before, after)
        assert after.shape[2] * after.shape[3] == (32 // read.stride) * (48 // read.stride)
        everything = quietvit.load(files[which], "cpu", norm=False)
        everything.backbone.blocks[-1].register_forward_hook(mark)  # type: ignore[index]
        assert bool((everything(x).registers == 1e4).all())  # the mark is where registers are read


# ---- the default call is the house's extractor


def test_the_default_call_is_an_extractor(files: dict[str, Path]) -> None:
    read, house, x = quietvit.load(files["vit"], "cpu"), load(files["vit"], "cpu"), images()
    assert isinstance(read, FeatureReader)
    assert isinstance(read, BackboneExtractor)
    assert isinstance(read, Extractor)
    assert (read.mean, read.std, read.image_size, read.stride, read.embed_dim) == (MEAN, STD, 32, 8, 32)
    got, want = read(x), house(x)
    assert torch.equal(got.cls, want.cls)
    assert torch.equal(got.registers, want.registers)
    assert torch.equal(got.patches, want.patches)
    for one, other in zip(read.last_blocks(x, 3), house.last_blocks(x, 3), strict=True):
        assert torch.equal(one.patches, other.patches)
    assert read.identity() == house.identity()
    assert random_like(read).identity() == random_like(house).identity()
    cls_only = quietvit.load(files["vit"], "cpu", kind="cls", layers=1)
    assert torch.equal(cls_only.last_blocks(x, 1)[0].patches, want.patches)  # whatever is read


def test_evaluation_takes_a_reader_as_it_takes_a_path(files: dict[str, Path], tmp_path: Path) -> None:
    data = DataSpec("scenes", test_split="test", options={"num_images": 40})
    cards = [
        evaluate(model, ["knn"], data, random_init=True, device="cpu", feature_cache=tmp_path)
        for model in (files["vit"], quietvit.load(files["vit"], "cpu"))
    ]
    assert [c.scores for c in cards[0]] == [c.scores for c in cards[1]]
    assert [c.subject for c in cards[1]] == ["model", "random-init"]


def test_class_scores_of_a_head(tmp_path: Path) -> None:
    backbone, x = make("t2t", num_classes=7), images()
    file = save_teacher(tmp_path, backbone, mean=MEAN, std=STD, image_size=32, provenance={}, backbone_name="t2t_vit")
    with torch.no_grad():
        want = backbone.head(backbone(x).cls)
    for reading in ({}, {"kind": "patches", "layers": [1, 2]}):
        read = quietvit.load(file, "cpu", **reading)
        assert read.num_classes == 7
        torch.testing.assert_close(read.logits(x), want)


@pytest.mark.slow
@pytest.mark.timeout(900)  # without a cache of mypy's, it reads all of torch first
def test_types_follow_layers_and_kind(tmp_path: Path) -> None:
    code = """
import quietvit
from torch import Tensor
images: Tensor
reveal_type(quietvit.load("a")(images))
reveal_type(quietvit.load("a", layers=3, kind="cls")(images))
reveal_type(quietvit.load("a", kind="patches", norm=False)(images))
reveal_type(quietvit.load("a", layers=[3], kind="registers")(images))
reveal_type(quietvit.load("a", layers=[3, 4])(images))
kind: str
reveal_type(quietvit.load("a", kind=kind)(images))
quietvit.load("a", layers=3, kind="cls")(images).patches
"""
    file = tmp_path / "typed.py"
    file.write_text(code)
    words = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--follow-imports=silent", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    told = [
        line.split("note: Revealed type is ")[1].strip('"') for line in done.stdout.splitlines() if "Reveal" in line
    ]
    tensor, features = "torch._tensor.Tensor", "quietvit.contracts.Features"
    assert told == [features, tensor, tensor, f"list[{tensor}]", f"list[{features}]", "Any"], done.stdout
    assert '"Tensor" has no attribute "patches"' in done.stdout


# ---- precision and compilation


@pytest.mark.parametrize("which", ["vit", "t2t"])
def test_bf16_is_near_fp32_and_comes_as_fp32(files: dict[str, Path], which: str) -> None:
    x, exact = images(), quietvit.load(files[which], "cpu", layers=[1, 4])(images())
    read = quietvit.load(files[which], "cpu", layers=[1, 4], bf16=True)
    assert read.identity()["precision"] == "bf16"
    for near, want in zip(read(x), exact, strict=True):
        for name in ("cls", "registers", "patches"):
            a, b = getattr(near, name), getattr(want, name)
            assert a.dtype == torch.float32
            assert not torch.equal(a, b)  # it did run in bf16
            assert float((a - b).norm() / b.norm()) < 0.02  # bf16 keeps 8 bits: steps of 0.4 %, over five blocks


@pytest.mark.parametrize(("cast", "share"), [("bfloat16", 0.05), ("half", 0.005), ("double", 1e-6)])
@pytest.mark.parametrize("which", ["vit", "t2t"])
def test_cast_weights_still_read_in_fp32(files: dict[str, Path], which: str, cast: str, share: float) -> None:
    x, read = images(), quietvit.load(files[which], "cpu")
    want, before = read(x), read.identity()
    read = getattr(read, cast)()
    got = read(x)
    assert got.patches.dtype == torch.float32
    assert float((got.patches - want.patches).norm() / want.patches.norm()) < share
    after = read.identity()
    assert after["precision"] == f"{str(read.dtype).removeprefix('torch.')} weights"
    assert (after["hash"] == before["hash"]) is (cast == "double")


def test_every_method_that_takes_images_works_on_cast_weights(tmp_path: Path) -> None:
    backbone = make(num_classes=3)
    file = save_teacher(tmp_path, backbone, mean=MEAN, std=STD, image_size=32, provenance={})
    read = quietvit.load(file, "cpu").bfloat16()
    others = {"num": 2, "which": [1, 2], "norm": False}
    seen = []
    for name, method in inspect.getmembers(BackboneExtractor, inspect.isfunction):
        parameters = list(inspect.signature(method).parameters.values())[1:]
        if name.startswith("_") or not parameters or parameters[0].name != "images":
            continue
        asked = {p.name: others[p.name] for p in parameters[1:] if p.default is p.empty}
        assert getattr(read, name)(images(), **asked) is not None
        seen.append(name)
    assert {"last_blocks", "blocks", "logits", "attention_inputs"} <= set(seen)
    assert read.classify(read(images()).cls).dtype == torch.float32


@pytest.fixture
def graphs() -> Iterator[Any]:
    """How many graphs torch.compile has made since."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("which", "backend", "sizes"), [("vit", "aot_eager", 3), ("t2t", "eager", 1)])
def test_compiled_as_one_graph_for_any_batch(tmp_path: Path, which: str, backend: str, sizes: int, graphs: Any) -> None:
    name, model = MODELS[which]["name"], make(which, depth=2)
    save_teacher(tmp_path, model, mean=MEAN, std=STD, image_size=32, provenance={}, backbone_name=name)
    read = quietvit.load(tmp_path, "cpu", layers=[0, -1])
    compiled = torch.compile(read, fullgraph=True, backend=backend)
    counts = []
    for height, width in ((32, 32), (48, 64), (64, 80))[:sizes]:
        for batch in (2, 3, 5):
            x = images(height, width, batch)
            for got, want in zip(compiled(x), read(x), strict=True):
                torch.testing.assert_close(got.cls, want.cls, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(got.patches, want.patches, atol=1e-5, rtol=1e-5)
            counts.append(graphs())
    assert counts[1] == counts[2]  # the second batch size teaches it that they vary
    assert counts[3:] == counts[3:4] * len(counts[3:])  # the second image size likewise


def test_compiled_in_bf16(files: dict[str, Path], graphs: Any) -> None:
    read = quietvit.load(files["vit"], "cpu", kind="patches", bf16=True)
    got = torch.compile(read, fullgraph=True, backend="aot_eager")(images())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, read(images()), atol=0.05, rtol=0.05)
    assert graphs() == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(files: dict[str, Path]) -> None:
    want = quietvit.load(files["vit"], "cpu", kind="patches")(images())
    read = quietvit.load(files["vit"], "cpu", kind="patches").to("cuda")
    assert read.device.type == "cuda"
    torch.testing.assert_close(read(images()).cpu(), want, atol=1e-4, rtol=1e-4)
    half = quietvit.load(files["vit"], "cuda", kind="patches", bf16=True)(images())
    assert half.dtype == torch.float32
    assert float((half.cpu() - want).norm() / want.norm()) < 0.02


# ---- a frozen module


def test_frozen_but_usable_in_autograd(files: dict[str, Path]) -> None:
    read = quietvit.load(files["vit"], "cpu", kind="patches")
    assert not any(p.requires_grad for p in read.parameters())
    x = images().requires_grad_()
    head = nn.Conv2d(32, 2, 1)
    head(read(x)).sum().backward()
    assert head.weight.grad is not None
    assert x.grad is None  # nothing goes through the backbone
    assert not read(x).is_inference()
    with torch.inference_mode():
        assert read(x).is_inference()


def test_training_of_a_model_around_it_leaves_it_in_eval_mode(tmp_path: Path) -> None:
    file = save_teacher(tmp_path, make(drop_path=0.9), mean=MEAN, std=STD, image_size=32, provenance={})
    read, x = quietvit.load(file, "cpu", kind="patches"), images()
    want = read(x)
    model = nn.Sequential(read, nn.Dropout(0.0)).train()
    assert model.training
    assert read.training
    assert torch.equal(model(x), want)
    assert not any(module.training for module in read.backbone.modules())


def _in_child(read: Any, x: Tensor, out: Any) -> None:
    torch.set_num_threads(1)
    out.put(read(x).numpy())


def test_copies_pickles_and_processes_read_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    read, x = quietvit.load(files["t2t"], "cpu", layers=-2, kind="patches", norm=False), images()
    want = read(x)
    copied = copy.deepcopy(read)
    assert torch.equal(copied(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(read))(x), want)
    with torch.no_grad():
        copied.backbone.norm.bias.add_(1)  # type: ignore[union-attr,operator]
    assert copied.identity()["hash"] != read.identity()["hash"]
    queue = mp.get_context("fork").SimpleQueue()
    child = mp.get_context("fork").Process(target=_in_child, args=(read, x, queue))
    child.start()
    np.testing.assert_allclose(queue.get(), want.numpy(), atol=1e-6)
    child.join()
    saved = nn.ModuleDict({"read": read}).state_dict()
    again = nn.ModuleDict({"read": quietvit.load(files["t2t"], "cpu", layers=-2, kind="patches", norm=False)})
    again.load_state_dict(saved)
    assert repr(read).startswith("FeatureReader(\n  layers=3, kind='patches', norm=False")


def test_moving_is_followed(files: dict[str, Path]) -> None:
    read = quietvit.load(files["vit"], "cpu", kind="cls")
    assert nn.Sequential(read).to("meta")[0].device.type == read.device.type == "meta"


# ---- errors


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "patch"}, "unknown kind 'patch', nearest: patches; choose from cls, patches, registers, all"),
        ({"kind": "xyz"}, "unknown kind 'xyz'; choose from"),
        ({"layers": 5}, "layer 5 of a model with 5 blocks: use 0 to 4, or -1 to -5 from the end"),
        ({"layers": [0, -6]}, "layer -6 of a model with 5 blocks"),
        ({"layers": []}, r"None, an int or a sequence of ints, not \[\]"),
        ({"layers": "3"}, "None, an int or a sequence of ints, not '3'"),
        ({"layers": [1, 2.0]}, r"None, an int or a sequence of ints, not \[1, 2.0\]"),
        ({"layers": {1, 2}}, r"None, an int or a sequence of ints, not \{1, 2\}"),
        ({"layers": True}, "layer True of a model"),
    ],
)
def test_what_cannot_be_read_is_told_at_once(files: dict[str, Path], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quietvit.load(files["vit"], "cpu", **asked)


def test_registers_of_a_model_without_any(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"kind 'registers', but this model has none; 'all' gives .* \[B 0 D\]"):
        quietvit.load(files["offset"], "cpu", kind="registers")
    assert quietvit.load(files["offset"], "cpu")(images()).registers.shape == (2, 0, 32)


def test_lost_layers_of_a_dense_trunk(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"layer -3 of a dense trunk: .* before 3 are gone at the end; use 3 to 4"):
        quietvit.load(files["dense"], "cpu", layers=[-1, -3])


def test_images_that_do_not_fit(files: dict[str, Path]) -> None:
    read = quietvit.load(files["vit"], "cpu", kind="cls")
    with pytest.raises(ValueError, match="image width 47 is no multiple of 8; use 40 or 48"):
        read(torch.zeros(1, 3, 32, 47))
    with pytest.raises(ValueError, match=r"images must be float \[b 3 H W\], not torch.uint8"):
        read(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# ---- pictures


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_preprocess_is_the_view_of_evaluation(files: dict[str, Path], tmp_path: Path) -> None:
    read, pixels = quietvit.load(files["vit"], "cpu"), picture(50, 70)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = (center_view(pixels, 32).astype(np.float64) / 255 - MEAN) / STD
    for given in (pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        got = read.preprocess(given)
        assert got.shape == (1, 3, 32, 32)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got[0].permute(1, 2, 0), want, atol=1e-6)
    assert read(read.preprocess(pixels)).patches.shape == (1, 4, 4, 32)
    assert read.preprocess(pixels, size=64).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [
        (50, 70, 40, (40, 56)),
        (70, 50, 40, (56, 40)),
        (40, 47, 40, (40, 40)),
        (10, 1000, 32, (32, 3200)),
        (9, 9, 16, (16, 16)),
    ],
)
def test_whole_pictures_keep_their_shape(
    files: dict[str, Path], height: int, width: int, size: int, shape: tuple[int, int]
) -> None:
    read, pixels = quietvit.load(files["vit"], "cpu", kind="patches"), picture(height, width)
    x = read.preprocess(pixels, size=size, whole=True)
    assert x.shape == (1, 3, *shape)
    assert read(x).shape == (1, 32, shape[0] // 8, shape[1] // 8)
    if min(height, width) == size:  # nothing was resized: the cut is about the centre
        left = (width - shape[1]) // 2
        kept = pixels[:, left : left + shape[1]].astype(np.float64)
        np.testing.assert_allclose(x[0].permute(1, 2, 0), (kept / 255 - MEAN) / STD, atol=1e-6)


@pytest.mark.parametrize("kind", ["orientation", "transparent", "grey16", "cmyk"])
def test_pillow_images_are_decoded_as_files_are(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.jpg" if kind in ("orientation", "cmyk") else "a.png")
    image = Image.fromarray(picture(40, 48))
    if kind == "orientation":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    elif kind == "transparent":
        image.putalpha(Image.fromarray(picture(40, 48)[..., 0]))
        image.save(path)
    elif kind == "grey16":
        Image.fromarray(np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 30).save(path)
    else:
        image.convert("CMYK").save(path)
    read = quietvit.load(files["vit"], "cpu")
    with Image.open(path) as opened:
        got = read.preprocess(opened, size=40, whole=True)
    difference = float((got - read.preprocess(path, size=40, whole=True)).abs().max())
    assert difference < (0.1 if path.suffix == ".jpg" else 1e-6)  # OpenCV's and Pillow's JPEG differ by a grey level
    assert (got.shape[2:] == (48, 40)) is (kind == "orientation")
    assert decode_file(path, "a").shape[:2] == tuple(got.shape[2:])


def test_pictures_that_cannot_be_used(files: dict[str, Path], tmp_path: Path) -> None:
    read = quietvit.load(files["vit"], "cpu")
    for size in (30, 4, 0):
        with pytest.raises(
            ValueError, match=f"size {size} is no multiple of 8, the side of this model's patches; use "
        ):
            read.preprocess(picture(40, 40), size=size)
    for given, told in (
        (picture(40, 40).astype(np.float32), r"not float32 \[40, 40, 3\]"),
        (picture(40, 40)[..., 0], r"not uint8 \[40, 40\]"),
        (torch.zeros(3, 8, 8), r"not torch.float32 \[3, 8, 8\]"),
        (7, "not int"),
    ):
        with pytest.raises(ValueError, match=told):
            read.preprocess(given)  # type: ignore[arg-type]
    with pytest.raises(UnreadableImage, match="No such file"):
        read.preprocess(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UnreadableImage, match="not an image"):
        read.preprocess(tmp_path / "text.png")

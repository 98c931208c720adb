"""Broken, foreign and hostile weights: each gets a sentence; none runs code, takes all memory or passes silently."""

from __future__ import annotations

import json
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.weights import load, save_teacher
from quietvit.weights.native import METADATA_KEY


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 4, "image_size": 8}
    return make_backbone("vit", **{**arguments, **changes}).eval()


def refused(path: Path, message: str, **asked: Any) -> None:
    """The file is refused with a sentence that names it; tens of megabytes are all that it may take to find out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as caught:
        load(path, device="cpu", **asked)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch advises to switch it off
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def teacher(folder: Path, **changes: Any) -> Path:
    return save_teacher(folder, small(**changes), mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8, provenance={})


class Payload:
    """Pickled, it would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


# ---- code


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_no_code_is_run(tmp_path: Path, new: bool, where: str) -> None:
    payload = Payload(tmp_path / "ran")
    state = small().state_dict()
    content = {"beside": {**state, "args": payload}, "inside": {"teacher": {**state, "x": payload}}, "alone": payload}
    for name in ("model.pth", "model.safetensors", "pytorch_model.bin", "teacher.jpg"):
        torch.save(content[where], tmp_path / name, _use_new_zipfile_serialization=new)
        refused(tmp_path / name, "would run code")
        (tmp_path / name).unlink()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content[where]))
    refused(tmp_path / "plain.pkl", "would run code")
    (tmp_path / "text.pkl").write_bytes(pickle.dumps(payload, protocol=0))
    refused(tmp_path / "text.pkl", "no weights file")
    assert not (tmp_path / "ran").exists()


def test_a_torchscript_archive_is_a_program(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    refused(path, r"is a TorchScript archive.*it is not run.*torch\.jit\.load.*state_dict\(\)")


# ---- truncated and of other kinds


def test_truncated_files(tmp_path: Path) -> None:
    state = small().state_dict()
    save_file(state, tmp_path / "foreign.safetensors")
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    teacher(tmp_path)
    (tmp_path / "teacher.json").unlink()
    for path in sorted(p for p in tmp_path.iterdir() if p.is_file()):
        whole = path.read_bytes()
        for keep in (0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:keep])
            refused(path, "is truncated|has no|no weights file|has \\d+ bytes")
        path.write_bytes(whole)
        load(path, device="cpu")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.jpg").rename(tmp_path / "photo.pth")
    refused(tmp_path / "photo.pth", r"no weights file: it begins as neither.*\\xff\\xd8\\xff")
    for name, content in (
        ("notes.safetensors", b"These are not weights."),
        ("empty.pth", b""),
        ("zeros.pth", bytes(4096)),
        ("recipe.yaml", b"# nano: {depth: 2}"),
        ("config.json", b'{"model_type": "dinov2"}'),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "is truncated or no weights file.*a model is a run folder")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "archive.pth", "cannot be read as a torch file of plain tensors")
    folder = tmp_path / "nothing"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no model in .*nothing: looked for .*It holds: nothing"):
        load(folder, device="cpu")
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)},
              tmp_path / "resnet.safetensors")  # fmt: skip
    refused(tmp_path / "resnet.safetensors", r"of no family.*Found: 2 tensors \(conv1\.weight, layer1")


# ---- that lie about their size


def test_a_lying_header_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small().state_dict(), path)
    whole = path.read_bytes()
    for claimed in (2**39, len(whole), len(whole) - 7):
        path.write_bytes(struct.pack("<Q", claimed) + whole[8:])
        refused(path, f"truncated or not a safetensors file .its header claims {claimed} bytes")
    path.write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    refused(path, "truncated or no weights file")
    (length,) = struct.unpack("<Q", whole[:8])
    path.write_bytes(struct.pack("<Q", length - 20) + whole[8:])
    refused(path, "truncated or not a safetensors file")
    header = json.loads(whole[8 : 8 + length])
    header["cls_token"]["shape"] = [1, 1, 2**40]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    refused(path, "truncated or not a safetensors file")


def test_any_length_of_the_header_is_read(tmp_path: Path) -> None:
    """Its first byte is that of a pickle for one file in 32."""
    first = set()
    for length in range(0, 256, 8):
        save_file(small(depth=1).state_dict(), tmp_path / "model.safetensors", metadata={"padding": "x" * length})
        first.add((tmp_path / "model.safetensors").read_bytes()[0])
        load(tmp_path / "model.safetensors", device="cpu")
    assert 0x80 in first


def test_numbers_repeated_a_billion_times_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    huge = torch.zeros(1).expand(1, 1, 2**36)
    torch.save({**small().state_dict(), "cls_token": huge}, path)
    refused(path, r"of cls_token \(1, 1, 68719476736\), 274877906944 bytes, only 4 are stored")


def test_zips_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    refused(tmp_path / "bomb.pth", r"has \d+ bytes, and its parts claim 50000000")


# ---- that are readable, and still not right


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_tensors(tmp_path: Path, value: float) -> None:
    model = small()
    with torch.no_grad():
        model.blocks[1].norm1.weight[3] = value
    torch.save(model.state_dict(), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"not finite in blocks\.1\.norm1\.weight: its training had diverged")
    path = save_teacher(tmp_path, model, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8, provenance={})
    refused(path, r"not finite in blocks\.1\.norm1\.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_numbers_of_other_kinds_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    state = small().state_dict()
    torch.save({**state, "norm.weight": torch.ones(64, dtype=dtype)}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"not plain arrays of floating-point numbers: norm\.weight")


def test_sparse_tensors_are_not_taken_for_weights(tmp_path: Path) -> None:
    state = {**small().state_dict(), "norm.weight": torch.ones(64).to_sparse()}
    torch.save(state, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "norm.weight")


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """quietvit's own file with another description or other tensors."""
    tensors, meta = load_file(path), json.loads(path.with_suffix(".json").read_text())
    edit(meta, tensors)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(meta)})
    return path


def test_registers_and_their_description_must_agree(tmp_path: Path) -> None:
    def told(number: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
        return lambda meta, _: meta["backbone"]["arguments"].update(num_registers=number)

    refused(edited(teacher(tmp_path, num_registers=4), told(0)), "1 keys unexpected: register_tokens")
    refused(edited(teacher(tmp_path, num_registers=0), told(4)), "1 keys missing: register_tokens")
    refused(
        edited(teacher(tmp_path, num_registers=4), told(2)), r"register_tokens \(1, 4, 64\) instead of \(1, 2, 64\)"
    )
    removed = edited(teacher(tmp_path, num_registers=4), lambda _, tensors: tensors.__delitem__("register_tokens"))
    refused(removed, "1 keys missing: register_tokens")
    refused(teacher(tmp_path), "says itself how many heads and registers", num_registers=1)
    refused(teacher(tmp_path), "leave .*mean and std out", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_descriptions_that_cannot_be_read(tmp_path: Path) -> None:
    for part in ("backbone", "normalisation", "image_size", "provenance"):
        cut = edited(teacher(tmp_path), lambda meta, _, part=part: meta.__delitem__(part))  # type: ignore[misc]
        refused(cut, f"without {part}")
    for text in ("", "{", "[]", "[" * 100_000, '{"format": ["quietvit-backbone-1"]}'):
        save_file(small().state_dict(), tmp_path / "teacher.safetensors", metadata={METADATA_KEY: text})
        refused(tmp_path / "teacher.safetensors", "description that is not readable JSON|has the format")


def test_old_descriptions_without_newer_arguments_still_load(tmp_path: Path) -> None:
    def older(meta: dict[str, Any], _: dict[str, Tensor]) -> None:
        for name in ("activation", "pre_norm"):
            del meta["backbone"]["arguments"][name]

    model = load(edited(teacher(tmp_path), older), device="cpu")
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(images).cls, small()(images).cls)


def test_a_normalisation_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    state = {k: v for k, v in small(layer_scale=0.0, num_registers=0).state_dict().items() if k != "mask_token"}
    path = tmp_path / "vit.pth"
    torch.save(state, path)
    refused(
        path, r"does not tell which mean.*config\.json beside it.*mean and std.*--normalisation imagenet\|inception"
    )
    model = load(path, device="cpu", mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2])
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    for asked, message in (
        ({"mean": (0.5,) * 3}, "mean and std belong together"),
        ({"mean": (0.5,) * 2, "std": (0.5,) * 3}, "mean must be three numbers"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"mean": (float("nan"),) * 3, "std": (0.5,) * 3}, "mean must be three numbers"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3, "activation": "relu"}, "unknown activation 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, device="cpu", **asked)  # type: ignore[arg-type]


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """A few hundred damaged files: each loads or gets a ValueError."""
    chance = random.Random(0)
    state = small(depth=1, num_registers=0).state_dict()
    save_file(state, tmp_path / "a")
    torch.save(state, tmp_path / "b")
    torch.save(state, tmp_path / "c", _use_new_zipfile_serialization=False)
    for name in ("a", "b", "c"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(100):
            broken = bytearray(whole)
            for _ in range(4):
                broken[chance.randrange(2000 if chance.random() < 0.8 else len(whole))] = chance.randrange(256)
            (tmp_path / "broken").write_bytes(broken)
            with suppress(ValueError):
                load(tmp_path / "broken", device="cpu")

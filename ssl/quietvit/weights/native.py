"""quietvit's own weights file: one backbone in `teacher.safetensors`, described by JSON inside it and beside it.

The JSON under the metadata key "quietvit" is what is read back, so that weights and description cannot part; the
`teacher.json` beside it holds the same for people and other tools. Key names are those of the released DINOv2 files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quietvit import dist
from quietvit.backbones import make_backbone
from quietvit.files import write_atomically, write_text

FORMAT = "quietvit-backbone-1"
METADATA_KEY = "quietvit"
WEIGHTS_NAME = "teacher.safetensors"
JSON_NAME = "teacher.json"
PARTS = ("backbone", "normalisation", "image_size", "provenance")
SHOWN = 12  # keys named in an error before it only counts (ours: they fit a terminal)


def save_teacher(
    folder: Path | str,
    backbone: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    provenance: Mapping[str, Any],
    backbone_name: str = "vit",
) -> Path:
    """Write `teacher.safetensors` (fp32) and `teacher.json` into `folder`, each under a temporary name first.

    `mean` and `std` are the input normalisation, RGB in units of [0, 1]; `image_size` is the side in pixels that the
    backbone was trained at; `provenance` is any JSON-able account of the run (its "seed" lets evaluation rebuild the
    very initialisation). `backbone.arguments` must rebuild it through `make_backbone(backbone_name, ...)`. Returns the
    path of the weights. Under ranks all call, and the first one writes. Raises OSError as the file system does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "format": FORMAT,
        "backbone": {"name": backbone_name, "arguments": backbone.arguments},
        "normalisation": {"mean": [float(v) for v in mean], "std": [float(v) for v in std]},
        "image_size": int(image_size),
        "provenance": dict(provenance),
    }
    text = json.dumps(meta, indent=2)
    tensors = {k: _stored(dist.whole(v)) for k, v in backbone.state_dict().items()}
    path = folder / WEIGHTS_NAME
    if dist.rank() != 0:
        return path
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={METADATA_KEY: text}))
    write_text(folder / JSON_NAME, text + "\n")
    return path


def _stored(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy, fp32 if it is of a floating type (safetensors refuses tensors that share memory)."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def load_backbone(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone stored in a `teacher.safetensors`, in eval mode on the CPU, and its description.

    Raises FileNotFoundError if there is no such file; ValueError if it is truncated, not quietvit's, or if its tensors
    are not exactly those of the architecture it describes (the message names the keys).
    """
    path = Path(path)
    tensors, meta = _read(path)
    spec = meta["backbone"]
    try:
        # How attention is computed belongs to the machine, not to the weights: a run made with xFormers loads on a CPU.
        backbone = make_backbone(spec["name"], **{**spec["arguments"], "attention": "auto"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a backbone that this version of quietvit cannot build: {error}") from error
    load_strictly(backbone, tensors, what=str(path))
    return backbone.eval(), meta


def read_meta(path: Path | str) -> dict[str, Any]:
    """The description inside a `teacher.safetensors`, without its tensors. Raises as `load_backbone`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}): copy it again, or "
            "use an older checkpoint"
        ) from error
    if text is None:
        raise ValueError(f"{path} holds tensors but no quietvit description (metadata key {METADATA_KEY!r})")
    try:
        meta = json.loads(text)
        wanted = meta.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds a description that is not readable JSON ({error}): copy it again") from error
    if wanted != FORMAT:
        raise ValueError(f"{path} has the format {wanted!r}; this version reads {FORMAT!r}")
    if lacking := [part for part in PARTS if part not in meta]:
        raise ValueError(f"{path} holds a description without {', '.join(lacking)}: copy it again")
    return cast(dict[str, Any], meta)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    meta = read_meta(path)
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 (not a mapping)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Copy `tensors` into `module`. Raises ValueError naming missing, unexpected and mis-shaped keys, if any.

    A file that fits only partly must never pass: register weights read into a model without registers once cost users
    40 points of k-NN without an error (dinov2 issue 505).
    """
    expected = module.state_dict()
    missing = [k for k in expected if k not in tensors]
    unexpected = [k for k in tensors if k not in expected]
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    problems = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", shapes),
    ]
    if any(problems):
        raise ValueError(
            f"{what} is a checkpoint of another architecture than {type(module).__name__} with these settings. "
            + " ".join(p for p in problems if p)
        )
    module.load_state_dict(dict(tensors))


def _listed(kind: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} keys {kind}: {', '.join(keys[:SHOWN])}{more}."


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all stored tensors as fp32, and over the register neurons of test-time
    registers, if any: the same in memory and from any file."""
    digest = hashlib.sha256(getattr(getattr(module, "options", None), "register_neurons", "").encode())
    for key, value in sorted(module.state_dict().items()):
        stored = _stored(value)
        digest.update(f"{key} {tuple(stored.shape)} {stored.dtype}\n".encode())
        digest.update(stored.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

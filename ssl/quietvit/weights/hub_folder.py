"""Folders in the form of model hubs: config.json beside the weights, which may lie in several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from quietvit.weights.tensors_file import read_tensors
from quietvit.weights.torch_file import check_stored

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "config_or_none", "folder_tensors", "read_json", "three_numbers"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TORCH_NAME = "pytorch_model.bin"
SHOWN = 4  # names in an error about files that do not fit their index (ours)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError if there is no such file, ValueError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is truncated or not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def config_or_none(folder: Path) -> dict[str, Any] | None:
    """The configuration of a folder, or None where there is none that can be read."""
    try:
        return read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return None


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`: of model.safetensors, of several files under its index, or of pytorch_model.bin.

    No code in them is run. Raises FileNotFoundError if there are none or a part is missing; ValueError for a broken
    file, or an index that does not say what its files hold.
    """
    if (folder / INDEX_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
        return _read_parts(folder)
    for name in (WEIGHTS_NAME, TORCH_NAME):
        if (folder / name).is_file():
            return _read_file(folder / name)
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
    raise FileNotFoundError(
        f"no weights in {folder}: looked for {WEIGHTS_NAME}, {INDEX_NAME} and {TORCH_NAME}. It holds: {names}"
    )


def three_numbers(value: object, *, what: str) -> tuple[float, float, float]:
    """One number for each of R, G and B. Raises ValueError for anything else."""
    numbers = isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not isinstance(value, list) or not numbers or len(value) != 3:
        raise ValueError(f"{what} must be three numbers, not {value!r}")
    return float(value[0]), float(value[1]), float(value[2])


def _read_file(path: Path) -> dict[str, Tensor]:
    tensors = {k: v for k, v in read_tensors(path).items() if isinstance(v, Tensor)}
    check_stored(tensors, what=str(path))
    return tensors


def _read_parts(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX_NAME
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r}, which is not in its folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there: copy the whole folder")
        part = _read_file(folder / name)
        if differing := sorted({key for key, place in places.items() if place == name} ^ set(part)):
            raise ValueError(
                f"{folder / name} holds other tensors than {INDEX_NAME} says: they differ in "
                f"{', '.join(differing[:SHOWN])}"
            )
        tensors.update(part)
    return tensors

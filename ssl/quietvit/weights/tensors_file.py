"""Weights files of any origin, told by their content: safetensors, or torch's zip or pickle of plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from quietvit.weights.torch_file import read_torch_file

__all__ = ["is_safetensors", "read_metadata", "read_tensors"]

LENGTH = 8  # bytes of the little-endian header length that a safetensors file begins with; then JSON
TORCH = (b"PK\x03\x04", b"\x80")  # a zip (torch >= 1.6), a pickle (before)


def read_tensors(path: Path) -> dict[str, Any]:
    """Whatever a weights file holds: its tensors by name, and of a torch file also other plain values and dictionaries.

    The name of the file plays no part, and no code in it is run. Raises FileNotFoundError if there is no such file;
    ValueError if it is truncated, of another kind, holds anything but a dictionary, or needs code to be unpickled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if is_safetensors(path):
        return _read_safetensors(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH)
    if not start.startswith(TORCH):
        raise ValueError(
            f"{path} ({size} bytes) is truncated or no weights file: it begins as neither a safetensors nor a torch "
            f"file does, but with {start!r}. Copy it again, or give another: a model is a run folder, a "
            "teacher.safetensors, or weights of DINOv2, T2T-ViT, open_clip, timm or transformers"
        )
    return read_torch_file(path)


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: a length, below a terabyte, then a brace. It may be truncated."""
    with path.open("rb") as file:
        start = file.read(LENGTH + 1)
    return start[5:] == b"\0\0\0{"  # more than the first byte tells: a length may begin like a pickle


def read_metadata(path: Path) -> dict[str, str]:
    """The free text entries in the header of a safetensors file. Raises ValueError if it is truncated or broken."""
    _check_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_broken(path, str(error))) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    _check_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(_broken(path, str(error))) from error


def _check_length(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(LENGTH), "little")
    if claimed > size - LENGTH:
        raise ValueError(_broken(path, f"its header claims {claimed} bytes"))


def _broken(path: Path, reason: str) -> str:
    return (
        f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({reason}): copy it again, or "
        "use an older checkpoint"
    )

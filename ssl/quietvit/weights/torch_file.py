"""Torch files of other people's code: read without running any, and brought to plain names."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NEEDS_CODE = re.compile(r"Unsupported (?:global|class|operand)[^\n]*?(?:GLOBAL )?([\w.]+) was not an allowed")
UNREADABLE = (  # what torch.load raises, depending on where a broken file goes wrong
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, MemoryError,
    ArithmeticError, struct.error, pickle.UnpicklingError,
)  # fmt: skip
ADVICE = "weights_only"
SHOWN = 12  # names listed in an error (ours: they fit a terminal)


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dictionary in a torch file; only tensors and plain values are unpickled.

    Raises FileNotFoundError if there is no such file; ValueError if it is truncated, holds anything but a dictionary,
    or needs code to be unpickled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    _check_sizes(loaded, path)
    return {str(k): v for k, v in loaded.items()}


def _check_archive(path: Path) -> None:
    """Refuses zips that torch.load would take for something else, or that claim to unpack to more than they are."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        raise ValueError(_unreadable(path, error)) from error
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise ValueError(
            f"{path} is a TorchScript archive: a program with its weights, and it is not run. Where you trust it, save "
            f'its weights alone, with torch.save(torch.jit.load("{path.name}", "cpu").state_dict(), "weights.pth"), '
            "and load that"
        )
    claimed, size = sum(part.file_size for part in parts), path.stat().st_size
    if claimed > size:
        raise ValueError(f"{path} has {size} bytes, and its parts claim {claimed}: it is broken, or no torch file")


def _unreadable(path: Path, error: Exception) -> str:
    if found := NEEDS_CODE.search(str(error)):
        return (
            f"{path} holds a {found[1]} beside its tensors, and to unpickle that would run code, which is not done. "
            "Where you trust the file, save its weights alone, as a dictionary of tensors, and load that"
        )
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    if ADVICE in reason:  # torch's first line tells how to run the code after all
        reason = "torch's reader of plain tensors refuses its contents"
    return (
        f"{path} ({path.stat().st_size} bytes) cannot be read as a torch file of plain tensors: it is truncated, or it "
        f"would run code ({reason})"
    )


def tensor_keys(loaded: Mapping[str, Any]) -> Iterator[str]:
    """The names of all tensors, as stored, of the file itself and of the dictionaries in it."""
    for entries in (loaded, *(v for v in loaded.values() if isinstance(v, Mapping))):
        yield from (str(k) for k, v in entries.items() if isinstance(v, Tensor))


def choose_entry(loaded: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Mapping[str, Any]]:
    """The first of `names` under which a dictionary lies, and that; "" and the file itself if there is none."""
    for name in names:
        if isinstance(loaded.get(name), Mapping):
            return name, loaded[name]
    return "", loaded


def plain_names(tensors: Mapping[str, Tensor], rename: Callable[[str], str], *, what: str = "it") -> dict[str, Tensor]:
    """`tensors` under other names. Raises ValueError if two names become one."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = rename(key)
        if name in found:
            raise ValueError(f"{what} holds two tensors that are both {name!r} once prefixes are removed")
        found[name] = value
    return found


def check_stored(tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Raises ValueError naming tensors that are not plain arrays of floating-point numbers: sparse, integers, ..."""
    odd = [k for k, v in tensors.items() if v.layout != torch.strided or not v.is_floating_point()]
    if odd:
        shown = ", ".join(f"{k} ({tensors[k].dtype}, {tensors[k].layout})" for k in odd[:SHOWN])
        raise ValueError(f"{what} holds tensors that are not plain arrays of floating-point numbers: {shown}")


def _check_sizes(loaded: Mapping[Any, Any], path: Path) -> None:
    """Refuses views that repeat one stored number: they take no room in a file, and all memory when they are used."""
    for entries in (loaded, *(v for v in loaded.values() if isinstance(v, Mapping))):
        for key, value in entries.items():
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
                continue
            size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
            if size > stored:
                raise ValueError(
                    f"{path}: of {key} {tuple(value.shape)}, {size} bytes, only {stored} are stored: it repeats them. "
                    "It is broken, or was saved as a view: save a copy, by .contiguous()"
                )


def strip_prefixes(key: str, prefixes: Iterable[str]) -> str:
    """`key` without any of `prefixes`, however many stand before it."""
    prefixes = tuple(prefixes)
    while prefix := next((p for p in prefixes if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def list_names(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) + more) or "nothing"

"""Torch files of other people's code: read without running any, and brought to plain names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NEEDS_CODE = re.compile(r"Unsupported (?:global|class|operand)[^\n]*?(?:GLOBAL )?([\w.]+) was not an allowed")
SHOWN = 12  # names listed in an error (ours: they fit a terminal)


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dictionary in a torch file; only tensors and plain values are unpickled.

    Raises FileNotFoundError if there is no such file; ValueError if it is truncated, holds anything but a dictionary,
    or needs code to be unpickled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    return loaded


def _unreadable(path: Path, error: Exception) -> str:
    if found := NEEDS_CODE.search(str(error)):
        return (
            f"{path} holds a {found[1]} beside its tensors, and to unpickle that would run code, which is not done. "
            "Where you trust the file, save its weights alone, as a dictionary of tensors, and load that"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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


def plain_names(tensors: Mapping[str, Tensor], rename: Callable[[str], str], *, what: str) -> dict[str, Tensor]:
    """`tensors` under other names. Raises ValueError if two names become one."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = rename(key)
        if name in found:
            raise ValueError(f"{what} holds two tensors that are both {name!r} once prefixes are removed")
        found[name] = value
    return found


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

"""The TARGETS table. A new target is one module with a TARGET, and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from quietvit.weights.export.target import Target

__all__ = ["TARGETS", "find_target"]

MODULES: Mapping[str, str] = {
    "safetensors": "quietvit.weights.export.safetensors_folder",
    "transformers": "quietvit.weights.export.to_transformers",
    "timm": "quietvit.weights.export.to_timm",
    "onnx": "quietvit.weights.export.to_onnx",
    "torch": "quietvit.weights.export.to_torch",
}


class _Targets(Mapping[str, Target]):
    """Each row is imported when it is asked for."""

    def __getitem__(self, name: str) -> Target:
        target = importlib.import_module(MODULES[name]).TARGET
        assert isinstance(target, Target)
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


TARGETS: Mapping[str, Target] = _Targets()


def find_target(name: str) -> Target:
    """The row of TARGETS. Raises ValueError for an unknown name, with the nearest one."""
    if name not in TARGETS:
        near = get_close_matches(name, list(TARGETS), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown export target '{name}'; {hint}known: {', '.join(TARGETS)}")
    return TARGETS[name]

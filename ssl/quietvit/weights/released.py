"""Weights that others released as torch files: which family a file is of is told by its keys, never by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from quietvit.weights import dinov2, t2t
from quietvit.weights.torch_file import list_names, read_torch_file, tensor_keys

SUFFIXES = (".pth", ".pt", ".pth.tar", ".pt.tar")
T2T_STEM, DINOV2_STEM = "tokens_to_token.", "patch_embed."


def load_released(
    path: Path, *, num_heads: int | None = None, num_registers: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a DINOv2 or T2T-ViT file and its description. `num_heads`, `num_registers`: see `load_t2t`.

    Raises as `load_dinov2` and `load_t2t`; ValueError also for a file of neither, and if heads or registers are asked
    for in a file that says itself how many it has.
    """
    loaded = read_torch_file(path)
    keys = list(tensor_keys(loaded))
    if any(T2T_STEM in key for key in keys):
        return t2t.t2t_backbone(loaded, path, num_heads=num_heads, num_registers=num_registers)
    if any(DINOV2_STEM in key for key in keys):
        if num_heads is not None or num_registers:
            raise ValueError(f"{path}: num_heads and num_registers are for T2T-ViT files; this is a DINOv2 one")
        return dinov2.dinov2_backbone(loaded, path)
    raise ValueError(
        f"{path} is of no family that can be read. A DINOv2 backbone has {', '.join(dinov2.NEEDED)}; a T2T-ViT has "
        f"{', '.join(t2t.NEEDED)}. Found: {len(keys)} tensors ({list_names(keys)}) under {list_names(map(str, loaded))}"
    )

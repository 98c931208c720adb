"""Position tables: a learned one resized to another patch grid in both modes of DINOv2, and T2T-ViT's sinusoids.

Bicubic resizing is linear and separable: out = Rows @ table @ Cols'. The two small matrices depend on sizes only, so
they are computed once and kept, which is faster than resizing at every forward, cannot go stale when the table is
trained, and makes the backward deterministic on CUDA (that of F.interpolate is not).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["POS_INTERPOLATION", "resize_positions", "sinusoid_positions"]

POS_INTERPOLATION = ("size", "offset")


def resize_positions(
    table: Float[Tensor, "1 1+N D"],
    native: tuple[int, int],
    grid: tuple[int, int],
    *,
    mode: str = "size",
    offset: float = 0.1,
    antialias: bool = True,
) -> Float[Tensor, "1 1+h*w D"]:
    """The position table of grid (h, w). Row 0, the class token's, is kept; computed in fp32 at least.

    Mode "size" resizes to exactly (h, w). Mode "offset" is what the DINOv2 checkpoints without registers were made
    with: it samples at scale ((h + offset) / native_h, ...), so the grid is slightly shrunk. Keep it for those only.

    Raises:
        ValueError: the offset is too small, so that rounding yields another grid than asked for. At 0 that happens
            (37 -> 39 patches, say: DINOv2 PR 378); at 0.1 it does for none of 1 to 400 patches from 7, 14, 16 or 37.
    """
    if grid == native:
        return table
    shift = offset if mode == "offset" else None
    dtype = torch.promote_types(table.dtype, torch.float32)
    make = resize_matrix.__wrapped__ if torch.compiler.is_compiling() else resize_matrix  # a tracer's are not real
    rows = make(native[0], grid[0], shift, antialias, dtype, table.device)
    cols = make(native[1], grid[1], shift, antialias, dtype, table.device)
    with torch.autocast(table.device.type, enabled=False):
        patches = table[0, 1:].to(dtype).view(native[0], -1)
        patches = (rows @ patches).view(grid[0], native[1], -1)
        patches = torch.matmul(cols, patches).flatten(0, 1)
        return torch.cat((table[:, :1], patches[None].to(table.dtype)), dim=1)


@lru_cache(maxsize=256)
def resize_matrix(
    native: int, out: int, offset: float | None, antialias: bool, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "out native"]:
    """The matrix of one axis: the columns are the resized unit vectors. `offset` None is the size mode."""
    with torch.inference_mode(False), torch.no_grad():  # what a teacher's pass caches serves a student's backward
        unit = torch.eye(native, dtype=dtype, device="cpu")[None, None]
        if offset is None:
            resized = F.interpolate(unit, size=(out, native), mode="bicubic", antialias=antialias)
        else:
            scale = ((out + offset) / native, 1.0)
            resized = F.interpolate(unit, scale_factor=scale, mode="bicubic", antialias=antialias)
        if resized.shape[2] != out:
            raise ValueError(
                f"pos_interpolation: offset with pos_offset {offset} turns {out} patches into {resized.shape[2]}; "
                "use pos_offset: 0.1, or pos_interpolation: size"
            )
        return resized[0, 0].to(device)


@lru_cache(maxsize=16)
def _sinusoids(count: int, dim: int) -> Float[Tensor, "1 count dim"]:
    with torch.inference_mode(False):
        position = torch.arange(count, dtype=torch.float64, device="cpu")[:, None]
        channel = torch.arange(dim, dtype=torch.float64, device="cpu")
        angle = position / 10000 ** (2 * (channel // 2) / dim)
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def sinusoid_positions(count: int, dim: int) -> Float[Tensor, "1 count dim"]:
    """T2T-ViT's fixed table over the sequence (its section 3.2, after Vaswani et al. 2017), float32, on the CPU.

    Row p, channel j: sin (even j) or cos (odd j) of p / 10000^(2 floor(j / 2) / dim); row 0 is the class token's. The
    patches are numbered row by row, so that the same row means another place in every other grid: for its weights only.
    """
    make = _sinusoids.__wrapped__ if torch.compiler.is_compiling() else _sinusoids
    return make(count, dim)

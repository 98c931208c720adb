"""Self-attention over packed groups of sequences: the ATTENTION table and the layer that uses it.

Every backend computes the same thing, softmax(q k' / sqrt(d)) v inside each sequence and nothing across sequences.
They differ in how many kernels that takes: `sdpa` calls one per group, `varlen` and `xformers` one for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from quietvit.nn.packing import Groups, group_sizes

__all__ = ["ATTENTION", "AUTO_ORDER", "Attend", "Attention", "AttentionBackend", "choose_attention"]

# (qkv [T 3 A d], groups) -> [T A d]
Attend = Callable[[Float[Tensor, "T 3 A d"], Groups], Float[Tensor, "T A d"]]

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionBackend:
    """One row of ATTENTION.

    `available(device, dtype, head_dim)` says whether the backend can run there and, if not, why not.
    `attend` is the computation.
    """

    name: str
    available: Callable[[torch.device, torch.dtype, int], tuple[bool, str]]
    attend: Attend


def _sdpa(qkv: Float[Tensor, "T 3 A d"], groups: Groups) -> Float[Tensor, "T A d"]:
    """One call of PyTorch's scaled_dot_product_attention per group (the form of DINOv3; runs everywhere)."""
    outputs = []
    # split, not slices: its backward is one concatenation instead of one zero-filled tensor per group
    for part, (images, tokens) in zip(torch.split(qkv, group_sizes(groups)), groups, strict=True):
        q, k, v = part.reshape(images, tokens, *part.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)  # each [b A n d]
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _sdpa_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    return True, ""


def _lengths(groups: Groups) -> list[int]:
    return [tokens for images, tokens in groups for _ in range(images)]


@lru_cache(maxsize=64)  # crop sizes and kept counts repeat from step to step
def _sequence_starts(groups: Groups, device: torch.device) -> Int[Tensor, " sequences+1"]:
    with torch.inference_mode(False):  # what a teacher's pass caches must be usable in a student's backward
        lengths = torch.tensor([0, *_lengths(groups)], device="cpu")
        return lengths.cumsum(0).to(device=device, dtype=torch.int32)


def _varlen(qkv: Float[Tensor, "T 3 A d"], groups: Groups) -> Float[Tensor, "T A d"]:
    """PyTorch's own variable-length attention: one FlashAttention launch for all groups."""
    starts = _sequence_starts(groups, qkv.device)
    longest = max(tokens for _, tokens in groups)
    q, k, v = qkv.unbind(1)
    return cast(Tensor, varlen_attn(q, k, v, starts, starts, longest, longest))


def _varlen_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, f"it has CUDA kernels only and the tokens are on {device.type}"
    if dtype not in HALF:
        return False, f"it computes in half precision only and the tokens are {dtype}"
    if head_dim % 8 or head_dim > 256:
        return False, f"its head width must be a multiple of 8 up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "it needs a GPU of compute capability 8.0 or more"
    return True, ""


@lru_cache(maxsize=64)
def _block_diagonal(groups: Groups, device: torch.device) -> Any:
    attn_bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    with torch.inference_mode(False):
        return attn_bias.BlockDiagonalMask.from_seqlens(_lengths(groups), device=device)


def _xformers(qkv: Float[Tensor, "T 3 A d"], groups: Groups) -> Float[Tensor, "T A d"]:
    """xFormers' memory-efficient attention under a block-diagonal mask (the form of DINOv2)."""
    ops = importlib.import_module("xformers.ops")
    q, k, v = qkv.unsqueeze(0).unbind(2)  # each [1 T A d]
    return cast(Tensor, ops.memory_efficient_attention(q, k, v, attn_bias=_block_diagonal(groups, qkv.device))[0])


def _xformers_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, f"it has CUDA kernels only and the tokens are on {device.type}"
    if dtype not in (*HALF, torch.float32):
        return False, f"it computes in half or single precision and the tokens are {dtype}"
    if head_dim % 8:
        return False, f"its head width must be a multiple of 8, not {head_dim}"
    try:
        importlib.import_module("xformers.ops")
    except ImportError as error:
        return False, f"xformers cannot be imported ({error})"
    return True, ""


ATTENTION: Mapping[str, AttentionBackend] = {
    "sdpa": AttentionBackend("sdpa", _sdpa_available, _sdpa),
    "varlen": AttentionBackend("varlen", _varlen_available, _varlen),
    "xformers": AttentionBackend("xformers", _xformers_available, _xformers),
}

# What `auto` tries for several groups in half precision on CUDA. Ours, by reasoning and not yet by measurement:
# varlen is one launch without the split and concatenation of sdpa and needs no further package; xformers does the
# same for GPUs that PyTorch's kernel does not reach; sdpa always works.
AUTO_ORDER = ("varlen", "xformers", "sdpa")


@lru_cache(maxsize=256)
def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, num_groups: int
) -> AttentionBackend:
    """The backend that `name` stands for, given what it will be fed.

    `auto` is `sdpa` unless there are several groups to pack, on CUDA, in half precision; then the first of AUTO_ORDER
    that can run. (A single group is one SDPA call already; in single precision SDPA is the exact, portable choice.)

    Raises:
        ValueError: unknown name, or the named backend cannot run here (the message says why).
    """
    if name == "auto":
        packs = num_groups > 1 and device.type == "cuda" and dtype in HALF
        order = AUTO_ORDER if packs else ("sdpa",)
        name = next(n for n in order if ATTENTION[n].available(device, dtype, head_dim)[0])
    check_attention_name(name)
    able, reason = ATTENTION[name].available(device, dtype, head_dim)
    if not able:
        raise ValueError(f"attention '{name}' cannot run here: {reason}. Use attention: auto or attention: sdpa")
    return ATTENTION[name]


def check_attention_name(name: str) -> None:
    """Raises ValueError unless `name` is `auto` or a row of ATTENTION."""
    if name != "auto" and name not in ATTENTION:
        raise ValueError(f"unknown attention '{name}'; known: auto, {', '.join(ATTENTION)}")


class Attention(nn.Module):
    """Multi-head self-attention: one projection to q, k, v, attention inside each sequence, one projection back."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} cannot be divided among {num_heads} attention heads")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def project(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T 3*D"]:
        """Queries, keys and values of every token, one after the other."""
        return cast(Tensor, self.qkv(x))

    def forward(self, x: Float[Tensor, "T D"], groups: Groups, attend: Attend = _sdpa) -> Float[Tensor, "T D"]:
        qkv = self.project(x).view(-1, 3, self.num_heads, self.head_dim)
        return cast(Tensor, self.proj(attend(qkv, groups).flatten(1)))

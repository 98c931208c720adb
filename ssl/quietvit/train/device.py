"""Which device, which precision, how much memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from quietvit.backbones import Trunk
from quietvit.nn.block import Block
from quietvit.nn.feed_forward import swiglu_width

GIB = 1024**3
MOST_IMAGES = 64  # in a batch chosen automatically (ours: what a desktop GPU takes of the small models)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, then Apple's MPS, then CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: choose auto, cpu, cuda or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda, but torch sees no CUDA device here: use cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps, but torch sees no MPS device here: use cpu or auto")
    return device


def own_device(device: torch.device) -> torch.device:
    """The CUDA device of this process (LOCAL_RANK, as every launcher sets it); any other device as it is."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    mine = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(mine)
    return mine


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bf16 where the hardware is fast at it, else fp32.

    CUDA from compute capability 8.0; CPUs with AMX or AVX-512 bf16 instructions (without them bf16 autocast was
    measured 18 times slower than fp32); never MPS.
    """
    if name == "bf16":
        return torch.bfloat16
    if name == "fp32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    if device.type == "cpu" and {"amx_bf16", "avx512_bf16"} & _cpu_flags():
        return torch.bfloat16
    return torch.float32


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    for line in info.read_text(errors="ignore").splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def free_memory(device: torch.device) -> int:
    """Bytes that a run may take on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> int:
    """Greatest number of bytes in use so far: allocated on CUDA, resident size of the process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on Windows

    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


@dataclass(frozen=True)
class Shapes:
    """What decides the memory of a step."""

    parameters: int  # of the student: backbone and heads
    embed_dim: int  # mean over the blocks, whose width grows in a dense trunk
    depth: int  # blocks; a dense trunk's transitions are not counted
    ffn_values: int  # kept per token by a feed-forward network: before and after its nonlinearity, mean over the blocks
    stem_values: int  # kept per image, over all crops, by a stem other than a plain patch projection
    global_tokens: int  # per global crop, with [CLS] and registers
    local_tokens: int
    num_local: int
    masked_per_image: float  # patches, on average
    prototypes: int
    patch_prototypes: int  # of the head that serves masked patches


def shapes_of(
    backbone: Trunk,
    *,
    parameters: int,
    global_size: int,
    local_size: int,
    num_local: int,
    masked_share: float,
    prototypes: int,
    patch_prototypes: int,
) -> Shapes:
    """Shapes of a step with this backbone. Crop sides in pixels; `masked_share`: of all patches of the global crops."""
    options, stride = backbone.options, backbone.stride
    extra, patches = 1 + options.num_registers, (global_size // stride) ** 2
    widths = [block.norm1.weight.numel() for block in backbone.blocks if isinstance(block, Block)]  # no transitions
    hidden = int(sum(widths) / len(widths) * options.mlp_ratio)
    return Shapes(
        parameters=parameters,
        embed_dim=round(sum(widths) / len(widths)),
        depth=len(widths),
        stem_values=2 * backbone.stem_values(global_size) + num_local * backbone.stem_values(local_size),
        ffn_values=4 * swiglu_width(hidden) if options.ffn == "swiglu" else 2 * hidden,
        global_tokens=patches + extra,
        local_tokens=(local_size // stride) ** 2 + extra,
        num_local=num_local,
        masked_per_image=2 * patches * masked_share,
        prototypes=prototypes,
        patch_prototypes=patch_prototypes,
    )


def step_memory(shapes: Shapes, batch_size: int, *, bytes_per_value: int, accumulate: int = 1) -> int:
    """Estimated bytes of one training step of `accumulate` micro-batches of `batch_size` images each.

    States: 16 bytes per student parameter (weight, gradient, two moments) and 4 per teacher parameter. Activations
    kept for the backward pass, per token and block: two residual sums in fp32 (2 D), and in the computing precision
    two norms, qkv, attention output and projection (7 D) and the FFN before and after its nonlinearity; the teacher
    keeps one block's. D is the mean width, which a dense trunk needs: its blocks differ. A tokens-to-token stem keeps
    its windows and what its attention makes of them (TokensToToken.kept_values), in the computing precision; a patch
    stem next to nothing. Prototypes, fp32: four rows for each the student scores (scores, scaled scores, the gradients
    of both), and the targets of all micro-batches.

    Measured in benchmarks/results/step-*.md: within 10 % of the peak for a ViT-S on the CPU. Not counted are some
    130 MiB that the libraries themselves take there at the first step, more than all else in a nano model.
    """

    def kept(tokens: int, depth: int) -> int:
        d = shapes.embed_dim
        return tokens * depth * (2 * d * 4 + (7 * d + shapes.ffn_values) * bytes_per_value)

    views = 2 * shapes.global_tokens
    per_image = kept(views + shapes.num_local * shapes.local_tokens, shapes.depth) + kept(views, 1)
    per_image += shapes.stem_values * bytes_per_value
    masked = shapes.masked_per_image * shapes.patch_prototypes
    student = (2 + shapes.num_local) * shapes.prototypes + masked
    targets = 2 * shapes.prototypes + masked
    scores = int(batch_size * 4 * (4 * student + accumulate * targets))
    return shapes.parameters * 20 + batch_size * per_image + scores


def fitting_batch(shapes: Shapes, free: int, *, bytes_per_value: int, accumulate: int, most: int = MOST_IMAGES) -> int:
    """Greatest batch of at most `most` images whose step is estimated to take under 60 % of the free memory.

    It is `accumulate` micro-batches of a power of two images, two at the least (KoLeo needs a neighbour).
    Raises ValueError when not even that fits, or `most` is less.
    """
    if most < 2 * accumulate:
        raise ValueError(
            f"{accumulate} micro-batches of at least 2 images make a batch of {2 * accumulate}, and at most {most} are "
            "to be had: lower train.accumulate, set train.batch_size, or add images"
        )
    micro = 1 << ((most // accumulate).bit_length() - 1)
    while micro >= 2:
        if step_memory(shapes, micro, bytes_per_value=bytes_per_value, accumulate=accumulate) < 0.6 * free:
            return micro * accumulate
        micro //= 2
    need = step_memory(shapes, 2, bytes_per_value=bytes_per_value, accumulate=accumulate) / GIB
    raise ValueError(
        f"a batch of {2 * accumulate} images needs about {need:.1f} GiB and {free / GIB:.1f} GiB are free: choose a "
        "smaller model.size, smaller crops or fewer prototypes (objective.head.num_prototypes)"
    )

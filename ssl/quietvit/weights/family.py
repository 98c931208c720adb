"""What a family of foreign weights is: a row of FAMILIES (quietvit/weights/released.py), and what rows have in common.

A row turns tensors under other people's names into arguments of `make_backbone` and tensors under ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietvit.nn.feed_forward import swiglu_width
from quietvit.weights.torch_file import list_names

__all__ = [
    "CLIP",
    "IMAGENET",
    "INCEPTION",
    "NORMALISATIONS",
    "Converted",
    "Family",
    "Hints",
    "Normalisation",
    "UnknownNormalisation",
]

Triple = tuple[float, float, float]
Normalisation = tuple[Triple, Triple]  # mean and std, RGB in units of [0, 1]

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision's; DINOv2, T2T-ViT, DeiT
INCEPTION: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # augreg, BEiT
CLIP: Normalisation = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # OpenAI's CLIP, and open_clip's own default
NORMALISATIONS: Mapping[str, Normalisation] = {"imagenet": IMAGENET, "inception": INCEPTION, "clip": CLIP}
HEAD_DIM = 64  # Vaswani et al. 2017 and Dosovitskiy et al. 2020 after it; DINOv2, DeiT, augreg, CLIP B and L
# Widths of which all released ViTs have 16 heads: so400m (72 wide), H (80), g of "Scaling ViTs" (88), G (104), e (112).
WIDTHS_OF_16_HEADS = (1152, 1280, 1408, 1664, 1792)
BLOCK = re.compile(r"^blocks\.(\d+)\.")
MASK_TOKEN_NOTE = "mask token: zeros, the file has none"


class UnknownNormalisation(ValueError):  # noqa: N818  (it names what was met)
    """Weights that can be read but for the mean and standard deviation of their images, which nothing tells."""


@dataclass(frozen=True)
class Hints:
    """What the caller, or a file beside the weights, says about them where their names and shapes cannot.

    `mean` and `std`: RGB in units of [0, 1], both or neither. `names`: file name and "arch" entry, for families whose
    variants differ in nothing else, and where each of them stands.
    """

    num_heads: int | None = None
    num_registers: int = 0  # to be added, freshly drawn; T2T-ViT only
    mean: Triple | None = None
    std: Triple | None = None
    activation: str | None = None  # "gelu" or "quick_gelu"
    names: Mapping[str, str] = field(default_factory=dict)  # where it stands -> name

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both, or neither")
        for what, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != 3 or any(not abs(v) < 100 for v in values)):
                raise ValueError(f"{what} must be three numbers, for RGB in units of [0, 1], not {values}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")

    @property
    def normalisation(self) -> Normalisation | None:
        """Mean and std as given, or None."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)


@dataclass(frozen=True)
class Converted:
    """Foreign weights as ours. `tensors` must be exactly those of `make_backbone(backbone, **arguments)`."""

    backbone: str  # a name of BACKBONES
    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    normalisation: Normalisation | None  # None: cannot be told, the caller has to say
    image_size: int  # side in pixels that the weights were made for
    notes: tuple[str, ...] = ()  # for the provenance: what was left out, added or assumed, a sentence each
    facts: Mapping[str, str] = field(default_factory=dict)  # for the provenance, by name: "heads", ...


@dataclass(frozen=True)
class Family:
    """One row of FAMILIES.

    `recognises` is asked with all names, prefixes of wrappers removed (`released.plain_tensors`); the first row that
    says yes converts. `convert` raises ValueError, without naming the file, for tensors that cannot be of the family
    after all or of which quietvit has no such model: the sentence says why. `beside` adds what other files next to the
    weights say to the caller's hints, which come first. Only families that `adds_registers` take `Hints.num_registers`.
    """

    name: str
    about: str  # for errors: by which names a file is recognised
    recognises: Callable[[Collection[str]], bool]
    convert: Callable[[Mapping[str, Tensor], Hints], Converted]
    beside: Callable[[Path, Hints], Hints] | None = None
    adds_registers: bool = False


def check_needed(tensors: Mapping[str, Tensor], needed: Mapping[str, int], *, family: str) -> None:
    """Raises ValueError unless all names of `needed` are there, each with its number of axes and not empty."""
    if lacking := [k for k in needed if k not in tensors]:
        raise ValueError(
            f"this is not a {family} backbone: it lacks {', '.join(lacking)}. It holds {len(tensors)} tensors: "
            f"{list_names(tensors)}"
        )
    if wrong := [k for k, axes in needed.items() if tensors[k].ndim != axes or not tensors[k].numel()]:
        shapes = ", ".join(f"{k} {tuple(tensors[k].shape)}" for k in wrong)
        raise ValueError(f"this is not a {family} backbone: it cannot have the shapes {shapes}")


def count_blocks(names: Iterable[str]) -> int:
    """Number of blocks, of names like `blocks.7.norm1.weight`. Raises ValueError unless they count up from 0."""
    found = sorted({int(m[1]) for m in map(BLOCK.match, names) if m})
    if not found or found != list(range(len(found))):
        gaps = next((i for i, block in enumerate(found) if i != block), 0)
        raise ValueError(f"its blocks are not numbered from 0 on: block {gaps} is missing")
    return len(found)


def count_heads(embed_dim: int, hints: Hints) -> tuple[int, str]:
    """The number of attention heads, which no shape tells, and how it is known.

    As asked for; else 16 for WIDTHS_OF_16_HEADS; else heads 64 wide. Raises ValueError for a width that cannot be
    divided so.
    """
    if hints.num_heads is not None:
        heads, reason = hints.num_heads, "as asked for"
    elif embed_dim in WIDTHS_OF_16_HEADS:
        heads, reason = 16, f"as released models of width {embed_dim} have"
    elif embed_dim % HEAD_DIM == 0:
        heads, reason = embed_dim // HEAD_DIM, f"each {HEAD_DIM} wide"
    else:
        raise ValueError(
            f"shapes do not tell the number of attention heads, and width {embed_dim} is no multiple of {HEAD_DIM}, "
            "which most released models have in a head: give num_heads"
        )
    if heads < 1 or embed_dim % heads:
        raise ValueError(f"width {embed_dim} cannot be divided among {heads} attention heads")
    return heads, f"{heads}, {reason}"


def square_grid(cells: int) -> int:
    """Side of a square position table of `cells` patches. Raises ValueError if it is not square."""
    grid = int(max(cells, 0) ** 0.5 + 0.5)
    if grid < 1 or grid * grid != cells:
        raise ValueError(f"a position table of {cells} patches is not square")
    return grid


def ratio_of(hidden: int, embed_dim: int) -> float:
    """The mlp_ratio for which `int(embed_dim * ratio)` is exactly `hidden` (CLIP's bigG: 8192 of 1664)."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else (hidden + 0.5) / embed_dim


def swiglu_ratio(width: int, embed_dim: int) -> float:
    """The mlp_ratio for which SwiGlu gets gates of `width` (see swiglu_width); 4 where that does it.

    Raises ValueError if none does.
    """
    if swiglu_width(int(embed_dim * 4.0)) == width:
        return 4.0
    ratio = ratio_of(-(-width * 3 // 2), embed_dim)
    if swiglu_width(int(embed_dim * ratio)) != width:
        raise ValueError(f"a gate of {width} channels is no multiple of 8, which quietvit's SwiGLU has")
    return ratio


def mask_token(embed_dim: int) -> Tensor:
    """What a mask token starts from (DINOv2 training code), for files that have none: say MASK_TOKEN_NOTE then."""
    return torch.zeros(1, embed_dim)

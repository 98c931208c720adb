"""Features of chosen blocks, with or without the final norm, from any extractor that can give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from quietvit.contracts import Extractor, Features


@runtime_checkable
class BlockReader(Protocol):
    """What an extractor also is if it can look into itself; quietvit's own and official models can."""

    def blocks(self, images: Float[Tensor, "B 3 H W"], which: Sequence[int], *, norm: bool) -> Sequence[Features]:
        """Features after the blocks with the listed indices (from 0), earliest first, final norm or not."""
        ...


def read_blocks(
    extractor: Extractor, images: Float[Tensor, "B 3 H W"], which: Sequence[int], *, norm: bool
) -> Sequence[Features]:
    """As `BlockReader.blocks`. An extractor with nothing but `last_blocks` gives its last ones, normed.

    Raises ValueError for a block that is not there, or that such an extractor cannot give.
    """
    check_blocks(extractor, which, norm=norm)
    if isinstance(extractor, BlockReader):
        return extractor.blocks(images, which, norm=norm)
    return extractor.last_blocks(images, len(which))


def check_blocks(extractor: Extractor, which: Sequence[int], *, norm: bool) -> None:
    """Raises ValueError as `read_blocks` would, before any work is done."""
    num = extractor.num_blocks
    if not which or list(which) != sorted(set(which)) or which[0] < 0 or which[-1] >= num:
        raise ValueError(f"blocks {list(which)} asked for; the model has {num}, numbered from 0, to be named in order")
    if isinstance(extractor, BlockReader):
        return
    if not norm or list(which) != list(range(num - len(which), num)):
        raise ValueError(
            f"{type(extractor).__name__} gives only its last blocks after the final norm, not blocks {list(which)} "
            f"{'with' if norm else 'without'} it: set norm=true and blocks=last, or give it a method blocks(images, "
            "which, norm=...)"
        )


def spread_blocks(num_blocks: int, count: int = 4) -> list[int]:
    """`count` blocks at even distances, the last among them: 2, 5, 8, 11 of 12 and 9, 19, 29, 39 of 40 (DINOv2).

    24 blocks give 5, 11, 17, 23, where DINOv2's depth heads have 4, 11, 17, 23. Raises ValueError for fewer blocks
    than asked for.
    """
    if num_blocks < count:
        raise ValueError(f"{count} blocks asked for; the model has {num_blocks}")
    return [num_blocks * (i + 1) // count - 1 for i in range(count)]

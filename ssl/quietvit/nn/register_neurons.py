"""Test-time registers: a block whose hidden units that make outliers act in added tokens, not in patches.

"Vision Transformers Don't Need Trained Registers" (Jiang, Dravid, Efros and Gandelsman 2025, arXiv 2506.08010): a few
hidden units of MLPs, the register neurons, put the high norms into patch tokens. Of these units the highest activation
is moved to a token that nobody trained, and patches have none. No weight is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from quietvit.nn.block import Block
from quietvit.nn.feed_forward import FeedForward
from quietvit.nn.packing import Groups, pack, unpack

__all__ = [
    "Neurons",
    "ShiftingBlock",
    "check_neurons",
    "move_to_registers",
    "neurons_text",
    "parse_neurons",
    "plain_blocks",
]

Neurons = Mapping[int, Sequence[int]]  # block (from 0) -> hidden units of its feed-forward network (from 0)
WRITTEN = re.compile(r"\d+:\d+(,\d+)*(;\d+:\d+(,\d+)*)*")


def parse_neurons(text: str) -> dict[int, tuple[int, ...]]:
    """ "2:0,1;5:17" as {2: (0, 1), 5: (17,)}; "" as {}. Raises ValueError for anything else."""
    if not text:
        return {}
    if not WRITTEN.fullmatch(text):
        raise ValueError(f"register_neurons {text!r}: write block:unit,unit;block:unit, e.g. 2:0,1;5:17")
    parts = [part.split(":") for part in text.split(";")]
    found = {int(block): tuple(map(int, units.split(","))) for block, units in parts}
    if len(found) < len(parts) or any(len(set(units)) < len(units) for units in found.values()):
        raise ValueError(f"register_neurons {text!r} names a block or a unit twice")
    return found


def neurons_text(neurons: Neurons) -> str:
    """The inverse of `parse_neurons`, blocks and units ascending; blocks without units are left out."""
    return ";".join(
        f"{block}:{','.join(map(str, sorted(neurons[block])))}" for block in sorted(neurons) if neurons[block]
    )


def check_neurons(text: str, added: int, *, num_registers: int, depth: int, dense: bool) -> None:
    """Raises ValueError for options of a trunk that do not go together: `added` test-time registers, the last ones of
    `num_registers`, and the neurons that feed them. Units are checked by the block that has them."""
    neurons = parse_neurons(text)
    if bool(neurons) != bool(added) or added < 0:
        raise ValueError(
            f"test_time_registers {added} and register_neurons {text!r}: either there are both, or 0 and none"
        )
    if added > num_registers:
        raise ValueError(f"test_time_registers {added}: they are the last of num_registers, which is {num_registers}")
    if neurons and dense:
        raise ValueError("a dense trunk cannot have test-time registers: leave dense_groups or register_neurons out")
    if neurons and max(neurons) >= depth:
        raise ValueError(f"register_neurons of block {max(neurons)}: there are {depth} blocks, numbered from 0")


def move_to_registers(
    hidden: Float[Tensor, "T H"], groups: Groups, units: Sequence[int], added: slice
) -> Float[Tensor, "T H"]:
    """Activations in which patches have 0 at `units`, and added register j the j-th highest that a patch had there.

    Tokens of an image are [cls | registers | added | patches]; `added` are the places of the added ones. Highest means
    greatest magnitude, the sign is kept, each unit for itself. [CLS] and other registers stay as they are. With one
    added token this is the paper's rule, but that it also looks for the highest in [CLS]; that more of them share out
    the highest ones, where the paper gives all of them the first, is ours: equal tokens would stay equal.
    """
    where, num = torch.tensor(units, device=hidden.device), added.stop - added.start
    parts = []
    for part in unpack(hidden, groups):
        chosen = part.index_select(-1, where)
        patches = chosen[:, added.stop :]
        count = min(num, patches.shape[1])
        places = patches.abs().topk(count, dim=1).indices
        moved = F.pad(patches.gather(1, places), (0, 0, 0, num - count))
        rows = torch.cat((chosen[:, : added.start], moved, torch.zeros_like(patches)), dim=1)
        parts.append(part.index_copy(-1, where, rows))
    return pack(parts)[0]


class ShiftingBlock(Block):
    """A Block that moves the activations of `units` to the registers at the places `added`.

    Raises ValueError for units that its feed-forward network has not.
    """

    def __init__(self, dim: int, num_heads: int, *, units: Sequence[int], added: slice, **layer: Any) -> None:
        super().__init__(dim, num_heads, **layer)
        width = cast(FeedForward, self.mlp).out_layer.in_features
        if max(units) >= width:
            raise ValueError(f"register_neurons name hidden unit {max(units)}: there are {width}, numbered from 0")
        self.units, self.added = tuple(units), added

    def feed(self, x: Float[Tensor, "T D"], groups: Groups) -> Float[Tensor, "T D"]:
        network = cast(FeedForward, self.mlp)
        return cast(Tensor, network.out_layer(move_to_registers(network.hidden(x), groups, self.units, self.added)))


def plain_blocks(dim: int, num_heads: int, depth: int, *, neurons: str, added: slice, **layer: Any) -> list[Block]:
    """`depth` blocks of one width, those that `neurons` name with their activations moved; `layer`: Block's keywords.

    Raises ValueError as ShiftingBlock and `parse_neurons`.
    """
    moved = parse_neurons(neurons)
    return [
        ShiftingBlock(dim, num_heads, units=moved[i], added=added, **layer)
        if i in moved
        else Block(dim, num_heads, **layer)
        for i in range(depth)
    ]

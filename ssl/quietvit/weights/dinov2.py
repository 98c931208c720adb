"""Reads DINOv2 backbone checkpoints (`dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth` and files of its training code).

The architecture is read off the shapes, so a file needs no name or configuration beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from quietvit.weights.family import IMAGENET, Converted, Family, Hints, count_heads
from quietvit.weights.torch_file import plain_names
from quietvit.weights.vit_shapes import vit_arguments

__all__ = ["FAMILY", "infer_arguments"]

HEADS = ("dino_head.", "ibot_head.")
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
OWN = ("mask_token", "register_tokens")  # names that no other ViT with this stem has
STEM = "patch_embed.proj.weight"


def recognises(names: Collection[str]) -> bool:
    return STEM in names and any(name in names for name in OWN)


def convert(tensors: Mapping[str, Tensor], hints: Hints) -> Converted:
    """A DINOv2 backbone: heads of its training left out, blocks in chunks (`blocks.1.7.`) numbered plainly.

    Position tables are interpolated as in the source of the released files: to a given size with antialiasing for the
    models with registers, by a scale factor with an offset of 0.1 and without antialiasing for the others. Raises
    ValueError if two names become one, or as `infer_arguments`.
    """
    heads = [k for k in tensors if k.startswith(HEADS)]
    # blocks.{chunk}.{block}: the block's index already counts from the first
    kept = {k: v for k, v in tensors.items() if k not in heads}
    plain = plain_names(kept, lambda key: CHUNKED.sub(r"blocks.\1.", key))
    arguments, reason = infer_arguments(plain, hints)
    notes = []
    if heads:
        notes.append(f"heads of the training left out: {len(heads)} tensors")
        if arguments["num_registers"]:
            notes.append("positions are resized as in the released models with registers; what the training did with "
                         "its local crops stands in its own configuration only")  # fmt: skip
    return Converted(
        backbone="vit",
        arguments=arguments,
        tensors=plain,
        normalisation=IMAGENET,
        image_size=arguments["image_size"],
        notes=tuple(notes),
        facts={"heads": reason},
    )


def infer_arguments(tensors: Mapping[str, Tensor], hints: Hints) -> tuple[dict[str, Any], str]:
    """Arguments of `make_backbone("vit", ...)`, from the shapes, and how the number of heads is known.

    Raises ValueError for another kind of file, a width that does not tell the heads, and as `vit_arguments`.
    """
    arguments = vit_arguments(tensors, family="DINOv2")
    heads, reason = count_heads(arguments["embed_dim"], hints)
    registers = arguments["num_registers"] > 0
    return {
        **arguments,
        "num_heads": heads,
        "num_classes": 0,  # DINOv2's backbones have none: a head is an unexpected key
        "pre_norm": False,
        "pos_interpolation": "size" if registers else "offset",
        "pos_antialias": registers,
    }, reason


FAMILY = Family(
    "dinov2", f"a DINOv2 backbone has {STEM}, cls_token, pos_embed and {' or '.join(OWN)}", recognises, convert
)

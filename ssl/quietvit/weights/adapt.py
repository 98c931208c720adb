"""A model fitted to other settings: another patch side, another position grid, more registers.

What is resized keeps its meaning as far as it can: the position table goes through the resampling that the model itself
applies to images of another size, the patch embedding through the one that keeps the tokens of resized patches.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quietvit.backbones import Trunk, make_backbone
from quietvit.nn.position import resize_matrix
from quietvit.weights.native import load_strictly

__all__ = ["adapt", "resize_patches"]

PATCH_WEIGHT = "patch_embed.proj.weight"


def resize_patches(weight: Float[Tensor, "D C p p"], side: int) -> Float[Tensor, "D C q q"]:
    """Patch embedding weights for patches of `side` pixels (FlexiViT's PI-resize, arXiv 2212.08013, section 3.4).

    With B the matrix that resizes a patch x from p to q pixels (bicubic, antialiased, as our crops are resized), the
    new weights are the pseudo-inverse (B')+ w: those of least E (w . x - w_new . B x)^2 over white-noise patches. For
    q >= p the products are equal, so that an upsampled patch keeps its token; for q < p no weights can do that.
    Computed in float64, returned in the dtype of `weight`.
    """
    native = weight.shape[-1]
    if side == native:
        return weight
    one_axis = resize_matrix(native, side, None, True, torch.float64, torch.device("cpu"))
    inverse = torch.linalg.pinv(one_axis.T)  # B is the Kronecker product of one axis with itself; so is its inverse
    resized: Tensor = inverse @ weight.detach().to("cpu", torch.float64) @ inverse.T
    return resized.to(weight)


@torch.no_grad()
def adapt(source: Trunk, name: str, arguments: dict[str, Any]) -> tuple[Trunk, list[str]]:
    """`make_backbone(name, **arguments)` with the weights of `source`, and what had to be changed, in words.

    Registers that `source` lacks start as in training from scratch, drawn from torch's current seed; those it has come
    first. A learned position table goes through `source.positions`; a fixed one is computed for its grid. The
    supervised head of `source`, if any, is left out. Where nothing differs the weights are equal bit for bit.
    Raises ValueError for differences other than these, fewer registers among them.
    """
    backbone = make_backbone(name, **arguments)
    fresh, tensors, changes = backbone.state_dict(), dict(source.state_dict()), []
    if source.options.num_classes and not backbone.options.num_classes:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("head.")}
        changes.append("supervised head left out")
    if backbone.num_registers > source.num_registers:
        old = tensors.get("register_tokens", fresh["register_tokens"][:, :0])
        tensors["register_tokens"] = torch.cat((old, fresh["register_tokens"][:, source.num_registers :]), dim=1)
        changes.append(f"registers {source.num_registers} -> {backbone.num_registers}")
    if backbone.stride != source.stride and PATCH_WEIGHT in tensors:
        tensors[PATCH_WEIGHT] = resize_patches(tensors[PATCH_WEIGHT], backbone.stride)
        changes.append(f"patch {source.stride} -> {backbone.stride} px (pseudo-inverse resize)")
    if backbone.native_grid != source.native_grid:
        learned = backbone.options.positions == "learned"
        tensors["pos_embed"] = source.positions(backbone.native_grid) if learned else fresh["pos_embed"]
        how = "the model's own bicubic resampling" if learned else "computed"
        changes.append(f"position grid {_grid(source)} -> {_grid(backbone)} ({how})")
    load_strictly(backbone, tensors, what="the model to begin with")
    return backbone, changes


def _grid(backbone: Trunk) -> str:
    return " x ".join(map(str, backbone.native_grid))

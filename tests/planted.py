"""A small ViT whose artifacts are planted by construction: which tokens, from which block on, and how large is known.

Every block leaves its tokens as they are, so that a token is its stem's vector plus its position all the way up. One
pair of channels (MARK, -MARK) says whether a token is marked; the feed-forward network of one block adds `amount` to
channel TARGET, which is empty before, of marked tokens and nothing to others:

    norm of a marked token after blocks 0 .. block - 1    |x|
    ... after blocks block .. depth - 1                   sqrt(|x|^2 + amount^2)

The step is the difference of two GELUs, gelu(z) - gelu(z - 1) with z = SLOPE * (normalised mark), which is exactly 1 or
0 in float32 beyond |z| > 7. Marked are patches at given positions, or those that are red (`paint`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quietvit.backbones import make_backbone

MARK, ANTI_MARK, TARGET = 0, 1, 2  # channels
STRENGTH = 2.0  # of the mark, next to channels of standard deviation one
SLOPE = 40.0
RED_ENOUGH = 1.75  # mean red minus mean of green and blue of a patch, in normalised pixels: painted ones have 3


def planted_vit(
    *,
    block: int = 2,
    amount: float = 60.0,
    positions: Sequence[int] | None = (5,),
    depth: int = 4,
    embed_dim: int = 48,
    num_registers: int = 0,
    patch_size: int = 4,
    image_size: int = 32,
    seed: int = 0,
) -> torch.nn.Module:
    """The model. `positions` are row-major patch indices at `image_size`; None: red patches are marked instead.

    Usual norms are about sqrt(embed_dim) with unit-variance pixels. [CLS] and registers are never marked.
    """
    torch.manual_seed(seed)
    backbone = make_backbone(
        "vit", embed_dim=embed_dim, depth=depth, num_heads=4, patch_size=patch_size, image_size=image_size,
        num_registers=num_registers, layer_scale=0.0, attention="sdpa",
    ).eval()  # fmt: skip
    quiet = torch.arange(embed_dim) > TARGET
    with torch.no_grad():
        for layer in backbone.blocks:
            for linear in (layer.attn.proj, layer.mlp.fc2):
                linear.weight.zero_()
                linear.bias.zero_()
        weight = backbone.patch_embed.proj.weight
        weight.copy_(torch.randn_like(weight) / weight[0].numel() ** 0.5)
        backbone.patch_embed.proj.bias.zero_()
        backbone.pos_embed.normal_(std=0.3)
        backbone.cls_token.normal_()
        tables = [weight, backbone.pos_embed[0].T, backbone.cls_token[0].T]
        if num_registers:
            backbone.register_tokens.normal_()
            tables.append(backbone.register_tokens[0].T)
        for table in tables:  # the mean over channels is zero, so that the final sign of the mark is the mark's
            table[~quiet] = 0
            table[quiet] -= table[quiet].mean(0)
        _mark(backbone, positions)
        _plant(backbone.blocks[block], amount)
    return backbone


def _mark(backbone: torch.nn.Module, positions: Sequence[int] | None) -> None:
    sign = torch.tensor([1.0, -1.0])
    table = backbone.pos_embed[0]
    if positions is None:
        weight = backbone.patch_embed.proj.weight
        scale = STRENGTH / weight[0, 0].numel()
        colours = torch.tensor([1.0, -0.5, -0.5]).view(3, 1, 1)
        for channel, s in zip((MARK, ANTI_MARK), sign, strict=True):
            weight[channel] = s * scale * colours
            table[1:, channel] = -s * STRENGTH * RED_ENOUGH
    else:
        table[1:, :2] = -STRENGTH * sign
        table[1 + torch.tensor(list(positions)), :2] = STRENGTH * sign
    table[0, :2] = -STRENGTH * sign
    if backbone.num_registers:
        backbone.register_tokens[..., :2] = -STRENGTH * sign


def _plant(block: torch.nn.Module, amount: float) -> None:
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    fc1.weight[:2] = 0
    fc1.weight[:2, MARK] = SLOPE
    fc1.bias[:2] = torch.tensor([0.0, -1.0])
    fc2.weight[TARGET, :2] = torch.tensor([amount, -amount])


def paint(images: Tensor, positions: Sequence[int], *, patch_size: int = 4) -> Tensor:
    """A copy of normalised images [B 3 H W] with the listed patches (row-major) red."""
    out, columns = images.clone(), images.shape[-1] // patch_size
    for position in positions:
        row, column = divmod(position, columns)
        place = (slice(row * patch_size, (row + 1) * patch_size), slice(column * patch_size, (column + 1) * patch_size))
        out[:, :, *place] = torch.tensor([1.5, -1.5, -1.5]).view(3, 1, 1)
    return out


@torch.no_grad()
def expected_norms(
    backbone: torch.nn.Module, images: Tensor, marked: Sequence[int], *, block: int, amount: float
) -> Tensor:
    """Norms [L B N] of the patch tokens after every block, from the stem alone."""
    patches, grid = backbone.tokenize(images, None)
    stem = (patches + backbone.positions(grid)[:, 1:]).double().norm(dim=-1)
    after = stem.clone()
    after[:, list(marked)] = (stem[:, list(marked)] ** 2 + amount**2).sqrt()
    return torch.stack([stem if i < block else after for i in range(backbone.num_blocks)])

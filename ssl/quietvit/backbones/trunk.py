"""The trunk that all backbones share: position, [cls | registers | patches], blocks, final norm. It knows no stem.

A backbone is a Trunk with a stem: it builds the stem's modules, calls `init_weights` and provides `tokenize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from quietvit.backbones.dense import Transition, dense_blocks
from quietvit.contracts import Features
from quietvit.nn.attention import Attend, check_attention_name, choose_attention
from quietvit.nn.block import Block, LayerScale
from quietvit.nn.drop_path import BranchDrop, draw_drop, drop_rates
from quietvit.nn.ghost import ChannelScale
from quietvit.nn.packing import Groups, pack, unpack
from quietvit.nn.position import POS_INTERPOLATION, resize_positions, sinusoid_positions
from quietvit.nn.register_neurons import check_neurons, plain_blocks

__all__ = ["Trunk", "TrunkOptions"]

Grid = tuple[int, int]  # patch rows, patch columns
Observer = Callable[[int, Tensor, Groups], None]
INITS = ("trunc_normal", "xavier")
POSITIONS = ("learned", "sinusoid")


@dataclass(frozen=True, kw_only=True)
class TrunkOptions:
    """Everything about a backbone but its stem. "D2" below: the DINOv2 training code."""

    embed_dim: int
    depth: int
    num_heads: int
    image_size: int = 224  # side in pixels that the position table is made for; D2: 224 in training, 518 released
    num_registers: int = 4  # recommended in "Vision Transformers Need Registers", section 3; D2 defaults to 0
    register_std: float = 1e-6  # D2; in short runs such registers stay alike. DINOv3: 0.02
    ffn: str = "mlp"  # D2; its giant model has "swiglu"; "ghost": T2T-ViT's architecture study
    attention_layer: str = "plain"  # D2; "se" and "ghost": T2T-ViT's architecture study
    dense_groups: str = ""  # "3-6-6-4": dense connections (quietvit/backbones/dense.py); depth counts their transitions
    growth: int = 64  # channels that a dense block adds; T2T-ViT, appendix
    mlp_ratio: float = 4.0  # D2, all sizes
    layer_scale: float = 1e-5  # D2 training; 0 leaves layer scale out, names included
    activation: str = "gelu"  # D2, of ffn "mlp"; "quick_gelu": OpenAI's CLIP
    pre_norm: bool = False  # D2; True: a LayerNorm over all tokens before the first block, as in CLIP
    qkv_bias: bool = True  # D2
    proj_bias: bool = True  # D2
    ffn_bias: bool = True  # D2
    norm_eps: float = 1e-6  # D2
    drop_path: float = 0.0  # a recipe's choice: D2 has 0.3 or 0.4
    drop_path_uniform: bool = True  # D2; otherwise rising linearly from 0 over the blocks
    positions: str = "learned"  # D2, a table over rows and columns; "sinusoid": T2T-ViT's fixed one over the sequence
    pos_interpolation: str = "size"  # the released reg4 models; "offset": those without registers
    pos_offset: float = 0.1  # D2, in offset mode only
    pos_antialias: bool = True  # the released reg4 models; registers paper, appendix A: without it, stripes
    attention: str = "auto"  # ours: see choose_attention
    test_time_registers: int = 0  # so many of the registers, the last ones, were added without training; see
    register_neurons: str = ""  # quietvit/nn/register_neurons.py: "2:0,1;5:17", hidden units by block that feed them
    num_classes: int = 0  # a supervised head that came with someone's weights; we train without one
    init: str = "trunc_normal"  # D2; "xavier" (Glorot uniform) gives small models a livelier start
    init_std: float = 0.02  # D2; of linear layers, under trunc_normal only

    def __post_init__(self) -> None:
        if self.pos_interpolation not in POS_INTERPOLATION:
            raise ValueError(f"pos_interpolation must be one of {POS_INTERPOLATION}, not '{self.pos_interpolation}'")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, not '{self.init}'")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not '{self.positions}'")
        if self.num_registers < 0:
            raise ValueError(f"num_registers must be 0 or more, not {self.num_registers}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {self.drop_path}")
        check_attention_name(self.attention)
        check_neurons(
            self.register_neurons, self.test_time_registers, num_registers=self.num_registers, depth=self.depth,
            dense=bool(self.dense_groups),
        )  # fmt: skip


class Trunk(nn.Module, ABC):
    """A vision transformer without its stem. Parameter names are those of the DINOv2 checkpoints.

    Attributes: `embed_dim`, `num_blocks`, `num_registers`, `stride` (pixels for one patch), `image_size`, `native_grid`
    (of the position table), `drop_rates` (one for each block), `arguments` (plain data that rebuilds the backbone).
    """

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]]  # named sizes -> constructor arguments
    arguments: dict[str, Any]

    def __init__(self, options: TrunkOptions, *, stride: int) -> None:
        super().__init__()
        o = options
        if o.image_size % stride:
            raise ValueError(f"image_size {o.image_size} is no multiple of {stride}; {_nearest(o.image_size, stride)}")
        self.options = o
        self.num_blocks, self.num_registers = o.depth, o.num_registers
        self.stride, self.image_size = stride, o.image_size
        self.native_grid: Grid = (o.image_size // stride, o.image_size // stride)
        self._observer: Observer | None = None
        self.drop_rates = drop_rates(o.drop_path, o.depth, uniform=o.drop_path_uniform)

        num_patches = self.native_grid[0] * self.native_grid[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, o.embed_dim))
        table = torch.empty(1, 1 + num_patches, o.embed_dim)
        if o.positions == "learned":
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        if o.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, o.num_registers, o.embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, o.embed_dim))
        if o.pre_norm:
            self.norm_pre = nn.LayerNorm(o.embed_dim, eps=o.norm_eps)
        layer: dict[str, Any] = {
            "ffn": o.ffn,
            "activation": o.activation,
            "attention_layer": o.attention_layer,
            "mlp_ratio": o.mlp_ratio,
            "layer_scale": o.layer_scale,
            "qkv_bias": o.qkv_bias,
            "proj_bias": o.proj_bias,
            "ffn_bias": o.ffn_bias,
            "norm_eps": o.norm_eps,
        }
        if o.dense_groups:
            blocks = dense_blocks(o.embed_dim, o.num_heads, o.dense_groups, o.growth, **layer)
            if len(blocks) != o.depth:
                raise ValueError(f"dense_groups {o.dense_groups} make {len(blocks)} blocks with their transitions; "
                                 f"set depth to {len(blocks)}, not {o.depth}")  # fmt: skip
        else:
            added = slice(1 + o.num_registers - o.test_time_registers, 1 + o.num_registers)
            neurons = o.register_neurons
            blocks = [*plain_blocks(o.embed_dim, o.num_heads, o.depth, neurons=neurons, added=added, **layer)]
        self.blocks = nn.ModuleList(blocks)
        self.embed_dim = blocks[-1].out_dim
        self.first_readable_block = max((i + 1 for i, b in enumerate(blocks) if isinstance(b, Transition)), default=0)
        self.norm = nn.LayerNorm(self.embed_dim, eps=o.norm_eps)
        if o.num_classes:
            self.head = nn.Linear(self.embed_dim, o.num_classes)

    # ---- what a backbone provides

    @abstractmethod
    def tokenize(
        self, images: Float[Tensor, "b 3 H W"], mask: Bool[Tensor, "b N"] | None
    ) -> tuple[Float[Tensor, "b N D"], Grid]:
        """The stem: patch tokens without position, and their grid (h, w).

        Masked tokens must be `mask_token`, and no other token may depend on the pixels under the mask.
        """

    def stem_values(self, side: int) -> int:
        """Numbers that the stem keeps for the backward pass of one image, beside its tokens: an estimate."""
        return 0

    @abstractmethod
    def init_stem(self, generator: torch.Generator | None) -> None:
        """Initialise the parameters of the stem."""

    # ---- initialisation

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Give every parameter its starting value (DINOv2 training code), also after `to_empty`."""
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        if self.options.positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        else:
            self.pos_embed.copy_(sinusoid_positions(self.pos_embed.shape[1], self.options.embed_dim))
        if self.num_registers:
            nn.init.normal_(self.register_tokens, std=self.options.register_std, generator=generator)
        nn.init.zeros_(self.mask_token)
        self.init_stem(generator)
        first = (self.norm_pre,) if self.options.pre_norm else ()
        head = (self.head,) if self.options.num_classes else ()
        for module in (*first, *self.blocks.modules(), self.norm, *head):
            if isinstance(module, nn.Linear):
                self.init_linear(module, generator)
            elif isinstance(module, (nn.LayerNorm, LayerScale)):
                module.reset_parameters()
            elif isinstance(module, ChannelScale):
                module.reset_parameters(generator)

    def init_linear(self, linear: nn.Linear, generator: torch.Generator | None) -> None:
        """Starting value of a linear layer: `options.init`, bias 0."""
        if self.options.init == "xavier":
            nn.init.xavier_uniform_(linear.weight, generator=generator)
        else:
            nn.init.trunc_normal_(linear.weight, std=self.options.init_std, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    # ---- forward

    @overload
    def forward(self, images: Tensor, masks: Tensor | None = None) -> Features: ...

    @overload
    def forward(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]: ...

    def forward(
        self, images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Features after the final norm: of images [b 3 H W], or of a list of such groups in one pass.

        A mask [b N] (True = replaced by the mask token, N row-major) may go with each group.

        Raises:
            ValueError: a side that is no multiple of `stride`, or a mask of another shape than the patch grid.
        """
        if isinstance(images, Tensor):
            assert masks is None or isinstance(masks, Tensor)
            return self._forward_groups([images], [masks])[0]
        assert not isinstance(masks, Tensor)
        return self._forward_groups(images, masks)

    def logits(self, features: Features) -> Float[Tensor, "b classes"]:
        """Class scores of the supervised head, from the class token. Raises ValueError if there is no head."""
        if not self.options.num_classes:
            raise ValueError("this backbone has no supervised head: its weights came without one")
        return cast(Tensor, self.head(features.cls))

    def tokens(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Float[Tensor, "b T D"]]:
        """Tokens [cls | registers | patches] of every group after the last block, before the final norm."""
        x, groups, _ = self._embed(images, masks)
        return unpack(self._run_blocks(x, groups, ())[0], groups)

    def before_and_after_norm(self, images: Float[Tensor, "b 3 H W"]) -> tuple[Features, Features]:
        """Features of the last block, before the final norm (where artifacts show) and after it."""
        x, groups, grids = self._embed([images], None)
        tokens = unpack(self._run_blocks(x, groups, ())[0], groups)[0]
        return self.split(tokens, grids[0], norm=False), self.split(tokens, grids[0])

    def split(self, tokens: Float[Tensor, "b T D"], grid: Grid, *, norm: bool = True) -> Features:
        """Tokens as Features, through the final norm unless told otherwise."""
        width = tokens.shape[-1]
        if width == self.embed_dim:
            x = self.norm(tokens) if norm else tokens
        else:  # inside the last group of a dense trunk
            x = tokens
            if norm:
                x = F.layer_norm(x, (width,), self.norm.weight[:width], self.norm.bias[:width], self.norm.eps)
            x = F.pad(x, (0, self.embed_dim - width))
        first = 1 + self.num_registers
        return Features(x[:, 0], x[:, 1:first], x[:, first:].unflatten(1, grid))

    def last_blocks(
        self, images: Float[Tensor, "b 3 H W"], num: int | Sequence[int], *, norm: bool = True
    ) -> list[Features]:
        """Features after each of the last `num` blocks, or after the blocks with the listed indices, earliest first.

        Dense blocks append channels: earlier features hold zeros where later blocks will write. They can be read after
        the blocks of the last group, whose channels are still the first ones at the end.

        Raises:
            ValueError: more blocks than there are or can be read, or an index outside 0 .. num_blocks - 1.
        """
        wanted = range(self.num_blocks - num, self.num_blocks) if isinstance(num, int) else sorted(set(num))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_blocks:
            raise ValueError(f"blocks {num} asked for; this model has {self.num_blocks} (indices from 0)")
        if wanted[0] < self.first_readable_block:
            raise ValueError(
                f"blocks {num} asked for; of this dense trunk, those from {self.first_readable_block} to "
                f"{self.num_blocks - 1} can be read: the channels of earlier ones are gone"
            )
        x, groups, grids = self._embed([images], None)
        states = self._run_blocks(x, groups, wanted, stop=wanted[-1] + 1)[1]
        return [self.split(unpack(state, groups)[0], grids[0], norm=norm) for state in states]

    def attention_inputs(
        self, images: Float[Tensor, "b 3 H W"], block: int = -1
    ) -> tuple[Float[Tensor, "b A T d"], Float[Tensor, "b A T d"], Float[Tensor, "b A T d"]]:
        """Queries, keys and values, biases included, that the attention of one block works on, by head.

        Tokens are [cls | registers | patches], patches row-major; queries are not yet divided by sqrt(d). Blocks after
        `block` (from 0; -1 is the last) are not run.

        Raises:
            ValueError: an image as a call, a block that is not there, or a dense trunk's transition, which has none.
        """
        index = block + self.num_blocks if block < 0 else block
        if not 0 <= index < self.num_blocks:
            raise ValueError(
                f"block {block} asked for; this model has {self.num_blocks} (indices from 0, or from -1 down)"
            )
        layer = self.blocks[index]
        if isinstance(layer, Transition):
            raise ValueError(f"block {block} of this dense trunk is a transition between groups: it has no attention")
        x, groups, _ = self._embed([images], None)
        for i, earlier in enumerate(self.blocks[:index]):
            attend = self._attend(x, groups, cast(int, earlier.head_dim))
            x = earlier(x, groups, attend, self._draw(i, x, groups))
        chosen = cast(Block, layer)
        qkv = unpack(chosen.attn.project(chosen.norm1(x)), groups)[0]
        by_head = qkv.unflatten(-1, (3, chosen.attn.num_heads, chosen.head_dim))
        q, k, v = by_head.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def positions(self, grid: Grid) -> Float[Tensor, "1 1+h*w D"]:
        """The position table for a patch grid, the class token's row first."""
        o = self.options
        if o.positions == "sinusoid":
            count = 1 + grid[0] * grid[1]
            same = grid == self.native_grid
            return self.pos_embed if same else sinusoid_positions(count, o.embed_dim).to(self.pos_embed)
        return resize_positions(
            self.pos_embed, self.native_grid, grid, mode=o.pos_interpolation, offset=o.pos_offset,
            antialias=o.pos_antialias,
        )  # fmt: skip

    def _forward_groups(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> list[Features]:
        x, groups, grids = self._embed(images, masks)
        x = self.norm(self._run_blocks(x, groups, ())[0])  # one norm over all groups
        return [self.split(part, grid, norm=False) for part, grid in zip(unpack(x, groups), grids, strict=True)]

    def _embed(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[Float[Tensor, "T D"], Groups, list[Grid]]:
        """Packed input tokens of all groups, as the first block takes them."""
        if not len(images):
            raise ValueError("no images: pass a tensor [b 3 H W] or a list of at least one")
        masks = [None] * len(images) if masks is None else masks
        if len(masks) != len(images):
            raise ValueError(f"{len(images)} groups of images but {len(masks)} masks; use None for a group without")
        sequences, grids = [], []
        for group, mask in zip(images, masks, strict=True):
            self._check(group, mask)
            patches, grid = self.tokenize(group, mask)
            sequences.append(self._assemble(patches, grid))
            grids.append(grid)
        x, packed = pack(sequences)
        return self.norm_pre(x) if self.options.pre_norm else x, packed, grids

    def _assemble(self, patches: Float[Tensor, "b N D"], grid: Grid) -> Float[Tensor, "b T D"]:
        """[cls | registers | patches]: cls and patches carry a position, registers do not."""
        position = self.positions(grid)
        batch = patches.shape[0]
        parts = [(self.cls_token + position[:, :1]).expand(batch, -1, -1)]
        if self.num_registers:
            parts.append(self.register_tokens.expand(batch, -1, -1))
        parts.append(patches + position[:, 1:])
        return torch.cat(parts, dim=1)

    def _run_blocks(
        self, x: Float[Tensor, "T D"], groups: Groups, collect: Sequence[int], *, stop: int | None = None
    ) -> tuple[Float[Tensor, "T D"], list[Float[Tensor, "T D"]]]:
        """The tokens after the last block, or after the first `stop`, and those after each block in `collect`."""
        states = []
        for i, block in enumerate(self.blocks[:stop]):
            attend = self._attend(x, groups, cast(int, block.head_dim))
            x = block(x, groups, attend, self._draw(i, x, groups))
            if self._observer is not None:
                self._observer(i, x, groups)
            if i in collect:
                states.append(x)
        return x, states

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """While open, `observer(block, tokens, groups)` is shown the packed tokens [T D] after every block (from 0),
        before the final norm, of every pass through all blocks. It runs between the blocks, outside of what is
        compiled or computed again, and must leave the tokens as they are. Raises ValueError inside another one."""
        if self._observer is not None:
            raise ValueError("this backbone is observed already")
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def _attend(self, x: Tensor, groups: Groups, head_dim: int) -> Attend:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        choose = choose_attention.__wrapped__ if torch.compiler.is_compiling() else choose_attention  # tracers warn
        return choose(self.options.attention, x.device, dtype, head_dim, len(groups)).attend

    def _draw(self, block: int, x: Tensor, groups: Groups) -> tuple[BranchDrop | None, BranchDrop | None]:
        rate = self.drop_rates[block]
        if not self.training or rate == 0:
            return None, None
        attention, feed_forward = (draw_drop(groups, rate, device=x.device, dtype=x.dtype) for _ in range(2))
        return attention, feed_forward

    def _check(self, images: Tensor, mask: Tensor | None) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float [b 3 H W], not {images.dtype} {list(images.shape)}")
        for name, side in (("height", images.shape[2]), ("width", images.shape[3])):
            if side % self.stride or not side:
                raise ValueError(f"image {name} {side} is no multiple of {self.stride}; {_nearest(side, self.stride)}")
        expected = (images.shape[0], images.shape[2] // self.stride * (images.shape[3] // self.stride))
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != expected):
            raise ValueError(
                f"mask must be bool {list(expected)} for these images, not {mask.dtype} {list(mask.shape)}"
            )


def _nearest(side: int, stride: int) -> str:
    below = side // stride * stride
    return f"use {below} or {below + stride}" if below else f"use {stride}"

"""The DPT head: four blocks reassembled into maps of four sizes and fused from coarse to fine (Ranftl et al. 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from quietvit_eval.depth.heads import expected_depth, middle
from quietvit_eval.depth.options import DPT_BLOCKS, DepthOptions

WIDTH = 256  # channels of every fused map (Ranftl et al. 2021; DINOv2)
NARROW = 32  # channels before the last layer (Ranftl et al. 2021)


class Reassemble(nn.Module):
    """Patches and [CLS] of one block, [B, 2D, h, w] -> [B, C, s h, s w]."""

    def __init__(self, embed_dim: int, channels: int, scale: float) -> None:
        super().__init__()
        self.readout = nn.Conv2d(2 * embed_dim, embed_dim, 1)
        self.project = nn.Conv2d(embed_dim, channels, 1)
        self.resample: nn.Module
        if scale > 1:
            self.resample = nn.ConvTranspose2d(channels, channels, int(scale), stride=int(scale))
        elif scale < 1:
            self.resample = nn.Conv2d(channels, channels, 3, stride=round(1 / scale), padding=1)
        else:
            self.resample = nn.Identity()
        self.widen = nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "B 2D h w"]) -> Float[Tensor, "B 256 sh sw"]:
        out: Tensor = self.widen(self.resample(self.project(F.gelu(self.readout(x)))))
        return out


class ResidualUnit(nn.Module):
    """x + two 3 x 3 convolutions, each after a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "B 256 h w"]) -> Float[Tensor, "B 256 h w"]:
        out: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return out


class Fusion(nn.Module):
    """The map so far plus, but for the first, a finer level; refined, brought to the next size and mixed."""

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self.skip = ResidualUnit() if adds else None
        self.refine = ResidualUnit()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(
        self, x: Float[Tensor, "B 256 h w"], level: Float[Tensor, "B 256 h w"] | None, size: tuple[int, int]
    ) -> Float[Tensor, "B 256 H W"]:
        if self.skip is not None:
            x = x + self.skip(level)
        out: Tensor = self.mix(_to(self.refine(x), size))
        return out


class DptHead(nn.Module):
    """Feature maps of 4 blocks with [CLS] -> metres at 8 times the patch grid, 16 times when regressed.

    Widths D/8, D/4, D/2 and D at 4, 2, 1 and 1/2 times the patch grid, as DINOv2 has them. Parameters, with W = 256 and
    s = 15 D / 8 the sum of the widths: readouts 4 (2 D^2 + D); projections D s + s; resampling 16 (D/8)^2 + 4 (D/4)^2 +
    9 D^2 + D/8 + D/4 + D; to the common width 9 W s; fusion 14 convolutions of 9 W^2 and 4 of W^2 + W; a last
    9 W^2 + W; then 9 W bins + bins, or regressed 9 W (W/2) + W/2 + 9 (W/2) 32 + 32 + 33. In all 14.2 million for
    D = 384 with 256 bins.

    Maps are interpolated with align_corners=False throughout, unlike the originals, so that nothing is shifted.
    """

    def __init__(self, embed_dim: int, options: DepthOptions) -> None:
        super().__init__()
        if embed_dim % 8:
            raise ValueError(f"depth: a DPT head needs features whose width is a multiple of 8, not {embed_dim}")
        self.options = options
        scales = (4, 2, 1, 0.5)
        self.levels = nn.ModuleList(
            Reassemble(embed_dim, embed_dim * 2**i // 8, scale) for i, scale in enumerate(scales)
        )
        self.fusions = nn.ModuleList(Fusion(adds=i > 0) for i in range(DPT_BLOCKS))
        self.last = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.out: nn.Module
        if options.bins:
            self.out = nn.Conv2d(WIDTH, options.bins, 3, padding=1)
        else:
            final = nn.Conv2d(NARROW, 1, 1)
            nn.init.constant_(final.bias, middle(options))  # type: ignore[arg-type]
            self.out = nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(WIDTH // 2, NARROW, 3, padding=1),
                nn.ReLU(),
                final,
            )

    def forward(self, maps: Float[Tensor, "B 8D h w"]) -> Float[Tensor, "B H W"]:
        """Metres; `maps` as feature_maps(..., with_cls=True) gives them, earliest block first."""
        levels = [level(x) for level, x in zip(self.levels, maps.chunk(DPT_BLOCKS, dim=1), strict=True)]
        levels.reverse()
        sizes = [(x.shape[-2], x.shape[-1]) for x in levels[1:]]
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
        x = levels[0]
        for fusion, level, size in zip(self.fusions, levels, sizes, strict=True):
            x = fusion(x, level, size)
        logits = self.out(F.relu(self.last(x)))
        return expected_depth(logits, min_depth=self.options.min_depth, max_depth=self.options.max_depth)


def _to(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

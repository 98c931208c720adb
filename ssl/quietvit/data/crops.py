"""Multi-crop augmentation: 2 large and 8 small random views of one image, uint8 in, uint8 out.

The distribution is that of DINOv2's DataAugmentationDINO (reference/training.md 5.1); the pixels are computed
faster: no float image, antialiased resizing straight from the decoded bytes, fused colour passes (color.py).
What is random is drawn apart from what is computed: `MultiCrop.draw` turns a generator into parameters,
`MultiCrop.render` turns an image and parameters into pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
from jaxtyping import UInt8

from quietvit.data.blur import gaussian_blur
from quietvit.data.color import Jitter, recolor, solarize
from quietvit.data.resample import NUM_TRIES, Box, draw_box, resize_box

__all__ = ["BlurChoice", "MultiCrop", "View"]

BlurChoice = Literal["reference_as_run", "paper", "none"]

# Blur probability of the first global view, the other global views, the local views (reference/training.md 5.1).
_BLUR: dict[str, tuple[float, float, float]] = {
    "reference_as_run": (0.0, 0.9, 0.5),
    "paper": (1.0, 0.1, 0.5),
    "none": (0.0, 0.0, 0.0),  # for views of a few dozen pixels, where blur leaves nothing
}

# Columns of the table of uniform numbers from which one view is made. Every view takes the whole row, whatever comes
# of it, so that changing one probability or strength leaves all other draws of the image as they were.
_AREAS = slice(0, NUM_TRIES)
_ASPECTS = slice(NUM_TRIES, 2 * NUM_TRIES)
_TOP, _LEFT, _FLIP, _JITTER = range(2 * NUM_TRIES, 2 * NUM_TRIES + 4)
_ORDER = slice(_JITTER + 1, _JITTER + 5)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLURRED, _SIGMA, _SOLARIZE, _NUM_COLUMNS = range(
    _JITTER + 5, _JITTER + 14
)


class View(NamedTuple):
    """Everything that is random in one view; `render` needs nothing else."""

    size: int  # side of the view in pixels
    box: Box  # what part of the image it shows
    flip: bool  # mirrored left to right
    jitter: Jitter | None  # None: colours left alone
    grayscale: bool
    blur_sigma: float | None  # in pixels of the view; None: not blurred
    solarize: bool


class _Kind(NamedTuple):
    """What distinguishes first global, other global and local views."""

    size: int
    scale: tuple[float, float]
    blur_prob: float
    solarize_prob: float


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Random views of an image, as DINOv2 makes them. Picklable; holds no random state.

    Raises ValueError for sizes, ranges or probabilities that make no sense.
    """

    global_size: int = 224  # DINOv2, ViT-L/16 "short" recipe
    local_size: int = 96  # the same; 98 for patches of 14
    num_global: int = 2  # DINOv2
    num_local: int = 8  # DINOv2
    global_scale: tuple[float, float] = (0.32, 1.0)  # DINOv2; shares of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)  # DINOv2
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop; width / height
    flip_prob: float = 0.5  # DINOv2
    jitter_prob: float = 0.8  # DINOv2, and the four strengths
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    color_strength: float = 1.0  # multiplies the four strengths; 1 = DINOv2
    grayscale_prob: float = 0.2  # DINOv2
    # DINOv2 asks for blur with probability 1.0 / 0.1 / 0.5 (first global, other global, local: "paper"), but its code
    # inverts them, and the released models were trained with 0.0 / 0.9 / 0.5. Scores are compared with those models,
    # so what ran is the default.
    blur: BlurChoice = "reference_as_run"
    blur_kernel: int = 9  # DINOv2; in pixels of the view. Narrow it, and the sigmas, for views of a few dozen pixels.
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # DINOv2
    solarize_prob: float = 0.2  # DINOv2; not in the first global view, nor in local ones
    solarize_threshold: int = 128  # DINOv2
    reduced_decode: bool = True  # whether large photographs may be decoded at a reduced scale, see `min_side`
    _kinds: tuple[_Kind, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        first, other, local = _BLUR[self.blur]
        kinds = [_Kind(self.global_size, self.global_scale, first, 0.0)]
        kinds += [_Kind(self.global_size, self.global_scale, other, self.solarize_prob)] * (self.num_global - 1)
        kinds += [_Kind(self.local_size, self.local_scale, local, 0.0)] * self.num_local
        object.__setattr__(self, "_kinds", tuple(kinds))

    def _check(self) -> None:
        if self.num_global < 1 or self.num_local < 0:
            raise ValueError(
                f"num_global must be at least 1 and num_local at least 0: {self.num_global, self.num_local}"
            )
        if min(self.global_size, self.local_size) < 1:
            raise ValueError(f"global_size and local_size must be positive: {self.global_size, self.local_size}")
        if self.blur not in get_args(BlurChoice):
            raise ValueError(f"blur must be one of {get_args(BlurChoice)}, not {self.blur!r}")
        for name in ("global_scale", "local_scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                raise ValueError(f"{name} must be (low, high), 0 < low <= high, scales at most 1: got {(low, high)}")
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "solarize_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if min(self.brightness, self.contrast, self.saturation, self.hue, self.color_strength) < 0:
            raise ValueError("brightness, contrast, saturation, hue and color_strength must not be negative")
        if self.hue * self.color_strength > 0.5:
            raise ValueError(f"hue * color_strength is {self.hue * self.color_strength}: at most 0.5, half a turn")
        smallest = min(self.global_size, self.local_size) if self.num_local else self.global_size
        if self.blur_kernel < 1 or self.blur_kernel % 2 == 0 or self.blur_kernel // 2 >= smallest:
            raise ValueError(f"blur_kernel must be odd and at most {2 * smallest - 1} here, not {self.blur_kernel}")

    @property
    def min_side(self) -> int | None:
        """Shortest side in pixels to which a decoder may reduce an image; None: never reduce.

        Rule: the smallest crop that can be drawn must, at the mean aspect ratio of 1, still have as many pixels as
        its view, so that reduction never means enlarging again. A crop of area share s has the side
        sqrt(s H W) >= sqrt(s) * shorter side, hence size / sqrt(lowest s), the larger of global and local: 430 by
        default, where a photograph of 3000 x 4000 is decoded at a quarter of its sides. On sharp photographs right at
        that limit the views differ from full decoding by 0.9 grey levels on average.
        """
        if not self.reduced_decode:
            return None
        return max(math.ceil(kind.size / math.sqrt(kind.scale[0])) for kind in self._kinds)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[View, ...]:
        """Parameters of all views of an image of `height` x `width` pixels: global ones first, then local ones.

        Takes one table rng.random((views, 36)) and nothing else: always the same amount. Columns in order: 10 areas
        and 10 aspects (tries of the box), top, left, flip, jitter or not, 4 sort keys (order of brightness, contrast,
        saturation, hue), their 4 factors, grayscale, blurred or not, sigma, solarize. An event of probability p
        happens if its number is below p.
        """
        table = rng.random((len(self._kinds), _NUM_COLUMNS)).tolist()
        return tuple(self._view(kind, row, height, width) for kind, row in zip(self._kinds, table, strict=True))

    def _view(self, kind: _Kind, row: list[float], height: int, width: int) -> View:
        box = draw_box(
            height,
            width,
            scale=kind.scale,
            ratio=self.ratio,
            areas=row[_AREAS],
            aspects=row[_ASPECTS],
            place=(row[_TOP], row[_LEFT]),
        )
        low, high = self.blur_sigma
        return View(
            size=kind.size,
            box=box,
            flip=row[_FLIP] < self.flip_prob,
            jitter=self._jitter(row) if row[_JITTER] < self.jitter_prob else None,
            grayscale=row[_GRAY] < self.grayscale_prob,
            blur_sigma=low + row[_SIGMA] * (high - low) if row[_BLURRED] < kind.blur_prob else None,
            solarize=row[_SOLARIZE] < kind.solarize_prob,
        )

    def _jitter(self, row: list[float]) -> Jitter:
        keys, strength = row[_ORDER], self.color_strength
        return Jitter(
            order=tuple(sorted(range(4), key=keys.__getitem__)),
            factors=(
                _factor(self.brightness * strength, row[_BRIGHTNESS]),
                _factor(self.contrast * strength, row[_CONTRAST]),
                _factor(self.saturation * strength, row[_SATURATION]),
                (2.0 * row[_HUE] - 1.0) * self.hue * strength,
            ),
        )

    def render(self, image: UInt8[np.ndarray, "H W 3"], view: View) -> UInt8[np.ndarray, "S S 3"]:
        """Pixels of one view: box, flip, colours, blur, solarize, in the reference's order."""
        out = resize_box(image, view.box, view.size)
        if view.flip:
            out = cv2.flip(out, 1)
        if view.jitter is not None or view.grayscale:
            out = recolor(out, view.jitter, grayscale=view.grayscale)
        if view.blur_sigma is not None:
            out = gaussian_blur(out, view.blur_sigma, self.blur_kernel)
        if view.solarize:
            out = solarize(out, self.solarize_threshold)
        return out

    def __call__(
        self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> tuple[list[UInt8[np.ndarray, "S S 3"]], list[UInt8[np.ndarray, "s s 3"]]]:
        """Global and local views of an RGB image. All that is random comes from `rng` (see `draw`).

        Raises ValueError if `image` is not uint8 of shape [H W 3].
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(
                f"an image must be uint8 [H W 3], got {image.dtype} {list(image.shape)}: convert it to RGB"
            )
        if not (image.flags.writeable and image.flags.c_contiguous):
            image = image.copy()  # what PIL hands out is read-only, which torch cannot share
        views = [self.render(image, view) for view in self.draw(image.shape[0], image.shape[1], rng)]
        return views[: self.num_global], views[self.num_global :]


def _factor(strength: float, u: float) -> float:
    """Uniform in [max(0, 1 - strength), 1 + strength] (torchvision's ColorJitter)."""
    low = max(0.0, 1.0 - strength)
    return low + u * (1.0 + strength - low)

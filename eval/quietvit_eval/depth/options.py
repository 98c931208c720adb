"""Settings of the depth task, and what a size asked for by the user makes of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

NYU_FRAME = (480, 640)  # rows and columns of NYU Depth v2
CROP_SHARE = 416 / 480  # of the height, DINOv2's training crop on NYU
DPT_BLOCKS = 4  # Ranftl et al. 2021
TEST_ONLY = ("eval_crop", "flip_test", "align", "pictures")  # a trained head is the same whatever these are
CHOICES = {
    "head": ("linear", "dpt"),
    "train_crop": ("nyu", "none"),
    "decay": ("cosine", "poly", "one_cycle", "none"),
    "eval_crop": ("eigen", "garg", "none"),
}
FLAGS = ("norm", "with_cls", "batch_norm", "flip", "color", "color_quirk", "flip_test", "align", "keep_padding")


@dataclass(frozen=True)
class DepthOptions:
    """Settings of the task; defaults are DINOv2's linear head on NYU unless said otherwise.

    DINOv2's configurations were released for the Monocular-Depth-Estimation-Toolbox. Raises ValueError for values that
    cannot be.
    """

    head: str = "linear"  # or "dpt"
    layers: int = 1  # last block, or as many at even distances; 4 for linear-4 and DPT
    layer_indices: tuple[int, ...] | None = None  # blocks by number instead; DINOv2's L: 4, 11, 17, 23
    norm: bool = False  # final norm on the features; DINOv3: true
    with_cls: bool = True  # [CLS] beside every patch; DINOv3: false
    batch_norm: bool = False  # of the linear head's input; DINOv3: true
    upsample: int = 4  # of the linear head's patch grid, before logits become metres; DINOv3: 1
    min_depth: float = 1e-3  # metres, of the bins and of pixels that are scored
    max_depth: float = 10.0  # metres; KITTI: 80
    bins: int = 256  # 0: metres are regressed, as DINOv2's DPT heads do
    resize: int | None = None  # shorter side that images and training targets are brought to first; None: their own
    train_crop: str = "nyu"  # NYU's frame is cut off images of 480 x 640: rows 45:472, columns 43:608
    crop: tuple[int, int] = (416, 544)  # rows, columns; DINOv3 alike
    rotate: float = 2.5  # degrees at the most, either way, of every second image
    flip: bool = True  # of every second image
    color: bool = True  # gamma, brightness and tint of every second image
    gamma: float = 0.1  # exponents 1 +- gamma; DINOv3: 0
    brightness: float = 0.25  # factors 1 +- brightness; DINOv3 alike
    tint: float = 0.1  # factors 1 +- tint of each channel; DINOv3: 0
    color_quirk: bool = False  # the original's gamma on 0..255, which scales brightness by 0.57 to 1.74; ours: on 0..1
    batch_size: int = 16  # over all processes; DINOv2: 2 on each of 8 GPUs
    steps: int = 38_400
    lr: float = 1e-4  # DINOv3: 3e-4
    betas: tuple[float, float] = (0.9, 0.999)  # DINOv3: 0.9, 0.99
    weight_decay: float = 0.01  # DINOv3: 1e-4
    clip: float = 35.0  # greatest L2 norm of the gradient; DINOv3 alike
    warmup_steps: int = 12_800  # DINOv3 alike
    warmup_factor: float = 1e-3
    decay: str = "cosine"  # DINOv3: "one_cycle"
    sig_warmup: int = 100  # steps in which SigLoss leaves the variance out
    gradient_weight: float = 0.5  # of the corrected gradient loss; the original's was 0 in effect, DINOv3's is none
    eval_crop: str = "eigen"  # rows 45:471, columns 41:601 of 480 x 640; "garg": KITTI; "none"
    flip_test: bool = True  # mean of the predictions for the image and its mirror image
    align: bool = False  # scale and shift by least squares on each test image
    keep_padding: bool = False  # true: the padded grid is squeezed into the image, as the originals do
    pictures: int = 8  # test images drawn (ours)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"depth: {name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"depth: {name} is true or false, not {getattr(self, name)!r}")
        for name in ("layers", "upsample", "batch_size", "steps"):
            _need(self, name, int, lambda v: v >= 1, "a whole number from 1")
        for name in ("warmup_steps", "sig_warmup", "pictures"):
            _need(self, name, int, lambda v: v >= 0, "a whole number from 0")
        for name in ("lr", "clip", "min_depth", "max_depth"):
            _need(self, name, (int, float), lambda v: 0 < v < float("inf"), "a number above 0")
        for name in ("weight_decay", "gradient_weight", "rotate"):
            _need(self, name, (int, float), lambda v: 0 <= v < float("inf"), "a number from 0")
        for name in ("gamma", "brightness", "tint", "warmup_factor"):
            _need(self, name, (int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1")
        _need(self, "bins", int, lambda v: v == 0 or v >= 2, "0 (regression) or a whole number from 2")
        _need(self, "crop", tuple, lambda v: _whole(v, 2) and min(v) >= 1, "two whole numbers, rows and columns")
        _need(
            self,
            "betas",
            tuple,
            lambda v: len(v) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in v),
            "two numbers in [0, 1)",
        )
        if self.resize is not None:
            _need(self, "resize", int, lambda v: v >= 1, "a whole number of pixels")
        if self.layer_indices is not None:
            _need(self, "layer_indices", tuple, lambda v: _whole(v) and len(v) > 0, "a list of block numbers")
        if self.min_depth >= self.max_depth:
            raise ValueError(f"depth: needs 0 < min_depth < max_depth, not {self.min_depth} and {self.max_depth}")
        if self.head == "dpt" and (self.num_blocks != DPT_BLOCKS or not self.with_cls):
            raise ValueError("depth: a DPT head reads 4 blocks with their [CLS]: set layers=4 and with_cls=true")

    @property
    def num_blocks(self) -> int:
        return self.layers if self.layer_indices is None else len(self.layer_indices)

    def as_protocol(self, leave_out: tuple[str, ...] = ("pictures",)) -> dict[str, Any]:
        """The settings as JSON has them."""
        found = {k: v for k, v in asdict(self).items() if k not in leave_out}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def at_size(options: DepthOptions, image_size: int | None, stride: int) -> DepthOptions:
    """The options for a size asked for by the user: that shorter side, and a square training crop.

    The crop's side is 416/480 of the size, as the height of DINOv2's crop is of NYU's, in whole patches: it fits into
    NYU's images after their frame is cut off. Raises ValueError for a size below one patch.
    """
    if image_size is None:
        return options
    if image_size < stride:
        raise ValueError(f"depth: an image size of {image_size} is less than one patch of {stride} pixels")
    side = max(1, round(image_size * CROP_SHARE / stride)) * stride
    return replace(options, resize=image_size, crop=(side, side))


def _need(options: DepthOptions, name: str, kind: Any, holds: Any, what: str) -> None:
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
        raise ValueError(f"depth: {name} is {what}, not {value!r}")


def _whole(values: tuple[Any, ...], count: int | None = None) -> bool:
    return (count is None or len(values) == count) and all(type(v) is int for v in values)

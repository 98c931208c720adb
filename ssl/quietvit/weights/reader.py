"""The Python face: `quietvit.load` and the frozen model that it gives, which reads features of any layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, cast, overload

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from quietvit.contracts import Features
from quietvit.data.center import center_view
from quietvit.data.decode import decode_file, to_pixels
from quietvit.weights import extractor
from quietvit.weights.extractor import BackboneExtractor

__all__ = ["KINDS", "FeatureReader", "load"]

KINDS = ("cls", "patches", "registers", "all")
Layers = int | Sequence[int] | None
Output = TypeVar("Output", Tensor, Features, list[Tensor], list[Features], Any)


class FeatureReader(nn.Module, BackboneExtractor, Generic[Output]):
    """A frozen backbone as a module: normalised images [B 3 H W] in, what it was loaded for out.

    A single layer (`layers` None: the last block; or an int) gives one value, a sequence of layers a list of values in
    the order asked for. A value is, by `kind`:

        "cls"        [B D]
        "patches"    [B D h w], a dense map with channels first, as convolutional heads take it
        "registers"  [B R D]
        "all"        `quietvit.contracts.Features` with all three; there `patches` is [B h w D], channels last

    `norm` passes every layer through the final norm. With kind "all" and a single layer this is a
    `contracts.Extractor`. Attributes `mean`, `std`, `image_size`, `stride`, `embed_dim`, `num_blocks`, `num_classes`,
    `meta` and the methods of `BackboneExtractor`, by which the tasks of quietvit_eval score, are there for any kind.

    Frozen: parameters require no gradient, drop path stays off under `train()`, and calls run under `torch.no_grad`.
    Features may be used in autograd, for heads trained on them, unless the caller is in `torch.inference_mode`. To
    train the backbone itself, take `.backbone`.

    Images move to the reader's device. Features are fp32: under `bf16` (autocast to bfloat16, on any device), and also
    after `.bfloat16()`, `.half()` or `.double()`, which change the weights themselves, and so their hash.
    """

    def __init__(
        self,
        backbone: nn.Module,
        meta: dict[str, Any],
        *,
        device: torch.device,
        bf16: bool = False,
        layers: Layers = None,
        kind: str = "all",
        norm: bool = True,
    ) -> None:
        """As `BackboneExtractor`, and what to read. Raises ValueError for layers or a kind that cannot be read."""
        nn.Module.__init__(self)
        BackboneExtractor.__init__(self, backbone, meta, device=device)
        self.bf16 = bf16
        self.kind, self.norm = kind, norm
        self.single = layers is None or not isinstance(layers, Sequence)
        self.layers = _layer_indices(layers, self.num_blocks, cast(int, backbone.first_readable_block))
        _check_kind(kind, cast(int, backbone.num_registers))
        self.eval()

    if TYPE_CHECKING:

        def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Output:  # type: ignore[override]  # by kind and layers
            ...

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Output:
        """See the class. Raises ValueError for images that are not float [B 3 H W], and for sides that are no multiple
        of `stride` (the message names the nearest; `preprocess` makes images that fit)."""
        if self.norm and self.layers == (self.num_blocks - 1,):
            by_layer = {self.layers[0]: self._last(images)}
        else:
            wanted = sorted(set(self.layers))
            by_layer = dict(zip(wanted, self.blocks(images, wanted, norm=self.norm), strict=True))
        values = [self._select(by_layer[layer]) for layer in self.layers]
        return cast(Output, values[0] if self.single else values)

    def last_blocks(self, images: Float[Tensor, "B 3 H W"], num: int) -> Sequence[Features]:
        """As `BackboneExtractor.last_blocks`, whatever `layers` and `kind` are."""
        return super().last_blocks(self._cast(images), num)

    def blocks(self, images: Float[Tensor, "B 3 H W"], which: Sequence[int], *, norm: bool) -> Sequence[Features]:
        """As `BackboneExtractor.blocks`, whatever `layers` and `kind` are."""
        return super().blocks(self._cast(images), which, norm=norm)

    def attention_inputs(
        self, images: Float[Tensor, "B 3 H W"], block: int = -1
    ) -> tuple[Float[Tensor, "B A T d"], Float[Tensor, "B A T d"], Float[Tensor, "B A T d"]]:
        """As `BackboneExtractor.attention_inputs`, whatever `layers` and `kind` are."""
        return super().attention_inputs(self._cast(images), block)

    def classify(self, cls: Float[Tensor, "B D"]) -> Float[Tensor, "B classes"]:
        """As `BackboneExtractor.classify`; fp32."""
        return super().classify(cls.to(self.dtype)).float()

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        """As `BackboneExtractor.logits`, whatever `layers` and `kind` are."""
        return self.classify(self._last(images).cls)

    def identity(self) -> dict[str, Any]:
        """As `BackboneExtractor.identity`; "precision" also tells weights that were cast."""
        weights = {} if self.dtype == torch.float32 else {"precision": f"{self.dtype} weights".removeprefix("torch.")}
        return {**super().identity(), **weights}

    def preprocess(
        self, image: str | Path | Image.Image | UInt8[np.ndarray, "H W 3"], *, size: int | None = None,
        whole: bool = False,
    ) -> Float[Tensor, "1 3 h w"]:  # fmt: skip
        """One picture as this model's input, normalised, on the CPU; batches are `torch.cat` of several.

        Files and Pillow images are decoded by the rules of `quietvit.data.decode` (EXIF orientation, transparency on
        white, 16 bits, ...). The shorter side is resized to `size` pixels (bicubic, antialiased; default: the model's
        `image_size`) and the centre `size` x `size` is cut out, as in evaluation. With `whole` the longer side is kept
        in proportion, and cut about the centre to the multiple of `stride` below it: at most `stride` - 1 pixels go.

        Raises ValueError for a size that is no multiple of `stride`, or an array that is not uint8 [H W 3];
        `quietvit.data.decode.UnreadableImage` for a file that is missing or damaged.
        """
        side = self.image_size if size is None else size
        if side < 1 or side % self.stride:
            below = side // self.stride * self.stride
            use = f"{below} or {below + self.stride}" if below > 0 else f"{self.stride}"
            raise ValueError(
                f"size {side} is no multiple of {self.stride}, the side of this model's patches; use {use}"
            )
        pixels = _read_pixels(image)
        view = _whole_view(pixels, side, self.stride) if whole else center_view(pixels, side)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return ((torch.from_numpy(view).permute(2, 0, 1) / 255 - mean) / std)[None]

    @property
    def device(self) -> torch.device:
        """Where the weights are; setting it moves them, as `.to` does."""
        return cast(Tensor, self.backbone.cls_token).device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.backbone.to(device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return cast(Tensor, self.backbone.cls_token).dtype

    def train(self, mode: bool = True) -> Self:
        """Sets `training` for the sake of modules around it; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def extra_repr(self) -> str:
        """What is read."""
        return f"layers={self.layers[0] if self.single else list(self.layers)}, kind={self.kind!r}, norm={self.norm}"

    def _last(self, images: Tensor) -> Features:
        return BackboneExtractor.__call__(self, self._cast(images))

    def _cast(self, images: Tensor) -> Tensor:
        return images.to(self.dtype) if images.is_floating_point() else images  # others are refused by the backbone

    def _select(self, features: Features) -> Tensor | Features:
        if self.kind == "cls":
            return features.cls
        if self.kind == "registers":
            return features.registers
        return features if self.kind == "all" else features.patches.permute(0, 3, 1, 2).contiguous()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.__dict__.pop("_hash", None)  # the weights may be others afterwards
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _layer_indices(layers: Layers, num_blocks: int, first: int) -> tuple[int, ...]:
    """Indices from 0, in the order asked for. Raises ValueError for any that is not there or cannot be read."""
    if layers is None:
        return (num_blocks - 1,)
    asked = layers if isinstance(layers, Sequence) else [layers]
    if isinstance(layers, str | bytes) or not asked:
        raise ValueError(f"layers must be None, an int or a sequence of ints, not {layers!r}")
    found = []
    for layer in asked:
        try:
            index = operator.index(layer)
        except TypeError:
            raise ValueError(f"layers must be None, an int or a sequence of ints, not {layers!r}") from None
        if not -num_blocks <= index < num_blocks or isinstance(layer, bool):
            raise ValueError(
                f"layer {layer} of a model with {num_blocks} blocks: use 0 to {num_blocks - 1}, or -1 to {-num_blocks} "
                "from the end"
            )
        found.append(index % num_blocks)
        if found[-1] < first:
            raise ValueError(
                f"layer {layer} of a dense trunk: the channels of blocks before {first} are gone at the end; use "
                f"{first} to {num_blocks - 1}"
            )
    return tuple(found)


def _check_kind(kind: str, num_registers: int) -> None:
    if kind not in KINDS:
        near = get_close_matches(str(kind), KINDS, n=1, cutoff=0.4)
        raise ValueError(
            f"unknown kind {kind!r}" + (f", nearest: {near[0]}" if near else "") + f"; choose from {', '.join(KINDS)}"
        )
    if kind == "registers" and not num_registers:
        raise ValueError("kind 'registers', but this model has none; 'all' gives them as a tensor [B 0 D]")


def _read_pixels(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(image, str | Path):
        return decode_file(Path(image).expanduser(), str(image))
    if isinstance(image, Image.Image):
        return to_pixels(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray | Tensor) else type(image).__name__
        raise ValueError(f"a picture is a path, a Pillow image or a uint8 array [H W 3], not {given}")
    return image


def _whole_view(image: UInt8[np.ndarray, "H W 3"], size: int, stride: int) -> UInt8[np.ndarray, "h w 3"]:
    """The shorter side at `size`, the longer one in proportion, cut to a multiple of `stride` about the centre."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    if scale != 1:
        new = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))
    kept = [side // stride * stride for side in image.shape[:2]]
    top, left = ((side - keep) // 2 for side, keep in zip(image.shape[:2], kept, strict=True))
    return np.ascontiguousarray(image[top : top + kept[0], left : left + kept[1]])


_One = int | None
_Tensors = Literal["cls", "patches", "registers"]


# fmt: off
@overload
def load(
    path: Path | str, device: str = ..., *, layers: _One = ..., kind: Literal["all"] = ..., norm: bool = ...,
    bf16: bool = ..., num_heads: int | None = ..., num_registers: int = ..., activation: str | None = ...,
    mean: Sequence[float] | None = ..., std: Sequence[float] | None = ...,
) -> FeatureReader[Features]: ...
@overload
def load(
    path: Path | str, device: str = ..., *, layers: _One = ..., kind: _Tensors, norm: bool = ...,
    bf16: bool = ..., num_heads: int | None = ..., num_registers: int = ..., activation: str | None = ...,
    mean: Sequence[float] | None = ..., std: Sequence[float] | None = ...,
) -> FeatureReader[Tensor]: ...
@overload
def load(
    path: Path | str, device: str = ..., *, layers: Sequence[int], kind: Literal["all"] = ..., norm: bool = ...,
    bf16: bool = ..., num_heads: int | None = ..., num_registers: int = ..., activation: str | None = ...,
    mean: Sequence[float] | None = ..., std: Sequence[float] | None = ...,
) -> FeatureReader[list[Features]]: ...
@overload
def load(
    path: Path | str, device: str = ..., *, layers: Sequence[int], kind: _Tensors, norm: bool = ...,
    bf16: bool = ..., num_heads: int | None = ..., num_registers: int = ..., activation: str | None = ...,
    mean: Sequence[float] | None = ..., std: Sequence[float] | None = ...,
) -> FeatureReader[list[Tensor]]: ...
@overload
def load(
    path: Path | str, device: str = ..., *, layers: Layers = ..., kind: str, norm: bool = ...,
    bf16: bool = ..., num_heads: int | None = ..., num_registers: int = ..., activation: str | None = ...,
    mean: Sequence[float] | None = ..., std: Sequence[float] | None = ...,
) -> FeatureReader[Any]: ...
# fmt: on
def load(
    path: Path | str,
    device: str = "auto",
    *,
    layers: Layers = None,
    kind: str = "all",
    norm: bool = True,
    bf16: bool = False,
    num_heads: int | None = None,
    num_registers: int = 0,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FeatureReader[Any]:
    """The frozen model at `path`, as `quietvit.weights.load` finds it, reading the features that are asked for.

    Args:
        path: a run folder, a folder with `teacher.safetensors`, that file, or other people's weights. Nothing is
            downloaded and no code in a file is run.
        device: "auto" (CUDA, else Apple's MPS, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        layers: None, the last block; an index from 0, or from the end if negative; or several in a list. Layer i is
            what block i puts out. Of a dense trunk only the blocks of its last group can be read.
        kind: "cls" [B D], "patches" [B D h w], "registers" [B R D] or "all" (`contracts.Features`, whose patches are
            [B h w D]): see `FeatureReader`.
        norm: pass each layer through the final norm; False gives what the blocks put out.
        bf16: run under autocast to bfloat16, on whatever device; features come in fp32 all the same.
        num_heads, num_registers, activation, mean, std: what a file of other people's cannot tell; see
            `quietvit.weights.load`.

    Raises FileNotFoundError and ValueError as `quietvit.weights.load`; ValueError also for an unknown kind, a layer
    that is not there, and kind "registers" of a model without any.
    """
    found = extractor.load(
        path, device, num_heads=num_heads, num_registers=num_registers, activation=activation, mean=mean, std=std
    )
    return FeatureReader(
        found.backbone, found.meta, device=found.device, bf16=bf16, layers=layers, kind=kind, norm=norm
    )

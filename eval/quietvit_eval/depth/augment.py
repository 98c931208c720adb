"""Training views of an image and its depth: NYU's frame off, resize, rotation, mirroring, crop, colour."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from quietvit_eval.dense_data.pairs import Target
from quietvit_eval.depth.options import NYU_FRAME, DepthOptions

NYU_CROP = (slice(45, 472), slice(43, 608))  # inside the white frame of NYU's images (Lee et al. 2019)
HALF = 0.5  # chance of the rotation, of the mirror image and of the colours, DINOv2

Image = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class DepthAugment:
    """(image, metres, random numbers) -> views of `options.crop`, the image as bytes; unknown depth is 0.

    An image smaller than the crop is surrounded with black of unknown depth.
    """

    options: DepthOptions

    def __call__(
        self, image: Image, target: Target, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "h w 3"], Float32[np.ndarray, "h w"]]:
        o = self.options
        image, target = self.framed(image, target)
        if rng.random() < HALF and o.rotate:
            image, target = rotated(image, target, rng.uniform(-o.rotate, o.rotate))
        if rng.random() < HALF and o.flip:
            image, target = image[:, ::-1], target[:, ::-1]
        image, target = cropped(image, target, o.crop, rng)
        if rng.random() < HALF and o.color:
            gamma, brightness = 1 + o.gamma * rng.uniform(-1, 1), 1 + o.brightness * rng.uniform(-1, 1)
            factors = brightness * (1 + o.tint * rng.uniform(-1, 1, 3))
            image = recoloured(image, gamma, factors, quirk=o.color_quirk)
        return np.ascontiguousarray(image), np.ascontiguousarray(target, dtype=np.float32)

    def framed(self, image: Image, target: Target) -> tuple[Image, Target]:
        """The part to train on, at the size to train at: the scale is that of the whole image."""
        shorter = min(image.shape[:2])
        if self.options.train_crop == "nyu" and image.shape[:2] == NYU_FRAME:
            image, target = image[NYU_CROP], target[NYU_CROP]
        if self.options.resize is None or self.options.resize == shorter:
            return image, target
        scale = self.options.resize / shorter
        size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
        nearest = cv2.resize(target, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return resized(image, size), nearest


def resized(image: Image, size: tuple[int, int]) -> Image:
    """The image at (rows, columns): averaged over areas when it shrinks, else bilinear."""
    shrinks = size[0] < image.shape[0]
    out: Image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return out


def rotated(image: Image, target: Target, degrees: float) -> tuple[Image, Target]:
    """Turned counter-clockwise about the centre: the image bilinear, depth by the nearest pixel; 0 comes in."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return (
        cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=0),
        cv2.warpAffine(target, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=0),
    )


def cropped(image: Image, target: Target, crop: tuple[int, int], rng: np.random.Generator) -> tuple[Image, Target]:
    """A window at random, of both alike."""
    missing = [max(0, side - own) for side, own in zip(crop, image.shape[:2], strict=True)]
    if any(missing):
        border = [(m // 2, m - m // 2) for m in missing]
        image, target = np.pad(image, [*border, (0, 0)]), np.pad(target, border)
    top, left = (int(rng.integers(0, own - side + 1)) for own, side in zip(image.shape[:2], crop, strict=True))
    window = slice(top, top + crop[0]), slice(left, left + crop[1])
    return image[window], target[window]


def recoloured(image: Image, gamma: float, factors: Float64[np.ndarray, " 3"], *, quirk: bool) -> Image:
    """v^gamma times the factor of each channel, v in [0, 1], or in 0..255 with `quirk`; clipped, rounded to bytes."""
    values = np.arange(256.0)
    curve = values**gamma if quirk else 255 * (values / 255) ** gamma
    table = np.clip(np.rint(curve[:, None] * factors), 0, 255).astype(np.uint8)
    out: Image = np.stack([table[:, c][image[:, :, c]] for c in range(3)], axis=-1)
    return out

"""The data set `scenes`: a picture, its labels, its masks and its depth for every index, rendered when asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from quietvit.data.scenes.draws import Draws, uniforms
from quietvit.data.scenes.patterns import BACKGROUNDS, MATERIALS
from quietvit.data.scenes.render import render_scene
from quietvit.data.scenes.solids import SOLIDS

VERSION = 3  # raise it with any change that alters a picture: scores of different versions must not be compared
# Ours: train is more than the demo sees in 2.5 minutes; val and test give a k-NN standard error of about 1 point.
NUM_IMAGES = {"train": 20_000, "val": 2_000, "test": 2_000}
_SPLITS = tuple(NUM_IMAGES)
_LABEL_KEY, _PICTURE_KEY = 0, 1


@dataclass(frozen=True)
class SceneImage:
    """One rendered scene with everything known about it."""

    image: UInt8[np.ndarray, "H W 3"]
    segmentation: Int64[np.ndarray, "H W"]  # 0 floor and wall, else 1 + category of the solid seen there
    depth: Float32[np.ndarray, "H W"]  # metres along the optical axis
    labels: dict[str, int]


class Scenes:
    """Rendered scenes: a main solid of some `shape` and `material`, before a wall of some `background` family.

    Every picture is a function of (seed, split, index) alone, and the splits draw from different random streams.
    Colours, light, lens and poses are random and say nothing about the labels.

    Args:
        split: "train", "val" or "test".
        num_images: how many; a longer set begins with the pictures of a shorter one.
        image_size: side in pixels of the square pictures; the same index shows the same scene at every size.
        seed: another seed is another data set.
        category: which label of the solids the segmentation mask carries, "shape" or "material".

    Raises:
        ValueError: for an unknown split or category, or sizes below one.
    """

    name = "scenes"

    def __init__(
        self,
        split: str = "train",
        *,
        num_images: int | None = None,
        image_size: int = 64,  # ours: a nano ViT with patches of 8 sees 8 x 8 tokens
        seed: int = 0,
        category: str = "material",
    ) -> None:
        if split not in NUM_IMAGES:
            raise ValueError(f"scenes has the splits {', '.join(_SPLITS)}, not {split!r}")
        if category not in ("shape", "material"):
            raise ValueError(f"the masks of scenes carry 'shape' or 'material', not {category!r}")
        self._length = NUM_IMAGES[split] if num_images is None else num_images
        if self._length < 1 or image_size < 1 or seed < 0:
            raise ValueError(
                f"num_images {num_images} and image_size {image_size} must be positive, seed {seed} at least 0"
            )
        self.split, self.image_size, self.seed, self.category = split, image_size, seed, category
        self.classes = {"shape": list(SOLIDS), "material": list(MATERIALS), "background": list(BACKGROUNDS)}
        self._key = (seed, _SPLITS.index(split))
        draws = uniforms(*self._key, _LABEL_KEY, num=3 * self._length).reshape(-1, 3)
        self.labels = {
            name: (draws[:, k] * len(classes)).astype(np.int64)
            for k, (name, classes) in enumerate(self.classes.items())
        }
        self.classes["class"], self.labels["class"] = self.classes[HEADLINE], self.labels[HEADLINE]

    def __len__(self) -> int:
        return self._length

    def load(self, index: int, *, min_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """The picture alone. `min_side` is a hint to decoders of files and changes nothing here."""
        return self.render(index).image

    def render(self, index: int) -> SceneImage:
        """The picture with mask, depth and labels. Raises IndexError outside [0, len)."""
        if not 0 <= index < self._length:
            raise IndexError(f"scenes/{self.split} has {self._length} images, there is no index {index}")
        labels = {name: int(values[index]) for name, values in self.labels.items()}
        draws = Draws(*self._key, _PICTURE_KEY, index)
        layers = render_scene(
            labels["shape"], labels["material"], labels["background"], draws, image_size=self.image_size
        )
        mask = layers.shapes if self.category == "shape" else layers.materials
        return SceneImage(layers.image, mask, layers.depth, labels)

    def item_name(self, index: int) -> str:
        """A stable name for reports, e.g. "scenes/train/000012"."""
        return f"{self.name}/{self.split}/{index:06d}"

    def fingerprint(self) -> str:
        """Hash of everything that decides the pictures and labels, for result cards."""
        parts = [VERSION, self.split, self._length, self.image_size, self.seed, self.category, self.classes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


HEADLINE = "background"  # the label called "class": the one that self-supervision learns first

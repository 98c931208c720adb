"""The embedded data set with its masks and its depth as targets."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Float32, Int16, UInt8

from quietvit.data.scenes import Scenes
from quietvit_eval.dense_data.target import CLASSES, METRES

OF_SOLIDS, OF_SURROUNDINGS = ("material", "shape"), "background"


class SceneMasks:
    """What each pixel shows: the background's family on floor and wall, with class 0 for all solids.

    With category="material" or "shape" it is that of the solid, and class 0 is floor and wall. Raises ValueError for a
    path, a split or a category that is not there.
    """

    kind = CLASSES

    def __init__(
        self,
        path: str | None = None,
        *,
        split: str,
        num_images: int | None = None,
        image_size: int = 64,
        seed: int = 0,
        category: str = OF_SURROUNDINGS,  # the label that self-supervision learns first, as for images
    ) -> None:
        if category not in (*OF_SOLIDS, OF_SURROUNDINGS):
            raise ValueError(f"masks of scenes tell {', '.join(OF_SOLIDS)} or {OF_SURROUNDINGS}, not {category!r}")
        self.category = category
        of_solids = category if category in OF_SOLIDS else OF_SOLIDS[0]
        self.scenes = _open(path, split, num_images, image_size, seed, of_solids)
        first = "solid" if category == OF_SURROUNDINGS else "floor and wall"
        self.class_names = [first, *self.scenes.classes[category]]
        self.name = f"scenes/{split}, {category}"

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int16[np.ndarray, "H W"]]:
        scene = self.scenes.render(index)
        mask = scene.segmentation.astype(np.int16)
        if self.category == OF_SURROUNDINGS:
            mask = np.where(mask == 0, np.int16(1 + scene.labels[OF_SURROUNDINGS]), np.int16(0))
        return scene.image, mask

    def item_name(self, index: int) -> str:
        return self.scenes.item_name(index)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.scenes.fingerprint()} {self.category}".encode()).hexdigest()[:16]


class SceneDepth:
    """Metres along the optical axis; every pixel is known. Raises ValueError for a path, or an unknown split."""

    kind = METRES

    def __init__(
        self,
        path: str | None = None,
        *,
        split: str,
        num_images: int | None = None,
        image_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.scenes = _open(path, split, num_images, image_size, seed, OF_SOLIDS[0])
        self.class_names: list[str] = []
        self.name = f"scenes/{split}"

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, "H W"]]:
        scene = self.scenes.render(index)
        return scene.image, scene.depth

    def item_name(self, index: int) -> str:
        return self.scenes.item_name(index)

    def fingerprint(self) -> str:
        return self.scenes.fingerprint()


def _open(path: str | None, split: str, num_images: int | None, image_size: int, seed: int, category: str) -> Scenes:
    if path is not None:
        raise ValueError(f"source 'scenes' is rendered on the fly and takes no path, got {path!r}")
    return Scenes(split, num_images=num_images, image_size=image_size, seed=seed, category=category)

"""The embedded data set with its masks and its depth as targets."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int16, UInt8

from quietvit.data.scenes import Scenes


class _ScenePairs:
    kind: str

    def __init__(
        self,
        path: str | None = None,
        *,
        split: str,
        num_images: int | None = None,
        image_size: int = 64,
        seed: int = 0,
        category: str = "material",
    ) -> None:
        if path is not None:
            raise ValueError(f"source 'scenes' is rendered on the fly and takes no path, got {path!r}")
        self.scenes = Scenes(split, num_images=num_images, image_size=image_size, seed=seed, category=category)
        self.name = f"scenes/{split}"
        # Class 0 is floor and wall.
        self.class_names = ["background", *self.scenes.classes[category]] if self.kind == "classes" else []

    def __len__(self) -> int:
        return len(self.scenes)

    def item_name(self, index: int) -> str:
        return self.scenes.item_name(index)

    def fingerprint(self) -> str:
        return self.scenes.fingerprint()


class SceneMasks(_ScenePairs):
    """Which material (or, with category="shape", which shape) each pixel shows; class 0 is floor and wall."""

    kind = "classes"

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int16[np.ndarray, "H W"]]:
        scene = self.scenes.render(index)
        return scene.image, scene.segmentation.astype(np.int16)


class SceneDepth(_ScenePairs):
    """Metres along the optical axis; every pixel is known."""

    kind = "metres"

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, "H W"]]:
        scene = self.scenes.render(index)
        return scene.image, scene.depth

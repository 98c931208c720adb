"""Pairs of an image file and a target file, whatever the layout that names them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from quietvit.data.decode import UnreadableImage, decode_bytes
from quietvit.data.names import NameTable, fingerprint
from quietvit_eval.dense_data.class_map import ClassMap
from quietvit_eval.dense_data.depth_rule import DepthRule
from quietvit_eval.dense_data.numbers import Unfit
from quietvit_eval.dense_data.target import CLASSES, METRES, Target
from quietvit_eval.dense_data.trees import Pairs

FIRST = 4  # targets read when a set is opened, so that a wrong setting shows at once (ours)
_ORIENTATION = 0x0112  # EXIF


class PairFiles:
    """Base of the layouts made of files (see dense_data.pairs.PairSource)."""

    layout: str
    kind: str

    def _open(
        self,
        root: Path,
        pairs: Pairs,
        rule: ClassMap | DepthRule,
        *,
        asked: str,
        used: str,
        class_names: list[str] | None = None,
        detail: str = "",
        hint: str = "",
    ) -> None:
        """Take the pairs of split `used`, which serves as split `asked`.

        Raises ValueError, ending in `hint`, if none of the first targets is of the right kind.
        """
        self.root, self.rule, self.class_names = root, rule, class_names or []
        self._pairs = sorted(pairs)
        notes = [f"{len(pairs):,} pairs", *([detail] if detail else [])]
        notes += [f"there is no split {asked!r}"] if used != asked else []
        self.name = f"{self.layout}:{root} {used} ({'; '.join(notes)})"
        self._check_first(hint)

    def _check_first(self, hint: str) -> None:
        first: tuple[str, Unfit] | None = None
        for _, target in self._pairs[:FIRST]:
            try:
                self.rule.read(self.root / target)
                return
            except Unfit as error:
                first = first or (target, error)
            except ValueError:
                continue
        if first is not None:
            raise ValueError(
                f"{self.name}: the first targets are not what this layout needs; {first[0]}: {first[1]}"
                + (f". {hint}" if hint else "")
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Target]:
        """RGB pixels and target; see PairSource. Raises UnreadableImage."""
        image, target = self._pairs[index]
        try:
            values = self.rule.read(self.root / target)
        except ValueError as error:
            raise UnreadableImage(image, f"{target}: {error}") from error
        return read_image(self.root / image, image, values.shape), values

    def item_name(self, index: int) -> str:
        """The image's path relative to the data set."""
        return self._pairs[index][0]

    def fingerprint(self) -> str:
        """sha256 of names and sizes of all files, and of how targets are read: another rule is other data."""
        digest = hashlib.sha256(b"quietvit pairs 1\0" + json.dumps(self._rule_facts(), sort_keys=True).encode())
        for names in zip(*self._pairs, strict=True):
            sizes = np.array([_size(self.root / name) for name in names], np.int64)
            digest.update(fingerprint(NameTable.of(os.fsencode(name) for name in names), sizes).encode())
        return digest.hexdigest()

    def _rule_facts(self) -> dict[str, Any]:
        if isinstance(self.rule, ClassMap):
            return {str(number): class_ for number, class_ in self.rule.classes.items()}
        return asdict(self.rule)


class MaskFiles(PairFiles):
    """Class numbers in image files."""

    kind = CLASSES


class DepthFiles(PairFiles):
    """Depth in image or .npy files."""

    kind = METRES


def read_image(path: Path, name: str, size: tuple[int, ...]) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of the height and width of the target.

    The picture stands upright, as EXIF says and as those who annotated it saw it, unless its target only fits the
    pixels as they are stored: then it was made from those. (Of a square picture, or one turned by half, the sizes tell
    nothing, and upright it stays.) Raises UnreadableImage, also if the sizes differ either way.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(name, error.strerror or str(error)) from error
    pixels = decode_bytes(data, name)
    if pixels.shape[:2] == size:
        return pixels if pixels.flags.writeable else pixels.copy()  # Pillow's arrays are not
    if pixels.shape[1::-1] == size and (orientation := _read_orientation(data)) >= 5:
        return _as_stored(pixels, orientation)
    height, width = pixels.shape[:2]
    raise UnreadableImage(name, f"the image has {width} x {height} pixels, its target {size[1]} x {size[0]}")


def _read_orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block: whatever Pillow raises, the picture has no known orientation
        return 1


def _as_stored(pixels: UInt8[np.ndarray, "H W 3"], orientation: int) -> UInt8[np.ndarray, "W H 3"]:
    """The inverse of turning upright, for EXIF orientations 5 to 8."""
    if orientation in (6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1

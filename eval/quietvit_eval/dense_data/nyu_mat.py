"""NYU Depth v2's labelled set, as its authors publish it: nyu_depth_v2_labeled.mat and splits.mat."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from quietvit.data.decode import UnreadableImage
from quietvit_eval.dense_data.depth_rule import DepthRule
from quietvit_eval.dense_data.target import METRES
from quietvit_eval.dense_data.trees import found_in, some, stand_ins

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
MAT_BYTES = 2_972_037_809  # of the published file
INDICES = {"train": "trainNdxs", "test": "testNdxs"}
DEPTHS = {"raw": "rawDepths", "filled": "depths"}
FRAME = (slice(7, 474), slice(7, 632))  # rows and columns inside the white frame of the 480 x 640 images (BTS)


class NyuMat:
    """The 1,449 labelled images: 795 to train with, 654 to test (see dense_data.pairs.PairSource).

    MATLAB's v7.3 files are HDF5 with all axes reversed: images [N 3 W H], depths [N W H], in metres. Each item is read
    when it is asked for. As BTS's script extracts them: images are set to 0 outside rows 7:474 and columns 7:632, where
    they have a white frame, and raw depth is cut to whole millimetres.

    Args:
        path: nyu_depth_v2_labeled.mat, or its folder.
        split: "train", or "val" or "test": both mean test, there being no third split.
        depth: "raw" (the standard: as measured, 0 in holes) or "filled" (the authors' in-painted depth).
        splits: the file of 1-based indices, by default splits.mat beside the first.

    Raises:
        ValueError: a file is missing, damaged or of another form, or indices do not fit the images.
    """

    kind = METRES
    looked_for = f"{MAT} (nyu_mat)"

    def __init__(self, path: str | Path, *, split: str, depth: str = "raw", splits: str | Path | None = None) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"depth is {depth!r}; one of {', '.join(DEPTHS)}")
        asked = stand_ins(split)[0]
        used = "train" if asked == "train" else "test"
        self.file = _find_mat(Path(path).expanduser())
        self._depth = depth
        count = _check_mat(self.file, DEPTHS[depth])
        self._indices = _read_splits(Path(splits) if splits is not None else self.file.parent / SPLITS, count)[used]
        self.class_names: list[str] = []
        notes = f"{len(self._indices):,} pairs, {depth} depth" + ("" if used == asked else f"; no split {asked!r}")
        self.name = f"nyu_mat:{self.file} {used} ({notes})"

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return path.suffix == ".mat" if path.is_file() else (path / MAT).is_file()

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, "H W"]]:
        """RGB pixels and metres; see PairSource. Raises UnreadableImage."""
        import h5py

        at = self._indices[index]
        try:
            # Opened each time: a file that stays open does not survive the forking of workers.
            with h5py.File(self.file, "r") as mat:
                stored, metres = mat["images"][at].T, mat[DEPTHS[self._depth]][at].T
        except (OSError, RuntimeError) as error:
            raise UnreadableImage(self.item_name(index), f"{self.file.name} is damaged: {error}") from error
        image = np.zeros_like(stored, order="C")
        image[FRAME] = stored[FRAME]
        if self._depth == "raw":
            metres = np.floor(metres * np.float32(1000)) / np.float32(1000)
        return image, DepthRule().clean(metres)

    def item_name(self, index: int) -> str:
        """The number of the image in the file, from 0, as BTS names its files."""
        return f"rgb_{self._indices[index]:05d}"

    def fingerprint(self) -> str:
        """sha256 of the file's size, the images of the split and the kind of depth."""
        facts = [MAT, self.file.stat().st_size, self._depth, self._indices]
        return hashlib.sha256(b"quietvit nyu_mat 1\0" + json.dumps(facts).encode()).hexdigest()


def _find_mat(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; {MAT} or its folder is wanted")
    if not (path / MAT).is_file():
        raise ValueError(f"{path} has no {MAT}; found {found_in(path)}")
    return path / MAT


def _check_mat(file: Path, depths: str) -> int:
    """The number of images. Raises ValueError unless the file holds images and depths of one size."""
    import h5py

    try:
        with h5py.File(file, "r") as mat:
            shapes = {}
            for name, dtype in (("images", np.dtype(np.uint8)), (depths, np.dtype(np.float32))):
                found: Any = mat.get(name)
                if not isinstance(found, h5py.Dataset):
                    raise ValueError(f"{file} has no {name!r}; it holds {some(sorted(mat)) or 'nothing'}")
                if found.dtype.newbyteorder("=") != dtype:
                    raise ValueError(f"{file}: {name!r} is of type {found.dtype}; {dtype} is wanted")
                shapes[name] = found.shape
    except OSError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} cannot be read as a MATLAB v7.3 file ({error}); it has {size:,} bytes, the published one "
            f"{MAT_BYTES:,}"
        ) from error
    images = shapes["images"]
    if len(images) != 4 or images[1] != 3 or shapes[depths] != (images[0], *images[2:]):
        raise ValueError(
            f"{file}: images are {images}, {depths} {shapes[depths]}; (N, 3, width, height) and (N, width, height) "
            "are wanted"
        )
    return int(images[0])


def _read_splits(file: Path, count: int) -> dict[str, list[int]]:
    """0-based indices of train and test, ascending. Raises ValueError."""
    import scipy.io

    if not file.is_file():
        raise ValueError(f"{file} is missing: the indices of train and test, published beside {MAT}")
    try:
        content = scipy.io.loadmat(str(file))
    except Exception as error:  # scipy's reader raises nearly anything on damaged files
        raise ValueError(f"{file} cannot be read as a MATLAB v5 file ({type(error).__name__}: {error})") from error
    splits: dict[str, list[int]] = {}
    for split, key in INDICES.items():
        if key not in content:
            raise ValueError(f"{file} has no {key!r}; it holds {some([k for k in content if k[:1] != '_'])}")
        numbers = np.asarray(content[key]).reshape(-1)
        if numbers.size == 0 or numbers.dtype.kind not in "iuf" or (numbers != np.floor(numbers)).any():
            raise ValueError(f"{file}: {key!r} must hold whole numbers")
        if numbers.min() < 1 or numbers.max() > count:
            raise ValueError(
                f"{file}: {key!r} runs from {numbers.min()} to {numbers.max()}; MATLAB's indices of {count:,} images "
                f"run from 1 to {count}"
            )
        splits[split] = sorted(int(number) - 1 for number in numbers)
    if both := sorted(set(splits["train"]) & set(splits["test"])):
        raise ValueError(f"{file}: {len(both)} images are in train and in test, the first number {both[0] + 1}")
    return splits

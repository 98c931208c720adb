"""ADE20K as the scene parsing challenge released it (ADEChallengeData2016, 150 classes)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quietvit.data.decode import IMAGE_EXTENSIONS
from quietvit.data.folder import require_folder
from quietvit_eval.dense_data.class_map import make_class_map
from quietvit_eval.dense_data.numbers import NUMBER_EXTENSIONS
from quietvit_eval.dense_data.pair_files import MaskFiles
from quietvit_eval.dense_data.trees import by_stem, choose_listed, found_in, match, read_names, stand_ins

FOLDER = "ADEChallengeData2016"
NUM_CLASSES = 150
# The release's own split names. Its test images have no annotations: there is no third split to score on.
SPLITS = {"train": "training", "val": "validation"}
LISTS = {"train": "ADE20K_object150_train.txt", "val": "ADE20K_object150_val.txt"}
CLASS_FILES = ("objectInfo150.txt", "objectInfo150.csv")


class Ade20k(MaskFiles):
    """images/{training,validation}/*.jpg and annotations/{training,validation}/*.png of the release.

    In the files 0 is "other", which is ignored, and 1 .. 150 are the classes, which become 0 .. 149; 255 is ignored as
    well. Class names are read from the release's objectInfo150.txt; without it they are the numbers. If DINOv3's lists,
    ADE20K_object150_{train,val}.txt, are in the folder, only the images that they name count.

    Args:
        path: the folder ADEChallengeData2016, or the one it lies in.
        split: "train", or "val" or "test": both mean the 2,000 validation images.

    Raises:
        ValueError: a folder is missing, an image has no annotation or the reverse, or a list names what is not there.
    """

    layout = "ade20k"
    looked_for = f"{FOLDER}/ with images/training/ADE_*.jpg (ade20k)"

    def __init__(self, path: str | Path, *, split: str) -> None:
        root = _find_root(require_folder(path))
        asked = stand_ins(split)[0]
        used = "train" if asked == "train" else "val"
        images, targets = root / "images" / SPLITS[used], root / "annotations" / SPLITS[used]
        for folder in (images, targets):
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is missing; layout 'ade20k' is the release {FOLDER} (SceneParsing, 150 classes), with "
                    f"images/ and annotations/ divided into training/ and validation/; found {found_in(root)}"
                )
        found = by_stem(images, IMAGE_EXTENSIONS)
        names = root / LISTS[used]
        if names.is_file():
            found = choose_listed(found, names, images)
        pairs = match(
            found, by_stem(targets, NUMBER_EXTENSIONS), where=(images, targets), all_targets=not names.is_file()
        )
        self._open(
            root,
            [(f"images/{SPLITS[used]}/{i}", f"annotations/{SPLITS[used]}/{t}") for i, t in pairs],
            make_class_map(NUM_CLASSES, [255], reduce_zero=True),
            asked=asked,
            used=used,
            class_names=_class_names(root),
            detail=f"of {LISTS[used]}" if names.is_file() else "",
            hint="The annotations of the full ADE20K are another format: use the SceneParsing release",
        )

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there. Other sets use the same folders, so their names alone do not tell."""
        root = _find_root(path)
        images = root / "images" / SPLITS["train"]
        if not (images.is_dir() and (root / "annotations").is_dir()):
            return False
        own = [root.name == FOLDER, *((root / name).is_file() for name in (*CLASS_FILES, *LISTS.values()))]
        return any(own) or any(entry.name.startswith("ADE_") for entry in os.scandir(images))


def _find_root(path: Path) -> Path:
    return path / FOLDER if (path / FOLDER).is_dir() else path


def _class_names(root: Path) -> list[str]:
    """The first synonym of each class: columns Idx, Ratio, Train, Val, Stuff, Name, divided by tabs or commas."""
    for file in CLASS_FILES:
        if not (root / file).is_file():
            continue
        names: dict[int, str] = {}
        for line in read_names(root / file):
            fields = [field.strip() for field in re.split("\t" if file.endswith(".txt") else ",", line, maxsplit=5)]
            if len(fields) == 6 and fields[0].isdigit():
                names[int(fields[0])] = re.split("[,;]", fields[5].strip('"'))[0].strip()
        if sorted(names) != list(range(1, NUM_CLASSES + 1)):
            raise ValueError(f"{root / file} should name classes 1 to {NUM_CLASSES}, one a line; it names {len(names)}")
        return [names[number] for number in sorted(names)]
    return [str(class_) for class_ in range(NUM_CLASSES)]

"""Pascal VOC's segmentation sets."""

from __future__ import annotations

from pathlib import Path

from quietvit.data.folder import require_folder
from quietvit_eval.dense_data.class_map import make_class_map
from quietvit_eval.dense_data.pair_files import MaskFiles
from quietvit_eval.dense_data.trees import found_in, read_names, require_files, some, stand_ins

# fmt: off
CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
VOID = 255  # the border round objects (VOC 2012 development kit, section 4)
MASKS, AUGMENTED_MASKS = "SegmentationClass", "SegmentationClassAug"
AUGMENTED_LISTS = ("train_aug.txt", "trainaug.txt")  # DeepLab's name, MMSegmentation's


class PascalVoc(MaskFiles):
    """JPEGImages/NAME.jpg, SegmentationClass/NAME.png and the lists ImageSets/Segmentation/{train,val}.txt.

    The 20 classes and the background, which is a class; 255 is ignored. The PNGs' palette indices are the numbers.

    Args:
        path: the folder VOC2012, VOCdevkit, or the one that lies in.
        split: "test" means test.txt where its annotations are there (VOC2007), else val.
        year: of VOC{year}.
        aug: train with the annotations of SBD: SegmentationClassAug/ and the list train_aug.txt (10,582 images).

    Raises:
        ValueError: a folder or list is missing, lists name what is not there, or train and val images overlap.
    """

    layout = "voc"
    looked_for = "VOCdevkit/VOC2012/ with JPEGImages/ and SegmentationClass/ (voc)"

    def __init__(self, path: str | Path, *, split: str, year: int | str = 2012, aug: bool = False) -> None:
        place = require_folder(path)
        root = _find_root(place, year)
        if root is None:
            raise ValueError(
                f"{place} has no VOC{year}/ with JPEGImages/ in it, nor is it one (looked in VOCdevkit/ too); "
                f"found {found_in(place)}"
            )
        lists = root / "ImageSets" / "Segmentation"
        used = asked = stand_ins(split)[0]
        if used == "test" and not _has_annotations(root, lists / "test.txt"):
            used = "val"
        names_file = _augmented_list(lists) if aug and used == "train" else lists / f"{used}.txt"
        names = [line.split()[0] for line in read_names(names_file)]
        if used == "train" and (lists / "val.txt").is_file():
            held_out = {line.split()[0] for line in read_names(lists / "val.txt")}
            if both := [name for name in names if name in held_out]:
                raise ValueError(f"{names_file} and val.txt share {len(both):,} images: {some(both)}")
        masks = MASKS
        if aug and used == "train":
            masks = AUGMENTED_MASKS
            if not (root / masks).is_dir():
                raise ValueError(f"{root} has no {masks}/, which aug=True trains with; found {found_in(root)}")
        pairs = [(f"JPEGImages/{name}.jpg", f"{masks}/{name}.png") for name in names]
        require_files(root, (file for pair in pairs for file in pair), names_file)
        self._open(
            root,
            pairs,
            make_class_map(len(CLASS_NAMES), [VOID]),
            asked=asked,
            used=used,
            class_names=list(CLASS_NAMES),
            detail=masks if aug else "",
        )

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        root = _find_root(path, 2012)
        return root is not None and (root / MASKS).is_dir()


def _find_root(path: Path, year: int | str) -> Path | None:
    places = (path / "VOCdevkit" / f"VOC{year}", path / f"VOC{year}", path)
    return next((place for place in places if (place / "JPEGImages").is_dir()), None)


def _has_annotations(root: Path, names_file: Path) -> bool:
    if not names_file.is_file():
        return False
    return (root / MASKS / f"{read_names(names_file)[0].split()[0]}.png").is_file()


def _augmented_list(lists: Path) -> Path:
    for name in AUGMENTED_LISTS:
        if (lists / name).is_file():
            return lists / name
    raise ValueError(f"{lists} has none of {', '.join(AUGMENTED_LISTS)}: aug=True needs the list of SBD's images")

"""Cityscapes' fine annotations."""

from __future__ import annotations

from pathlib import Path

from quietvit.data.folder import require_folder
from quietvit_eval.dense_data.class_map import ClassMap, make_class_map
from quietvit_eval.dense_data.numbers import NUMBER_EXTENSIONS
from quietvit_eval.dense_data.pair_files import MaskFiles
from quietvit_eval.dense_data.target import IGNORE
from quietvit_eval.dense_data.trees import by_stem, found_in, match, stand_ins

# fmt: off
CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
# The labelId of each class above; the other ids, 0 to 33 and the number plates' -1, are not scored (cityscapesScripts,
# helpers/labels.py).
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# fmt: on
IMAGES, TARGETS = "leftImg8bit", "gtFine"
TRAIN_IDS, IDS = "_gtFine_labelTrainIds", "_gtFine_labelIds"


class Cityscapes(MaskFiles):
    """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png.

    The 19 classes of the benchmark; 255 is ignored. Where cityscapesScripts have not yet made the labelTrainIds files,
    the labelIds files are read and renumbered in the same way.

    Args:
        path: the folder with leftImg8bit/ and gtFine/.
        split: "train", or "val" or "test": both mean val, since the annotations of test are kept secret.

    Raises:
        ValueError: a folder is missing, or an image has no annotation.
    """

    layout = "cityscapes"
    looked_for = "leftImg8bit/ and gtFine/ (cityscapes)"

    def __init__(self, path: str | Path, *, split: str) -> None:
        root = require_folder(path)
        asked = stand_ins(split)[0]
        used = "train" if asked == "train" else "val"
        images, targets = root / IMAGES / used, root / TARGETS / used
        for folder in (images, targets):
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing; found {found_in(root)} in {root}")
        found = by_stem(images, NUMBER_EXTENSIONS, f"_{IMAGES}")
        if not found:
            raise ValueError(f"no images *_{IMAGES}.png in {images}")
        annotations = by_stem(targets, NUMBER_EXTENSIONS, TRAIN_IDS)
        rule, detail = make_class_map(len(CLASS_NAMES), [255]), ""
        if not annotations:
            annotations = by_stem(targets, NUMBER_EXTENSIONS, IDS)
            rule, detail = _from_label_ids(), "from labelIds"
        if not annotations:
            raise ValueError(f"{targets} has neither *{TRAIN_IDS}.png nor *{IDS}.png (from gtFine_trainvaltest.zip)")
        pairs = match(found, annotations, where=(images, targets), all_targets=True)
        self._open(
            root,
            [(f"{IMAGES}/{used}/{image}", f"{TARGETS}/{used}/{target}") for image, target in pairs],
            rule,
            asked=asked,
            used=used,
            class_names=list(CLASS_NAMES),
            detail=detail,
        )

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return (path / IMAGES).is_dir() and (path / TARGETS).is_dir()


def _from_label_ids() -> ClassMap:
    ignored = dict.fromkeys((-1, *range(max(LABEL_IDS) + 1), 255), IGNORE)
    return ClassMap(ignored | {number: class_ for class_, number in enumerate(LABEL_IDS)})

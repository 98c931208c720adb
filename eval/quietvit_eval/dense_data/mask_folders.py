"""Own segmentation sets: images and annotations of the same names in two folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quietvit.data.decode import IMAGE_EXTENSIONS
from quietvit.data.folder import require_folder
from quietvit_eval.dense_data.class_map import make_class_map
from quietvit_eval.dense_data.numbers import NUMBER_EXTENSIONS, read_numbers
from quietvit_eval.dense_data.pair_files import FIRST, MaskFiles
from quietvit_eval.dense_data.trees import (
    SPLIT_WORDS,
    by_stem,
    choose_listed,
    find_trees,
    found_in,
    match,
    read_names,
    stand_ins,
)

# Where they are looked for unless said; undivided folders come with a list per split.
PATTERNS = (
    ("images/{split}", "annotations/{split}"),
    ("{split}/images", "{split}/annotations"),
    ("images", "annotations"),
)


class MaskFolders(MaskFiles):
    """Any set with one file of class numbers per image, of the same name up to the extension.

    Args:
        path: the folder.
        split: train (or training), val (valid, validation) or test (testing); val and test stand in for each other.
        images, annotations: their folders, "{split}" standing for the split's name; by default images/{split} and
            annotations/{split}, {split}/images and {split}/annotations, or images and annotations with lists.
        num_classes: numbers 0 .. num_classes - 1 of the files are the classes. May be left out if they have names.
        ignore: numbers of the files that are neither trained on nor scored; 255 by default, as in Pascal VOC.
        reduce_zero: in the files 0 is ignored and the classes are 1 .. num_classes, as in ADE20K.
        class_names: a list, or a text file with one name per line.
        image_suffix, annotation_suffix: ends of the names before the extension that do not take part in the
            comparison, e.g. "_leftImg8bit"; files without them are passed over.
        lists: files that name what belongs to a split, one a line, e.g. "lists/{split}.txt"; by default "{split}.txt"
            for folders that are not divided.

    Raises:
        ValueError: folders or lists are missing, images and annotations do not match, settings do not fit the files.
    """

    layout = "folders"
    looked_for = "images/ and annotations/, divided into training/ and validation/ or with lists (folders)"

    def __init__(
        self,
        path: str | Path,
        *,
        split: str,
        images: str | None = None,
        annotations: str | None = None,
        num_classes: int | None = None,
        ignore: int | Sequence[int] = 255,
        reduce_zero: bool = False,
        class_names: str | Path | Sequence[str] | None = None,
        image_suffix: str = "",
        annotation_suffix: str = "",
        lists: str | None = None,
    ) -> None:
        root = require_folder(path)
        patterns: Sequence[tuple[str, str]] = PATTERNS
        if images is not None or annotations is not None:
            patterns = ((images or "images/{split}", annotations or "annotations/{split}"),)
        trees = find_trees(root, patterns, split, lists)
        if trees is None:
            raise ValueError(missing_trees(root, patterns, split, lists, "images", "annotations"))
        image_folder, target_folder = root / trees.images, root / trees.targets
        found = by_stem(image_folder, IMAGE_EXTENSIONS, image_suffix)
        if trees.names is not None:
            found = choose_listed(found, trees.names, image_folder)
        targets = by_stem(target_folder, NUMBER_EXTENSIONS, annotation_suffix)
        pairs = match(found, targets, where=(image_folder, target_folder), all_targets=trees.all_targets)
        names = _read_class_names(class_names, root)
        count = num_classes if num_classes is not None else len(names)
        first = [target_folder / target for _, target in pairs[:FIRST]]
        if count == 0:
            raise ValueError(
                f"{root}: set num_classes (or class_names), and ignore if need be; {_describe_numbers(first)}"
            )
        if names and len(names) != count:
            raise ValueError(f"num_classes is {count}, but there are {len(names)} class names")
        ignored = [ignore] if isinstance(ignore, int) else list(ignore)
        self._open(
            root,
            [(f"{trees.images}/{image}", f"{trees.targets}/{target}") for image, target in pairs],
            make_class_map(count, ignored, reduce_zero=reduce_zero),
            asked=stand_ins(split)[0],
            used=trees.split,
            class_names=names or [str(class_) for class_ in range(count)],
            hint="See the settings num_classes, ignore (numbers that do not count) and reduce_zero (0 does not count, "
            "classes start at 1)",
        )

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return any(find_trees(path, PATTERNS, split, None) is not None for split in SPLIT_WORDS)


def missing_trees(
    root: Path, patterns: Sequence[tuple[str, str]], split: str, lists: str | None, first: str, second: str
) -> str:
    """What to say when neither divided folders nor lists are there."""
    words = "|".join(word for used in stand_ins(split) for word in SPLIT_WORDS[used])
    looked_for = "; ".join(f"{a}/ and {b}/" for a, b in patterns).replace("{split}", f"({words})")
    listed = (lists or "{split}.txt").replace("{split}", f"({words})")
    return (
        f"{root} has no {first} and {second} for split {split!r}: looked for {looked_for}, undivided folders with a "
        f"list {listed}; found {found_in(root)}"
    )


def _read_class_names(given: str | Path | Sequence[str] | None, root: Path) -> list[str]:
    if given is None:
        return []
    if isinstance(given, str | Path):
        file = Path(given).expanduser()
        return read_names(file if file.is_file() else root / file)
    return [str(name) for name in given]


def _describe_numbers(files: Sequence[Path]) -> str:
    found: set[int] = set()
    for file in files:
        try:
            found |= set(np.unique(read_numbers(file)).tolist())
        except ValueError as error:
            return f"{file}: {error}"
    shown = sorted(found)
    return f"the first {len(files)} annotations hold {', '.join(map(str, shown[:20]))}{', ...' * (len(shown) > 20)}"

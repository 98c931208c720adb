"""Own depth sets: images and depth maps of the same names in two folders."""

from __future__ import annotations

from pathlib import Path

from quietvit.data.decode import IMAGE_EXTENSIONS
from quietvit.data.folder import require_folder
from quietvit_eval.dense_data.depth_rule import DEPTH_EXTENSIONS, DepthRule
from quietvit_eval.dense_data.mask_folders import missing_trees
from quietvit_eval.dense_data.pair_files import DepthFiles
from quietvit_eval.dense_data.trees import SPLIT_WORDS, by_stem, choose_listed, find_trees, match, stand_ins

# Where they are looked for unless said; undivided folders come with a list per split.
PATTERNS = (("rgb/{split}", "depth/{split}"), ("{split}/rgb", "{split}/depth"), ("rgb", "depth"))


class DepthFolders(DepthFiles):
    """Any set with one depth map per image, of the same name up to the extension.

    Args:
        path: the folder.
        split: train (or training), val (valid, validation) or test (testing); val and test stand in for each other.
        rgb, depth: their folders, "{split}" standing for the split's name; by default rgb/{split} and depth/{split},
            {split}/rgb and {split}/depth, or rgb and depth with lists.
        scale: units per metre of files with whole numbers; by default 1000 for files of 16 bits. Numbers of .npy files
            and images with floating point are metres.
        max_depth: greater depths count as this many metres; None: none is changed.
        rgb_suffix, depth_suffix: ends of the names before the extension that do not take part in the comparison.
        lists: files that name what belongs to a split, one a line; by default "{split}.txt" for folders that are not
            divided.

    Raises:
        ValueError: folders or lists are missing, images and depth maps do not match, settings do not fit the files.
    """

    layout = "folders"
    looked_for = "rgb/ and depth/, divided into train/ and test/ or with lists (folders)"

    def __init__(
        self,
        path: str | Path,
        *,
        split: str,
        rgb: str | None = None,
        depth: str | None = None,
        scale: float | None = None,
        max_depth: float | None = None,
        rgb_suffix: str = "",
        depth_suffix: str = "",
        lists: str | None = None,
    ) -> None:
        root = require_folder(path)
        patterns = PATTERNS if rgb is None and depth is None else ((rgb or "rgb/{split}", depth or "depth/{split}"),)
        trees = find_trees(root, patterns, split, lists)
        if trees is None:
            raise ValueError(missing_trees(root, patterns, split, lists, "images", "depth maps"))
        image_folder, target_folder = root / trees.images, root / trees.targets
        found = by_stem(image_folder, IMAGE_EXTENSIONS, rgb_suffix)
        if trees.names is not None:
            found = choose_listed(found, trees.names, image_folder)
        targets = by_stem(target_folder, DEPTH_EXTENSIONS, depth_suffix)
        pairs = match(found, targets, where=(image_folder, target_folder), all_targets=trees.all_targets)
        self._open(
            root,
            [(f"{trees.images}/{image}", f"{trees.targets}/{target}") for image, target in pairs],
            DepthRule(scale, max_depth),
            asked=stand_ins(split)[0],
            used=trees.split,
            hint="If whole numbers are meant, set scale to the units per metre",
        )

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return any(find_trees(path, PATTERNS, split, None) is not None for split in SPLIT_WORDS)

"""Images in plain tar files, read in place: one file or many shards, with random access by offset.

Headers are read once per shard and kept (index_cache.py), keyed by the shard's size and time of change. Reading uses
`os.pread` on handles that each process opens for itself, so that workers never move one another's position.

Labels, the first that applies to all shards:
  1. WebDataset's way: beside `key.jpg` lies `key.cls` (a number or a name), `key.json` (an object with "label", "class"
     or "cls") or `key.txt` (one word; anything longer is a caption and no label). Keys end at the first dot.
  2. The first folder of the members' names, e.g. `n01440764/n01440764_10026.JPEG`, if there are several such folders.
  3. None.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from quietvit.data import index_cache
from quietvit.data.decode import IMAGE_EXTENSIONS, UnreadableImage, decode_bytes, is_image_name
from quietvit.data.folder import SPLIT_FOLDERS, find_split, no_images_message
from quietvit.data.names import NameTable, fingerprint, labels_from_text

log = logging.getLogger(__name__)

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAX_HANDLES = 64  # open shards per process: far below the usual limit of 1,024 files (ours)
_MAX_SIDECAR = 64 * 1024  # bytes; a label file is no larger (ours)
_BLOCK = 512  # POSIX pax interchange format


class TarSource:
    """Images of plain tar files (see data.sources.Source).

    Args:
        path: a tar file, a folder of them, a glob pattern (`*`), or a brace pattern (`a-{000..012}.tar`, `{x,y}.tar`).
        split: for a folder with train/ and val/ or test/ sub-folders of shards, which one; for members that all lie in
            such folders, which of them. None means "train".
        allow_truncated: use the whole members of a shard that is cut off, with a warning, instead of stopping.
        refresh: read the headers again.

    Raises:
        ValueError: nothing found, a packed tar, a cut or damaged tar (with shard and offset), or no images inside.
    """

    def __init__(
        self, path: str | Path, *, split: str | None = None, allow_truncated: bool = False, refresh: bool = False
    ) -> None:
        self._shards = find_shards(path, split)
        indices = [_index_of(shard, allow_truncated, refresh) for shard in self._shards]
        chosen = [_of_split(index, split) for index in indices]
        if split not in (None, "train") and all(c is None for c in chosen) and not _is_split_folder(path, split):
            raise ValueError(f"{path}: the members are not divided into splits, so there is no split {split!r}")
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._collect(
            indices, [np.arange(len(i.names)) if c is None else c for i, c in zip(indices, chosen, strict=True)]
        )
        if len(self._names) == 0:
            others: Counter[str] = Counter()
            for index in indices:
                others.update(index.others)
            raise ValueError(no_images_message(f"{path} (split {split})" if split else path, dict(others)))
        plural = "shard" if len(self._shards) == 1 else "shards"
        self.name = f"tar:{path} ({len(self._names):,} images in {len(self._shards):,} {plural})"
        self.labels: dict[str, np.ndarray] = {}
        self.classes: dict[str, list[str]] = {}
        self._read_labels([text for i, c in zip(indices, chosen, strict=True) for text in i.labels_at(c)])

    def _collect(self, indices: Sequence[_ShardIndex], chosen: Sequence[np.ndarray]) -> None:
        base = os.path.commonpath([shard.parent for shard in self._shards])
        prefixes = [b""]
        if len(self._shards) > 1:  # names must tell the shards apart
            prefixes = [os.fsencode(os.path.relpath(shard, base)) + b"/" for shard in self._shards]
        parts = list(zip(prefixes, indices, chosen, strict=True))
        self._names = NameTable.of(p + index.names[i] for p, index, rows in parts for i in rows.tolist())
        self._members = NameTable.of(index.names[i] for _, index, rows in parts for i in rows.tolist())
        self._offsets = np.concatenate([index.offsets[rows] for _, index, rows in parts])
        self._sizes = np.concatenate([index.sizes[rows] for _, index, rows in parts])
        self._shard_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(rows) for _, _, rows in parts])

    def _read_labels(self, sidecars: list[str]) -> None:
        if not any(sidecars):
            sidecars = _folder_labels(self._members)
        if any(sidecars):
            self.labels["class"], self.classes["class"] = labels_from_text(sidecars)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int, *, min_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Decoded RGB; see data.decode. Raises UnreadableImage."""
        name, size = self._names.text(index), int(self._sizes[index])
        try:
            data = os.pread(self._handle(int(self._shard_of[index])), size, int(self._offsets[index]))
        except OSError as error:
            raise UnreadableImage(name, error.strerror or str(error)) from error
        if len(data) < size:
            raise UnreadableImage(name, "its shard has become shorter since it was indexed")
        return decode_bytes(data, name, min_side=min_side)

    def item_name(self, index: int) -> str:
        """The member's name, behind the shard's where there are several shards."""
        return self._names.text(index)

    def fingerprint(self) -> str:
        """sha256 of names and sizes."""
        return fingerprint(self._names, self._sizes)

    def _handle(self, shard: int) -> int:
        handle = self._handles.get(shard)
        if handle is None:
            if len(self._handles) >= _MAX_HANDLES:
                os.close(self._handles.popitem(last=False)[1])
            handle = self._handles[shard] = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._handles.move_to_end(shard)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}  # a number means another file in another process

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", {}).values():
            os.close(handle)


# ---- which shards


def find_shards(path: str | Path, split: str | None = None) -> list[Path]:
    """The tar files that a path or pattern means, sorted; ValueError if there are none."""
    text = str(Path(path).expanduser())
    if Path(text).is_dir():
        folder = find_split(Path(text), split)
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            packed = [p.name for p in sorted(folder.iterdir()) if p.name.lower().endswith(PACKED)]
            raise ValueError(_unpack_message(folder / packed[0]) if packed else f"{folder} has no .tar files")
    elif Path(text).exists():
        shards = [Path(text)]
    else:
        shards = []
        for pattern in _expand_braces(text):
            found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            shards.extend(Path(name) for name in found)
        if not shards:
            raise ValueError(f"no file matches {text}")
        if missing := [str(shard) for shard in shards if not shard.exists()]:
            raise ValueError(f"{len(missing)} of {len(shards)} tar files do not exist, e.g. {missing[0]}")
    for shard in shards:
        if shard.name.lower().endswith(PACKED):
            raise ValueError(_unpack_message(shard))
    return [shard.absolute() for shard in shards]


def _is_split_folder(path: str | Path, split: str | None) -> bool:
    folder = Path(path).expanduser()
    return folder.is_dir() and find_split(folder, split) != folder


def _unpack_message(shard: Path) -> str:
    return (
        f"{shard} is compressed, and a compressed tar cannot be read at random places: unpack it (to a plain .tar, or "
        "to a folder for source 'folder' or 'classes'). Images are compressed already, so this costs hardly any space"
    )


_BRACES = re.compile(r"\{([^{}]*)\}")


def _expand_braces(pattern: str) -> list[str]:
    """`a-{000..012}.tar` and `{x,y}.tar` as a shell expands them; the width of the first number is kept."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1)):
        first, last = numbers.groups()
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        choices = match.group(1).split(",")
    rests = _expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice, rest in itertools.product(choices, rests)]


# ---- what is in a shard


@dataclass(frozen=True)
class _ShardIndex:
    names: NameTable
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    sidecars: NameTable  # label texts beside the images, in their order; "" where there is none
    others: dict[str, int]

    def labels_at(self, rows: np.ndarray | None) -> Iterator[str]:
        for i in range(len(self.names)) if rows is None else rows.tolist():
            yield self.sidecars[i].decode()


def _index_of(shard: Path, allow_truncated: bool, refresh: bool) -> _ShardIndex:
    status = shard.stat()
    key = f"tar 1\n{os.path.realpath(shard)}"
    state = np.array([status.st_size, status.st_mtime_ns], np.int64)
    kept = None if refresh else index_cache.load(key)
    if kept is None or not np.array_equal(kept["state"], state):
        kept = {**_read_headers(shard, status.st_size), "state": state}
        index_cache.save(key, kept)
    if cut := kept["cut"].tobytes().decode():
        if not allow_truncated:
            raise ValueError(
                f"{shard}: {cut}. Fetch or write it again, or use what is whole with the option allow_truncated=true"
            )
        log.warning("%s: %s; using the %d whole images before it", shard, cut, len(kept["ends"]))
    return _ShardIndex(
        names=NameTable(kept["blob"], kept["ends"]),
        offsets=kept["offsets"],
        sizes=kept["sizes"],
        sidecars=NameTable(kept["sidecar_blob"], kept["sidecar_ends"]),
        others=json.loads(kept["others"].tobytes()),
    )


def _read_headers(shard: Path, file_size: int) -> index_cache.Arrays:
    log.info("reading the headers of %s; this is done once", shard)
    members: list[tuple[bytes, int, int]] = []
    texts: dict[tuple[bytes, str], bytes] = {}  # (key, extension) -> content of a label file
    others: Counter[str] = Counter()
    walk = _Walk(shard, file_size)
    with shard.open("rb") as file:
        for name, offset, size in walk:
            extension = os.path.splitext(name)[1].lower()
            if os.path.basename(name).startswith("."):  # macOS puts a ._NAME beside each NAME
                continue
            if is_image_name(name):
                members.append((os.fsencode(name), offset, size))
                continue
            others[extension or "no extension"] += 1
            key, sidecar = _split_key(name)
            if sidecar in _SIDECARS and size <= _MAX_SIDECAR:
                texts[key, sidecar] = os.pread(file.fileno(), size, offset)
    keys = [_split_key(os.fsdecode(name)) for name, _, _ in members]
    if texts and any((key, sidecar) in texts for key, _ in keys for sidecar in _SIDECARS):
        rows = _first_image_per_key(keys)
        members, keys = [members[i] for i in rows], [keys[i] for i in rows]
        sidecars = NameTable.of(text.encode() for text in _sidecar_labels([key for key, _ in keys], texts))
    else:
        sidecars = NameTable.of(b"" for _ in members)
    names = NameTable.of(name for name, _, _ in members)
    return {
        "blob": names.blob,
        "ends": names.ends,
        "offsets": np.array([offset for _, offset, _ in members], np.int64),
        "sizes": np.array([size for _, _, size in members], np.int64),
        "sidecar_blob": sidecars.blob,
        "sidecar_ends": sidecars.ends,
        "others": np.frombuffer(json.dumps(others).encode(), np.uint8),
        "cut": np.frombuffer(walk.cut.encode(), np.uint8),
    }


class _Walk:
    """(name, offset of the data, size) of the regular files of a tar. Afterwards `cut` says what is wrong, or nothing.

    tarfile alone ends in silence where a file stops between two members or a header is damaged; a whole tar ends with
    blocks of zeros, and that is what is asked for here.
    """

    def __init__(self, shard: Path, file_size: int) -> None:
        self.shard, self.file_size, self.cut = shard, file_size, ""

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        try:
            archive = tarfile.open(self.shard, "r:", errorlevel=0)  # noqa: SIM115  (closed below)
        except tarfile.ReadError as error:
            raise ValueError(
                f"{self.shard} is not a plain tar file, or its first header is damaged ({error})"
            ) from error
        with archive:
            while True:
                try:
                    member = archive.next()
                except tarfile.ReadError as error:
                    self.cut = f"cut or damaged at byte {min(archive.offset, self.file_size):,} ({error})"
                    return
                archive.members = []  # type: ignore[attr-defined]  # it keeps every header: a gigabyte for a million images
                if member is None:
                    break
                if member.offset_data + member.size > self.file_size:
                    self.cut = f"cut at byte {self.file_size:,}, inside {member.name}"
                    return
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            self._check_end(archive.offset)

    def _check_end(self, offset: int) -> None:
        with self.shard.open("rb") as file:
            file.seek(offset)
            block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            self.cut = f"cut at byte {self.file_size:,}, before the mark that ends a tar"
        elif block.strip(b"\0"):
            self.cut = f"damaged header at byte {offset:,}"


# ---- labels

_SIDECARS = ("cls", "json", "txt")  # in order of preference
_LABEL_KEYS = ("label", "class", "cls")


def _split_key(name: str) -> tuple[bytes, str]:
    """WebDataset's rule: the key ends at the first dot of the file name; extensions do not mind case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return os.fsencode(folder + slash + stem), extension.lower()


def _first_image_per_key(keys: list[tuple[bytes, str]]) -> list[int]:
    """Rows of the images proper: `a.seg.png` is not the image of sample `a`, and of `a.jpg`, `a.png` the first is."""
    seen: dict[bytes, int] = {}
    for i, (key, extension) in enumerate(keys):
        if "." + extension in IMAGE_EXTENSIONS:
            seen.setdefault(key, i)
    return list(seen.values())


def _sidecar_labels(keys: list[bytes], texts: dict[tuple[bytes, str], bytes]) -> list[str]:
    for sidecar in _SIDECARS:
        labels = [_label_text(texts.get((key, sidecar), b""), sidecar) for key in keys]
        if any(labels):
            return labels
    return [""] * len(keys)


def _label_text(content: bytes, sidecar: str) -> str:
    text = content.decode(errors="replace").strip()
    if sidecar == "json" and text:
        try:
            fields = json.loads(text)
        except ValueError:
            return ""
        value = next((fields[k] for k in _LABEL_KEYS if k in fields), "") if isinstance(fields, dict) else ""
        return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if sidecar == "txt" and len(text.split()) != 1:
        return ""
    return "" if "\n" in text else text


def _folder_labels(members: NameTable) -> list[str]:
    folders = [_class_folder(name) for name in members]
    return folders if len(set(folders) - {""}) > 1 else []


def _class_folder(member: bytes) -> str:
    parts = [part for part in os.fsdecode(member).split("/")[:-1] if part != "."]
    if parts and parts[0] in _SPLIT_NAMES:
        parts = parts[1:]
    return parts[0] if parts else ""


# ---- splits inside a tar

_SPLIT_NAMES = frozenset(name for names in SPLIT_FOLDERS.values() for name in names)


def _of_split(index: _ShardIndex, split: str | None) -> np.ndarray | None:
    """Rows of the split, if every image lies in a split's folder; None if the shard is not divided so."""
    first = [os.fsdecode(name.removeprefix(b"./").split(b"/", 1)[0]) for name in index.names]
    present = set(first)
    if not present or not present <= _SPLIT_NAMES:
        return None
    wanted = next((name for name in SPLIT_FOLDERS[split or "train"] if name in present), None)
    return np.flatnonzero(np.array(first) == wanted)

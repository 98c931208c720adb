"""Unreadable images of a run: each listed once in `unreadable.txt`, and too many of them are an end with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quietvit.contracts import BadSample


class TooManyUnreadable(RuntimeError):  # noqa: N818  (it names what was met)
    """So many images cannot be read that something is wrong with the data as a whole."""


class BadImages:
    """Counts the distinct unreadable images of a run and lists them, tab-separated name and reason, in its folder.

    A resumed run reads the list and goes on counting. Of several ranks each keeps its own file and count.

    Args:
        run_dir: folder of the run; it exists.
        num_images: images of the source.
        max_share: more distinct bad images than this share of all are too many. 0.01, ours: ImageNet has none, crawled
            sets a few in a thousand; a broken disk or a wrong format shows within the first batches.
        at_least: this many are never too many, so that one odd file does not end a run on a hundred (ours).
        rank: number of the process; rank 0 writes `unreadable.txt`, the others `unreadable.rank1.txt` and so on.
    """

    def __init__(
        self, run_dir: Path, num_images: int, *, max_share: float = 0.01, at_least: int = 10, rank: int = 0
    ) -> None:
        self.file = run_dir / ("unreadable.txt" if rank == 0 else f"unreadable.rank{rank}.txt")
        self.num_images = num_images
        self.limit = max(at_least, int(max_share * num_images))
        self._names: set[str] = set()
        if self.file.exists():
            # A line without its end was cut off by a crash; its image will be met again.
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            self._names = {line.split("\t", 1)[0] for line in lines if line.endswith("\n")}

    @property
    def count(self) -> int:
        """Distinct unreadable images met so far, before a restart too."""
        return len(self._names)

    def add(self, bad: Iterable[BadSample]) -> None:
        """List what a batch could not read. Raises TooManyUnreadable beyond the limit; the list is written first."""
        for sample in bad:
            name = _field(sample.name)
            if name in self._names:
                continue
            self._names.add(name)
            # Appended, not rewritten: a list of a million lines must not be copied for each new one.
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{name}\t{_field(sample.reason)}\n")
            last = f"{name}: {_field(sample.reason)}"
            if self.count > self.limit:
                raise TooManyUnreadable(
                    f"{self.count:,} of {self.num_images:,} images cannot be read, more than the "
                    f"{self.limit:,} allowed; the last was {last}. All of them are listed in {self.file}. "
                    "Repair or remove them, or raise data.max_bad_share"
                )


def _field(text: str) -> str:
    """One field of a line: what would break the table, or is no text at all, is written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

"""Decoded images in memory, for data sets small enough: a 32-pixel JPEG need not be decoded a thousand times."""

from __future__ import annotations

import logging

import numpy as np
from jaxtyping import Int64, UInt8

from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source

log = logging.getLogger(__name__)

RAM_CACHE_MB = (
    1024  # ours: CIFAR-10 takes 154 MB, 20,000 pictures of 64 pixels 246 MB; machines for training have 16 GB
)
_NUM_PROBES = 32  # images decoded for the estimate (ours)


def cached(source: Source, *, min_side: int | None = None, max_mb: int = RAM_CACHE_MB) -> Source:
    """The source with all its images decoded into one block of memory, or the source itself if they would not fit.

    The size is estimated from 32 images spread evenly. Worker processes that are forked share the block. `min_side` is
    what the images will be asked for with: pixels are the same with and without the cache.
    """
    sizes = []
    for index in np.linspace(0, len(source) - 1, num=min(_NUM_PROBES, len(source))).astype(int).tolist():
        try:
            sizes.append(source.load(index, min_side=min_side).nbytes)
        except UnreadableImage:
            continue
    estimate = float(np.mean(sizes)) * len(source) / 1e6 if sizes else float("inf")
    if estimate > max_mb:
        log.info("images stay on disk: decoded they would take about %.0f MB, %d MB are allowed", estimate, max_mb)
        return source
    log.info("decoding %s into memory, about %.0f MB", source.name, estimate)
    return CachedSource.of(source, min_side=min_side, max_mb=max_mb) or source


class CachedSource:
    """A source whose pixels lie in memory (see data.sources.Source). Made by `cached`."""

    def __init__(
        self,
        source: Source,
        min_side: int | None,
        pixels: UInt8[np.ndarray, " bytes"],
        shapes: Int64[np.ndarray, "n 2"],
        unreadable: dict[int, str],
    ) -> None:
        self.source, self.min_side = source, min_side
        self.name, self.labels, self.classes = f"{source.name}, in memory", source.labels, source.classes
        self._pixels, self._shapes, self._unreadable = pixels, shapes, unreadable
        self._ends = np.cumsum(shapes.prod(1) * 3)

    @classmethod
    def of(cls, source: Source, *, min_side: int | None, max_mb: int) -> CachedSource | None:
        """Decode all images; None as soon as they take more than `max_mb`, where the estimate was wrong."""
        pixels = bytearray()  # grows in place: a list of arrays joined at the end would need the memory twice
        shapes = np.zeros((len(source), 2), np.int64)
        unreadable: dict[int, str] = {}
        for index in range(len(source)):
            try:
                image = source.load(index, min_side=min_side)
            except UnreadableImage as error:
                unreadable[index] = error.reason
                continue
            shapes[index] = image.shape[:2]
            pixels += image.data
            if len(pixels) > max_mb * 1e6:
                log.info("images stay on disk: decoded they take more than the %d MB allowed", max_mb)
                return None
        return cls(source, min_side, np.frombuffer(pixels, np.uint8), shapes, unreadable)

    def __len__(self) -> int:
        return len(self._shapes)

    def load(self, index: int, *, min_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """A copy of the image in memory; from the source if it is wanted at another least size."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if min_side != self.min_side:
            return self.source.load(index, min_side=min_side)
        if index in self._unreadable:
            raise UnreadableImage(self.item_name(index), self._unreadable[index])
        height, width = self._shapes[index].tolist()
        end = int(self._ends[index])
        return self._pixels[end - height * width * 3 : end].reshape(height, width, 3).copy()

    def item_name(self, index: int) -> str:
        """As the source names it."""
        return self.source.item_name(index)

    def fingerprint(self) -> str:
        """The source's: the data are the same."""
        return self.source.fingerprint()

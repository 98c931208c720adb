"""A small data set with targets per pixel, read once and held in memory."""

from __future__ import annotations

from jaxtyping import UInt8
from numpy import ndarray

from quietvit_eval.dense_data.pairs import PairSource, Target


class HeldPairs:
    """Another source's pairs, all of them loaded when this is made. Raises UnreadableImage if one cannot be."""

    def __init__(self, source: PairSource) -> None:
        self.name, self.kind, self.class_names = source.name, source.kind, source.class_names
        self._names = [source.item_name(i) for i in range(len(source))]
        self._fingerprint = source.fingerprint()
        self._pairs = [source.load(i) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> tuple[UInt8[ndarray, "H W 3"], Target]:
        return self._pairs[index]

    def item_name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        return self._fingerprint

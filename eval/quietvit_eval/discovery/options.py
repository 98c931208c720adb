"""Settings of the discovery task."""

from __future__ import annotations

from dataclasses import dataclass

from quietvit_eval.discovery.features import FACETS, FeatureView
from quietvit_eval.discovery.lost import CANDIDATES
from quietvit_eval.discovery.sweep import LEVELS

CHOICE = {
    "fixed": "bias fixed beforehand",
    "held_out": "bias chosen on the train images, none of which is scored",
    "val": "bias chosen on the test images themselves: optimistic",
}


@dataclass(frozen=True)
class DiscoveryOptions:
    """Settings of the task; defaults are LOST's unless said otherwise. Raises ValueError for values that cannot be."""

    facet: str = "keys"  # or "queries", "values"; the registers paper: keys of DINOv2, values of the others
    block: int = -1  # from 0; -1: the last
    center: bool = False  # features less their mean over the image: another way than a bias
    select: str = "fixed"  # `bias` as it is; "held_out": chosen on train images; "val": on the test images
    bias: float = 0.0  # added to every similarity if `select` is fixed; the registers paper's own is not published
    levels: tuple[float, ...] = LEVELS  # quantiles of the similarities that biases are tried at otherwise (ours)
    k: int = CANDIDATES
    expand: bool = True  # false: the region of the seed alone
    pictures: int = 8  # test images drawn (ours)

    def __post_init__(self) -> None:
        if self.facet not in FACETS:
            raise ValueError(f"discovery: facet is one of {', '.join(sorted(FACETS))}, not {self.facet!r}")
        if self.select not in CHOICE:
            raise ValueError(f"discovery: select is one of {', '.join(CHOICE)}, not {self.select!r}")
        if self.select != "fixed" and self.bias:
            raise ValueError(f"discovery: select={self.select} chooses the bias; leave bias={self.bias:g} out")
        if not abs(self.bias) < float("inf"):
            raise ValueError(f"discovery: bias is a number, not {self.bias}")
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"discovery: levels are shares between 0 and 1, at least one, not {list(self.levels)}")
        for name, least in (("k", 1), ("pictures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"discovery: {name} is a whole number from {least}, not {getattr(self, name)}")

    def view(self, max_side: int | None) -> FeatureView:
        """How images become features. `max_side`: of the longer side, in pixels; None: any."""
        return FeatureView(self.facet, self.block, self.center, max_side)

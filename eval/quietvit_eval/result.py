"""What a task hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quietvit_eval.resampling import PerImage


@dataclass(frozen=True)
class Result:
    """What a task found: scores by name, which of them is the headline, and how it was done."""

    scores: dict[str, float]  # shares in [0, 1], or errors in the task's units
    main: str  # a key of scores, and of what per_image can be scored by
    protocol: dict[str, Any]  # everything that must be equal before two scores are compared
    details: dict[str, Any]  # everything else worth keeping, e.g. which head was chosen
    per_image: PerImage
    higher_is_better: bool = True
    splits: tuple[str, ...] = ("train", "test")  # which it read, where targets are not labels

"""quietvit: self-supervised pretraining of vision transformers with registers.

`quietvit.load(path)` gives a frozen model that reads features of any layer. Importing the package alone does not import
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quietvit.weights.reader import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from quietvit.weights.reader import load

        return load
    raise AttributeError(f"module 'quietvit' has no attribute {name!r}")

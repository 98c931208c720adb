"""What a pixel's target is: the constants that every layout and every task agree on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int16

IGNORE = -1  # the class of pixels that are neither trained on nor scored, whatever a data set's files call them
CLASSES, METRES = "classes", "metres"  # what a pixel's target is

Target = Int16[np.ndarray, "H W"] | Float32[np.ndarray, "H W"]

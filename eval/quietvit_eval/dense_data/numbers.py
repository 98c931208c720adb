"""Images whose pixels are numbers, not colours: class numbers, millimetres."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quietvit.data.decode import MAX_PIXELS

NUMBER_EXTENSIONS = frozenset({".png", ".tif", ".tiff", ".bmp", ".pgm"})  # formats that keep numbers as they are
_FORMATS = ("PNG", "TIFF", "BMP", "PPM", "JPEG")  # JPEG only to be refused by its name
_PHOTOMETRIC, _WHITE_IS_ZERO, _BITS = 262, 0, 258  # TIFF 6.0, section 8


class Unfit(ValueError):  # noqa: N818  (it says what the file is)
    """A file that is whole, but not of the kind that was asked for."""


def read_numbers(path: Path) -> Any:
    """The stored numbers of a one-channel image: [H W] of an integer dtype, or float32 for images of floats.

    Palettes are not applied: their indices are the numbers. Grey PNGs of 1, 2 and 4 bits give their own small numbers,
    which image libraries stretch to 0 .. 255. Raises ValueError for a file that is damaged or missing, Unfit for
    colours, transparency and lossy compression.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height <= MAX_PIXELS:
                image.load()
        except Exception as error:  # Pillow's readers raise nearly anything on damaged files
            raise ValueError(f"damaged, or not an image of numbers ({type(error).__name__}: {error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS:,}, refused as a bomb")
    if image.format == "JPEG":
        raise Unfit("a JPEG: its compression changes numbers; a PNG keeps them")
    if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
        raise Unfit(f"an image of colours ({image.mode}); numbers are wanted, in one channel or as palette indices")
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO or any(bits < 8 for bits in tags.get(_BITS, ())):
        raise Unfit("a TIFF with inverted grey or less than 8 bits; write it with 8 or 16 bits, black being 0")
    numbers = np.asarray(image)
    if numbers.dtype == bool:
        return numbers.astype(np.uint8)
    if image.format == "PNG" and image.mode == "L" and (bits := data[24]) < 8:  # the header's bit depth
        return numbers // (255 // (2**bits - 1))
    return numbers

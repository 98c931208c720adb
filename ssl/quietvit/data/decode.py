"""From the bytes of a file to RGB pixels: every kind of image that people have, handled on purpose.

What becomes of each kind (the documentation repeats this table):

    grey, 1-bit, grey JPEG     three equal channels
    palette                    its colours
    transparency of any kind   laid on white, the page such pictures are made for
    CMYK, YCCK                 (255 - C) * (255 - K) / 255 per channel, without a colour profile. JPEGs with Adobe's
                               marker store inverted inks and are turned round; others are taken as they are
    16-bit grey                the full range 0..65535 becomes 0..255, rounded; not stretched, so images stay comparable
    32-bit integers            0..65535 as 16-bit grey; beyond that stretched from the least to the greatest value
    floating point             [0, 1] becomes 0..255; beyond that stretched from the least to the greatest value
    16-bit colour              the high byte of each channel
    EXIF orientation           applied: the picture stands as the camera meant it
    animations, pages          the first frame
    truncated, damaged, empty  `UnreadableImage`; a JPEG must reach its end marker, half a picture is never handed out

JPEGs of one or three channels go through OpenCV (bit-equal to Pillow, and six times faster on 32-pixel files),
everything else through Pillow, which is told the formats it may try: none of them runs a program.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "UnreadableImage",
    "decode_bytes",
    "decode_file",
    "is_image_name",
    "to_pixels",
]

Pixels = UInt8[np.ndarray, "H W 3"]

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
})
# fmt: on
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")

# Twice Pillow's warning level (a 1 GiB image of 24 bits, times two over three): where Pillow itself speaks of a bomb.
MAX_PIXELS = 178_956_970


class UnreadableImage(Exception):  # noqa: N818  (it names what was met)
    """An image that cannot be read. `name` is the source's name of it, `reason` one line for the user."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Whether the extension is one of `IMAGE_EXTENSIONS`, in any case."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in IMAGE_EXTENSIONS


def decode_file(path: str | Path, name: str, *, min_side: int | None = None) -> Pixels:
    """Read and decode one file; see `decode_bytes`. A file that the system cannot read is an UnreadableImage too."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UnreadableImage(name, error.strerror or str(error)) from error
    return decode_bytes(data, name, min_side=min_side)


def decode_bytes(data: bytes, name: str, *, min_side: int | None = None) -> Pixels:
    """RGB pixels of an encoded image.

    With `min_side` a JPEG may come at a half, a quarter or an eighth of its size, as long as its shorter side keeps
    `min_side` pixels. Raises UnreadableImage(name, reason).
    """
    if not data:
        raise UnreadableImage(name, "the file is empty")
    if not data.startswith(b"\xff\xd8\xff"):
        return _decode_pillow(data, name, invert_cmyk=False)
    try:
        header = read_jpeg_header(data)
    except ValueError as error:
        raise UnreadableImage(name, str(error)) from error
    _check_size(header.width, header.height, name)
    if header.components == 4 or not header.is_common:
        return _decode_pillow(data, name, invert_cmyk=not header.has_adobe)
    return _decode_opencv(data, name, header, min_side)


def to_pixels(image: Image.Image) -> Pixels:
    """RGB pixels of an image opened with Pillow, under the same rules. Raises UnreadableImage as `decode_bytes`."""
    name = str(getattr(image, "filename", "")) or "the Pillow image"
    _check_size(image.width, image.height, name)
    inverted = image.format == "JPEG" and "adobe" not in image.info  # Pillow takes every CMYK JPEG for one of Adobe's
    try:
        return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(image), image.info, inverted))
    except Exception as error:  # as in _decode_pillow
        raise UnreadableImage(name, _one_line(error)) from error


# ---- JPEG headers


@dataclass(frozen=True)
class JpegHeader:
    """What decides how a JPEG is decoded."""

    width: int
    height: int
    components: int
    is_common: bool  # baseline or progressive Huffman with 8 bits: what every decoder reads
    has_adobe: bool
    orientation: int  # EXIF, 1 to 8


# A marker that is not stuffing (00), a restart (D0 to D7), TEM (01) or a fill byte (FF).
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOI, _EOI, _APP1, _APP14 = 0xD8, 0xD9, 0xE1, 0xEE


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Walk from marker to marker to the very end (ITU-T T.81, annex B).

    Decoders fill what is missing with grey and at best print a warning, and an end marker near the end of the file may
    belong to a thumbnail: only the walk tells for certain whether a file is whole. Raises ValueError if it is not.
    """
    frame: tuple[int, int, int, int, int] | None = None
    has_adobe, orientation, position = False, 1, 2
    while True:
        match = _MARKER.search(data, position)
        if match is None:
            raise ValueError(f"truncated JPEG: {len(data)} bytes without an end marker")
        marker, position = match.group(1)[0], match.end()
        if marker == _EOI:
            break
        if marker == _SOI:
            continue
        if position + 2 > len(data):
            raise ValueError(f"truncated JPEG: cut inside a header at byte {len(data)}")
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + length]
        if marker in _FRAMES and frame is None and len(body) >= 6:
            precision, height, width, components = struct.unpack(">BHHB", body[:6])
            frame = (marker, precision, width, height, components)
        elif marker == _APP1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])
        elif marker == _APP14 and body.startswith(b"Adobe"):
            has_adobe = True
        position += length
    if frame is None:
        raise ValueError("damaged JPEG: no frame header")
    marker, precision, width, height, components = frame
    is_common = marker in (0xC0, 0xC1, 0xC2) and precision == 8 and components in (1, 3)
    return JpegHeader(width, height, components, is_common, has_adobe, orientation)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 (upright) if it is missing or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:  # cut EXIF block: the picture itself may be whole
        return 1
    return 1


# ---- OpenCV: JPEGs of one or three channels

# 256 = COLOR_RGB, 16 / 32 / 64 = REDUCED_2 / 4 / 8; OpenCV has no names for the sums.
_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def _decode_opencv(data: bytes, name: str, header: JpegHeader, min_side: int | None) -> Pixels:
    shorter = min(header.width, header.height)
    scale = 1
    if min_side is not None:
        scale = next((s for s in (8, 4, 2) if -(-shorter // s) >= min_side), 1)
    try:
        # Orientation is ours to apply, so that both paths do the same.
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS[scale] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise UnreadableImage(name, f"damaged JPEG: {error.err}") from error
    if pixels is None:
        raise UnreadableImage(name, "damaged JPEG: the decoder gave up")
    return _upright(pixels, header.orientation)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the camera's rotation: orientation 1 to 8 of the EXIF standard."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# ---- Pillow: everything else


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(name, f"{width} x {height} pixels: more than {MAX_PIXELS:,}, refused as a bomb")


def _decode_pillow(data: bytes, name: str, *, invert_cmyk: bool) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF blocks and the like: one line per image would drown the log
        try:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # Pillow's readers raise nearly anything on damaged files
            raise UnreadableImage(name, _one_line(error)) from error
        _check_size(opened.width, opened.height, name)
        try:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return np.ascontiguousarray(_to_rgb(image, opened.info, invert_cmyk))
        except Exception as error:  # as above; UnreadableImage itself is raised nowhere in here
            raise UnreadableImage(name, _one_line(error)) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _to_rgb(image: Image.Image, info: dict[Any, Any], invert_cmyk: bool) -> Pixels:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey(_from_16_bits(np.asarray(image).astype(np.int64)))
    if mode == "I":
        values = np.asarray(image).astype(np.int64)
        fits = values.min() >= 0 and values.max() <= 65535
        return _grey(_from_16_bits(values) if fits else _stretched(values))
    if mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("floating-point image with infinite or undefined values")
        fits = values.min() >= 0 and values.max() <= 1
        return _grey(np.rint(values * 255).astype(np.uint8) if fits else _stretched(values))
    if mode == "CMYK":
        inks = np.asarray(image).astype(np.int64)
        if invert_cmyk:  # Pillow takes every CMYK JPEG for one of Adobe's
            inks = 255 - inks
        rgb = ((255 - inks[..., :3]) * (255 - inks[..., 3:]) + 127) // 255
        return rgb.astype(np.uint8)
    if "A" in mode or "a" in mode or "transparency" in info:
        coloured = image.convert("RGBA")
        page = Image.new("RGBA", coloured.size, "white")
        return np.asarray(Image.alpha_composite(page, coloured).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    return ((values * 255 + 32767) // 65535).astype(np.uint8)


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _grey(values: np.ndarray) -> Pixels:
    return np.repeat(values[..., None], 3, axis=2)

"""Texture families: scalar fields in [0, 1] over a surface, coloured later by a ramp.

A family is what the labels `material` and `background` name. Everything else about a texture (period, direction, phase,
duty, colours) is drawn per surface, so only the structure says which family it is. Coordinates come in periods:
one unit is one stripe, tile or leaf, which the renderer makes 5 to 14 pixels wide in a 64 pixel picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, UInt8

from quietvit.data.scenes.draws import Draws, uniforms

Field = Float32[np.ndarray, "..."]
Pattern = Callable[[Field, Field, Draws], Field]

_CELLS = 16  # side of a table of cell tones: more cells than a surface shows, so no repetition is seen
_TILE = 512  # texels of a noise tile ...
_TEXELS = 32  # ... of which this many make one unit, enough for pictures of 224 pixels
_NOISE_KEY = 20240229  # any constant: the tiles are part of the definition of the data set


@lru_cache(maxsize=2)
def noise_tile(roughness: float) -> UInt8[np.ndarray, "512 512"]:
    """Periodic noise, all of 0..255 equally frequent; amplitudes fall as frequency**-roughness above one per unit."""
    white = uniforms(_NOISE_KEY, num=_TILE * _TILE).reshape(_TILE, _TILE)
    freq = np.fft.fftfreq(_TILE, d=1.0 / _TEXELS)
    radius = np.hypot(freq[:, None], freq[None, :])
    gain = radius**2 / (0.25 + radius ** (2.0 + roughness))  # rises to a peak below one cycle per unit, then falls
    smooth = np.fft.ifft2(np.fft.fft2(white) * gain).real
    rank = np.argsort(np.argsort(smooth, axis=None))
    return (rank * 256 // rank.size).astype(np.uint8).reshape(_TILE, _TILE)


def _noise(u: Field, v: Field, draws: Draws, roughness: float, zoom: float = 1.0) -> Field:
    """Noise in [0, 1] at a random place of the tile; `zoom` > 1 makes it finer."""
    scale = _TEXELS * zoom
    column = (u * scale + draws.uniform(0, _TILE)).astype(np.int32) & (_TILE - 1)
    row = (v * scale + draws.uniform(0, _TILE)).astype(np.int32) & (_TILE - 1)
    return noise_tile(roughness).ravel()[(row * _TILE) + column].astype(np.float32) * np.float32(1 / 255)


def _triangle(x: Field) -> Field:
    """Triangle wave in [-1, 1] of period one."""
    field: Field = np.abs(x - np.floor(x) - 0.5) * 4 - 1
    return field


def _edge(x: Field, slope: float) -> Field:
    """From 0 to 1 around x = 0, steep but not a jump: the picture is sampled, a jump would alias."""
    return np.clip(x * slope + 0.5, 0.0, 1.0)


def _cells(row: Field, column: Field, draws: Draws) -> Field:
    """A random tone for each cell, given whole numbers."""
    index = (row.astype(np.int32) & (_CELLS - 1)) * _CELLS + (column.astype(np.int32) & (_CELLS - 1))
    return draws.table(_CELLS).ravel()[index]


# ---- materials ----


def plain(u: Field, v: Field, draws: Draws) -> Field:
    """One colour; only the shading varies."""
    return np.full_like(u, draws.uniform())


def stripes(u: Field, v: Field, draws: Draws) -> Field:
    """Straight parallel bands."""
    return _edge(_triangle(u) + draws.uniform(-0.3, 0.3), 2.5)


def checker(u: Field, v: Field, draws: Draws) -> Field:
    """Squares of alternating colour."""
    return _edge(np.clip(_triangle(u * 0.6) * 3, -1, 1) * np.clip(_triangle(v * 0.6) * 3, -1, 1), 0.7)


def dots(u: Field, v: Field, draws: Draws) -> Field:
    """Discs in staggered rows."""
    row = np.floor(v)
    du = u + 0.5 * row
    du = du - np.floor(du) - 0.5
    dv = v - row - 0.5
    radius = draws.uniform(0.28, 0.38)
    return _edge(radius * radius - du * du - dv * dv, 8.0)


def zigzag(u: Field, v: Field, draws: Draws) -> Field:
    """Chevrons: bands that turn back and forth."""
    return _edge(_triangle(u + draws.uniform(0.35, 0.5) * _triangle(v * 0.5)) + draws.uniform(-0.2, 0.2), 2.5)


def bricks(u: Field, v: Field, draws: Draws) -> Field:
    """Long blocks in staggered courses with joints of the far colour."""
    course = np.floor(v)
    along = u * 0.5 + 0.5 * course
    block = np.floor(along)
    joint = np.maximum(np.abs(along - block - 0.5) * 2 - 0.06, np.abs(v - course - 0.5) * 2 + 0.08)
    tone = 0.45 * _cells(course, block, draws)
    field: Field = tone + (1 - tone) * _edge(joint - 0.86, 5.0)
    return field


def marble(u: Field, v: Field, draws: Draws) -> Field:
    """Winding veins: bands warped by noise."""
    warp = _noise(u, v, draws, 3.0, zoom=0.5)
    field: Field = np.abs(_triangle(u * 0.25 + warp * draws.uniform(1.2, 1.8)))
    return field


def mesh(u: Field, v: Field, draws: Draws) -> Field:
    """Thin lines crossing at right angles."""
    line = np.maximum(_triangle(u * 0.8), _triangle(v * 0.8))
    return _edge(line - draws.uniform(0.55, 0.65), 3.0)


MATERIALS: dict[str, Pattern] = {
    "plain": plain,
    "stripes": stripes,
    "checker": checker,
    "dots": dots,
    "zigzag": zigzag,
    "bricks": bricks,
    "marble": marble,
    "mesh": mesh,
}


# ---- backgrounds ----


def planks(u: Field, v: Field, draws: Draws) -> Field:
    """Upright boards, each of its own tone, with dark gaps and a faint grain."""
    across, along = u, v
    board = np.floor(across)
    tone = 0.35 + 0.65 * _cells(board, np.zeros_like(board), draws)
    grain = 0.15 * _noise(across * 3, along * 0.3, draws, 3.0)
    field: Field = (tone - grain) * _edge(0.43 - np.abs(across - board - 0.5), 10.0)
    return field


def tiles(u: Field, v: Field, draws: Draws) -> Field:
    """Square tiles, each of its own tone, without joints."""
    return _cells(np.floor(v), np.floor(u), draws)


def clouds(u: Field, v: Field, draws: Draws) -> Field:
    """Soft shapes of several sizes."""
    return _noise(u, v, draws, 3.0, zoom=draws.uniform(0.35, 0.5))


def hills(u: Field, v: Field, draws: Draws) -> Field:
    """Ranges one behind the other, each dark at its ridge and bright at its foot."""
    slow = draws.uniform(0.25, 0.4)
    height = v * 0.5 + 0.3 * _triangle(u * slow) + 0.12 * _triangle(u * slow * 2.7 + draws.uniform())
    return height - np.floor(height)


def windows(u: Field, v: Field, draws: Draws) -> Field:
    """A facade: upright rectangles with wide gaps, some lit."""
    column, row = np.floor(u), np.floor(v * 0.75)
    inside = 0.36 - np.maximum(np.abs(u - column - 0.5) * 1.35, np.abs(v * 0.75 - row - 0.5))
    field: Field = (0.4 + 0.6 * _cells(row, column, draws)) * _edge(inside, 8.0)
    return field


def foliage(u: Field, v: Field, draws: Draws) -> Field:
    """Leaves: small hard-edged blobs without order."""
    return _edge(_noise(u, v, draws, 3.0, zoom=1.3) - draws.uniform(0.45, 0.55), 4.0)


def shingles(u: Field, v: Field, draws: Draws) -> Field:
    """Overlapping rounded scales in staggered rows."""
    arc = v * 1.2 + 0.5
    row = np.floor(arc)
    du = u + 0.5 * row
    du = du - np.floor(du) - 0.5
    drop = arc - row - 2.0 * du * du
    return drop - np.floor(drop)


def trellis(u: Field, v: Field, draws: Draws) -> Field:
    """Laths crossing aslant, one in front of the other."""
    rising = _edge(_triangle((u + v) * 0.5) - 0.45, 4.0)
    falling = _edge(_triangle((u - v) * 0.5) - 0.45, 4.0)
    field: Field = np.maximum(rising, 0.6 * falling)
    return field


BACKGROUNDS: dict[str, Pattern] = {
    "planks": planks,
    "tiles": tiles,
    "clouds": clouds,
    "hills": hills,
    "windows": windows,
    "foliage": foliage,
    "shingles": shingles,
    "trellis": trellis,
}


def paint(
    pattern: Pattern, u: Field, v: Field, draws: Draws, *, period: float, turn: float
) -> Float32[np.ndarray, "... 3"]:
    """Colours in [0, 1] of a pattern at surface coordinates u, v; `period` in their unit, `turn` in radians."""
    cos, sin = math.cos(turn) / period, math.sin(turn) / period
    shift_u, shift_v = draws.uniform(0, _CELLS), draws.uniform(0, _CELLS)
    field = pattern(u * cos + (v * sin + shift_u), v * cos + (shift_v - u * sin), draws)
    # Level and contrast are the same lottery for every family: without that, the brightness of a wall would tell it.
    span = draws.uniform(0.14, 0.2) / max(float(field.std()), 0.2)
    dark = draws.uniform(0.32, 0.6) - span * float(field.mean())
    return _ramp(dark, dark + span, draws).take((field * (_STEPS - 1)).astype(np.intp), axis=0)


_STEPS = 64  # colours of a ramp: two grey levels apart at most
_AT = np.linspace(0.0, 2.0, _STEPS)[:, None]
_BLEND = np.concatenate([np.clip(1 - _AT, 0, 1), 1 - np.abs(_AT - 1), np.clip(_AT - 1, 0, 1)], axis=1).astype(
    np.float32
)


def _ramp(dark: float, light: float, draws: Draws) -> Float32[np.ndarray, "64 3"]:
    """A ramp between two luminances of one random colour, through a third shade.

    The ends differ in hue only a little: in the world a texture is mostly a matter of shade, and joints are dark.
    Colours are muted: vivid ones tell pictures apart so well that a method that matches crops need learn little else.
    """
    base = [draws.uniform(-0.14, 0.14) for _ in range(3)]
    stops = [_shade(base, luminance, draws) for luminance in (dark, (dark + light) / 2, light)]
    return _BLEND @ np.array(stops, dtype=np.float32)


def _shade(base: list[float], luminance: float, draws: Draws) -> list[float]:
    """An RGB colour near `base` and of about the given luminance, in [0.02, 0.98]."""
    red, green, blue = (c + draws.uniform(-0.07, 0.07) for c in base)
    shift = luminance - (0.299 * red + 0.587 * green + 0.114 * blue)  # ITU-R BT.601
    return [min(max(c + shift, 0.02), 0.98) for c in (red, green, blue)]

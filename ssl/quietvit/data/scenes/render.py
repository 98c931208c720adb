"""One scene from labels and random numbers: a camera over a floor before a wall, and one to three solids.

Frame: x right, y up, z ahead, metres; the eye stands above the origin of the floor y = 0. The camera only nods, so that
ray directions are (right(column), fall(row), ahead(row)), with the depth along the optical axis as their parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int8, Int64, UInt8

from quietvit.data.scenes.draws import Draws
from quietvit.data.scenes.patterns import BACKGROUNDS, MATERIALS, paint
from quietvit.data.scenes.solids import SOLIDS, Rays

OVERSAMPLING = 2  # samples per pixel and axis: the least that keeps edges and fine textures from crawling
_SHAPES, _MATERIALS, _BACKGROUNDS = list(SOLIDS.values()), list(MATERIALS.values()), list(BACKGROUNDS.values())


@dataclass(frozen=True)
class Layers:
    """What the renderer returns, per pixel; `shapes` and `materials` are 0 on floor and wall, else 1 + category."""

    image: UInt8[np.ndarray, "H W 3"]
    shapes: Int64[np.ndarray, "H W"]
    materials: Int64[np.ndarray, "H W"]
    depth: Float32[np.ndarray, "H W"]


@dataclass(frozen=True)
class _Solid:
    """One solid placed in the scene, foot at (x, floor, z)."""

    shape: int
    material: int
    x: float
    z: float
    scale: float
    yaw: float


class _Camera:
    """Ray directions of one picture and the light of its scene."""

    def __init__(self, side: int, draws: Draws) -> None:
        self.half = math.tan(math.radians(draws.uniform(44.0, 54.0)) / 2)  # of the field of view: a normal lens
        self.nod = math.radians(draws.uniform(-4.0, 3.0))
        self.eye = draws.uniform(0.45, 0.75)
        at = ((np.arange(side) + 0.5) * (2 / side) - 1).astype(np.float32) * np.float32(self.half)
        self.right = at[None, :]
        self.fall = (-at * math.cos(self.nod) - math.sin(self.nod))[:, None]
        self.ahead = (math.cos(self.nod) - at * math.sin(self.nod))[:, None]
        self.side = side
        around, high = draws.uniform(-1.3, 1.3), draws.uniform(0.5, 1.1)
        self.light = (math.sin(around) * math.cos(high), math.sin(high), -math.cos(around) * math.cos(high))
        self.ambient = draws.uniform(0.4, 0.6)

    def window(self, x: float, y: float, z: float, radius: float) -> tuple[slice, slice]:
        """Rows and columns that a ball may touch; empty when it is out of sight."""
        cos, sin = math.cos(self.nod), math.sin(self.nod)
        up, axial = y * cos + z * sin, z * cos - y * sin
        return self._span(-up, axial, radius), self._span(x, axial, radius)

    def _span(self, aside: float, axial: float, radius: float) -> slice:
        angle, spread = math.atan2(aside, axial), math.asin(min(1.0, radius / math.hypot(aside, axial)))
        ends = [(math.tan(angle + s * spread) / self.half + 1) * self.side / 2 for s in (-1, 1)]
        return slice(max(0, math.floor(ends[0])), max(0, min(self.side, math.ceil(ends[1]) + 1)))


def render_scene(shape: int, material: int, background: int, draws: Draws, *, image_size: int) -> Layers:
    """Render the scene whose main solid has this shape and material, before a wall of this background family."""
    side = image_size * OVERSAMPLING
    camera = _Camera(side, draws)
    solids = _place(shape, material, draws)
    colour, near = _stage(camera, background, solids, draws)
    owner = np.zeros((side, side), dtype=np.int8)
    for number, solid in enumerate(solids, start=1):
        _add(camera, solid, number, draws.branch(number), colour, near, owner)
    # Masks and depth cannot be averaged: they are those of one sample of the pixel.
    first = (slice(None, None, OVERSAMPLING), slice(None, None, OVERSAMPLING))
    shapes = np.array([0, *(1 + s.shape for s in solids)])
    materials = np.array([0, *(1 + s.material for s in solids)])
    return Layers(_average(colour), shapes[owner[first]], materials[owner[first]], 1 / near[first])


def _average(colour: Float32[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Mean of the samples of each pixel."""
    rows = colour[0::OVERSAMPLING] + colour[1::OVERSAMPLING]
    pixels = (rows[:, 0::OVERSAMPLING] + rows[:, 1::OVERSAMPLING]) * np.float32(255 / OVERSAMPLING**2) + np.float32(0.5)
    image: UInt8[np.ndarray, "H W 3"] = pixels.astype(np.uint8)
    return image


def _place(shape: int, material: int, draws: Draws) -> list[_Solid]:
    """The main solid, large and near the middle, and up to two small ones beside it."""
    main = _Solid(
        shape,
        material,
        x=draws.uniform(-0.45, 0.45),
        z=draws.uniform(2.2, 2.8),
        scale=draws.uniform(0.9, 1.25),
        yaw=draws.uniform(0, 2 * math.pi),
    )
    solids = [main]
    first_side = 1 if draws.uniform() < 0.5 else -1
    for k in range(draws.below(3)):
        sign = first_side if k == 0 else -first_side
        solids.append(
            _Solid(
                draws.below(len(_SHAPES)),
                draws.below(len(_MATERIALS)),
                x=main.x + sign * draws.uniform(0.85, 1.1),
                z=main.z + draws.uniform(-0.4, 0.5),
                scale=draws.uniform(0.3, 0.5),
                yaw=draws.uniform(0, 2 * math.pi),
            )
        )
    return solids


def _stage(
    camera: _Camera, background: int, solids: list[_Solid], draws: Draws
) -> tuple[Float32[np.ndarray, "s s 3"], Float32[np.ndarray, "s s"]]:
    """Colours and nearness (1 / metres) of wall and floor, with the solids' soft shadows."""
    yaw, distance = draws.uniform(-0.4, 0.4), draws.uniform(4.0, 5.2)
    cos, sin = math.cos(yaw) / distance, math.sin(yaw) / distance
    near = camera.right * sin + camera.ahead * cos
    u = (camera.right * cos - camera.ahead * sin) / near
    v = camera.fall / near
    # In units of the wall's distance: 1/10 to 1/6 of the picture, 6 to 10 of 64 pixels.
    period = camera.half * draws.uniform(0.19, 0.32)
    turn = draws.uniform(-0.2, 0.2)  # people hang things nearly straight
    colour = paint(_BACKGROUNDS[background], u, v / distance, draws, period=period, turn=turn)
    colour *= draws.uniform(0.8, 1.0)
    grey = draws.uniform(0.25, 0.8)
    tone = np.array([grey + draws.uniform(-0.1, 0.1) for _ in range(3)], dtype=np.float32)
    floor = camera.fall * (-1 / camera.eye)
    rows = slice(int((floor[:, 0] <= near.min(axis=1)).sum()), None)  # the floor grows nearer row by row
    shade = _floor_light(camera, rows, 1 / np.maximum(floor[rows], np.float32(0.02)), solids)
    seen = (floor[rows] > near[rows])[..., None]
    colour[rows] = np.where(seen, shade[..., None] * tone, colour[rows])
    near[rows] = np.maximum(near[rows], floor[rows])
    return colour, near


def _floor_light(
    camera: _Camera, rows: slice, depth: Float32[np.ndarray, "r 1"], solids: list[_Solid]
) -> Float32[np.ndarray, "r s"]:
    """Brightness of the floor: full light but for a soft patch where each solid stands, drawn away from the light."""
    x, z = depth * camera.right, depth * camera.ahead[rows]
    shade: Float32[np.ndarray, "r s"] = np.ones_like(x)
    for solid in solids:
        reach = 0.3 * solid.scale
        dx = x - (solid.x - reach * camera.light[0])
        dz = z - (solid.z - reach * camera.light[2])
        width = (0.6 * solid.scale) ** 2
        shade *= 1 - 0.6 * np.exp((dx * dx + dz * dz) * (-1 / width))
    return shade


def _add(
    camera: _Camera,
    solid: _Solid,
    number: int,
    draws: Draws,
    colour: Float32[np.ndarray, "s s 3"],
    near: Float32[np.ndarray, "s s"],
    owner: Int8[np.ndarray, "s s"],
) -> None:
    """Draw one solid into the picture, in place, where nothing nearer is there."""
    body, scale = _SHAPES[solid.shape], solid.scale
    middle = body.height * scale / 2
    reach = math.hypot(body.radius * scale, middle)
    rows, columns = camera.window(solid.x, middle - camera.eye, solid.z, reach)
    right, fall, ahead = camera.right[:, columns], camera.fall[rows], camera.ahead[rows]
    eye = (-solid.x / scale, camera.eye / scale, -solid.z / scale)
    # The solid's frame is smaller by `scale`, so its nearness (1 / metres) is greater by as much.
    s = body.nearness(Rays(eye, right, fall, ahead), solid.yaw) * (1 / scale)
    row, column = np.nonzero(s > near[rows, columns])
    if not row.size:  # out of sight or hidden
        return
    s = s[row, column]
    t = 1 / (s * scale)
    view = (right[0, column], fall[row, 0], ahead[row, 0])
    x, y, z = (o + t * d for o, d in zip(eye, view, strict=True))
    cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
    surface = body.surface(x * cos - z * sin, y, x * sin + z * cos)
    period = draws.uniform(0.17, 0.24)  # 5 to 10 of 64 pixels on the main solid
    turn = draws.uniform(-0.2, 0.2)
    albedo = paint(_MATERIALS[solid.material], surface.u, surface.v, draws, period=period, turn=turn)
    nx, ny, nz = surface.normal
    normal = (nx * cos + nz * sin, ny, nz * cos - nx * sin)
    diffuse, highlight = _light(camera, normal, view, gloss=draws.uniform(0.0, 0.35))
    at = (row + rows.start, column + columns.start)
    colour[at] = np.minimum(albedo * diffuse[:, None] + highlight[:, None], 1.0)
    near[at] = s
    owner[at] = number


def _light(
    camera: _Camera,
    normal: tuple[Float32[np.ndarray, " n"], ...],
    view: tuple[Float32[np.ndarray, " n"], ...],
    *,
    gloss: float,
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Diffuse factor (Lambert) and highlight to add (Blinn and Phong, exponent 16)."""
    lx, ly, lz = camera.light
    facing = np.maximum(normal[0] * lx + normal[1] * ly + normal[2] * lz, 0)
    inverse = 1 / np.sqrt(view[0] ** 2 + view[1] ** 2 + view[2] ** 2)
    hx, hy, hz = lx - view[0] * inverse, ly - view[1] * inverse, lz - view[2] * inverse
    along = normal[0] * hx + normal[1] * hy + normal[2] * hz
    half = np.maximum(along, 0) ** 2 / (hx * hx + hy * hy + hz * hz)  # squared cosine
    eighth = (half * half) ** 2
    return camera.ambient + (1 - camera.ambient) * facing, gloss * eighth * eighth

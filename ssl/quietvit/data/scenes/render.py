"""One scene from labels and random numbers: a camera over a floor before a wall, and one to three solids.

Frame: x right, y up, z into the picture, metres, the eye at the origin and the floor at y = -eye height. The camera only
nods, so ray directions are (u, fall(v), ahead(v)) with the depth along the optical axis as their parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from quietvit.data.scenes.draws import Draws
from quietvit.data.scenes.patterns import BACKGROUNDS, MATERIALS, paint
from quietvit.data.scenes.solids import SOLIDS

OVERSAMPLING = 2  # samples per pixel and axis: the least that keeps edges and fine textures from crawling
_SHAPES, _MATERIALS, _BACKGROUNDS = (list(t.values()) for t in (SOLIDS, MATERIALS, BACKGROUNDS))


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
        self.nod = math.radians(draws.uniform(-1.0, 6.0))
        self.eye = draws.uniform(0.55, 0.85)
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
    colour, depth = _stage(camera, background, solids, draws)
    owner = np.zeros((side, side), dtype=np.int8)
    for number, solid in enumerate(solids, start=1):
        _add(camera, solid, number, draws, colour, depth, owner)
    pixels = colour.reshape(image_size, OVERSAMPLING, image_size, OVERSAMPLING, 3)
    image = sum(pixels[:, i, :, j] for i in range(OVERSAMPLING) for j in range(OVERSAMPLING))
    image *= 255 / OVERSAMPLING**2
    # Masks and depth cannot be averaged: they are those of one sample of the pixel.
    seen = owner[::OVERSAMPLING, ::OVERSAMPLING]
    shapes = np.array([0, *(1 + s.shape for s in solids)])
    materials = np.array([0, *(1 + s.material for s in solids)])
    sharp = np.ascontiguousarray(depth[::OVERSAMPLING, ::OVERSAMPLING])
    return Layers((image + 0.5).astype(np.uint8), shapes[seen], materials[seen], sharp)


def _place(shape: int, material: int, draws: Draws) -> list[_Solid]:
    """The main solid, large and near the middle, and up to two small ones beside it."""
    main = _Solid(
        shape,
        material,
        x=draws.uniform(-0.3, 0.3),
        z=draws.uniform(2.1, 2.6),
        scale=draws.uniform(1.05, 1.35),
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
    """Colours and depth of wall and floor, with the solids' soft shadows."""
    yaw, distance = draws.uniform(-0.5, 0.5), draws.uniform(3.4, 4.6)
    cos, sin = math.cos(yaw), math.sin(yaw)
    near_wall = np.maximum((camera.right * sin + camera.ahead * cos) / distance, np.float32(0.02))  # 1 / depth
    near_floor = camera.fall * (-1 / camera.eye)
    depth = 1 / near_wall
    u = depth * (camera.right * cos - camera.ahead * sin)
    v = depth * camera.fall
    period = distance * camera.half * draws.uniform(0.2, 0.4)  # 1/10 to 1/5 of the picture: 6 to 13 of 64 pixels
    turn = draws.uniform(-0.12, 0.12)  # people hang things nearly straight
    colour = paint(_BACKGROUNDS[background], u, v, draws, period=period, turn=turn)
    colour *= draws.uniform(0.8, 1.0)
    first = int(np.argmax(near_floor[:, 0] > near_wall.min(axis=1)))
    if near_floor[-1, 0] > near_wall[-1].min():
        rows = slice(first, None)
        floor = np.broadcast_to(near_floor[rows], depth[rows].shape) > near_wall[rows]
        below = 1 / np.maximum(near_floor[rows], np.float32(0.02))
        depth[rows] = np.where(floor, below, depth[rows])
        shade = _floor_light(camera, rows, below, solids)
        tone = np.array([draws.uniform(0.15, 0.9) for _ in range(3)], dtype=np.float32)
        colour[rows] = np.where(floor[..., None], shade[..., None] * tone, colour[rows])
    return colour, depth


def _floor_light(
    camera: _Camera, rows: slice, depth: Float32[np.ndarray, "r 1"], solids: list[_Solid]
) -> Float32[np.ndarray, "r s"]:
    """Brightness of the floor: full light but for a soft patch where each solid stands, drawn away from the light."""
    x, z = depth * camera.right, depth * camera.ahead[rows]
    shade = np.ones_like(x)
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
    depth: Float32[np.ndarray, "s s"],
    owner: np.ndarray,
) -> None:
    """Draw one solid into the picture, in place, where nothing nearer is there."""
    body = _SHAPES[solid.shape]
    middle = body.height * solid.scale / 2
    reach = math.hypot(body.radius * solid.scale, middle)
    rows, columns = camera.window(solid.x, middle - camera.eye, solid.z, reach)
    cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
    right, ahead = camera.right[:, columns], camera.ahead[rows]
    ray = (right * cos - ahead * sin, camera.fall[rows], right * sin + ahead * cos)
    scale = 1 / solid.scale
    origin = (
        (-solid.x * cos + solid.z * sin) * scale,
        camera.eye * scale,
        (-solid.x * sin - solid.z * cos) * scale,
    )
    # In the solid's own frame lengths are divided by its scale, so t must be multiplied back.
    hits = body.meet(origin, ray)
    t = hits.depth * solid.scale
    front = t < depth[rows, columns][hits.mask]
    mask = hits.mask.copy()
    mask[hits.mask] = front
    u, v = (c[front] * solid.scale for c in hits.uv)
    period = draws.uniform(0.14, 0.26) * solid.scale  # 5 to 10 of 64 pixels on the main solid
    paint_of = paint(_MATERIALS[solid.material], u, v, draws, period=period, turn=draws.uniform(0, math.pi))
    nx, ny, nz = hits.normal[:, front]
    normal = (nx * cos + nz * sin, ny, nz * cos - nx * sin)
    view = [np.broadcast_to(d, mask.shape)[mask] for d in (right, camera.fall[rows], ahead)]
    lit = _light(camera, normal, view, gloss=draws.uniform(0.0, 0.35))
    colour[rows, columns][mask] = np.minimum(paint_of * lit[0][:, None] + lit[1][:, None], 1.0)
    depth[rows, columns][mask] = t[front]
    owner[rows, columns][mask] = number


def _light(
    camera: _Camera,
    normal: tuple[Float32[np.ndarray, " n"], ...],
    view: list[Float32[np.ndarray, " n"]],
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

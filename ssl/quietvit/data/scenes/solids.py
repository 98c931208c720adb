"""Solids that a ray meets in closed form: quadrics of revolution cut by a slab, and convex polytopes.

Every solid stands on y = 0 around the y axis and is about one metre wide; the renderer scales and turns it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float32

Grid = Float32[np.ndarray, "..."]
_FAR = np.float32(1e9)  # stands for "no hit": finite, so that arithmetic on it stays quiet


@dataclass(frozen=True)
class Hits:
    """Where rays meet a solid, only for the rays that do. Lengths in metres of the solid's own frame."""

    mask: np.ndarray  # bool [h w] of the rays asked for
    depth: Grid  # [n] multiples of the ray direction
    normal: Float32[np.ndarray, "3 n"]  # of unit length, outwards
    uv: tuple[Grid, Grid]  # [n] [n] coordinates along the surface


@dataclass(frozen=True)
class Revolution:
    """Points with x**2 + z**2 <= a + b y + c y**2 and 0 <= y <= height."""

    height: float
    profile: tuple[float, float, float]
    radius: float  # the widest one

    def meet(self, origin: tuple[float, float, float], ray: tuple[Grid, Grid, Grid]) -> Hits:
        """First hits of rays origin + t ray, t > 0, seen from outside."""
        (ox, oy, oz), (dx, dy, dz) = origin, ray
        a, b, c = self.profile
        qa = dx * dx + dz * dz - c * dy * dy
        qb = ox * dx + oz * dz - (0.5 * b + c * oy) * dy
        qc = ox * ox + oz * oz - a - b * oy - c * oy * oy
        root = qb * qb - qa * qc
        real = root >= 0
        root = np.sqrt(np.maximum(root, 0))
        qa = np.where(np.abs(qa) < 1e-6, np.float32(1e-6), qa)
        best = np.full(qa.shape, _FAR, dtype=np.float32)
        for sign in (-1.0, 1.0):
            t = (sign * root - qb) / qa
            y = oy + t * dy
            best = np.where(real & (t > 0) & (y >= 0) & (y <= self.height) & (t < best), t, best)
        lateral = best
        for cap in (0.0, self.height):
            limit = a + b * cap + c * cap * cap
            if limit < 1e-4:  # a pole or a tip: no lid there
                continue
            t = (cap - oy) / np.where(np.abs(dy) < 1e-6, np.float32(1e-6), dy)
            x, z = ox + t * dx, oz + t * dz
            best = np.where((x * x + z * z <= limit) & (t > 0) & (t < best), t, best)
        return self._surface(origin, ray, best, lateral)

    def _surface(
        self, origin: tuple[float, float, float], ray: tuple[Grid, Grid, Grid], best: Grid, lateral: Grid
    ) -> Hits:
        mask = best < _FAR
        t = best[mask]
        on_side = lateral[mask] == t
        x, y, z = (o + t * np.broadcast_to(d, mask.shape)[mask] for o, d in zip(origin, ray, strict=True))
        _, b, c = self.profile
        slope = -(0.5 * b + c * y)
        length = np.sqrt(np.maximum(x * x + z * z + slope * slope, np.float32(1e-8)))
        lid = np.where(y > 0.5 * self.height, np.float32(1), np.float32(-1))
        zero = np.float32(0)
        normal = np.stack(
            [np.where(on_side, x / length, zero), np.where(on_side, slope / length, lid), np.where(on_side, z / length, zero)]
        )
        u = np.where(on_side, np.arctan2(x, z) * np.float32(self.radius), x)
        return Hits(mask, t, normal, (u, np.where(on_side, y, z)))


@dataclass(frozen=True)
class Polytope:
    """Points with normals @ p <= offsets: the common part of half-spaces."""

    height: float
    normals: tuple[tuple[float, float, float], ...]  # of unit length, outwards
    offsets: tuple[float, ...]
    radius: float  # of the widest circle around the axis

    def meet(self, origin: tuple[float, float, float], ray: tuple[Grid, Grid, Grid]) -> Hits:
        """First hits of rays origin + t ray, t > 0, seen from outside."""
        (ox, oy, oz), (dx, dy, dz) = origin, ray
        shape = np.broadcast_shapes(dx.shape, dy.shape, dz.shape)
        enter = np.full(shape, -_FAR, dtype=np.float32)
        leave = np.full(shape, _FAR, dtype=np.float32)
        face = np.zeros(shape, dtype=np.int8)
        for k, ((nx, ny, nz), offset) in enumerate(zip(self.normals, self.offsets, strict=True)):
            gap = offset - (nx * ox + ny * oy + nz * oz)
            along = nx * dx + ny * dy + nz * dz
            t = gap / np.where(np.abs(along) < 1e-6, np.float32(1e-6), along)
            if gap < 0:  # the eye is outside this plane: the ray can only enter through it
                later = (t > enter) & (along < 0)
                enter = np.where(along < 0, np.where(later, t, enter), _FAR)
                face = np.where(later, np.int8(k), face)
            else:
                leave = np.where(along > 0, np.minimum(leave, t), leave)
        mask = (enter < leave) & (enter > 0) & (enter < _FAR)
        t, which = enter[mask], face[mask]
        x, y, z = (o + t * np.broadcast_to(d, mask.shape)[mask] for o, d in zip(origin, ray, strict=True))
        normals, first, second = self._frames()
        e, f = first[:, which], second[:, which]
        uv = (x * e[0] + y * e[1] + z * e[2], x * f[0] + y * f[1] + z * f[2])
        return Hits(mask, t, normals[:, which], uv)

    def _frames(self) -> tuple[Grid, Grid, Grid]:
        """Normal and two tangents of every face, each [3 faces]."""
        return _frames(self.normals)


@cache
def _frames(normals: tuple[tuple[float, float, float], ...]) -> tuple[Grid, Grid, Grid]:
    n = np.array(normals)
    aside = np.where(np.abs(n[:, 1:2]) > 0.99, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    first = np.cross(aside, n)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(n, first)
    return n.T.astype(np.float32), first.T.astype(np.float32), second.T.astype(np.float32)


def _sides(num: int, tilt: float) -> list[tuple[float, float, float]]:
    """`num` normals around the axis, leaning upwards by `tilt` radians."""
    angles = [2 * math.pi * k / num for k in range(num)]
    return [(math.sin(a) * math.cos(tilt), math.sin(tilt), math.cos(a) * math.cos(tilt)) for a in angles]


def _prism(num: int, inner: float, height: float) -> Polytope:
    normals = (*_sides(num, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0))
    return Polytope(height, normals, (*[inner] * num, height, 0.0), inner / math.cos(math.pi / num))


def _pyramid(num: int, inner: float, height: float) -> Polytope:
    tilt = math.atan2(inner, height)
    normals = (*_sides(num, tilt), (0.0, -1.0, 0.0))
    return Polytope(height, normals, (*[inner * math.cos(tilt)] * num, 0.0), inner / math.cos(math.pi / num))


def _diamond(inner: float, height: float) -> Polytope:
    half = height / 2
    tilt = math.atan2(inner, half)
    up, down = _sides(4, tilt), _sides(4, -tilt)
    top, bottom = (inner + 0.0) * math.cos(tilt) + half * math.sin(tilt), inner * math.cos(tilt) - half * math.sin(tilt)
    return Polytope(height, (*up, *down), (*[top] * 4, *[bottom] * 4), inner * math.sqrt(2))


SOLIDS: dict[str, Revolution | Polytope] = {
    "sphere": Revolution(1.0, (0.0, 1.0, -1.0), 0.5),
    "cylinder": Revolution(1.0, (0.44**2, 0.0, 0.0), 0.44),
    "cone": Revolution(1.15, (0.55**2, -2 * 0.55**2 / 1.15, (0.55 / 1.15) ** 2), 0.55),
    "spool": Revolution(1.1, (0.5**2, -4 * (0.5**2 - 0.24**2) / 1.1, 4 * (0.5**2 - 0.24**2) / 1.1**2), 0.5),
    "box": _prism(4, 0.42, 0.84),
    "prism": _prism(3, 0.32, 0.95),
    "pyramid": _pyramid(4, 0.5, 1.0),
    "diamond": _diamond(0.42, 1.15),
}

"""Solids that a ray meets in closed form: quadrics of revolution cut by a slab, and convex polytopes.

A solid stands on y = 0 around the y axis and is about one metre wide; the renderer scales, turns and places it. Rays
run from one eye with direction (right, fall, ahead), where `right` depends on the column alone and the other two on the
row. All is said in nearness s = 1 / t, t being the multiple of the direction at the hit: a plane's nearness is then
affine in the direction, "in front" is "greater", and no division meets a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32

Array = Float32[np.ndarray, "..."]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Rays:
    """Rays from `eye`, both in metres of the solid's frame but for its turn around the y axis."""

    eye: Vector
    right: Float32[np.ndarray, "1 w"]
    fall: Float32[np.ndarray, "h 1"]
    ahead: Float32[np.ndarray, "h 1"]


@dataclass(frozen=True)
class Surface:
    """What the renderer needs at points of a solid's surface."""

    normal: Float32[np.ndarray, "3 n"]  # of unit length, outwards
    u: Float32[np.ndarray, " n"]  # coordinates along the surface, metres
    v: Float32[np.ndarray, " n"]


@dataclass(frozen=True)
class Revolution:
    """Points with x**2 + z**2 <= a + b y + c y**2 and 0 <= y <= height, for profile = (a, b, c)."""

    height: float
    profile: Vector
    radius: float  # the widest one

    def nearness(self, rays: Rays, yaw: float) -> Float32[np.ndarray, "h w"]:
        """Nearness of the first hit, 0 for a miss. The eye is outside the whole quadric and above y = 0."""
        (ox, oy, oz), dx, dy, dz = rays.eye, rays.right, rays.fall, rays.ahead
        _, b, c = self.profile
        # With p = eye + direction / s the surface reads  square + 2 cross s + const s**2 = 0.
        square = dx * dx + (dz * dz - c * dy * dy)
        cross = ox * dx + (oz * dz - (0.5 * b + c * oy) * dy)
        const = ox * ox + oz * oz - self._limit(oy)
        root = cross * cross - const * square
        real = root >= 0
        root = np.sqrt(np.maximum(root, 0))
        low, high = dy * (-1 / oy), dy * (1 / (self.height - oy))
        best: Array = np.zeros_like(root)
        for s in ((-root - cross) / const, (root - cross) / const):  # the nearer one last
            in_slab = (s >= low) & ((high <= s) if oy < self.height else (high >= s))
            best = np.where(real & in_slab & (s > 0), s, best)
        limit = self._limit(self.height)
        if oy > self.height and limit > 1e-4:  # looking down on a lid
            s = np.maximum(high, 0)
            x, z = ox * s + dx, oz * s + dz
            best = np.where((x * x + z * z <= limit * s * s) & (s > best), s, best)
        return best

    def surface(self, x: Array, y: Array, z: Array) -> Surface:
        """Normals and coordinates at points of the surface, [n] each, in the solid's frame."""
        lid = (y > self.height - 1e-3) & (self._limit(self.height) > 1e-4)
        _, b, c = self.profile
        slope = -(0.5 * b + c * y)
        inverse = np.where(lid, np.float32(0), 1 / np.sqrt(np.maximum(x * x + z * z + slope * slope, np.float32(1e-8))))
        normal = np.stack([x * inverse, np.where(lid, np.float32(1), slope * inverse), z * inverse])
        return Surface(normal, np.where(lid, x, np.arctan2(x, z) * np.float32(self.radius)), np.where(lid, z, y))

    def _limit(self, y: float) -> float:
        """Squared radius at height y."""
        a, b, c = self.profile
        return a + b * y + c * y * y


@dataclass(frozen=True)
class Polytope:
    """Points with normals @ p <= offsets: the common part of half-spaces."""

    height: float
    normals: tuple[Vector, ...]  # of unit length, outwards
    offsets: tuple[float, ...]
    radius: float  # of the widest circle around the axis

    def nearness(self, rays: Rays, yaw: float) -> Float32[np.ndarray, "h w"]:
        """Nearness of the first hit, 0 for a miss.

        A ray enters when it has passed all planes that it faces, unless it has left through another one before.
        """
        (ox, oy, oz), cos, sin = rays.eye, math.cos(yaw), math.sin(yaw)
        shape = (rays.fall.shape[0], rays.right.shape[1])
        enter, leave = np.full(shape, np.inf, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        for (nx, ny, nz), offset in zip(self.normals, self.offsets, strict=True):
            nx, nz = nx * cos + nz * sin, nz * cos - nx * sin
            gap = offset - (nx * ox + ny * oy + nz * oz)
            s = rays.right * (nx / gap) + (rays.fall * (ny / gap) + rays.ahead * (nz / gap))
            if gap < 0:
                np.minimum(enter, s, out=enter)
            else:
                np.maximum(leave, s, out=leave)
        return np.where(enter > leave, enter, np.float32(0))

    def surface(self, x: Array, y: Array, z: Array) -> Surface:
        """Normals and coordinates at points of the surface, [n] each, in the solid's frame."""
        normals, first, second, offsets = self._frames
        face = (normals @ np.stack([x, y, z]) - offsets).argmax(axis=0)
        e, f = first.take(face, axis=0), second.take(face, axis=0)
        u, v = (x * t[:, 0] + y * t[:, 1] + z * t[:, 2] for t in (e, f))
        return Surface(normals.take(face, axis=0).T, u, v)

    @cached_property
    def _frames(self) -> tuple[Array, Array, Array, Array]:
        """Normal and two tangents of every face [faces 3], and the offsets [faces 1]."""
        n = np.array(self.normals)
        aside = np.where(np.abs(n[:, 1:2]) > 0.99, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
        first = np.cross(aside, n)
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        frames = (n, first, np.cross(n, first), np.array(self.offsets)[:, None])
        normal, e, f, offsets = (a.astype(np.float32) for a in frames)
        return normal, e, f, offsets


def _sides(num: int, tilt: float) -> list[Vector]:
    """`num` normals around the axis, leaning upwards by `tilt` radians."""
    angles = [2 * math.pi * k / num for k in range(num)]
    return [(math.sin(a) * math.cos(tilt), math.sin(tilt), math.cos(a) * math.cos(tilt)) for a in angles]


def _prism(num: int, inner: float, height: float) -> Polytope:
    """An upright prism; `inner` is the distance of its sides from the axis."""
    normals = (*_sides(num, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0))
    return Polytope(height, normals, (*[inner] * num, height, 0.0), inner / math.cos(math.pi / num))


def _pyramid(num: int, inner: float, height: float) -> Polytope:
    tilt = math.atan2(inner, height)
    normals = (*_sides(num, tilt), (0.0, -1.0, 0.0))
    return Polytope(height, normals, (*[inner * math.cos(tilt)] * num, 0.0), inner / math.cos(math.pi / num))


def _diamond(inner: float, height: float) -> Polytope:
    """Two pyramids base to base, standing on a tip."""
    tilt = math.atan2(inner, height / 2)
    lower = (inner - height / 2 * math.tan(tilt)) * math.cos(tilt)
    upper = (inner + height / 2 * math.tan(tilt)) * math.cos(tilt)
    return Polytope(height, (*_sides(4, tilt), *_sides(4, -tilt)), (*[upper] * 4, *[lower] * 4), inner * math.sqrt(2))


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

"""Polygons that shapes are made of: ovals, boxes, strokes and rounded corners. Knows nothing of colours."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """A filled polygon (y downwards, any scale), and the offsets of its corners for an outline of width 1."""

    points: Floats  # [N, 2]
    outwards: Floats  # [N, 2]
    role: str
    outlined: bool


def part(points: Floats, role: str = "main", outlined: bool = True) -> Part:
    following = np.roll(points, -1, 0)
    if np.sum(points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]) < 0:
        points = points[::-1]
    points = points[np.any(np.abs(points - np.roll(points, 1, 0)) > 1e-9, axis=1)]
    edges = np.roll(points, -1, 0) - points
    normals = np.stack([edges[:, 1], -edges[:, 0]], 1) / np.linalg.norm(edges, axis=1, keepdims=True)
    before = np.roll(normals, 1, 0)
    miter = (normals + before) / np.maximum(1 + np.sum(normals * before, 1, keepdims=True), 0.35)
    return Part(points, miter, role, outlined)


def detail(points: Floats, role: str) -> Part:
    return part(points, role, outlined=False)


def oval(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, count: int = 48) -> Floats:
    angles = np.radians(np.linspace(start, end, count, endpoint=end - start < 360))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def rounded(corners: list[tuple[float, float]], radius: float) -> Floats:
    """Replaces every corner of a polygon by a curve."""
    points = np.array(corners, float)
    curve = []
    for before, corner, after in zip(np.roll(points, 1, 0), points, np.roll(points, -1, 0), strict=True):
        ends = []
        for neighbour in (before, after):
            away = neighbour - corner
            length = float(np.linalg.norm(away))
            ends.append(corner + away * min(radius / length, 0.499))
        for t in np.linspace(0, 1, 7):
            curve.append((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * corner + t**2 * ends[1])
    return np.array(curve)


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> Floats:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return rounded(corners, radius) if radius else np.array(corners)


def stroke(path: list[tuple[float, float]] | Floats, width: float) -> Floats:
    """A line of the given width, as a polygon."""
    points = np.asarray(path, float)
    along = np.gradient(points, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True) * width / 2
    return np.concatenate([points + side, (points - side)[::-1]])


def star_points(count: int, inner: float, outer: float) -> list[tuple[float, float]]:
    angles = np.pi * np.arange(2 * count) / count - np.pi / 2
    radii = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]

"""Signed-distance shapes, colours and soft compositing for small vector-style pictures.

Coordinates run from -1 to 1 over the picture, x to the right and y downwards; distances are
negative inside a shape.  Everything is float32 over the whole pixel grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Tone = tuple[Field, Field]

IMAGE_SIZE = 64
# Width of an edge in pixels: slightly over one, which a coarse auto-encoder reproduces better.
EDGE = 1.25
_TINY = 1e-6


@dataclass(frozen=True)
class Frame:
    """A local coordinate system: the pixel centres in it, and the pixels to its unit."""

    x: Field
    y: Field
    px: float

    def place(self, cx: float, cy: float, size: float = 1.0, angle: float = 0.0) -> Frame:
        """Return the frame centred at (cx, cy) here, `size` larger, turned clockwise by `angle`."""
        c, s = math.cos(angle) / size, math.sin(angle) / size
        dx, dy = self.x - cx, self.y - cy
        return Frame(dx * c + dy * s, dy * c - dx * s, self.px * size)


def f32(values: NDArray[np.floating[Any]]) -> Field:
    """Return the values as float32; an array that is float32 already is not copied."""
    return values.astype(np.float32, copy=False)


def _root() -> Frame:
    line = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) * (2.0 / IMAGE_SIZE) - 1.0
    y, x = np.meshgrid(line, line, indexing="ij")
    return Frame(x.astype(np.float32), y.astype(np.float32), IMAGE_SIZE / 2.0)


ROOT = _root()


def oklch(lightness: float, chroma: float, hue: float) -> Field:
    """Return the sRGB colour [3, 1, 1] in 0..1 of an OKLCh colour (hue in degrees)."""
    a = chroma * math.cos(math.radians(hue))
    b = chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    mid = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * mid + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * mid - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * mid + 1.7076147010 * short,
    )
    values = []
    for v in linear:
        v = min(max(v, 0.0), 1.0)
        values.append(12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)
    return np.array(values, dtype=np.float32).reshape(3, 1, 1)


def tone(lightness: float, chroma: float, hue: float, depth: float = 0.06) -> Tone:
    """Return the lit and the shaded colour of a surface; shadows turn a little cooler."""
    cooler = 6.0 if hue >= 130.0 else -7.0
    return (
        oklch(min(lightness + depth, 0.985), chroma * 0.92, hue - 0.5 * cooler),
        oklch(lightness - depth, chroma, hue + cooler),
    )


class Canvas:
    """A picture that shapes are laid on, one over the other."""

    def __init__(self, first: Field, second: Field, angle: float) -> None:
        """Start from a gradient from `first` (top) to `second`, leaning by `angle` radians."""
        ramp = ROOT.y * math.cos(angle) + ROOT.x * math.sin(angle)
        reach = abs(math.cos(angle)) + abs(math.sin(angle))
        self.pixels = f32(first + (second - first) * (0.5 + ramp * (0.5 / reach)))

    def fill(
        self,
        frame: Frame,
        distance: Field,
        colours: Tone,
        *,
        alpha: float = 1.0,
        soft: float = 0.0,
        lean: tuple[float, float] = (0.45, 0.8),
        middle: float = 0.0,
    ) -> None:
        """Lay a shape over the picture.

        The colour goes from lit to shaded along `lean`, halfway at `middle`; `soft` widens the
        edge by so many pixels.
        """
        cover = distance * (-frame.px / (EDGE + soft))
        cover += 0.5
        np.maximum(cover, 0.0, out=cover)
        np.minimum(cover, 1.0, out=cover)
        # Only the rows that the shape touches are blended: most shapes are small.
        touched = np.flatnonzero(cover.max(axis=1))
        if touched.size == 0:
            return
        rows = slice(int(touched[0]), int(touched[-1]) + 1)
        cover = cover[rows]
        if soft > 0.0:
            cover = cover * cover * (3.0 - 2.0 * cover)
        if alpha < 1.0:
            cover *= alpha
        lit, shaded = colours
        part = self.pixels[:, rows]
        if lit is shaded:
            change = lit - part
        else:
            ramp = frame.x[rows] * (0.5 * lean[0]) + frame.y[rows] * (0.5 * lean[1])
            ramp += 0.5 - 0.5 * middle
            np.maximum(ramp, 0.0, out=ramp)
            np.minimum(ramp, 1.0, out=ramp)
            change = ramp * (shaded - lit)
            change += lit
            change -= part
        change *= cover
        part += change

    def vignette(self, strength: float) -> None:
        """Darken the picture towards its corners."""
        self.pixels *= 1.0 - strength * 0.5 * (ROOT.x * ROOT.x + ROOT.y * ROOT.y)

    def part(self, rows: slice, columns: slice) -> Canvas:
        """Return a canvas of a part of this picture: what is laid on it is laid on both."""
        part = Canvas.__new__(Canvas)
        part.pixels = self.pixels[:, rows, columns]
        return part

    def image(self) -> NDArray[np.uint8]:
        """Return the picture as [64, 64, 3] bytes."""
        scaled = np.clip(self.pixels * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
        return np.ascontiguousarray(scaled.transpose(1, 2, 0))


def circle(f: Frame, cx: float, cy: float, radius: float) -> Field:
    """Distance to a disk."""
    dx, dy = f.x - cx, f.y - cy
    return f32(np.sqrt(dx * dx + dy * dy) - radius)


def ellipse_at(x: Field, y: Field, rx: float, ry: float) -> Field:
    """Distance to an ellipse about the origin, exact to first order at its edge."""
    u, v = x * (1.0 / rx), y * (1.0 / ry)
    level = np.sqrt(u * u + v * v)
    u, v = u * (1.0 / rx), v * (1.0 / ry)
    return f32(level * (level - 1.0) / (np.sqrt(u * u + v * v) + _TINY))


def ellipse(f: Frame, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> Field:
    """Distance to a turned ellipse, exact to first order at its edge."""
    dx, dy = f.x - cx, f.y - cy
    if angle != 0.0:
        c, s = math.cos(angle), math.sin(angle)
        dx, dy = dx * c + dy * s, dy * c - dx * s
    return ellipse_at(dx, dy, rx, ry)


def box(f: Frame, cx: float, cy: float, hx: float, hy: float, rounding: float = 0.0) -> Field:
    """Distance to a rounded box of half-sizes hx, hy."""
    qx = np.abs(f.x - cx) - (hx - rounding)
    qy = np.abs(f.y - cy) - (hy - rounding)
    ox, oy = np.maximum(qx, 0.0), np.maximum(qy, 0.0)
    inner = np.minimum(np.maximum(qx, qy), 0.0)
    return f32(np.sqrt(ox * ox + oy * oy) + inner - rounding)


def capsule(
    x: Field, y: Field, a: tuple[float, float], b: tuple[float, float], radius: float
) -> Field:
    """Distance to the thick segment from a to b."""
    bx, by = b[0] - a[0], b[1] - a[1]
    dx, dy = x - a[0], y - a[1]
    t = np.clip((dx * bx + dy * by) * (1.0 / (bx * bx + by * by)), 0.0, 1.0)
    dx, dy = dx - t * bx, dy - t * by
    return f32(np.sqrt(dx * dx + dy * dy) - radius)


def convex(x: Field, y: Field, points: Sequence[tuple[float, float]], rounding: float) -> Field:
    """Distance to a convex polygon with rounded corners, its points clockwise as seen."""
    total: Field = np.zeros_like(x)
    deepest: Field = np.full_like(x, -9.0)
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        nx, ny = by - ay, ax - bx
        length = math.hypot(nx, ny)
        nx, ny = nx / length, ny / length
        plane = x * nx
        plane += y * ny
        plane += rounding - ax * nx - ay * ny
        np.maximum(deepest, plane, out=deepest)
        np.maximum(plane, 0.0, out=plane)
        plane *= plane
        total += plane
    return f32(np.sqrt(total) + np.minimum(deepest, 0.0) - rounding)


def fold(f: Frame, count: int, turn: float = 0.0) -> tuple[Field, Field]:
    """Fold the plane into `count` equal sectors: (along, across) the sector's middle line."""
    step = 2.0 * math.pi / count
    angle = np.arctan2(f.x, -f.y) + (0.5 * step - turn)
    angle = angle - np.floor(angle * (1.0 / step)) * step - 0.5 * step
    radius = np.sqrt(f.x * f.x + f.y * f.y)
    return radius * np.cos(angle), radius * np.sin(angle)


def star(f: Frame, radius: float, inner: float, rounding: float, count: int = 5) -> Field:
    """Distance to a star whose inner corners lie at `inner` of its radius, one point up."""
    along, across = fold(f, count)
    across = np.abs(across)
    half = math.pi / count
    ax, ay = radius - rounding * 1.6, 0.0
    valley = inner * radius - 0.8 * rounding
    bx, by = valley * math.cos(half), valley * math.sin(half)
    ex, ey = bx - ax, by - ay
    dx, dy = along - ax, across - ay
    t = np.clip((dx * ex + dy * ey) * (1.0 / (ex * ex + ey * ey)), 0.0, 1.0)
    side = dx * ey - dy * ex
    dx, dy = dx - t * ex, dy - t * ey
    distance = np.sqrt(dx * dx + dy * dy)
    # `side` is negative on the origin's side of the edge, since the edge runs inwards.
    return f32(np.where(side < 0.0, -distance, distance) - rounding)


def heart(x: Field, y: Field) -> Field:
    """Distance to a heart about the origin, some 1.2 wide and 1.1 high."""
    px, py = np.abs(x), 0.55 - y
    lobe = np.sqrt((px - 0.25) ** 2 + (py - 0.75) ** 2) - math.sqrt(2.0) / 4.0
    total = px + py
    ray = 0.5 * np.maximum(total, 0.0)
    near = np.minimum(px**2 + (py - 1.0) ** 2, (px - ray) ** 2 + (py - ray) ** 2)
    return np.where(total > 1.0, lobe, np.copysign(np.sqrt(near), px - py))


def merge(a: Field, b: Field, blend: float) -> Field:
    """Union of two shapes with a rounded seam of size `blend`."""
    h = np.maximum(blend - np.abs(a - b), 0.0)
    return f32(np.minimum(a, b) - h * h * (0.25 / blend))


def carve(a: Field, b: Field, blend: float) -> Field:
    """The first shape less the second, with rounded corners of size `blend`."""
    h = np.maximum(blend - np.abs(a + b), 0.0)
    return f32(np.maximum(a, -b) + h * h * (0.25 / blend))

"""A synthetic training set: ten classes of things, each drawn as a small soft-shaded picture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.pocket.outdoors import (
    draw_boat,
    draw_flower,
    draw_house,
    draw_mushroom,
    draw_tree,
)
from tools.pocket.scenery import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LIME,
    MAGENTA,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SKY,
    TEAL,
    WHITE,
    WHITES,
    YELLOW,
    Rng,
    backdrop,
    centred,
    pick,
    scene,
    shadow,
    shine,
    uniform,
)
from tools.pocket.shapes import (
    IMAGE_SIZE,
    ROOT,
    Canvas,
    Frame,
    capsule,
    carve,
    circle,
    convex,
    ellipse,
    f32,
    fold,
    heart,
    merge,
    oklch,
    star,
    tone,
)
from var_deploy.export.pocket.model import CLASS_NAMES

__all__ = ["IMAGE_SIZE", "draw", "draw_set"]


def _star(rng: Rng) -> Canvas:
    palette = (YELLOW, YELLOW, AMBER, ORANGE, RED, PINK, MAGENTA, PURPLE, BLUE, SKY)
    colour = pick(rng, (*palette, TEAL, GREEN, LIME, WHITE))
    canvas, _ = scene(rng, colour)
    f = centred(rng, 0.72, 0.98, 0.35)
    inner, rounding = uniform(rng, 0.47, 0.57), uniform(rng, 0.04, 0.11)
    shape = star(f, 1.0, inner, rounding)
    shadow(canvas, f, star(f.place(0.05, 0.09), 1.0, inner, rounding), alpha=0.25)
    canvas.fill(f, shape, tone(*colour), lean=(0.5, 0.9))
    kind = rng.random()
    lightness, chroma, hue = colour
    if kind < 0.35:
        # Each arm has a lit and a shaded half, like a folded paper star.
        halves = np.sin(5.0 * np.arctan2(f.x, -f.y)) * np.sqrt(f.x * f.x + f.y * f.y) * 0.2
        dark = oklch(lightness - 0.13, chroma, hue - 4.0)
        canvas.fill(f, np.maximum(shape, -halves), (dark, dark), alpha=0.6, soft=0.5)
    elif kind < 0.7:
        lit = oklch(min(lightness + 0.1, 0.97), chroma * 0.75, hue)
        canvas.fill(f, star(f, 0.62, inner, rounding), (lit, lit), alpha=0.75, soft=0.8)
    else:
        shine(canvas, f, ellipse(f, -0.14, -0.2, 0.26, 0.2, -0.6), 0.4, 6.0)
    return canvas


def _heart(rng: Rng) -> Canvas:
    palette = (RED, RED, PINK, PINK, MAGENTA, ORANGE, PURPLE, BLUE, SKY, TEAL, GREEN)
    colour = pick(rng, (*palette, AMBER))
    canvas, _ = scene(rng, colour)
    f = centred(rng, 1.05, 1.42, 0.28)
    stretch, puff = uniform(rng, 0.92, 1.1), uniform(rng, 0.02, 0.07)
    x, y = f.x / stretch, f.y * stretch
    shadow(canvas, f, heart(x - 0.03, y - 0.06) - puff, alpha=0.25)
    shape = heart(x, y) - puff
    canvas.fill(f, shape, tone(*colour, depth=0.07), lean=(0.9, 1.5))
    kind = rng.random()
    lightness, chroma, hue = colour
    if kind < 0.55:
        shine(canvas, f, ellipse(f, -0.28, -0.27, 0.15, 0.095, -0.7), uniform(rng, 0.45, 0.75), 1.5)
    elif kind < 0.8:
        lit = oklch(min(lightness + 0.1, 0.96), chroma * 0.75, hue)
        canvas.fill(f, shape + 0.16, (lit, lit), alpha=0.7, soft=1.0)
    else:
        shine(canvas, f, circle(f, -0.2, -0.22, 0.2), 0.4, 7.0)
    return canvas


def _fish(rng: Rng) -> Canvas:
    palette = (ORANGE, ORANGE, YELLOW, RED, PINK, MAGENTA, PURPLE, BLUE, TEAL, LIME)
    colour = pick(rng, palette)
    lightness, chroma, hue = colour
    if rng.random() < 0.6 and not 150.0 < hue < 290.0:
        level = uniform(rng, 0.42, 0.55) if lightness > 0.68 else uniform(rng, 0.84, 0.91)
        water = uniform(rng, 190.0, 262.0)
        canvas = backdrop(rng, level, water, water + uniform(rng, -30.0, 30.0))
    else:
        canvas, level = scene(rng, colour)
    f = centred(rng, 0.8, 0.95, 0.22)
    if rng.random() < 0.5:
        f = Frame(-f.x, f.y, f.px)
    long, high = uniform(rng, 0.56, 0.65), uniform(rng, 0.38, 0.53)
    fins = tone(lightness - 0.09, chroma, hue - uniform(rng, 0.0, 16.0))
    if rng.random() < 0.35:
        fins = tone(*pick(rng, palette))
    spread = uniform(rng, 0.34, 0.46)
    upper = ellipse(f, -0.68, -0.5 * spread, 0.3, 0.17, 0.65)
    lower = ellipse(f, -0.68, 0.5 * spread, 0.3, 0.17, -0.65)
    canvas.fill(f, merge(upper, lower, 0.1), fins)
    back = uniform(rng, -0.15, 0.15)
    fin = ellipse(f, back, -high * 0.92, uniform(rng, 0.26, 0.36), uniform(rng, 0.18, 0.25), 0.15)
    belly_fin = ellipse(f, back - 0.06, high * 0.95, 0.16, 0.18, 0.6)
    canvas.fill(f, np.minimum(fin, belly_fin), fins, middle=-0.2)
    body = ellipse(f, 0.15, 0.0, long, high)
    body = merge(body, capsule(f.x, f.y, (-0.5, 0.0), (0.0, 0.0), 0.1), 0.2)
    canvas.fill(f, body, tone(*colour), lean=(0.0, 1.3))
    kind = rng.random()
    if kind < 0.5:
        band = (WHITES, WHITES) if lightness < 0.8 else fins
        for at in (-0.12, 0.24)[: 1 + int(kind < 0.25)]:
            bow = np.abs(f.x - at + 0.35 * f.y * f.y) - 0.075
            canvas.fill(f, np.maximum(bow, body), band, alpha=0.85, soft=0.5)
    else:
        pale = oklch(min(lightness + 0.14, 0.96), chroma * 0.55, hue + 8.0)
        belly = ellipse(f, 0.18, high * 0.95, long * 0.9, high * 0.75)
        canvas.fill(f, np.maximum(belly, body), (pale, pale), alpha=0.8, soft=2.0)
    eye_x, eye_y = 0.15 + long * 0.6, -high * 0.24
    canvas.fill(f, circle(f, eye_x, eye_y, 0.125), (WHITES, WHITES))
    canvas.fill(f, circle(f, eye_x + 0.025, eye_y, 0.075), (INK, INK))
    air = oklch(min(level + 0.2, 0.985), 0.03, 220.0)
    bubbles = ((0.74, -0.48, 0.1), (0.84, -0.74, 0.075))
    for x, y, radius in bubbles[: int(rng.integers(0, 3))]:
        canvas.fill(f, circle(f, x, y + uniform(rng, -0.06, 0.06), radius), (air, air), alpha=0.75)
    return canvas


def _sun(rng: Rng) -> Canvas:
    colour = pick(rng, (YELLOW, YELLOW, (0.84, 0.165, 84.0), AMBER))
    if rng.random() < 0.75:
        hue, level = uniform(rng, 215.0, 280.0), uniform(rng, 0.60, 0.73)
    else:
        hue, level = uniform(rng, 285.0, 368.0), uniform(rng, 0.54, 0.66)
    canvas = backdrop(rng, level, hue, hue + uniform(rng, -20.0, 20.0), vivid=1.5)
    f = centred(rng, 0.76, 0.95, math.pi)
    warm = oklch(0.92, 0.09, 85.0)
    canvas.fill(
        f, circle(f, 0.0, 0.0, 0.85), (warm, warm), alpha=uniform(rng, 0.12, 0.3), soft=18.0
    )
    count = int(rng.integers(8, 12))
    disk = uniform(rng, 0.5, 0.58)
    along, across = fold(f, count)
    room = math.tan(math.pi / count)
    kind = rng.random()
    if kind < 0.5:
        foot, half = disk + 0.07, (disk + 0.07) * room * uniform(rng, 0.72, 0.85)
        rays = convex(along, across, [(foot, -half), (1.0, -0.03), (1.0, 0.03), (foot, half)], 0.03)
    elif kind < 0.8:
        thick = min(0.72 * room * 0.62, 0.12)
        rays = capsule(along, across, (disk + 0.17, 0.0), (0.98 - thick, 0.0), thick)
    else:
        half = disk * room * 1.05
        rays = convex(along, across, [(0.3, -half), (0.97, -0.04), (0.97, 0.04), (0.3, half)], 0.04)
    ray_tone = oklch(colour[0] - 0.04, colour[1], colour[2] - uniform(rng, 4.0, 22.0))
    canvas.fill(f, rays, (ray_tone, ray_tone))
    shape = circle(f, 0.0, 0.0, disk)
    # The sun is turned at random, but its light comes from above like everything else's.
    canvas.fill(
        Frame(ROOT.x, ROOT.y, f.px),
        shape,
        tone(colour[0] + 0.01, colour[1], colour[2] - 3.0, 0.05),
        lean=(0.9, 1.5),
    )
    if rng.random() < 0.5:
        pale = oklch(0.95, 0.09, 96.0)
        canvas.fill(f, shape + 0.16, (pale, pale), alpha=0.6, soft=5.0)
    return canvas


def _moon(rng: Rng) -> Canvas:
    hue = uniform(rng, 225.0, 320.0)
    canvas = backdrop(rng, uniform(rng, 0.24, 0.40), hue, hue + uniform(rng, -40.0, 40.0))
    palette = ((0.92, 0.08, 95.0), (0.89, 0.12, 90.0), (0.95, 0.02, 95.0), (0.88, 0.05, 235.0))
    colour = pick(rng, (*palette, (0.86, 0.08, 60.0)))
    f = centred(rng, 0.64, 0.84, 0.55)
    if rng.random() < 0.35:
        f = Frame(-f.x, f.y, f.px)
    glow = oklch(0.80, 0.06, hue)
    canvas.fill(
        f, circle(f, 0.0, 0.0, 1.0), (glow, glow), alpha=uniform(rng, 0.08, 0.25), soft=16.0
    )
    gap, bite = uniform(rng, 0.40, 0.58), uniform(rng, 0.76, 0.86)
    middle = 0.12
    shape = carve(circle(f, middle, 0.0, 1.0), circle(f, middle + gap, -0.06, bite), 0.12)
    canvas.fill(f, shape, tone(*colour, depth=0.05), lean=(-0.2, 0.9))
    inner = np.maximum(shape, -circle(f, middle + gap * 0.72, -0.04, bite + 0.06))
    canvas.fill(f, f32(inner + 0.03), (WHITES, WHITES), alpha=0.35, soft=3.0)
    spots = ((0.62, -0.1, 0.19), (0.3, 0.34, 0.14), (0.98, 0.42, 0.13))
    for x, y, size in spots[: int(rng.integers(0, 4))]:
        twinkle = f.place(x + uniform(rng, -0.05, 0.05), y + uniform(rng, -0.05, 0.05), size)
        canvas.fill(twinkle, star(twinkle, 1.0, 0.5, 0.12), (WHITES, WHITES), alpha=0.9)
    return canvas


_PAINTERS: tuple[Callable[[Rng], Canvas], ...] = (
    _star,
    _heart,
    draw_house,
    draw_tree,
    _fish,
    draw_flower,
    _sun,
    _moon,
    draw_mushroom,
    draw_boat,
)


def draw(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return one picture [64, 64, 3] of the class `label`, drawn with the numbers of `rng`."""
    if not 0 <= label < len(_PAINTERS):
        raise ValueError(f"label {label} is not one of the {len(_PAINTERS)} classes")
    return _PAINTERS[label](rng).image()


def draw_set(
    count: int, seed: int, *, labels: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return `count` pictures [count, 64, 64, 3] and their labels, by default 0..9 in turn.

    Picture i depends only on (seed, i, its label), so that any subset can be drawn again.
    """
    if labels is None:
        labels = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
    elif labels.shape != (count,):
        raise ValueError(f"labels must have the shape ({count},), not {labels.shape}")
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for i in range(count):
        images[i] = draw(int(labels[i]), np.random.default_rng([seed, i]))
    return images, labels

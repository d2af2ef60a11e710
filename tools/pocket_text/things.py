"""The things that pocket-text draws: each as layers of distance fields about the unit circle.

A painter returns the layers of one thing in its main colour. `paint` lays a light rim below them,
or a dark one below white things, so that every colour stands out from every background.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tools.pocket.scenery import INK, WHITES, Lch, Rng, shine, uniform
from tools.pocket.shapes import (
    Canvas,
    Field,
    Frame,
    Tone,
    box,
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

# lightness, chroma and hue of the colour words
COLOURS: Mapping[str, Lch] = {
    "red": (0.59, 0.21, 26.0),
    "orange": (0.74, 0.175, 56.0),
    "yellow": (0.89, 0.17, 98.0),
    "green": (0.64, 0.175, 145.0),
    "blue": (0.54, 0.19, 262.0),
    "purple": (0.52, 0.19, 305.0),
    "pink": (0.79, 0.125, 355.0),
    "brown": (0.45, 0.085, 50.0),
    "white": (0.97, 0.008, 90.0),
    "black": (0.21, 0.02, 280.0),
    "grey": (0.63, 0.01, 270.0),
    "turquoise": (0.77, 0.125, 190.0),
}
RIM = 0.075  # width of the rim, of the thing's radius
PALE: Tone = (WHITES, WHITES)
DARK: Tone = (INK, INK)
WOOD: Tone = tone(0.50, 0.07, 55.0)
GLASS: Tone = tone(0.86, 0.05, 230.0)


@dataclass(frozen=True)
class Layer:
    """A shape and its colours; `outer` shapes make the outline, below which the rim lies."""

    distance: Field
    colours: Tone
    outer: bool = True
    soft: float = 0.0


Layers = list[Layer]
Painter = Callable[[Frame, Lch, Rng], Layers]


def main(colour: Lch) -> Tone:
    return tone(*colour, depth=0.05)


def darker(colour: Lch, by: float = 0.13) -> Tone:
    """Return a shade of the colour for parts that must stand apart from it; black gets lighter."""
    lightness, chroma, hue = colour
    level = lightness - by if lightness > 0.35 else lightness + 0.8 * by
    return tone(level, chroma, hue, depth=0.03)


def contrast(colour: Lch) -> Tone:
    """Return white for details on most colours, and ink for those on light ones."""
    return DARK if colour[0] > 0.85 else PALE


def _star(f: Frame, c: Lch, rng: Rng) -> Layers:
    return [Layer(star(f, 1.05, 0.52, 0.06), main(c))]


def _heart(f: Frame, c: Lch, rng: Rng) -> Layers:
    x, y = f.x * 0.66, f.y * 0.66
    return [Layer(f32((heart(x, y) - 0.04) / 0.66), main(c))]


def _house(f: Frame, c: Lch, rng: Rng) -> Layers:
    walls = convex(f.x, f.y, [(-0.68, -0.05), (0.68, -0.05), (0.68, 0.85), (-0.68, 0.85)], 0.03)
    roof = convex(f.x, f.y, [(-0.98, 0.0), (0.0, -0.95), (0.98, 0.0)], 0.05)
    return [
        Layer(walls, main(c)),
        Layer(roof, darker(c)),
        Layer(box(f, -0.28, 0.55, 0.17, 0.32), contrast(c), outer=False),
        Layer(box(f, 0.3, 0.38, 0.17, 0.16), contrast(c), outer=False),
    ]


def _tree(f: Frame, c: Lch, rng: Rng) -> Layers:
    crown = merge(circle(f, 0.0, -0.48, 0.5), circle(f, -0.38, 0.0, 0.43), 0.15)
    crown = merge(crown, circle(f, 0.38, 0.0, 0.43), 0.15)
    return [Layer(box(f, 0.0, 0.6, 0.14, 0.4, 0.03), WOOD), Layer(crown, main(c))]


def _fish(f: Frame, c: Lch, rng: Rng) -> Layers:
    tail = convex(f.x, f.y, [(-0.3, 0.0), (-1.0, 0.5), (-1.0, -0.5)], 0.05)
    fin = ellipse(f, 0.1, -0.48, 0.32, 0.2, 0.15)
    return [
        Layer(tail, darker(c)),
        Layer(fin, darker(c)),
        Layer(ellipse(f, 0.2, 0.0, 0.76, 0.52), main(c)),
        Layer(circle(f, 0.6, -0.1, 0.15), PALE, outer=False),
        Layer(circle(f, 0.64, -0.1, 0.08), DARK, outer=False),
    ]


def _flower(f: Frame, c: Lch, rng: Rng) -> Layers:
    stem = capsule(f.x, f.y, (0.0, 0.1), (0.0, 0.95), 0.08)
    leaf = ellipse(f, 0.28, 0.68, 0.27, 0.12, -0.5)
    head = f.place(0.0, -0.32, 1.0, uniform(rng, -0.3, 0.3))
    along, across = fold(head, 6)
    petals = ellipse(Frame(along, across, f.px), 0.4, 0.0, 0.28, 0.22)
    middle = tone(0.85, 0.16, 85.0) if c[0] < 0.8 else tone(0.5, 0.1, 50.0)
    green = tone(0.55, 0.13, 140.0)
    return [
        Layer(stem, green),
        Layer(leaf, green),
        Layer(petals, main(c)),
        Layer(circle(head, 0.0, 0.0, 0.23), middle),
    ]


def _sun(f: Frame, c: Lch, rng: Rng) -> Layers:
    along, across = fold(f.place(0.0, 0.0, 1.0, uniform(rng, 0.0, 0.6)), 10)
    rays = convex(along, across, [(0.62, -0.13), (1.05, -0.03), (1.05, 0.03), (0.62, 0.13)], 0.03)
    return [Layer(rays, main(c)), Layer(circle(f, 0.0, 0.0, 0.55), main(c))]


def _moon(f: Frame, c: Lch, rng: Rng) -> Layers:
    return [Layer(carve(circle(f, 0.1, 0.0, 0.95), circle(f, 0.62, -0.1, 0.78), 0.08), main(c))]


def _mushroom(f: Frame, c: Lch, rng: Rng) -> Layers:
    stem = box(f, 0.0, 0.5, 0.25, 0.45, 0.15)
    cap = carve(ellipse(f, 0.0, 0.1, 0.98, 0.95), box(f, 0.0, 1.2, 2.0, 1.0), 0.1)
    dots = np.minimum(circle(f, -0.45, -0.2, 0.16), circle(f, 0.45, -0.15, 0.14))
    dots = np.minimum(dots, circle(f, 0.0, -0.5, 0.17))
    return [
        Layer(stem, tone(0.93, 0.03, 85.0)),
        Layer(cap, main(c)),
        Layer(dots, contrast(c), outer=False),
    ]


def _boat(f: Frame, c: Lch, rng: Rng) -> Layers:
    hull = convex(f.x, f.y, [(-1.0, 0.35), (1.0, 0.35), (0.65, 0.85), (-0.65, 0.85)], 0.06)
    mast = capsule(f.x, f.y, (0.0, -0.85), (0.0, 0.4), 0.05)
    right = convex(f.x, f.y, [(0.1, -0.9), (0.8, 0.2), (0.1, 0.2)], 0.03)
    left = convex(f.x, f.y, [(-0.1, -0.65), (-0.1, 0.2), (-0.62, 0.2)], 0.03)
    return [
        Layer(mast, WOOD),
        Layer(np.minimum(left, right), main(c)),
        Layer(hull, darker(c)),
    ]


def _ball(f: Frame, c: Lch, rng: Rng) -> Layers:
    round_ = circle(f, 0.0, 0.0, 0.88)
    g = f.place(0.0, 0.0, 1.0, uniform(rng, -0.5, 0.5))
    band = f32(np.maximum(np.abs(g.y + 0.25 * g.x * g.x) - 0.2, round_))
    return [Layer(round_, main(c)), Layer(band, contrast(c), outer=False)]


def _apple(f: Frame, c: Lch, rng: Rng) -> Layers:
    body = merge(ellipse(f, -0.3, 0.15, 0.55, 0.68), ellipse(f, 0.3, 0.15, 0.55, 0.68), 0.1)
    stem = capsule(f.x, f.y, (0.0, -0.4), (0.1, -0.85), 0.07)
    leaf = ellipse(f, 0.4, -0.72, 0.3, 0.14, -0.4)
    return [
        Layer(stem, WOOD),
        Layer(leaf, tone(0.58, 0.14, 140.0)),
        Layer(body, main(c)),
    ]


def _cup(f: Frame, c: Lch, rng: Rng) -> Layers:
    handle = np.abs(ellipse(f, 0.55, 0.1, 0.38, 0.36)) - 0.09
    body = convex(f.x, f.y, [(-0.78, -0.6), (0.58, -0.6), (0.46, 0.78), (-0.66, 0.78)], 0.1)
    return [
        Layer(f32(handle), darker(c)),
        Layer(body, main(c)),
        Layer(ellipse(f, -0.1, -0.55, 0.6, 0.14), darker(c, 0.2), outer=False),
    ]


def _car(f: Frame, c: Lch, rng: Rng) -> Layers:
    top = convex(f.x, f.y, [(-0.4, -0.55), (0.3, -0.55), (0.62, 0.0), (-0.68, 0.0)], 0.08)
    glass = convex(f.x, f.y, [(-0.32, -0.4), (0.22, -0.4), (0.42, -0.02), (-0.5, -0.02)], 0.03)
    wheels = np.minimum(circle(f, -0.5, 0.48, 0.24), circle(f, 0.5, 0.48, 0.24))
    hubs = np.minimum(circle(f, -0.5, 0.48, 0.1), circle(f, 0.5, 0.48, 0.1))
    return [
        Layer(top, main(c)),
        Layer(glass, GLASS, outer=False),
        Layer(box(f, 0.0, 0.2, 1.0, 0.28, 0.14), main(c)),
        Layer(wheels, DARK),
        Layer(hubs, PALE, outer=False),
    ]


def _balloon(f: Frame, c: Lch, rng: Rng) -> Layers:
    sway = uniform(rng, -0.15, 0.15)
    string = capsule(f.x - sway * np.sin(4.0 * f.y), f.y, (0.0, 0.4), (0.0, 1.0), 0.035)
    knot = convex(f.x, f.y, [(0.0, 0.3), (0.14, 0.5), (-0.14, 0.5)], 0.02)
    body = ellipse(f, 0.0, -0.32, 0.6, 0.7)
    gleam = ellipse(f, -0.22, -0.58, 0.1, 0.2, 0.4)
    return [
        Layer(f32(string), WOOD),
        Layer(knot, darker(c)),
        Layer(body, main(c)),
        Layer(gleam, contrast(c), outer=False, soft=1.0),
    ]


def _umbrella(f: Frame, c: Lch, rng: Rng) -> Layers:
    pole = capsule(f.x, f.y, (0.0, -0.6), (0.0, 0.75), 0.06)
    hook = np.maximum(np.abs(circle(f, 0.17, 0.72, 0.17)) - 0.06, 0.7 - f.y)
    dome = f32(np.maximum(circle(f, 0.0, 0.05, 1.0), f.y - 0.05))
    for x in (-0.67, 0.0, 0.67):
        dome = carve(dome, ellipse(f, x, 0.12, 0.3, 0.2), 0.03)
    panel = f32(np.maximum(ellipse(f, 0.0, 0.1, 0.33, 1.05), dome))
    return [
        Layer(np.minimum(pole, f32(hook)), WOOD),
        Layer(dome, main(c)),
        Layer(panel, darker(c), outer=False),
    ]


def _key(f: Frame, c: Lch, rng: Rng) -> Layers:
    ring = np.abs(circle(f, 0.0, -0.5, 0.34)) - 0.13
    shaft = box(f, 0.0, 0.4, 0.11, 0.6, 0.04)
    teeth = np.minimum(box(f, 0.25, 0.85, 0.22, 0.1), box(f, 0.22, 0.52, 0.18, 0.09))
    return [Layer(f32(np.minimum(np.minimum(ring, shaft), teeth)), main(c))]


def _butterfly(f: Frame, c: Lch, rng: Rng) -> Layers:
    g = Frame(np.abs(f.x), f.y, f.px)
    upper, lower = ellipse(g, 0.52, -0.32, 0.5, 0.4, -0.6), ellipse(g, 0.42, 0.42, 0.38, 0.32, 0.6)
    feelers = capsule(g.x, g.y, (0.0, -0.45), (0.25, -0.95), 0.04)
    return [
        Layer(feelers, DARK),
        Layer(upper, main(c)),
        Layer(lower, darker(c)),
        Layer(circle(g, 0.58, -0.36, 0.15), contrast(c), outer=False),
        Layer(ellipse(f, 0.0, 0.05, 0.1, 0.62), DARK),
    ]


def _cloud(f: Frame, c: Lch, rng: Rng) -> Layers:
    puff = merge(circle(f, -0.05, -0.15, 0.5), circle(f, -0.6, 0.12, 0.36), 0.1)
    puff = merge(puff, circle(f, 0.55, 0.1, 0.4), 0.1)
    return [Layer(merge(puff, box(f, 0.0, 0.3, 0.9, 0.2, 0.2), 0.1), main(c))]


def _duck(f: Frame, c: Lch, rng: Rng) -> Layers:
    body = merge(ellipse(f, -0.15, 0.4, 0.75, 0.42), circle(f, -0.8, 0.15, 0.15), 0.3)
    neck = capsule(f.x, f.y, (0.4, -0.2), (0.35, 0.3), 0.22)
    head = circle(f, 0.42, -0.45, 0.38)
    beak = ellipse(f, 0.85, -0.38, 0.24, 0.12)
    bill = tone(0.74, 0.17, 60.0) if c[2] > 80.0 or c[1] < 0.05 or c[0] < 0.7 else DARK
    return [
        Layer(beak, bill),
        Layer(merge(merge(body, neck, 0.15), head, 0.1), main(c)),
        Layer(ellipse(f, -0.25, 0.38, 0.38, 0.2, 0.2), darker(c), outer=False),
        Layer(circle(f, 0.52, -0.52, 0.09), contrast(c) if c[0] < 0.5 else DARK, outer=False),
    ]


def _kite(f: Frame, c: Lch, rng: Rng) -> Layers:
    points = [(0.0, -1.0), (0.62, -0.35), (0.0, 0.5), (-0.62, -0.35)]
    wave = 0.12 * np.sin(7.0 * (f.y - 0.5))
    tail = capsule(f.x - wave, f.y, (0.0, 0.45), (0.0, 1.0), 0.06)
    sail = convex(f.x, f.y, points, 0.02)
    quarter = np.maximum(np.maximum(sail, -f.x), f.y + 0.35)
    return [
        Layer(f32(tail), darker(c)),
        Layer(sail, main(c)),
        Layer(f32(quarter), contrast(c), outer=False),
    ]


def _rocket(f: Frame, c: Lch, rng: Rng) -> Layers:
    hull = f32(np.maximum(ellipse(f, 0.0, 0.0, 0.42, 1.0), f.y - 0.62))
    left = convex(f.x, f.y, [(-0.3, 0.15), (-0.28, 0.62), (-0.78, 0.8)], 0.04)
    right = convex(f.x, f.y, [(0.3, 0.15), (0.78, 0.8), (0.28, 0.62)], 0.04)
    flame = ellipse(f, 0.0, 0.72, 0.2, 0.3)
    return [
        Layer(flame, tone(0.84, 0.16, 75.0)),
        Layer(np.minimum(left, right), darker(c)),
        Layer(hull, main(c)),
        Layer(circle(f, 0.0, -0.2, 0.19), contrast(c), outer=False),
    ]


def _cat(f: Frame, c: Lch, rng: Rng) -> Layers:
    g = Frame(np.abs(f.x), f.y, f.px)
    ears = convex(g.x, g.y, [(0.2, -0.45), (0.72, -1.0), (0.82, -0.1)], 0.05)
    face = ellipse(f, 0.0, 0.15, 0.88, 0.74)
    eyes = ellipse(g, 0.35, 0.0, 0.12, 0.16)
    nose = ellipse(f, 0.0, 0.32, 0.12, 0.08)
    whiskers = capsule(g.x, g.y, (0.4, 0.36), (0.85, 0.28), 0.03)
    ink = PALE if c[0] < 0.5 else DARK
    return [
        Layer(np.minimum(ears, face), main(c)),
        Layer(np.minimum(eyes, whiskers), ink, outer=False),
        Layer(nose, tone(0.7, 0.13, 10.0), outer=False),
    ]


def _bell(f: Frame, c: Lch, rng: Rng) -> Layers:
    top = ellipse(f, 0.0, -0.15, 0.52, 0.7)
    skirt = convex(f.x, f.y, [(-0.5, -0.2), (0.5, -0.2), (0.9, 0.6), (-0.9, 0.6)], 0.08)
    body = f32(np.maximum(merge(top, skirt, 0.2), f.y - 0.6))
    return [
        Layer(circle(f, 0.0, 0.7, 0.2), darker(c, 0.2)),
        Layer(circle(f, 0.0, -0.88, 0.13), darker(c)),
        Layer(body, main(c)),
        Layer(f32(np.maximum(np.abs(f.y - 0.42) - 0.07, body)), darker(c), outer=False),
    ]


PAINTERS: Mapping[str, Painter] = {
    "star": _star,
    "heart": _heart,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "flower": _flower,
    "sun": _sun,
    "moon": _moon,
    "mushroom": _mushroom,
    "boat": _boat,
    "ball": _ball,
    "apple": _apple,
    "cup": _cup,
    "car": _car,
    "balloon": _balloon,
    "umbrella": _umbrella,
    "key": _key,
    "butterfly": _butterfly,
    "cloud": _cloud,
    "duck": _duck,
    "kite": _kite,
    "rocket": _rocket,
    "cat": _cat,
    "bell": _bell,
}
THINGS = tuple(PAINTERS)
COLOUR_NAMES = tuple(COLOURS)


def shade(name: str, rng: Rng) -> Lch:
    """Return the colour of this name, slightly changed."""
    lightness, chroma, hue = COLOURS[name]
    return (
        lightness + uniform(rng, -0.02, 0.02),
        chroma * uniform(rng, 0.92, 1.04),
        hue + uniform(rng, -4.0, 4.0),
    )


def paint(canvas: Canvas, f: Frame, thing: str, colour: Lch, rng: Rng) -> None:
    """Paint a thing whose circle is the unit circle of the frame `f`.

    Raises KeyError for a thing that has no painter.
    """
    layers = PAINTERS[thing](f, colour, rng)
    outline = layers[0].distance
    for layer in layers[1:]:
        if layer.outer:
            outline = np.minimum(outline, layer.distance)
    light = colour[0] > 0.93
    rim = oklch(0.45, 0.04, 270.0) if light else WHITES
    canvas.fill(f, f32(outline - RIM), (rim, rim), alpha=0.55 if light else 0.9, soft=0.8)
    for layer in layers:
        canvas.fill(f, layer.distance, layer.colours, soft=layer.soft)
    if rng.random() < 0.3:
        shine(canvas, f, f32(np.maximum(circle(f, -0.35, -0.35, 0.3), outline)), 0.25, 5.0)


def turn_of(thing: str, rng: Rng) -> float:
    """Return a random angle at which a thing may be drawn, in radians: none for buildings and what
    floats, more for what has no foot."""
    most = {"star": 0.3, "sun": math.pi, "ball": 0.4, "key": 0.5, "rocket": 0.3, "kite": 0.3}
    reach = most.get(thing, 0.0 if thing in ("house", "boat", "car", "cup", "cloud") else 0.12)
    return uniform(rng, -reach, reach)

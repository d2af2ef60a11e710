"""Palette, backdrops, ground and light that the pictures share."""

from __future__ import annotations

import numpy as np

from tools.pocket.shapes import (
    ROOT,
    Canvas,
    Field,
    Frame,
    circle,
    oklch,
    tone,
)

Rng = np.random.Generator
Lch = tuple[float, float, float]

# Lightness, chroma and hue of the object colours; each is at the lightness where its hue glows.
YELLOW: Lch = (0.87, 0.165, 92.0)
AMBER: Lch = (0.80, 0.165, 74.0)
ORANGE: Lch = (0.72, 0.175, 50.0)
RED: Lch = (0.60, 0.205, 26.0)
PINK: Lch = (0.71, 0.165, 2.0)
MAGENTA: Lch = (0.61, 0.20, 345.0)
PURPLE: Lch = (0.56, 0.18, 300.0)
BLUE: Lch = (0.58, 0.165, 258.0)
SKY: Lch = (0.71, 0.13, 235.0)
TEAL: Lch = (0.67, 0.115, 190.0)
GREEN: Lch = (0.68, 0.16, 148.0)
LIME: Lch = (0.79, 0.175, 125.0)
WHITE: Lch = (0.96, 0.012, 80.0)

WHITES: Field = oklch(0.985, 0.01, 90.0)
INK: Field = oklch(0.27, 0.05, 275.0)


def uniform(rng: Rng, low: float, high: float) -> float:
    """Return a number between `low` and `high`."""
    return low + (high - low) * float(rng.random())


def pick(rng: Rng, colours: tuple[Lch, ...]) -> Lch:
    """Return one of the colours, slightly changed."""
    lightness, chroma, hue = colours[int(rng.integers(len(colours)))]
    spread = 9.0 if chroma > 0.05 else 60.0
    return (
        lightness + uniform(rng, -0.025, 0.025),
        chroma * uniform(rng, 0.88, 1.05),
        hue + uniform(rng, -spread, spread),
    )


def apart(a: float, b: float) -> float:
    """Return the angle between two hues."""
    return abs((a - b + 180.0) % 360.0 - 180.0)


def backdrop(rng: Rng, lightness: float, hue: float, second: float, vivid: float = 1.0) -> Canvas:
    """Return a two-colour gradient of about the given lightness, its hue from `hue` to `second`."""
    chroma = uniform(rng, 0.04, 0.085) if lightness > 0.75 else uniform(rng, 0.06, 0.11)
    chroma *= vivid
    change = uniform(rng, 0.03, 0.075) * (1.0 if rng.random() < 0.3 else -1.0)
    top = oklch(min(lightness - change, 0.965), chroma * uniform(rng, 0.8, 1.1), hue)
    low = oklch(min(lightness + change, 0.965), chroma * uniform(rng, 0.8, 1.1), second)
    canvas = Canvas(top, low, uniform(rng, -0.95, 0.95))
    if rng.random() < 0.5:
        canvas.vignette(uniform(rng, 0.05, 0.16))
    return canvas


def scene(rng: Rng, colour: Lch, gap: float = 65.0) -> tuple[Canvas, float]:
    """Return a backdrop that `colour` stands out from, and its lightness."""
    hue = second = colour[2]
    if colour[0] >= 0.77 or (colour[0] >= 0.66 and rng.random() < 0.45):
        lightness = uniform(rng, 0.32, 0.43)
        if colour[0] >= 0.77 and rng.random() < 0.55:
            lightness = uniform(rng, 0.45, 0.58)
        # Dark warm hues and dark greens look muddy: evening colours only.
        while min(apart(hue, colour[2]), apart(second, colour[2])) < 0.8 * gap:
            hue = uniform(rng, 195.0, 345.0)
            second = min(max(hue + uniform(rng, -45.0, 45.0), 190.0), 350.0)
    else:
        lightness = uniform(rng, 0.84, 0.92)
        hue += uniform(rng, gap, 360.0 - gap)
        second = hue + uniform(rng, -45.0, 45.0)
    canvas = backdrop(rng, lightness, hue, second)
    if rng.random() < 0.35:
        glow = oklch(min(lightness + 0.07, 0.97), 0.06, hue)
        canvas.fill(ROOT, circle(ROOT, 0.0, 0.0, uniform(rng, 0.72, 0.9)), (glow, glow), alpha=0.8)
    return canvas, lightness


def outdoors(rng: Rng, avoid: float) -> Canvas:
    """Return a light sky, by day, dawn or dusk, whose hue is not near `avoid`."""
    hue = second = avoid
    while min(apart(hue, avoid), apart(second, avoid)) < 38.0:
        kind = rng.random()
        if kind < 0.55:
            hue = uniform(rng, 195.0, 265.0)
        elif kind < 0.85:
            hue = uniform(rng, 0.0, 100.0)
        else:
            hue = uniform(rng, 265.0, 330.0)
        second = hue + uniform(rng, -55.0, 55.0)
    return backdrop(rng, uniform(rng, 0.82, 0.91), hue, second)


def ground(canvas: Canvas, rng: Rng, top: float) -> None:
    """Lay a low hill whose crest is at `top`."""
    kind = rng.random()
    if kind < 0.7:
        colour = tone(
            uniform(rng, 0.68, 0.78), uniform(rng, 0.09, 0.14), uniform(rng, 115.0, 155.0)
        )
    elif kind < 0.85:
        colour = tone(uniform(rng, 0.76, 0.82), 0.08, uniform(rng, 65.0, 95.0))
    else:
        colour = tone(uniform(rng, 0.70, 0.78), 0.07, uniform(rng, 165.0, 300.0))
    radius = uniform(rng, 2.2, 5.0)
    hill = circle(ROOT, uniform(rng, -0.35, 0.35), top + radius, radius)
    canvas.fill(ROOT, hill, colour, lean=(0.2, 1.6), middle=top + 0.35)


def shadow(
    canvas: Canvas, f: Frame, distance: Field, *, alpha: float = 0.22, soft: float = 6.0
) -> None:
    canvas.fill(f, distance, (INK, INK), alpha=alpha, soft=soft)


def shine(canvas: Canvas, f: Frame, distance: Field, alpha: float, soft: float = 2.0) -> None:
    canvas.fill(f, distance, (WHITES, WHITES), alpha=alpha, soft=soft)


def centred(rng: Rng, low: float, high: float, turn: float, shift: float = 0.09) -> Frame:
    """Return a frame about the middle; its unit is from `low` to `high` of half the picture."""
    size = uniform(rng, low, high)
    return ROOT.place(
        uniform(rng, -shift, shift), uniform(rng, -shift, shift), size, uniform(rng, -turn, turn)
    )

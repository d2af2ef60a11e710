"""The pictures of things that stand on the ground or the water."""

from __future__ import annotations

import math

import numpy as np

from tools.pocket.scenery import (
    BLUE,
    GREEN,
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
    Lch,
    Rng,
    apart,
    backdrop,
    centred,
    ground,
    outdoors,
    pick,
    shadow,
    uniform,
)
from tools.pocket.shapes import (
    ROOT,
    Canvas,
    Frame,
    box,
    capsule,
    carve,
    circle,
    convex,
    ellipse,
    ellipse_at,
    fold,
    merge,
    oklch,
    tone,
)


def draw_house(rng: Rng) -> Canvas:
    """Draw a house."""
    roof = pick(rng, (RED, RED, ORANGE, PURPLE, BLUE, TEAL, (0.48, 0.09, 40.0), MAGENTA))
    roof = (roof[0] - 0.06, roof[1] * 0.9, roof[2])
    canvas = outdoors(rng, roof[2])
    f = centred(rng, 0.84, 0.99, 0.0, 0.04)
    base, half = 0.78, uniform(rng, 0.52, 0.72)
    eaves, peak = uniform(rng, -0.14, 0.08), uniform(rng, -0.92, -0.78)
    ground(canvas, rng, uniform(rng, 0.42, 0.6))
    shadow(canvas, f, ellipse(f, 0.04, base, half + 0.16, 0.12), alpha=0.25, soft=4.0)
    walls = pick(rng, (WHITE, (0.92, 0.05, 85.0), (0.85, 0.08, 60.0), (0.84, 0.075, 20.0)))
    if rng.random() < 0.35:
        walls = pick(rng, ((0.76, 0.10, 235.0), (0.80, 0.12, 85.0), (0.78, 0.09, 165.0)))
    side = 1.0 if rng.random() < 0.5 else -1.0
    if rng.random() < 0.6:
        chimney = box(f, side * half * 0.58, -0.5, 0.11, 0.3, 0.03)
        canvas.fill(f, chimney, tone(roof[0] - 0.12, roof[1] * 0.6, roof[2]))
    canvas.fill(
        f,
        box(f, 0.0, 0.5 * (eaves + base) - 0.08, half, 0.5 * (base - eaves) + 0.08, 0.04),
        tone(*walls, depth=0.045),
    )
    over = half + uniform(rng, 0.13, 0.2)
    flat = 0.0 if rng.random() < 0.65 else uniform(rng, 0.3, 0.5) * half
    points = [(-over, eaves), (-flat - 0.02, peak), (flat + 0.02, peak), (over, eaves)]
    # The roof's shade on the wall sets the two apart where their colours are close.
    low = convex(f.x, f.y - 0.07, points, 0.07)
    wall = np.abs(f.x) - half
    shadow(canvas, f, np.maximum(low, wall), alpha=0.2, soft=1.0)
    canvas.fill(f, convex(f.x, f.y, points, 0.07), tone(*roof), lean=(0.6, 0.9), middle=-0.4)
    door = pick(rng, (RED, BLUE, TEAL, GREEN, ORANGE, (0.45, 0.08, 50.0), PURPLE))
    door_half = uniform(rng, 0.13, 0.17)
    door_x = 0.0 if half < 0.6 and flat == 0.0 else -side * half * 0.45
    door_top = max(base - uniform(rng, 0.46, 0.56), eaves + 0.16)
    arch = door_half if rng.random() < 0.4 else 0.04
    opening = box(f, door_x, base, door_half, base - door_top, arch)
    canvas.fill(f, np.maximum(opening, f.y - base), tone(door[0] - 0.1, door[1], door[2]))
    glass = tone(0.88, 0.12, 90.0) if rng.random() < 0.5 else tone(0.80, 0.08, 230.0)
    rim = oklch(0.97, 0.01, 90.0) if walls[0] < 0.87 else oklch(0.55, 0.05, walls[2])
    if door_x != 0.0:
        panes = [(-door_x, 0.5 * (door_top + base) - 0.08, uniform(rng, 0.15, 0.19))]
    else:
        panes = []
    if flat == 0.0 and (not panes or rng.random() < 0.5):
        panes.append((0.0, 0.55 * eaves + 0.45 * peak + 0.06, 0.15))
    for wx, wy, size in panes:
        pane = box(f, wx, wy, size, size, 0.04) if wy > eaves else circle(f, wx, wy, size)
        canvas.fill(f, pane - 0.06, (rim, rim))
        canvas.fill(f, pane, glass)
    return canvas


def _conifer(canvas: Canvas, f: Frame, rng: Rng, colour: Lch) -> None:
    layers = int(rng.integers(2, 4))
    width = uniform(rng, 0.54, 0.7)
    top, bottom = -0.93, 0.58
    step = (bottom - top) / (layers + 0.75)
    for i in reversed(range(layers)):
        high, above = top + i * step, layers - 1 - i
        wide = width * (1.0 - 0.2 * above)
        points = [(-wide, high + 1.75 * step), (0.0, high), (wide, high + 1.75 * step)]
        paint = tone(colour[0] + 0.06 * above, colour[1], colour[2], 0.07)
        canvas.fill(f, convex(f.x, f.y, points, 0.08), paint, lean=(1.6, 0.5), middle=-0.1)


def draw_tree(rng: Rng) -> Canvas:
    """Draw a tree."""
    kind, season = rng.random(), rng.random()
    if kind < 0.35:
        colour = (uniform(rng, 0.5, 0.62), 0.12, uniform(rng, 138.0, 178.0))
    elif season < 0.6:
        colour = (uniform(rng, 0.55, 0.68), 0.15, uniform(rng, 122.0, 155.0))
    elif season < 0.82:
        colour = (uniform(rng, 0.62, 0.72), 0.165, uniform(rng, 35.0, 68.0))
    else:
        colour = (uniform(rng, 0.68, 0.74), 0.14, uniform(rng, -15.0, 12.0))
    canvas = outdoors(rng, colour[2])
    f = centred(rng, 0.86, 1.0, 0.04, 0.04)
    ground(canvas, rng, uniform(rng, 0.5, 0.66))
    shadow(canvas, f, ellipse(f, 0.05, 0.84, 0.45, 0.1), alpha=0.28, soft=4.0)
    thick = uniform(rng, 0.09, 0.15)
    trunk = [(-thick * 1.35, 0.87), (-thick * 0.8, -0.1), (thick * 0.8, -0.1), (thick * 1.35, 0.87)]
    brown = tone(uniform(rng, 0.42, 0.54), 0.075, uniform(rng, 42.0, 65.0))
    canvas.fill(f, convex(f.x, f.y, trunk, 0.04), brown, lean=(4.0, 0.0))
    if kind < 0.35:
        _conifer(canvas, f, rng, colour)
        return canvas
    if kind < 0.58:
        crown = ellipse(f, 0.0, -0.27, uniform(rng, 0.56, 0.74), uniform(rng, 0.6, 0.66))
    else:
        wide, drop = uniform(rng, 0.38, 0.48), uniform(rng, -0.02, 0.08)
        crown = circle(f, 0.0, -0.5, uniform(rng, 0.4, 0.46))
        crown = merge(crown, circle(f, -wide, drop - 0.1, uniform(rng, 0.34, 0.42)), 0.12)
        crown = merge(crown, circle(f, wide, drop - 0.1, uniform(rng, 0.34, 0.42)), 0.12)
        crown = merge(crown, circle(f, 0.0, drop, 0.36), 0.12)
    canvas.fill(f, crown, tone(*colour, depth=0.08), lean=(0.6, 1.0), middle=-0.25)
    if rng.random() < 0.6:
        # A lit clump towards the light gives the crown its volume.
        lit = oklch(colour[0] + 0.11, colour[1] * 0.95, colour[2])
        clump = ellipse(f, -0.2, -0.45, uniform(rng, 0.24, 0.34), uniform(rng, 0.2, 0.28), -0.4)
        canvas.fill(f, clump, (lit, lit), alpha=0.65, soft=2.5)
    return canvas


def draw_flower(rng: Rng) -> Canvas:
    """Draw a flower."""
    palette = (RED, PINK, PINK, MAGENTA, PURPLE, BLUE, ORANGE, YELLOW, WHITE, SKY)
    colour = pick(rng, palette)
    lightness, chroma, hue = colour
    if lightness > 0.77:
        level, backs = uniform(rng, 0.50, 0.62), uniform(rng, 185.0, 345.0)
        if lightness < 0.92:
            backs = uniform(rng, 200.0, 330.0)
    else:
        level, backs = uniform(rng, 0.88, 0.94), uniform(rng, 20.0, 300.0)
        while apart(backs, hue) < 60.0 or 105.0 < backs < 165.0:
            backs = uniform(rng, 20.0, 300.0)
    canvas = backdrop(rng, level, backs, backs + uniform(rng, -30.0, 30.0))
    f = centred(rng, 0.92, 1.0, 0.1, 0.05)
    green = (0.80 if level < 0.7 else 0.56, 0.13, uniform(rng, 128.0, 155.0))
    if level < 0.7:
        green = (0.36, 0.09, green[2])
    bend, top = uniform(rng, -0.3, 0.3), uniform(rng, -0.28, -0.22)
    # The stem bows sideways between the head and the foot, which stay in place.
    sway = f.x - bend * (f.y - top) * (1.25 - f.y)
    canvas.fill(f, capsule(sway, f.y, (0.0, top), (0.0, 1.25), 0.062), tone(*green))
    leaf_y = uniform(rng, 0.5, 0.66)
    curve = bend * (leaf_y - top) * (1.25 - leaf_y)
    leaves = (-1.0, 1.0) if rng.random() < 0.6 else (-1.0 if rng.random() < 0.5 else 1.0,)
    for side in leaves:
        tilt = -side * uniform(rng, 0.45, 0.75)
        leaf = ellipse(f, curve + side * 0.24, leaf_y - 0.12, 0.26, 0.115, tilt)
        canvas.fill(f, leaf, tone(green[0] + 0.03, green[1], green[2]), middle=0.4)
    count = int(rng.integers(5, 9))
    size, turn = uniform(rng, 0.6, 0.69), uniform(rng, 0.0, 1.2)
    head = f.place(0.0, top, size)
    shadow(canvas, head, circle(head, 0.04, 0.1, 0.72), alpha=0.22, soft=8.0)
    along, across = fold(head, count, turn)
    wide = math.tan(math.pi / count) * 0.62 * uniform(rng, 0.82, 1.05)
    petals = ellipse_at(along - 0.60, across, 0.42, min(wide, 0.42))
    under = oklch(lightness - 0.14, chroma + 0.01, hue)
    canvas.fill(head, circle(head, 0.0, 0.0, 0.42), (under, under))
    canvas.fill(head, petals, tone(*colour), lean=(0.4, 0.8))
    # Petals darken towards the middle.
    canvas.fill(
        head, np.maximum(petals, circle(head, 0.0, 0.0, 0.45)), (under, under), alpha=0.4, soft=5.0
    )
    middle = tone(0.86, 0.16, 90.0)
    if 60.0 < hue < 120.0 and chroma > 0.05:
        middle = tone(0.50, 0.10, 50.0)
    elif rng.random() < 0.25:
        middle = tone(0.46, 0.09, 45.0) if lightness > 0.66 else tone(0.95, 0.03, 90.0)
    canvas.fill(head, circle(head, 0.0, 0.0, uniform(rng, 0.28, 0.36)), middle, lean=(1.5, 2.5))
    return canvas


def draw_mushroom(rng: Rng) -> Canvas:
    """Draw a mushroom."""
    palette = (RED, RED, RED, ORANGE, PURPLE, BLUE, MAGENTA, TEAL, (0.50, 0.09, 48.0))
    lightness, chroma, hue = pick(rng, palette)
    canvas = outdoors(rng, hue)
    f = centred(rng, 0.86, 1.0, 0.08, 0.04)
    ground(canvas, rng, uniform(rng, 0.5, 0.64))
    shadow(canvas, f, ellipse(f, 0.05, 0.84, 0.46, 0.11), alpha=0.28, soft=4.0)
    foot, neck = uniform(rng, 0.25, 0.36), uniform(rng, 0.19, 0.27)
    stem = merge(ellipse(f, 0.0, 0.66, foot, 0.21), box(f, 0.0, 0.3, neck, 0.45, 0.1), 0.2)
    canvas.fill(f, stem, tone(0.91, 0.035, 80.0, 0.05), lean=(1.8, 0.4))
    wide, rim, high = uniform(rng, 0.74, 0.92), uniform(rng, 0.0, 0.14), uniform(rng, 0.72, 0.95)
    shadow(
        canvas, f, np.maximum(stem, ellipse(f, 0.0, rim + 0.06, wide, 0.24)), alpha=0.3, soft=2.0
    )
    gills = tone(0.80, 0.06, 65.0)
    canvas.fill(f, ellipse(f, 0.0, rim, wide * 0.86, 0.17), gills)
    # The dome is an ellipse cut by a bowed line, its brim rounded off by the cut.
    bow = rim + 0.04 - 0.10 * (f.x * (1.0 / wide)) ** 2
    cap = carve(ellipse(f, 0.0, rim, wide, high), bow - f.y, 0.16)
    canvas.fill(f, cap, tone(lightness, chroma, hue, 0.075), lean=(0.6, 1.0), middle=-0.3)
    spot = oklch(0.96, 0.02, 85.0)
    tall, shift = rim - high, uniform(rng, -0.06, 0.06)
    dots = [
        (shift, tall + 0.46 * high, 0.2),
        (-0.62 * wide, rim - 0.24, 0.16),
        (0.64 * wide, rim - 0.26, 0.15),
    ]
    if rng.random() < 0.45:
        dots = [
            (-0.3 * wide + shift, rim - 0.52 * high, 0.2),
            (0.36 * wide, rim - 0.56 * high, 0.15),
            (0.12 * wide, rim - 0.16, 0.13),
            (-0.8 * wide, rim - 0.14, 0.13),
        ]
    scale = uniform(rng, 0.85, 1.1)
    for x, y, radius in dots:
        dot = ellipse(f, x, y, radius * scale, radius * scale * 0.88)
        canvas.fill(f, np.maximum(dot, cap), (spot, spot), alpha=0.95)
    return canvas


def draw_boat(rng: Rng) -> Canvas:
    """Draw a boat."""
    hull = pick(rng, (RED, RED, BLUE, TEAL, ORANGE, PURPLE, GREEN, (0.48, 0.08, 50.0), MAGENTA))
    sails = (WHITE, WHITE, RED, YELLOW, ORANGE, PINK, BLUE, TEAL)
    main, jib = pick(rng, sails), pick(rng, sails)
    canvas = outdoors(rng, main[2] if main[1] > 0.05 else jib[2])
    f = centred(rng, 0.86, 1.0, 0.08, 0.04)
    if rng.random() < 0.5:
        f = Frame(-f.x, f.y, f.px)
    canvas.fill(f, box(f, 0.0, -0.22, 0.045, 0.72, 0.03), tone(0.42, 0.06, 50.0))
    peak, reach, low = uniform(rng, -0.92, -0.84), uniform(rng, 0.62, 0.78), uniform(rng, 0.1, 0.15)
    lightness = 0.97 if main[1] < 0.05 else main[0]
    canvas.fill(
        f,
        convex(f.x, f.y, [(0.06, low), (0.06, peak), (reach, low)], 0.035),
        tone(lightness, main[1], main[2]),
        lean=(1.2, 0.6),
    )
    front, start = uniform(rng, 0.48, 0.66), peak + uniform(rng, 0.1, 0.4)
    canvas.fill(
        f,
        convex(f.x, f.y, [(-front, low), (-0.06, start), (-0.06, low)], 0.035),
        tone(jib[0] - 0.03, jib[1], jib[2]),
        lean=(1.2, 0.6),
    )
    deck, bow, stern = 0.21, uniform(rng, 0.78, 0.9), uniform(rng, 0.7, 0.8)
    sides = [(-bow, deck), (stern, deck), (stern - 0.22, 0.82), (-bow + 0.42, 0.82)]
    body = convex(f.x, f.y, sides, 0.06)
    canvas.fill(f, body, tone(hull[0] - 0.03, hull[1], hull[2]), lean=(0.3, 2.0), middle=0.85)
    if rng.random() < 0.6:
        trim = np.maximum(body, f.y - deck - 0.11)
        canvas.fill(f, trim, (WHITES, WHITES), alpha=0.9)
    water = (uniform(rng, 0.54, 0.70), uniform(rng, 0.09, 0.125), uniform(rng, 195.0, 258.0))
    swell, phase = uniform(rng, 0.02, 0.045), uniform(rng, 0.0, 6.28)
    wave = (
        uniform(rng, 0.54, 0.62) - ROOT.y + swell * np.sin(ROOT.x * uniform(rng, 4.0, 6.5) + phase)
    )
    crest = oklch(water[0] + 0.16, water[1] * 0.6, water[2])
    canvas.fill(ROOT, wave - 0.04, (crest, crest), alpha=0.9)
    canvas.fill(ROOT, wave + 0.03, tone(*water), lean=(0.0, 3.0), middle=2.4)
    return canvas

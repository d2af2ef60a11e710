"""Scenes of pocket-text's pictures: their parts, the held-out combinations, and the drawing.

Scene i of a set depends on (seed, i) alone. Held-out combinations (thing and colour, two things,
and one in twenty of all other scenes) are never drawn for training, so that sentences about them
measure whether the model puts known words together in a new way.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.pocket.scenery import WHITES, Rng, uniform
from tools.pocket.shapes import (
    IMAGE_SIZE,
    ROOT,
    Canvas,
    Field,
    Frame,
    circle,
    f32,
    oklch,
)
from tools.pocket_text.things import COLOUR_NAMES, THINGS, paint, shade, turn_of

SIZES = ("small", "", "large")  # "" is what is not told
PLACES = ("", "left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("sky", "meadow", "beach", "sea", "snow")
TIMES = ("day", "sunset", "night")
# the colours that things have where a caption does not tell one
NATURAL = {
    **{"star": "yellow", "heart": "red", "tree": "green", "sun": "yellow", "moon": "yellow"},
    **{"mushroom": "red", "apple": "red", "cloud": "white", "duck": "yellow", "bell": "yellow"},
}

_ALONE = {"small": 0.34, "": 0.50, "large": 0.72}  # radii, of half the picture
_PAIRED = {"small": 0.32, "": 0.40, "large": 0.48}
_PLACED = {"left": (-0.5, 0.0), "right": (0.5, 0.0), "top": (0.0, -0.5), "bottom": (0.0, 0.5)}
# where the first thing stands; the second one stands opposite
_FIRST = {
    **{"left of": (-0.48, 0.0), "right of": (0.48, 0.0)},
    **{"above": (0.0, -0.48), "below": (0.0, 0.48)},
}
# lightness, chroma and hue of the sky at its top and at its bottom
_SKIES = {
    "day": ((0.73, 0.10, 243.0), (0.90, 0.045, 225.0)),
    "sunset": ((0.58, 0.12, 315.0), (0.83, 0.12, 62.0)),
    "night": ((0.24, 0.06, 278.0), (0.37, 0.075, 265.0)),
}
_GROUNDS = {
    "meadow": (0.74, 0.13, 133.0),
    "beach": (0.88, 0.06, 85.0),
    "sea": (0.60, 0.105, 240.0),
    "snow": (0.965, 0.01, 240.0),
}
_LIGHT = {"day": 1.0, "sunset": 0.84, "night": 0.52}  # of the ground


@dataclass(frozen=True)
class Item:
    """One thing of a scene: names of THINGS, COLOUR_NAMES and SIZES."""

    thing: str
    colour: str
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """One thing at a place, or two with a relation; a background and a time of day.

    Attributes:
        items: one or two things.
        place: of a single thing, a name of PLACES; "" near the middle.
        relation: of the first of two things to the second, a name of RELATIONS; "" for one.
        background, time: names of BACKGROUNDS and TIMES.
    """

    items: tuple[Item, ...]
    place: str
    relation: str
    background: str
    time: str


def in_order(scene: Scene) -> tuple[Item, ...]:
    """Return the things from left to right, or from top to bottom."""
    return scene.items[::-1] if scene.relation in ("right of", "below") else scene.items


def direction(scene: Scene) -> str:
    """Return how two things stand to each other: "beside" or "stacked"."""
    return "beside" if scene.relation in ("left of", "right of") else "stacked"


def unseen_colour(thing: str, colour: str) -> bool:
    """Whether a thing is never drawn in this colour for training; one in nine pairs."""
    if NATURAL.get(thing) == colour:
        return False
    return (5 * THINGS.index(thing) + 7 * COLOUR_NAMES.index(colour)) % 9 == 0


def unseen_pair(first: str, second: str) -> bool:
    """Whether two things, in either order, are never drawn together for training; one in eight."""
    a, b = THINGS.index(first), THINGS.index(second)
    return (a * b + 3 * (a + b)) % 8 == 5


def held_out(scene: Scene) -> bool:
    """Whether a scene is kept from training: an unseen combination, or one in twenty others."""
    if any(unseen_colour(item.thing, item.colour) for item in scene.items):
        return True
    if len(scene.items) == 2 and unseen_pair(scene.items[0].thing, scene.items[1].thing):
        return True
    return zlib.crc32(repr(scene).encode()) % 20 == 0


def any_scene(rng: Rng) -> Scene:
    """Return a random scene of one or, as often, two things; it may be held out."""

    def choice(names: tuple[str, ...]) -> str:
        return names[int(rng.integers(len(names)))]

    count = 1 + int(rng.random() < 0.5)
    items: list[Item] = []
    while len(items) < count:
        thing = choice(THINGS)
        natural = NATURAL.get(thing, "")
        colour = natural if natural and rng.random() < 0.12 else choice(COLOUR_NAMES)
        if all(thing != item.thing and colour != item.colour for item in items):
            items.append(Item(thing, colour, choice(SIZES)))
    return Scene(
        items=tuple(items),
        place=choice(PLACES) if count == 1 else "",
        relation=choice(RELATIONS) if count == 2 else "",
        background=choice(BACKGROUNDS),
        time=choice(("day", *TIMES)),
    )


def scenes(count: int, seed: int, *, training: bool = True) -> Iterator[tuple[Scene, Rng]]:
    """Yield `count` scenes, each with the random numbers that draw it.

    Of a training set none is held out; of any other set all are.
    """
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = any_scene(rng)
        while held_out(scene) == training:
            scene = any_scene(rng)
        yield scene, rng


def draw_scene(scene: Scene, rng: Rng) -> NDArray[np.uint8]:
    """Return one picture [64, 64, 3] of a scene, drawn with the numbers of `rng`."""
    canvas = _backdrop(scene, rng)
    for item, (x, y) in zip(scene.items, _places(scene), strict=True):
        radius = (_ALONE if len(scene.items) == 1 else _PAIRED)[item.size]
        radius *= uniform(rng, 0.93, 1.07)
        reach = 0.97 - radius  # a thing stays inside the picture
        # the larger, the less it can be moved off the middle
        x, y = (min(max(v + uniform(rng, -0.07, 0.07), -reach), reach) for v in (x, y))
        turn = turn_of(item.thing, rng)
        part, frame = _window(canvas, ROOT.place(x, y, radius, turn), (x, y), 1.3 * radius)
        paint(part, frame, item.thing, shade(item.colour, rng), rng)
    return canvas.image()


def draw_training(count: int, seed: int) -> tuple[NDArray[np.uint8], list[Scene]]:
    """Return `count` pictures [count, 64, 64, 3] for training and their scenes."""
    return _draw(count, seed, training=True)


def draw_held_out(count: int, seed: int) -> tuple[NDArray[np.uint8], list[Scene]]:
    """Return `count` pictures [count, 64, 64, 3] of scenes that are never trained on."""
    return _draw(count, seed, training=False)


def _draw(count: int, seed: int, *, training: bool) -> tuple[NDArray[np.uint8], list[Scene]]:
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    kept = []
    for i, (scene, rng) in enumerate(scenes(count, seed, training=training)):
        images[i] = draw_scene(scene, rng)
        kept.append(scene)
    return images, kept


def _places(scene: Scene) -> list[tuple[float, float]]:
    """Return the middle of each thing."""
    if len(scene.items) == 1:
        return [_PLACED.get(scene.place, (0.0, 0.0))]
    x, y = _FIRST[scene.relation]
    return [(x, y), (-x, -y)]


def _window(
    canvas: Canvas, frame: Frame, middle: tuple[float, float], reach: float
) -> tuple[Canvas, Frame]:
    """Return canvas and frame of the square about `middle` alone, which is all that is painted."""
    side = []
    for centre in middle:
        first, last = ((centre + d + 1.0) * 0.5 * IMAGE_SIZE for d in (-reach, reach))
        side.append(slice(max(int(first), 0), min(int(last) + 2, IMAGE_SIZE)))
    columns, rows = side
    return canvas.part(rows, columns), Frame(
        frame.x[rows, columns], frame.y[rows, columns], frame.px
    )


def _shade(colour: tuple[float, float, float], rng: Rng, light: float = 1.0) -> Field:
    lightness, chroma, hue = colour
    return oklch(
        lightness * light + uniform(rng, -0.02, 0.02),
        chroma * uniform(rng, 0.85, 1.1) * (0.6 + 0.4 * light),
        hue + uniform(rng, -6.0, 6.0),
    )


def _backdrop(scene: Scene, rng: Rng) -> Canvas:
    top, low = (_shade(colour, rng) for colour in _SKIES[scene.time])
    canvas = Canvas(top, low, 0.0)
    if scene.time == "night":
        for _ in range(4):
            dot = circle(ROOT, uniform(rng, -0.95, 0.95), uniform(rng, -0.95, 0.1), 0.03)
            canvas.fill(ROOT, dot, (WHITES, WHITES), alpha=0.5, soft=1.5)
    if scene.background == "sky":
        return canvas
    light = _LIGHT[scene.time]
    colour = _GROUNDS[scene.background]
    horizon = uniform(rng, 0.22, 0.42)
    if scene.background == "sea":
        edge = f32(horizon - ROOT.y)
    else:
        lift, phase = uniform(rng, 0.02, 0.09), uniform(rng, 0.0, 6.0)
        edge = f32(horizon - ROOT.y + lift * np.sin(2.2 * ROOT.x + phase))
    near, far = _shade(colour, rng, light), _shade(colour, rng, 0.9 * light)
    tones = (far, near) if scene.background == "sea" else (near, far)
    canvas.fill(ROOT, edge, tones, lean=(0.0, 1.4), middle=horizon + 0.3, soft=0.5)
    if scene.background == "sea":
        for _ in range(3):
            y = uniform(rng, horizon + 0.12, 0.95)
            x = uniform(rng, -0.7, 0.7)
            wave = np.abs(ROOT.y - y) - 0.025 + 0.2 * np.maximum(np.abs(ROOT.x - x) - 0.3, 0.0)
            canvas.fill(ROOT, f32(wave), (WHITES, WHITES), alpha=0.4 * light, soft=1.5)
    return canvas

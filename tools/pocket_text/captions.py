"""Sentences about scenes: a grammar with several ways to say each thing, and its vocabulary.

A sentence may leave out background and time of day, which are then anything, and a colour that a
thing has by nature. Everything else of a scene is told.
"""

from __future__ import annotations

from collections.abc import Mapping

from tools.pocket.scenery import Rng
from tools.pocket_text.scenes import NATURAL, Item, Scene
from tools.pocket_text.things import COLOUR_NAMES, THINGS

_OTHER_NOUNS: Mapping[str, tuple[str, ...]] = {
    "house": ("cottage",),
    "flower": ("blossom",),
    "moon": ("full moon", "crescent moon"),
    "mushroom": ("toadstool",),
    "boat": ("ship", "sailing boat"),
    "cup": ("mug",),
    "duck": ("duckling",),
    "rocket": ("spaceship",),
    "cat": ("kitten",),
    "umbrella": ("parasol",),
}
_OTHER_COLOURS: Mapping[str, tuple[str, ...]] = {
    "red": ("scarlet",),
    "yellow": ("golden",),
    "green": ("emerald",),
    "purple": ("violet",),
    "grey": ("gray",),
    "turquoise": ("teal",),
}
NOUNS = {thing: (thing, thing, *_OTHER_NOUNS.get(thing, ())) for thing in THINGS}
ADJECTIVES = {c: (c, c, c, *_OTHER_COLOURS.get(c, ())) for c in COLOUR_NAMES}
SIZE_WORDS = {
    "": ("",),
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
PLACE_WORDS = {
    "": ("", "", "in the middle", "in the centre", "in the center"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top", "high up"),
    "bottom": ("at the bottom", "near the bottom", "low down"),
}
RELATION_WORDS = {
    # "and" is read from left to right, as it is written
    "left of": ("left of", "to the left of", "on the left of", "and", "next to"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
BACKGROUND_WORDS = {
    "sky": ("in the sky", "in the air"),
    "meadow": ("on the grass", "on a meadow", "in a field"),
    "beach": ("on the beach", "on the sand"),
    "sea": ("on the sea", "on the water", "at sea"),
    "snow": ("in the snow", "on snow", "in winter"),
}
TIME_WORDS = {
    "day": ("by day", "in the daytime", "at noon"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "night": ("at night", "by night", "at midnight", "in the dark"),
}
_FRAMES = ("{}", "{}", "{}", "{}", "a picture of {}", "a drawing of {}", "there is {}")
UNTOLD = 0.25  # share of sentences that say nothing of the background, and of the time
NATURAL_UNTOLD = 0.25  # share of natural colours that are not told


def caption(scene: Scene, rng: Rng) -> str:
    """Return a sentence that describes a scene, in words that `rng` chooses."""

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    phrases = [_phrase(item, rng) for item in scene.items]
    if len(phrases) == 2:
        what = f"{phrases[0]} {one(RELATION_WORDS[scene.relation])} {phrases[1]}"
    else:
        what = f"{phrases[0]} {one(PLACE_WORDS[scene.place])}".strip()
    where = one(BACKGROUND_WORDS[scene.background]) if rng.random() >= UNTOLD else ""
    when = one(TIME_WORDS[scene.time]) if rng.random() >= UNTOLD else ""
    around = [where, when] if rng.random() < 0.7 else [when, where]
    return " ".join(part for part in (one(_FRAMES).format(what), *around) if part)


def _phrase(item: Item, rng: Rng) -> str:
    """Return a thing with its size and its colour, as in "a small red boat"."""

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    told = NATURAL.get(item.thing) != item.colour or rng.random() >= NATURAL_UNTOLD
    colour = one(ADJECTIVES[item.colour]) if told else ""
    noun = one(NOUNS[item.thing])
    after = told and rng.random() < 0.08
    words = [one(SIZE_WORDS[item.size]), "" if after else colour, noun]
    words = [word for word in words if word] + (["that is", colour] if after else [])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def vocabulary() -> tuple[str, ...]:
    """Return every word that a sentence may have, sorted; all are lower case."""
    tables = (
        *(NOUNS, ADJECTIVES, SIZE_WORDS, PLACE_WORDS, RELATION_WORDS, BACKGROUND_WORDS),
        TIME_WORDS,
    )
    texts = [text for table in tables for words in table.values() for text in words]
    texts += [*_FRAMES, "a an the and that is"]
    return tuple(sorted({word for text in texts for word in text.split()} - {"{}"}))

"""Sentences to begin with, for the page of the service and for `demo`."""

from __future__ import annotations

from collections.abc import Mapping

# of models that know everyday words
_GENERAL = (
    "a red fox in the snow",
    "a lighthouse at night, oil painting",
    "a bowl of oranges on a wooden table",
    "an astronaut who reads a newspaper",
)
# of models that know less; by preset
_OF_PRESETS: Mapping[str, tuple[str, ...]] = {
    "pocket-text": (
        "a red boat on the sea at night",
        "a blue house in the snow",
        "a large orange mushroom on the grass",
        "a green cat and a pink umbrella",
        "a yellow duck on the left at sunset",
        "a purple fish high up in the sky",
    ),
}


def examples(preset: str) -> tuple[str, ...]:
    """Return sentences that a model of this preset draws well; "" is a model without one."""
    return _OF_PRESETS.get(preset, _GENERAL)

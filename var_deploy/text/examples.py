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
        "a purple fish under a full moon",
        "a red boat on the sea at night",
        "a yellow duck left of a green boat",
        "a blue house in the snow",
        "a red balloon above a green tree",
        "a large orange mushroom by day",
    ),
}


def examples(preset: str) -> tuple[str, ...]:
    """Return sentences that a model of this preset draws well; "" is a model without one."""
    return _OF_PRESETS.get(preset, _GENERAL)

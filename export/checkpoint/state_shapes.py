"""Reads sizes off the shapes of a state dict, within bounds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.files import WeightSource

# Far beyond the models there are (40 blocks, 13 scales, 5 levels of 2 blocks), and small enough
# that a model of names alone costs nothing.
MAX_DEPTH = 256
MAX_SCALES = 64
MAX_LEVELS = 8
MAX_RES_BLOCKS = 16
MAX_SIZE = 1 << 24  # of any other dimension


def autoencoder_sizes(source: WeightSource) -> dict[str, Any]:
    """Return the fields that the specs of both tokenizers share, read off the encoder.

    Raises CheckpointError where they are not those of such an encoder.
    """
    base = size(source, "encoder.conv_in.weight", 0, rank=4)
    levels = count(source, r"encoder\.down\.(\d+)\.", "encoder levels", MAX_LEVELS)
    widths = [size(source, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)]
    if any(width % base for width in widths):
        raise CheckpointError(
            f"{source}: level widths {widths} are not multiples of the base width {base} "
            "(encoder.conv_in.weight)"
        )
    return {
        "base_width": base,
        "width_multipliers": tuple(width // base for width in widths),
        "res_blocks": count(
            source, r"encoder\.down\.0\.block\.(\d+)\.", "residual blocks", MAX_RES_BLOCKS
        ),
        "image_channels": size(source, "encoder.conv_in.weight", 1),
    }


def has(source: WeightSource, key: str) -> bool:
    keys = source.keys()
    return key in keys


def size(
    source: WeightSource, key: str, axis: int, rank: int | None = None, limit: int = MAX_SIZE
) -> int:
    """Return one dimension of a tensor that must be there, with a rank within bounds."""
    if not has(source, key):
        raise CheckpointError(f"{source} lacks {key}: it is incomplete or of another family")
    shape = source.shape(key)
    if len(shape) <= axis or len(shape) < 2 or (rank is not None and len(shape) != rank):
        raise CheckpointError(
            f"{source}: {key} is {listed(shape)}, expected {rank or 'at least 2'} dimensions"
        )
    if not 1 <= shape[axis] <= limit:
        raise CheckpointError(
            f"{source}: {key} is {listed(shape)}, expected 1 to {limit} in dimension {axis}"
        )
    return shape[axis]


def count(source: WeightSource, pattern: str, what: str, limit: int) -> int:
    """Count the consecutive indices from 0 that `pattern` captures from the keys."""
    matches = map(re.compile(pattern, re.ASCII).match, source.keys())
    found = {match[1] for match in matches if match}
    number = 0
    while str(number) in found:
        number += 1
        if number > limit:
            raise CheckpointError(
                f"{source} lists more than {limit} {what}, expected a model of this family"
            )
    return number


def listed(shape: Sequence[int]) -> str:
    return str(list(shape))

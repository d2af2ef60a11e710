"""Tokens of images as files: an .npz with one array [N, L_k] a scale, named as in the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.files import whole_file

SUFFIX = ".npz"


def save_tokens(path: Path, tokens: Sequence[NDArray[np.int64]]) -> None:
    """Write the tokens of every scale; see `files.whole_file`."""
    arrays: dict[str, Any] = {names.encoder_tokens(k): t for k, t in enumerate(tokens)}
    with whole_file(path) as stream:
        np.savez(stream, **arrays)


def read_tokens(path: Path, scales: int) -> list[NDArray[Any]]:
    """What `save_tokens` wrote, of at most this many scales; whether a model has such tokens is
    not known here. Raises UsageError for another file."""
    tokens: list[NDArray[Any]] = []
    try:
        with np.load(path, allow_pickle=False) as found:
            for name in map(names.encoder_tokens, range(scales)):
                if name not in found:
                    break
                tokens.append(found[name])
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        why = getattr(error, "strerror", None) or "it is no file of tokens, or a damaged one"
        raise UsageError(f"{path} cannot be read: {why}; var-deploy encode writes one") from None
    if not tokens:
        raise UsageError(f"{path} holds no tokens; var-deploy encode writes such a file")
    return tokens

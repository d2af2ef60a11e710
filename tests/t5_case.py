"""The golden T5 encoder: arrays of the published implementation, and files as on the Hub."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.spec import TextEncoderSpec

if TYPE_CHECKING:
    from var_deploy.export.checkpoint.text_encoder import LoadedTextEncoder

FOLDER = Path(__file__).parent / "golden-infinity" / "t5"
TOKENIZER_JSON = (FOLDER / "tokenizer.json").read_bytes()
LENGTHS = (1, 18, 25, 200)  # tokens of the golden prompts
SPEC = TextEncoderSpec(
    width=64, depth=2, heads=4, head_width=24, ffn_width=160, vocab_size=288, length=200
)


@cache
def arrays() -> dict[str, NDArray[Any]]:
    """`input_ids`, `attention_mask`, `last_hidden_state` of four prompts, and the bucket table."""
    with np.load(FOLDER / "golden.npz") as found:
        return dict(found)


def hub_folder(place: Path) -> Path:
    """Write the golden encoder to `place` under the names that the Hub uses."""
    place.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(FOLDER / name, place / name)
    shutil.copy(FOLDER / "t5.safetensors", place / "model.safetensors")
    return place


def encodings() -> Any:
    """Strings with their ids."""
    return json.loads((FOLDER / "encodings.json").read_text())


def random_model(length: int = 32, seed: int = 3) -> LoadedTextEncoder:
    """A smaller encoder with random weights that takes the golden tokenizer."""
    from var_deploy.export.checkpoint.text_encoder import random_text_encoder

    spec = TextEncoderSpec(
        width=32, depth=2, heads=2, head_width=8, ffn_width=64, vocab_size=280, length=length
    )
    return random_text_encoder(spec, TOKENIZER_JSON, seed)

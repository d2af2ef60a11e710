"""Where the golden cases of Infinity lie, see `tools.golden`; names and shapes of released files.

`seeded-small` is in the repository; its weights follow a rule. The others hold files of weights and
lie beside the repository, where they are at hand at all.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from tools.golden import Case as Case
from tools.golden import load_case as load_case
from tools.golden import published
from tools.golden import token_bits as token_bits

OWN = Path(__file__).parent / "golden-infinity"
SHARED = Path(__file__).parents[2] / "shared" / "golden-infinity"
CASES = ("seeded-small", "tiny-square", "tiny-wide")


def folder_of(name: str) -> Path:
    """Where a case lies, whether or not it is there."""
    return (OWN if (OWN / name).is_dir() else SHARED) / name


def published_states(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dicts of transformer and tokenizer as they were published: names, buffers."""
    chunk = case.config["depth"] // case.config["block_chunks"]
    states = tuple(
        {published(key, chunk): torch.from_numpy(array) for key, array in weights.arrays.items()}
        for weights in (case.transformer, case.tokenizer)
    )
    powers = 2 ** torch.arange(case.spec.tokenizer.bits).flip(0)
    states[1].update({"quantizer.lfq.mask": powers, "quantize.lfq.mask": powers})
    return states[0], states[1]


# preset → names in the listing of released files
MODELS = {
    "infinity-125m": ("infinity_layer12", "infinity_vae_d16"),
    "infinity-1b": ("infinity_layer24", "infinity_vae_d32"),
    "infinity-2b": ("infinity_2b", "infinity_vae_d32"),
    "infinity-8b": ("infinity_8b", "infinity_vae_d56_f8_14_patchify"),
    "infinity-8b-512": ("infinity_8b", "infinity_vae_d56_f8_14_patchify"),
}
Shapes = dict[str, tuple[int, ...]]


def official(name: str) -> Shapes:
    """Names and shapes of a released file."""
    listing = json.loads(gzip.decompress((OWN / "official_state_dicts.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in listing[name].items()}


def renamed(shapes: Shapes, names: dict[str, str]) -> Shapes:
    """Shapes under our names."""
    found = {ours: shapes[theirs] for theirs, ours in names.items()}
    assert len(found) == len(names), "two names became one"
    return found

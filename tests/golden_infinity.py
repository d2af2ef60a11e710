"""The golden cases of Infinity: sizes, weights, and what the published implementation computes.

`seeded-small` is in the repository; its weights follow a rule. The others hold files of weights and
lie beside the repository, where they are at hand at all.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from var_deploy.export.checkpoint.infinity_keys import tokenizer_names, transformer_names
from var_deploy.export.checkpoint.text_model import (
    LoadedTextModel,
    assemble_text,
    build_text_modules,
    empty_text_modules,
)
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.infinity import InfinityTransformer
from var_deploy.scale_lists import ScaleList
from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

OWN = Path(__file__).parent / "golden-infinity"
SHARED = Path(__file__).parents[2] / "shared" / "golden-infinity"
CASES = ("seeded-small", "tiny-square", "tiny-wide")
BLOCK = "blocks."


def folder_of(name: str) -> Path:
    """Where a case lies, whether or not it is there."""
    return (OWN if (OWN / name).is_dir() else SHARED) / name


@dataclass(frozen=True)
class Weights:
    """A weight source of arrays in memory."""

    arrays: Mapping[str, NDArray[Any]]
    description: Mapping[str, Any]

    def keys(self) -> Collection[str]:
        return self.arrays.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.arrays[key].shape

    def read(self, key: str) -> NDArray[Any]:
        return self.arrays[key]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and weights, under our names and in fp32, and the published implementation's arrays."""

    name: str
    config: Mapping[str, Any]
    spec: TextModelSpec
    transformer: Weights
    tokenizer: Weights
    golden: Mapping[str, NDArray[Any]]

    def scales(self, prefix: str) -> list[NDArray[Any]]:
        """Arrays `prefix.0` … of all scales."""
        return [self.golden[f"{prefix}.{k}"] for k in range(self.spec.scales)]

    def model(self) -> LoadedTextModel:
        """The case as a model that can be exported."""
        scales = ScaleList(
            resolution="",
            aspect="",
            grids=self.spec.grids,
            rope_grid=self.spec.transformer.rope_grid,
        )
        return assemble_text(self.spec, self.tokenizer, self.transformer, scales=scales)

    def modules(self) -> tuple[BitTokenizer, InfinityTransformer]:
        """The reference modules with the weights of the case."""
        return build_text_modules(self.model())


def spec_of(config: Mapping[str, Any]) -> TextModelSpec:
    """The sizes that a case's config.json tells."""
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=tuple((rows, columns) for rows, columns in config["scale_schedule"]),
            bits=config["bits"],
            patch=2 if config["patchify"] else 1,
            base_width=config["vae_ch"],
            width_multipliers=tuple(config["vae_ch_mult"]),
        ),
        transformer=TextTransformerSpec(
            depth=config["depth"],
            width=config["width"],
            heads=config["heads"],
            ffn_width=config["ffn"],
            text_width=config["text_width"],
            text_length=config["text_maxlen"],
            pool_heads=config["pool_heads"],
            rope_grid=tuple(config["rope_schedule"][-1]),
            unconditional_length=config["text_maxlen"],
            norm_eps=config["norm_eps"],
        ),
    )


@cache
def load_case(folder: Path) -> Case:
    """Read a golden case, with the weights of its files, or else by the rule."""
    config = json.loads((folder / "config.json").read_text())
    spec = spec_of(config)
    if (folder / "infinity.safetensors").is_file():
        transformer, tokenizer = (
            {name: tensor for name, tensor in load_file(folder / file).items()}
            for file in ("infinity.safetensors", "vae.safetensors")
        )
        description = {"file": folder.name}
        read = {
            ours: transformer[theirs].float().numpy()
            for theirs, ours in transformer_names(transformer).items()
        }
        read_tokenizer = {
            ours: tokenizer[theirs].float().numpy()
            for theirs, ours in tokenizer_names(tokenizer).items()
        }
    else:
        description = {"golden_seed": config["seed"]}
        read_tokenizer, read = (seeded(module, config) for module in empty_text_modules(spec))
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    return Case(
        name=folder.name,
        config=config,
        spec=spec,
        transformer=Weights(read, description),
        tokenizer=Weights(read_tokenizer, description),
        golden=golden,
    )


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


# the rule of weights


def seeded(module: nn.Module, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of a module under the published names of its tensors."""
    weights = {}
    for key, tensor in module.state_dict().items():
        if key.endswith("zero_k_bias"):
            weights[key] = np.zeros(tuple(tensor.shape), np.float32)
        else:
            name = published(key, config["depth"] // config["block_chunks"])
            weights[key] = drawn(name, tuple(tensor.shape), config["seed"])
    return weights


def published(key: str, chunk: int) -> str:
    """The released name of one of our tensors, for chunks of so many blocks."""
    if key.startswith(BLOCK):
        number, rest = key.removeprefix(BLOCK).split(".", 1)
        return f"block_chunks.{int(number) // chunk}.module.{int(number) % chunk}.{rest}"
    if not key.startswith(("encoder.", "decoder.")):
        return key
    layer, _, kind = key.rpartition(".")
    return f"{layer}.{'norm' if 'norm' in layer.rsplit('.', 1)[-1] else 'conv'}.{kind}"


def drawn(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The rule of the golden cases: a tensor depends on its published name, shape and the seed."""
    stream = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = stream.standard_normal(shape).astype(np.float32)
    if "scale_mul" in name:
        z = np.float32(2.5) + np.float32(1.5) * z
    elif "norm" in name and name.endswith("weight"):
        z = 1 + np.float32(0.1) * z
    elif "ada_gss" in name:
        z = np.float32(0.4) * z
    elif len(shape) >= 2:
        z = np.float32(_factor(name, shape)) * z
    else:
        z = np.float32(0.1) * z
    return z.astype(np.float16).astype(np.float32)


def _factor(name: str, shape: tuple[int, ...]) -> float:
    fixed = {
        "word_embed.weight": 1.0,
        "pos_start": 0.6,
        "lvl_embed.weight": 0.6,
        "cfg_uncond": 0.6,
        "text_proj_for_sos.ca.mat_q": 1.5,
    }
    if name in fixed:
        return fixed[name]
    gain = {"head.weight": 0.45, "shared_ada_lin.1.weight": 0.5}.get(name, 1.0)
    if "encoder.conv_out" in name:
        gain = 1.6
    if "decoder.conv_out" in name:
        gain = 0.6
    return float(gain * np.prod(shape[1:]) ** -0.5)

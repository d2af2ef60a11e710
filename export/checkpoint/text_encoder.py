"""Opens a T5 text encoder: a Hugging Face folder with tokenizer.json, or random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.json_values import DamagedError, Value
from var_deploy.errors import BundleError, CheckpointError, UsageError
from var_deploy.export.checkpoint.assemble import check_state
from var_deploy.export.checkpoint.files import WeightSource
from var_deploy.export.checkpoint.model_folder import CONFIG, FolderWeights, read_folder_json
from var_deploy.export.checkpoint.presets import TEXT_ENCODERS as TEXT_ENCODERS
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.export.models.t5 import EMBEDDING, T5Encoder
from var_deploy.files.held_files import open_regular
from var_deploy.spec import TextEncoderSpec
from var_deploy.text.manifest import SIZES
from var_deploy.text.prompt_tokenizer import PromptTokenizer
from var_deploy.text.tokenizer_json import MAX_BYTES

ALIAS = "encoder.embed_tokens.weight"  # the same tensor as the embedding
# the half of a T5 that makes text, which has no part in features
DECODER = ("decoder.", "lm_head.")
# names of sizes in config.json
CONFIG_NAMES = {
    "d_model": "width",
    "num_layers": "depth",
    "num_heads": "heads",
    "d_kv": "head_width",
    "d_ff": "ffn_width",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True, kw_only=True)
class LoadedTextEncoder:
    """A text encoder's sizes and where its weights are.

    Attributes:
        weights: under exactly the keys and shapes of `T5Encoder`.
        tokenizer_json: the bytes of tokenizer.json, which was checked.
    """

    spec: TextEncoderSpec
    weights: WeightSource
    tokenizer_json: bytes


class _EncoderWeights:
    """The encoder of a T5 whose embedding may lie under either of its two names."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        held = source.keys()
        self._stored = {key: key for key in held if key != ALIAS}
        if EMBEDDING not in held and ALIAS in held:
            self._stored[EMBEDDING] = ALIAS

    @property
    def description(self) -> Mapping[str, Any]:
        return self._source.description

    def __str__(self) -> str:
        return str(self._source)

    def keys(self) -> Collection[str]:
        return self._stored.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(self._stored[key])

    def read(self, key: str) -> NDArray[Any]:
        return self._source.read(self._stored[key])


def open_text_encoder(folder: Path, length: int) -> LoadedTextEncoder:
    """Open a folder with config.json, tokenizer.json and the weights of a T5 (v1.1).

    Of a whole T5 the decoder's tensors are left out by their names; every other tensor that the
    encoder does not have is reported. Nothing but metadata and tokenizer.json is read.

    Args:
        length: S, tokens that the graph takes.

    Raises CheckpointError for files that are missing, damaged, or not those of such an encoder,
    UsageError for a length out of range, BackendError where `tokenizers` is not installed.
    """
    spec = read_config(folder, length)
    weights = encoder_weights(FolderWeights(folder, DECODER), spec)
    data = _read_tokenizer(folder)
    return _checked(spec, weights, data, str(folder / names.TOKENIZER_JSON))


def random_text_encoder(
    spec: TextEncoderSpec, tokenizer_json: bytes, seed: int
) -> LoadedTextEncoder:
    """Return a text encoder of any sizes with random weights. Raises as `open_text_encoder`."""
    weights = RandomWeights(encoder_shapes(spec), seed)
    return _checked(spec, weights, tokenizer_json, names.TOKENIZER_JSON)


def _checked(
    spec: TextEncoderSpec, weights: WeightSource, data: bytes, name: str
) -> LoadedTextEncoder:
    try:
        PromptTokenizer(data, spec.length, vocab_size=spec.vocab_size)
    except BundleError as error:
        words = str(error).removeprefix(names.TOKENIZER_JSON).lstrip()
        raise CheckpointError(f"{name} {words}") from None
    return LoadedTextEncoder(spec=spec, weights=weights, tokenizer_json=data)


def encoder_shapes(spec: TextEncoderSpec) -> dict[str, tuple[int, ...]]:
    """Return the key and shape of every tensor of an encoder."""
    with torch.device("meta"):
        return {key: tuple(t.shape) for key, t in T5Encoder(spec).state_dict().items()}


def encoder_weights(source: WeightSource, spec: TextEncoderSpec) -> WeightSource:
    """Return the weights of an encoder under the keys of `T5Encoder`.

    Raises CheckpointError that lists keys which are missing, unexpected, or of another shape.
    """
    weights = _EncoderWeights(source)
    check_state(weights, encoder_shapes(spec), ())
    return weights


def build_t5(model: LoadedTextEncoder) -> T5Encoder:
    """Build the PyTorch encoder with its weights, in fp32, evaluation mode, no gradients."""
    with torch.device("meta"):
        module = T5Encoder(model.spec).eval()
    state = {key: torch.from_numpy(model.weights.read(key)) for key in encoder_shapes(model.spec)}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def read_config(folder: Path, length: int) -> TextEncoderSpec:
    """Return the sizes that config.json tells. Raises CheckpointError, UsageError for `length`."""
    low, high = SIZES["length"]
    if type(length) is not int or not low <= length <= high:
        raise UsageError(f"the text length must be from {low} to {high}, found {length}")
    config = read_folder_json(folder, CONFIG)
    try:
        return dataclasses.replace(_sizes(config), length=length)
    except DamagedError as error:
        raise CheckpointError(
            f"{folder / CONFIG} is not of a T5 encoder that is supported ({error})"
        ) from None


def _sizes(config: Value) -> TextEncoderSpec:
    members = config.members()
    config.member("feed_forward_proj").one_of("gated-gelu")
    sizes = {ours: config.member(name).whole(*SIZES[ours]) for name, ours in CONFIG_NAMES.items()}
    for name, ours, usual in (
        ("relative_attention_num_buckets", "buckets", 32),
        ("relative_attention_max_distance", "max_distance", 128),
    ):
        sizes[ours] = members[name].whole(*SIZES[ours]) if name in members else usual
    if sizes["buckets"] % 4 or sizes["max_distance"] <= sizes["buckets"] // 4:
        raise config.member("relative_attention_num_buckets").refuse(
            "a multiple of 4, with a largest distance above a quarter of it"
        )
    eps = members["layer_norm_epsilon"].number(0, 1) if "layer_norm_epsilon" in members else 1e-6
    return TextEncoderSpec(**sizes, length=1, norm_eps=eps)


def _read_tokenizer(folder: Path) -> bytes:
    path = folder / names.TOKENIZER_JSON
    try:
        with open(open_regular(path), "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {names.TOKENIZER_JSON}; take it from the released model's folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None

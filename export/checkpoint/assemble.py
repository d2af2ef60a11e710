"""Turns checkpoint files into a model: recognises its sizes, checks every key, loads it once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint.files import (
    DERIVED_BUFFERS,
    WeightSource,
    open_checkpoint,
)
from var_deploy.export.checkpoint.formats import shown
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.checkpoint.module_weights import ModuleWeights
from var_deploy.export.checkpoint.presets import Preset, find_preset, own_file
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.export.checkpoint.recognise import recognise, typed
from var_deploy.export.families import export_family_of
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import NextScaleTransformer
from var_deploy.export.verify.held_modules import recognise_modules, tokenizer_of
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec, TokenizerSpec

__all__ = [
    "Hints",
    "LoadedModel",
    "WeightSource",
    "as_loaded_model",
    "assemble",
    "build_modules",
    "check_state",
    "default_sampling",
    "empty_modules",
    "load_into",
    "load_model",
    "open_checkpoint",
]

MAX_LISTED = 8
MAX_LINE = 800  # characters of them


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model's sizes and where its weights are.

    Attributes:
        preset: name of the preset, "" for a model without one.
        tokenizer, transformer: weights under exactly the keys and shapes of the two modules,
            derived buffers included.
        labels: class names, index = label; empty where they are not known.
        defaults: sampling settings used where a call gives none.
    """

    spec: ModelSpec
    preset: str
    tokenizer: WeightSource
    transformer: WeightSource
    labels: tuple[str, ...]
    defaults: Sampling

    def source(self, key: str) -> WeightSource:
        """Return the weight source that holds a key (no key is in both). Raises KeyError."""
        for source in (self.transformer, self.tokenizer):
            keys = source.keys()
            if key in keys:
                return source
        raise KeyError(key)


class _Complete:
    """A checked weight source: derived buffers are computed, keys of no module are left out."""

    def __init__(self, source: WeightSource, module: nn.Module) -> None:
        self._source = source
        self._shapes = _shapes(module)
        self._derived = frozenset(key for key in self._shapes if _is_derived(key))
        self._module = module

    @property
    def description(self) -> Mapping[str, Any]:
        return self._source.description

    def __str__(self) -> str:
        return str(self._source)

    def keys(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> NDArray[Any]:
        if key not in self._derived:
            return self._source.read(key)
        if key == "lvl_1L":
            return self._levels()[None]
        if key == "attn_bias_for_masking":
            levels = self._levels()
            visible = levels[:, None] >= levels[None, :]
            bias: NDArray[np.float32] = np.where(visible, np.float32(0), np.float32(-np.inf))
            return bias[None, None]
        return np.zeros(self._shapes[key], np.float32)

    def _levels(self) -> NDArray[np.int64]:
        """Return the scale of each token [T]."""
        lengths = [side * side for side in _patch_nums(self._module)]
        levels: NDArray[np.int64] = np.repeat(np.arange(len(lengths)), lengths)
        return levels


def load_model(
    preset: str | None,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    random_weights: int | None = None,
    hints: Hints = NO_HINTS,
    fallback: Hints = NO_HINTS,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Open the weights of a preset, of files, or random ones, and check them against the model.

    Args:
        preset: name of a preset, whose files are those given, or else fetched; None: both files
            must be given, and the sizes are recognised.
        checkpoint: file with the transformer.
        tokenizer: file with the tokenizer (may be the same one, where it holds both).
        random_weights: a seed; no file is read.
        hints: what the user tells of the files; must not contradict them.
        fallback: taken where neither the files nor the hints tell.
        progress: called with what takes long.

    Nothing but metadata is read here. Raises UsageError for arguments that do not go together and
    CheckpointError for files that cannot be had, read, or do not fit.
    """
    known = None if preset is None else find_preset(preset)
    if random_weights is not None:
        if known is None:
            raise UsageError("--random-weights needs a preset, which tells the sizes")
        if checkpoint is not None or tokenizer is not None:
            raise UsageError("--random-weights and checkpoint files exclude each other")
        if dataclasses.replace(hints, heads=None) != NO_HINTS:
            raise UsageError("--random-weights reads no file, which --key and --patch-nums tell of")
        return random_model(known.spec, random_weights, **_named(preset, known))
    if known is None and (checkpoint is None or tokenizer is None):
        lacking = "--checkpoint" if checkpoint is None else "--tokenizer"
        raise UsageError(
            f"a model without a preset needs --checkpoint and --tokenizer; {lacking} is missing "
            "(one file that holds both may be given twice)"
        )
    asked = hints.patch_nums
    if known is not None and asked not in (None, known.spec.patch_nums):
        raise UsageError(
            f"--patch-nums {typed(asked)} contradicts preset {preset}, which has "
            f"{typed(known.spec.patch_nums)}"
        )
    opened_tokenizer = open_checkpoint(
        tokenizer or own_file(known, "tokenizer", progress),
        "tokenizer",
        hints.tokenizer_key,
        fallback.tokenizer_key,
    )
    opened_transformer = open_checkpoint(
        checkpoint or own_file(known, "transformer", progress),
        "transformer",
        hints.key,
        fallback.key,
    )
    if known is None:
        spec = recognise(opened_tokenizer, opened_transformer, hints, fallback)
        return assemble(spec, opened_tokenizer, opened_transformer)
    model = assemble(known.spec, opened_tokenizer, opened_transformer, **_named(preset, known))
    # equal shapes leave open which side lengths add up to the same number of tokens
    found = recognise(opened_tokenizer, opened_transformer, hints, fallback).patch_nums
    if found != known.spec.patch_nums:
        raise CheckpointError(
            f"{opened_transformer} does not fit preset {preset}: lvl_1L has patch_nums {found}, "
            f"expected {known.spec.patch_nums}"
        )
    return model


def random_model(spec: ModelSpec, seed: int, **named: Any) -> LoadedModel:
    """Return a model of any sizes with random weights; `named` as in `assemble`."""
    drawn = (RandomWeights(weight_shapes(module), seed) for module in empty_modules(spec))
    return assemble(spec, *drawn, **named)


def assemble(
    spec: ModelSpec,
    tokenizer: WeightSource,
    transformer: WeightSource,
    *,
    preset: str = "",
    labels: tuple[str, ...] = (),
    defaults: Sampling | None = None,
) -> LoadedModel:
    """Make a model of a tokenizer's and a transformer's weights, checked against its sizes.

    Raises CheckpointError as `check_state` does.
    """
    tokenizer_module, transformer_module = empty_modules(spec)
    return LoadedModel(
        spec=spec,
        preset=preset,
        tokenizer=fitted(tokenizer, tokenizer_module, preset),
        transformer=fitted(transformer, transformer_module, preset),
        labels=labels,
        defaults=defaults or default_sampling(spec),
    )


def fitted(source: WeightSource, module: nn.Module, preset: str = "") -> WeightSource:
    """Return a source with exactly a module's keys and shapes; derived buffers are computed.

    Raises CheckpointError as `check_state` does.
    """
    what = f"preset {preset}" if preset else "the sizes found in it"
    _check_fit(source, _shapes(module), _derived_keys(module), what)
    return _Complete(source, module)


def as_loaded_model(
    transformer: nn.Module,
    tokenizer: nn.Module,
    *,
    defaults: Sampling | None = None,
    labels: tuple[str, ...] = (),
) -> LoadedModel:
    """Wrap a transformer and a tokenizer in memory, to be exported like checkpoint files.

    Args:
        transformer: VAR of the published code, of `models.transformer`, or what `var.build`
            returned; of any other class where its state dict has the keys of one of these.
        tokenizer: the published VQVAE, a Tokenizer, or what `var.build_tokenizer` returned (either
            of the two).
        defaults: sampling settings; None: those of `default_sampling`.
        labels: class names, index = label; empty where they are not known.

    Sizes come from the state dicts, and from attributes (`module_sizes`) where those do not tell.
    Raises CheckpointError for modules that are not of this family, UsageError where the two do not
    belong together or where nothing tells a size.
    """
    tokenizer = tokenizer_of(tokenizer)
    weights = ModuleWeights(tokenizer), ModuleWeights(transformer)
    if isinstance(transformer, NextScaleTransformer) and isinstance(tokenizer, Tokenizer):
        spec = _joined(transformer.spec, tokenizer.spec)
    else:
        spec = recognise_modules(transformer, tokenizer, *weights)
    return with_labels(assemble(spec, *weights, defaults=defaults), labels)


def with_labels(model: LoadedModel, labels: tuple[str, ...]) -> LoadedModel:
    """The model with class names, index = label; () keeps those that it has.

    Raises UsageError where they are not one per class.
    """
    classes = model.spec.transformer.classes if model.spec.transformer.conditional else 0
    if labels and len(labels) != classes:
        raise UsageError(
            f"labels must have a name for each of the {classes} classes, found {len(labels)}"
        )
    return dataclasses.replace(model, labels=labels) if labels else model


def _joined(model: ModelSpec, tokenizer: TokenizerSpec) -> ModelSpec:
    """Return the transformer's sizes with those of the tokenizer that it is used with."""
    for field in ("patch_nums", "vocab_size"):
        ours, theirs = getattr(model.tokenizer, field), getattr(tokenizer, field)
        if ours != theirs:
            raise UsageError(
                f"the model and the tokenizer do not belong together: {field} is {ours} and "
                f"{theirs}"
            )
    return ModelSpec(tokenizer=tokenizer, transformer=model.transformer)


def default_sampling(spec: ModelSpec) -> Sampling:
    """Return the settings of a model without a preset: those of the paper's demo, or, without
    classes, every code at temperature 1."""
    if spec.transformer.conditional:
        return Sampling()
    return Sampling(cfg=0.0, top_k=0, top_p=0.0)


def _named(name: str | None, preset: Preset) -> dict[str, Any]:
    return {"preset": name, "labels": preset.labels, "defaults": preset.defaults}


def check_state(
    source: WeightSource, expected: Mapping[str, tuple[int, ...]], optional: Collection[str]
) -> None:
    """Compare the keys and shapes of a state dict; `optional` keys may be absent or of any shape.

    Raises CheckpointError that lists, by key, shapes found and expected, missing and unexpected
    keys (the first few of each, and how many more).
    """
    _check_fit(source, expected, optional, "the model")


def _check_fit(
    source: WeightSource,
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
    what: str,
) -> None:
    found = source.keys()
    wrong = [
        f"{key} is {list(source.shape(key))}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and key not in optional and source.shape(key) != tuple(shape)
    ]
    missing = [
        f"{key} is missing, expected {list(shape)}"
        for key, shape in expected.items()
        if key not in found and key not in optional
    ]
    unexpected = [
        f"{key} is unexpected ({list(source.shape(key))})"
        for key in found
        if key not in expected and key not in optional
    ]
    problems = [
        problem
        for problems in zip_longest(wrong, missing, unexpected)
        for problem in problems
        if problem is not None
    ]
    if problems:
        more = len(problems) - MAX_LISTED
        listed = shown("; ".join(problems[:MAX_LISTED]), MAX_LINE)
        listed += f"; and {more} more" if more > 0 else ""
        raise CheckpointError(f"{source} does not fit {what}: {listed}")


def empty_modules(spec: ModelSpec) -> tuple[Tokenizer, NextScaleTransformer]:
    """Build tokenizer and transformer on the meta device: every key and shape, no memory."""
    with torch.device("meta"):
        transformer = export_family_of(spec.transformer).transformer(spec)
        return Tokenizer(spec.tokenizer).eval(), transformer.eval()


def load_into(module: nn.Module, source: WeightSource) -> None:
    """Fill a Tokenizer or Transformer tensor by tensor; the module is best on the meta device.

    Each parameter takes over the array that was read, so the weights never lie twice in memory
    (of a mapped fp32 file, not even once: its pages are used). Derived buffers are computed.
    Raises CheckpointError where keys or shapes are not the module's.
    """
    check_state(source, _shapes(module), _derived_keys(module))
    complete = _Complete(source, module)
    for owner, name, key in _slots(module):
        tensor = torch.from_numpy(complete.read(key))
        is_parameter = name in owner._parameters
        setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def build_modules(model: LoadedModel) -> tuple[Tokenizer, NextScaleTransformer]:
    """Build tokenizer and transformer with their weights, in fp32, evaluation mode, no
    gradients."""
    tokenizer, transformer = empty_modules(model.spec)
    load_into(tokenizer, model.tokenizer)
    load_into(transformer, model.transformer)
    return tokenizer, transformer


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (owning module, attribute, state-dict key) of every parameter and buffer."""
    for key in module.state_dict():
        owner, _, name = key.rpartition(".")
        yield module.get_submodule(owner), name, key


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a module's tensors that are not derived from its sizes."""
    return {key: shape for key, shape in _shapes(module).items() if not _is_derived(key)}


def _derived_keys(module: nn.Module) -> frozenset[str]:
    return frozenset(filter(_is_derived, module.state_dict()))


def _is_derived(key: str) -> bool:
    return key.rpartition(".")[2] in DERIVED_BUFFERS


def _patch_nums(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module, (Tokenizer, NextScaleTransformer))
    return module.spec.patch_nums

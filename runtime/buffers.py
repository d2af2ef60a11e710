"""All buffers of a generation: allocated once, at sizes known from the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from var_deploy import names
from var_deploy.families import family_of
from var_deploy.image.editing import Kept
from var_deploy.image.resize import bicubic_matrix, linear_matrix
from var_deploy.manifest import Manifest
from var_deploy.rope import rope_tables
from var_deploy.runtime.backends.protocol import Array, Memory
from var_deploy.runtime.blocks import Block, Fields, SharedBlock
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec, NextScaleSpec, TextModelSpec

# the scalar inputs of a scale: its sampling settings
_SETTINGS: dict[str, DTypeLike] = {
    names.CFG: np.float32,
    names.TEMPERATURE: np.float32,
    names.TOP_K: np.int64,
    names.TOP_P: np.float32,
}


# what the images of a batch are made of: B class numbers, or the features of B prompts
Conditions: TypeAlias = Sequence[int] | PromptRows
NEGATIVE = "negative"  # the launch of `condition` for the negative prompts, and their features
# masks of the two halves, apart from the whole one: an input of TensorRT has to be aligned
FIRST_MASK, SECOND_MASK = "first mask", "second mask"


@dataclass(frozen=True, kw_only=True)
class ConditionLaunch:
    """A launch before the scales: its graph and the buffers that it reads and writes."""

    graph: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class FHatPlace(Enum):
    """The buffer that holds f_hat after a number of scales.

    A graph must not write to a buffer that it reads, so scales write f_hat to two buffers in turn.
    Before the first scale f_hat is a buffer of zeros, which no graph writes.
    """

    ZEROS = "zeros"
    ODD = "after an odd number of scales"
    EVEN = "after an even number of scales"

    @classmethod
    def after(cls, scales: int) -> FHatPlace:
        """The buffer that holds f_hat after the first `scales` scales."""
        if scales == 0:
            return cls.ZEROS
        return cls.ODD if scales % 2 else cls.EVEN


class CacheArena:
    """The key-value cache: one sequence-major buffer for the keys and one for the values per layer.

    Scale k reads rows [0, P_k) and writes rows [P_k, P_k + L_k): views of the same memory, so the
    cache is never copied or concatenated outside a graph. The rows of the last scale are not
    stored, since no later scale reads them. Scale 0 has no past: its graph gets one row of zeros,
    which it does not use, because TensorRT has no empty inputs.
    """

    def __init__(self, manifest: Manifest, dtype: DTypeLike, memory: Memory) -> None:
        spec, t = manifest.model, manifest.model.transformer
        self._prefix, self._scales, self._depth = spec.prefix_lengths, spec.scales, t.depth
        row = (manifest.rows, t.heads, t.head_width)
        fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {"no past": ((1, *row), dtype)}
        for layer in range(t.depth):
            for name in (names.past_key(layer), names.past_value(layer)):
                fields[name] = ((self._prefix[-2], *row), dtype)
        self._block = Block(memory, fields)

    @property
    def nbytes(self) -> int:
        return self._block.nbytes

    def discard(self) -> None:
        """Discard the cache, which is not read between the last scale and the next generation."""
        self._block.discard()

    def past(self, scale: int) -> dict[str, Array]:
        """Past keys and values that scale k reads: [P_k, G, H, D] each, [1, G, H, D] at scale 0."""
        if scale == 0:
            return {name: self._block["no past"] for name in self._block if name != "no past"}
        return self._rows(0, self._prefix[scale], names.past_key, names.past_value)

    def new(self, scale: int) -> dict[str, Array]:
        """Keys and values that scale k writes: [L_k, G, H, D] each, none at the last scale."""
        if scale == self._scales - 1:
            return {}
        start, stop = self._prefix[scale], self._prefix[scale + 1]
        return self._rows(start, stop, names.new_key, names.new_value)

    def _rows(
        self, start: int, stop: int, key: Callable[[int], str], value: Callable[[int], str]
    ) -> dict[str, Array]:
        views = {}
        for layer in range(self._depth):
            views[key(layer)] = self._block[names.past_key(layer)].rows(start, stop)
            views[value(layer)] = self._block[names.past_value(layer)].rows(start, stop)
        return views


class LoopBuffers:
    """The input and output buffers of every launch, by tensor name.

    Four blocks are copied between host and backend, each with one copy: `inputs` before a
    generation, `outputs` and `latent` (f_hat) after it, and the geometry of `step` once. `latent`
    is also copied to the backend when `ScaleLoop.decode` decodes an f_hat. Intermediates stay in
    the backend's memory.
    """

    def __init__(self, manifest: Manifest, cache_dtype: DTypeLike, memory: Memory) -> None:
        self._spec = spec = manifest.model
        self._batch, self._more_smooth = manifest.batch, manifest.more_smooth
        self._text = manifest.takes_text
        # launches of the condition graphs that the last `fill` asks for
        self.wanted: tuple[str, ...] = ()
        self.arena = CacheArena(manifest, cache_dtype, memory)
        self.inputs = SharedBlock(memory, _input_fields(manifest))
        self.outputs = SharedBlock(memory, _output_fields(manifest))
        self.latent = SharedBlock(memory, _latent_fields(manifest))
        self._intermediates = Block(memory, _intermediate_fields(manifest, cache_dtype))
        geometry = {
            _at(name, k): value
            for k in range(spec.scales)
            for name, value in step_geometry(spec, k).items()
        }
        self._geometry = tuple(step_geometry(spec, 0))
        fields = {name: (value.shape, value.dtype) for name, value in geometry.items()}
        self._fixed = SharedBlock(memory, fields)
        for name, value in geometry.items():
            self._fixed.host[name][...] = value
        self._fixed.upload()

    @property
    def nbytes(self) -> int:
        """Size of all blocks in the backend's memory, in bytes."""
        shared = (self.inputs, self.outputs, self.latent, self._fixed)
        return sum(block.nbytes for block in (self.arena, self._intermediates, *shared))

    def fill(
        self,
        conditions: Conditions,
        uniforms_BT: NDArray[np.float32],
        sampling: Sampling,
        forced: Sequence[NDArray[np.int64]] = (),
        keep: Kept | None = None,
        noise: Sequence[NDArray[np.float32]] = (),
    ) -> None:
        """Write the inputs of one generation and copy them to the backend.

        Args:
            conditions: B class numbers, or the features of B prompts.
            uniforms_BT: [B, `NextScaleSpec.draws`] random numbers in [0, 1): one per token, or per
                bit of it.
            forced: tokens [B, L_k] (bits [B, L_k, e]) of the first scales, which are then not
                sampled.
            keep: tokens of the other scales that are not sampled.
            noise: with `more_smooth`, the Gumbel noise of each image [T, V]; zeros where it is
                left out.
        """
        spec, inputs = self._spec, self.inputs.host
        self._fill_conditions(conditions)
        prefix, token = spec.prefix_lengths, spec.token_shape
        uniforms = uniforms_BT.reshape(self._batch, -1, *token)
        for k in range(spec.scales):
            chosen = sampling.at(k, spec.scales)
            inputs[_at(names.CFG, k)][...] = chosen.guidance
            inputs[_at(names.TEMPERATURE, k)][...] = chosen.temperature
            if not self._text:
                inputs[_at(names.TOP_K, k)][...] = chosen.top_k
            inputs[_at(names.TOP_P, k)][...] = chosen.top_p
            inputs[_at(names.UNIFORMS, k)][...] = uniforms[:, prefix[k] : prefix[k + 1]]
            inputs[_at(names.KEEP_MASK, k)][...] = k < len(forced)
            if k < len(forced):
                inputs[_at(names.KEEP_TOKENS, k)][...] = forced[k]
            elif keep is not None:
                inputs[_at(names.KEEP_MASK, k)][...] = keep.masks[k]
                inputs[_at(names.KEEP_TOKENS, k)][...] = keep.tokens[k]
            if self._more_smooth:
                place = inputs[_at(names.NOISE, k)]
                place[...] = 0
                for row, numbers in enumerate(noise):
                    place[row] = numbers[prefix[k] : prefix[k + 1]]
        self.inputs.upload()

    def _fill_conditions(self, conditions: Conditions) -> None:
        inputs = self.inputs.host
        if not isinstance(conditions, PromptRows):
            inputs[names.LABELS][: self._batch] = conditions
            inputs[names.LABELS][self._batch :] = self._spec.transformer.classes
            self.wanted = (names.CONDITION,)
            return
        masks = inputs[names.TEXT_MASK]
        inputs[names.TEXT_FEATURES][...] = conditions.features
        masks[: self._batch] = inputs[FIRST_MASK][...] = conditions.mask
        self.wanted = (names.CONDITION,)
        if len(masks) == self._batch:
            return
        negative = conditions.negative
        # without a prompt a row counts as many tokens as the prompt of its image
        second = conditions.mask if negative is None else negative.mask
        masks[self._batch :] = inputs[SECOND_MASK][...] = second
        if negative is not None:
            inputs[NEGATIVE][...] = negative.features
        self.wanted += (names.UNCONDITIONAL if negative is None else NEGATIVE,)

    def image(self) -> NDArray[np.float32]:
        """The images [B, height, width, channels] in [0, 1]; valid after `outputs.download()`."""
        return self.outputs.host[names.IMAGE]

    def tokens(self, scale: int) -> NDArray[np.int64]:
        """The tokens [B, L_k] (bits [B, L_k, e]) of a scale; valid after `outputs.download()`."""
        return self.outputs.host[_at(names.TOKENS, scale)]

    def f_hat(self, scales: int) -> NDArray[np.float32]:
        """f_hat [B, Cv, p_K, p_K] after the first `scales` scales; valid after
        `latent.download()`, and only for the last two scales that were computed."""
        return self.latent.host[FHatPlace.after(scales).value]

    def condition_inputs(self) -> dict[str, Array]:
        """The input buffers of the graph `condition`."""
        return dict(self.condition_launches()[names.CONDITION].inputs)

    def condition_outputs(self) -> dict[str, Array]:
        """The buffers that the scales read of what the condition graphs wrote."""
        if not self._text:
            outputs = (names.FIRST_INPUT, names.MODULATION)
            return {name: self._intermediates[name] for name in outputs}
        return {name: self._intermediates[name] for name in _text_rows(self._spec)}

    def condition_launches(self) -> dict[str, ConditionLaunch]:
        """The launches that may come before the scales, by name; `wanted` are those of a
        generation."""
        outputs = self.condition_outputs()
        if not self._text:
            labels = {names.LABELS: self.inputs[names.LABELS]}
            launch = ConditionLaunch(graph=names.CONDITION, inputs=labels, outputs=outputs)
            return {names.CONDITION: launch}
        batch, mask = self._batch, self.inputs[names.TEXT_MASK]

        def rows(graph: str, start: int, features: str | None) -> ConditionLaunch:
            half = {name: a.rows(start, start + batch) for name, a in outputs.items()}
            read = {names.TEXT_MASK: self.inputs[SECOND_MASK if start else FIRST_MASK]}
            if features is not None:
                read[names.TEXT_FEATURES] = self.inputs[features]
            return ConditionLaunch(graph=graph, inputs=read, outputs=half)

        launches = {names.CONDITION: rows(names.CONDITION, 0, names.TEXT_FEATURES)}
        if mask.shape[0] > batch:
            launches[names.UNCONDITIONAL] = rows(names.UNCONDITIONAL, batch, None)
            launches[NEGATIVE] = rows(names.CONDITION, batch, NEGATIVE)
        return launches

    def scale_inputs(self, scale: int) -> dict[str, Array]:
        """All tensors that the static graph of a scale, or `step`, may declare as inputs."""
        per_scale = [*_settings(self._text), names.UNIFORMS, names.KEEP_MASK, names.KEEP_TOKENS]
        if self._more_smooth:
            per_scale.append(names.NOISE)
        masks = {names.TEXT_MASK: self.inputs[names.TEXT_MASK]} if self._text else {}
        return {
            **masks,
            **self.condition_outputs(),
            **{n: self.inputs[_at(n, scale)] for n in per_scale},
            **{n: self._fixed[_at(n, scale)] for n in self._geometry},
            **self.arena.past(scale),
            names.INPUT: self._intermediates[_at(names.INPUT, scale)],
            names.F_HAT: self._f_hat(FHatPlace.after(scale)),
        }

    def scale_outputs(self, scale: int) -> dict[str, Array]:
        """The output buffers of a scale; the last scale has no `next_input`."""
        outputs = {
            names.TOKENS: self.outputs[_at(names.TOKENS, scale)],
            names.NEW_F_HAT: self._f_hat(FHatPlace.after(scale + 1)),
            **self.arena.new(scale),
        }
        if scale + 1 < self._spec.scales:
            outputs[names.NEXT_INPUT] = self._intermediates[_at(names.INPUT, scale + 1)]
        return outputs

    def fill_f_hat(self, f_hat: NDArray[np.float32]) -> None:
        """Copy an f_hat [B, Cv, p_K, p_K] into the buffer that the last scale writes to."""
        self.latent.host[FHatPlace.after(self._spec.scales).value][...] = f_hat
        self.latent.upload()

    def decoder_inputs(self, place: FHatPlace) -> dict[str, Array]:
        """The input buffers of the decoder, with f_hat from `place`."""
        return {names.F_HAT: self._f_hat(place)}

    def decoder_outputs(self) -> dict[str, Array]:
        """The output buffers of the decoder."""
        return {names.IMAGE: self.outputs[names.IMAGE]}

    def _f_hat(self, place: FHatPlace) -> Array:
        return self.latent[place.value]


def step_geometry(spec: NextScaleSpec, scale: int) -> dict[str, NDArray[Any]]:
    """The scale number, resizing matrices and rotations: inputs of `step`, constants of a static
    graph.

    The last scale has no next scale: its matrices to the next one have one row (one token), whose
    result is not read.
    """
    if isinstance(spec, TextModelSpec):
        return _text_geometry(spec, scale)
    assert isinstance(spec, ModelSpec)
    side, patch = spec.tokenizer.latent_side, spec.patch_nums[scale]
    following = spec.patch_nums[scale + 1] if scale + 1 < spec.scales else 1
    return {
        names.SCALE: np.array(scale, np.int64),
        names.UP_MATRIX: bicubic_matrix(patch, side),
        names.NEXT_MATRIX: family_of(spec.transformer).next_matrix(spec, scale, following),
    }


def _text_geometry(spec: TextModelSpec, scale: int) -> dict[str, NDArray[Any]]:
    tokenizer, t = spec.tokenizer, spec.transformer
    whole, grid = tokenizer.latent_grid, tokenizer.latent_grids[scale]
    last = scale + 1 == spec.scales
    following = (tokenizer.patch,) * 2 if last else tokenizer.latent_grids[scale + 1]
    cos, sin = rope_tables(spec.grids[scale], t.rope_grid, t.head_width)
    return {
        names.SCALE: np.array(scale, np.int64),
        names.UP_ROWS: linear_matrix(grid[0], whole[0]),
        names.UP_COLUMNS: linear_matrix(grid[1], whole[1]),
        names.NEXT_ROWS: linear_matrix(whole[0], following[0]),
        names.NEXT_COLUMNS: linear_matrix(whole[1], following[1]),
        names.ROPE_COS: cos,
        names.ROPE_SIN: sin,
    }


def step_shapes(manifest: Manifest, precision: str, scale: int) -> dict[str, tuple[int, ...]]:
    """Shape of every input of `step` at a scale: one optimisation profile of a TensorRT engine.

    Raises BundleError where the bundle has no graph `step` in this precision.
    """
    spec = manifest.model
    last = scale + 1 == spec.scales
    sizes = {
        names.LENGTH: spec.scale_lengths[scale],
        names.PAST: max(spec.prefix_lengths[scale], 1),  # a placeholder at scale 0
    }
    if isinstance(spec, TextModelSpec):
        grids, patch = spec.tokenizer.latent_grids, spec.tokenizer.patch
        following = (patch, patch) if last else grids[scale + 1]
        sizes |= zip((names.ROWS, names.COLUMNS), grids[scale], strict=True)
        sizes |= zip((names.NEXT_ROW_COUNT, names.NEXT_COLUMN_COUNT), following, strict=True)
    else:
        sizes[names.SIDE] = spec.patch_nums[scale]
        sizes[names.NEXT_SIDE] = 1 if last else spec.patch_nums[scale + 1]
    return {
        tensor.name: tuple(sizes[n] if isinstance(n, str) else n for n in tensor.shape)
        for tensor in manifest.graph(precision, names.STEP).inputs
    }


def _at(name: str, scale: int) -> str:
    """Key of a buffer that exists once per scale."""
    return f"{name}@{scale}"


def _input_fields(manifest: Manifest) -> Fields:
    """Inputs of all scales. Sampling settings have one buffer per scale, so that the host need not
    write anything between the launches of a generation."""
    model = manifest.model
    fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {}
    if isinstance(model, TextModelSpec):
        text = (model.transformer.text_length, model.transformer.text_width)
        fields[names.TEXT_FEATURES] = ((manifest.batch, *text), np.float32)
        fields[names.TEXT_MASK] = ((manifest.rows, text[0]), np.bool_)
        fields[FIRST_MASK] = ((manifest.batch, text[0]), np.bool_)
        if manifest.guidance:
            fields[NEGATIVE] = ((manifest.batch, *text), np.float32)
            fields[SECOND_MASK] = ((manifest.batch, text[0]), np.bool_)
    else:
        fields[names.LABELS] = ((manifest.rows,), np.int64)
    for k, length in enumerate(model.scale_lengths):
        row = (manifest.batch, length)
        token = (*row, *model.token_shape)
        for name, dtype in _settings(manifest.takes_text).items():
            fields[_at(name, k)] = ((), dtype)
        fields[_at(names.UNIFORMS, k)] = (token, np.float32)
        fields[_at(names.KEEP_MASK, k)] = (row, np.bool_)
        fields[_at(names.KEEP_TOKENS, k)] = (token, np.int64)
        if manifest.more_smooth:
            codes = manifest.model.tokenizer.token_values
            fields[_at(names.NOISE, k)] = ((*row, codes), np.float32)
    return fields


def _output_fields(manifest: Manifest) -> Fields:
    t = manifest.model.tokenizer
    image = (manifest.batch, *t.image_size, t.image_channels)
    fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {names.IMAGE: (image, np.float32)}
    for k, length in enumerate(manifest.model.scale_lengths):
        shape = (manifest.batch, length, *manifest.model.token_shape)
        fields[_at(names.TOKENS, k)] = (shape, np.int64)
    return fields


def _latent_fields(manifest: Manifest) -> Fields:
    t = manifest.model.tokenizer
    shape = (manifest.batch, t.code_width, *t.latent_grid)
    return {place.value: (shape, np.float32) for place in FHatPlace}


def _settings(text: bool) -> dict[str, DTypeLike]:
    """The scalar inputs of a scale: its sampling settings. Bits have no top-k."""
    return {name: kind for name, kind in _SETTINGS.items() if not text or name != names.TOP_K}


def _text_rows(spec: NextScaleSpec) -> list[str]:
    """Return the names of the tensors that the condition graphs of a text-to-image model write."""
    depth = range(spec.transformer.depth)
    texts = [name(layer) for layer in depth for name in (names.text_key, names.text_value)]
    return [names.FIRST_INPUT, names.MODULATION, *texts]


def _intermediate_fields(manifest: Manifest, cache_dtype: DTypeLike) -> Fields:
    spec, batch, rows = manifest.model, manifest.batch, manifest.rows
    t = spec.transformer
    table = 6 * t.depth + 2
    fields: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
        names.FIRST_INPUT: ((rows, 1, t.width), np.float32),
        names.MODULATION: ((table, rows, t.width), np.float32),
    }
    if isinstance(spec, TextModelSpec):
        # rows first, so that a launch can write one half of them
        fields[names.MODULATION] = ((rows, table, t.width), np.float32)
        text = spec.transformer.text_length
        for layer in range(t.depth):
            key, value = (t.heads, t.head_width, text), (t.heads, text, t.head_width)
            fields[names.text_key(layer)] = ((rows, *key), cache_dtype)
            fields[names.text_value(layer)] = ((rows, *value), cache_dtype)
    for k, length in enumerate(spec.scale_lengths):
        fields[_at(names.INPUT, k)] = ((batch, length, spec.input_width), np.float32)
    return fields

"""Every buffer of a generation, allocated once at a known size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from var_deploy import names
from var_deploy.manifest import Manifest
from var_deploy.resize import area_matrix, bicubic_matrix
from var_deploy.spec import ModelSpec

ALIGNMENT = 256  # what TensorRT asks of an address, and no less than any vector unit wants


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros whose first byte lies on a multiple of 256."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    block = np.zeros(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size].view(kind).reshape(shape)


class CacheArena:
    """Keys and values of all scales but the last, sequence-major, one buffer a layer and kind.

    Scale k reads rows [0, P_k) and writes rows [P_k, P_k + L_k): views of the same memory, so
    nothing is ever copied or concatenated outside a graph. The last scale's rows are read by
    nobody and have no place here.
    """

    def __init__(self, manifest: Manifest, dtype: DTypeLike) -> None:
        spec, t = manifest.model, manifest.model.transformer
        self._prefix = spec.prefix_lengths
        self._scales = spec.scales
        shape = (self._prefix[-2], manifest.rows, t.heads, t.head_width)
        self._keys = [aligned(shape, dtype) for _ in range(t.depth)]
        self._values = [aligned(shape, dtype) for _ in range(t.depth)]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self._keys, *self._values))

    def past(self, scale: int) -> dict[str, NDArray[Any]]:
        """What scale k attends to besides itself, [P_k, G, H, D] each."""
        return self._rows(slice(0, self._prefix[scale]), names.past_key, names.past_value)

    def new(self, scale: int) -> dict[str, NDArray[Any]]:
        """Where scale k leaves its own rows, [L_k, G, H, D] each; nowhere at the last scale."""
        if scale == self._scales - 1:
            return {}
        rows = slice(self._prefix[scale], self._prefix[scale + 1])
        return self._rows(rows, names.new_key, names.new_value)

    def _rows(self, rows: slice, key: Any, value: Any) -> dict[str, NDArray[Any]]:
        views: dict[str, NDArray[Any]] = {}
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            views[key(layer)], views[value(layer)] = keys[rows], values[rows]
        return views


class LoopBuffers:
    """Inputs and outputs of every launch, by tensor name."""

    def __init__(self, manifest: Manifest, cache_dtype: DTypeLike) -> None:
        spec, batch, rows = manifest.model, manifest.batch, manifest.rows
        t = spec.transformer
        side, width = spec.tokenizer.latent_side, spec.tokenizer.code_width
        self._spec = spec
        self.arena = CacheArena(manifest, cache_dtype)
        self.condition_out = {
            names.FIRST_INPUT: aligned((rows, 1, t.width), np.float32),
            names.MODULATION: aligned((6 * t.depth + 2, rows, t.width), np.float32),
        }
        self.labels = aligned((rows,), np.int64)
        # f_hat goes back and forth between two buffers: a graph never writes what it reads
        self.f_hats = [aligned((batch, width, side, side), np.float32) for _ in range(2)]
        self.scalars = {
            names.CFG: aligned((), np.float32),
            names.TEMPERATURE: aligned((), np.float32),
            names.TOP_K: aligned((), np.int64),
            names.TOP_P: aligned((), np.float32),
        }
        lengths = spec.scale_lengths
        self.uniforms = [aligned((batch, n), np.float32) for n in lengths]
        self.keep_mask = [aligned((batch, n), np.bool_) for n in lengths]
        self.keep_tokens = [aligned((batch, n), np.int64) for n in lengths]
        self.tokens = [aligned((batch, n), np.int64) for n in lengths]
        self.inputs = [aligned((batch, n, spec.input_width), np.float32) for n in lengths]
        image = (batch, *[spec.tokenizer.image_side] * 2, spec.tokenizer.image_channels)
        self.image = aligned(image, np.float32)

    def scale_inputs(self, scale: int) -> dict[str, NDArray[Any]]:
        """Everything that the static graph of a scale, or `step`, may ask for."""
        return {
            **self.condition_out,
            **self.scalars,
            **self.arena.past(scale),
            **step_geometry(self._spec, scale),
            names.INPUT: self.inputs[scale],
            names.F_HAT: self.f_hats[scale % 2],
            names.UNIFORMS: self.uniforms[scale],
            names.KEEP_MASK: self.keep_mask[scale],
            names.KEEP_TOKENS: self.keep_tokens[scale],
        }

    def scale_outputs(self, scale: int) -> dict[str, NDArray[Any]]:
        """Where a scale leaves its results; at the last scale nothing for a next one."""
        outputs = {
            names.TOKENS: self.tokens[scale],
            names.NEW_F_HAT: self.f_hats[(scale + 1) % 2],
            **self.arena.new(scale),
        }
        if scale + 1 < self._spec.scales:
            outputs[names.NEXT_INPUT] = self.inputs[scale + 1]
        return outputs

    @property
    def final_f_hat(self) -> NDArray[Any]:
        return self.f_hats[self._spec.scales % 2]


def step_geometry(spec: ModelSpec, scale: int) -> dict[str, NDArray[Any]]:
    """What `step` is told and a static graph knows: the scale and its resizing matrices.

    The last scale feeds no next one; its `next_matrix` has a single row, whose result is unread.
    """
    side, patch = spec.tokenizer.latent_side, spec.patch_nums[scale]
    following = spec.patch_nums[scale + 1] if scale + 1 < spec.scales else 1
    if spec.transformer.family == "gpt2":
        next_matrix = bicubic_matrix(patch, following)
    else:
        next_matrix = area_matrix(side, following)
    return {
        names.SCALE: np.array(scale, np.int64),
        names.UP_MATRIX: bicubic_matrix(patch, side),
        names.NEXT_MATRIX: next_matrix,
    }

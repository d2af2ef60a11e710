"""Counts weights and operations of the autoencoder's layers, for both kinds of tokenizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from var_deploy import names
from var_deploy.config import Precision
from var_deploy.planning.workload import FULL, Weights, Work, Workload
from var_deploy.spec import BitTokenizerSpec, Grid, TokenizerSpec


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the autoencoder.

    Attributes:
        grid: rows and columns of its output.
        kernel: side of the convolution's kernel; 0 for other layers.
        doubled: the convolution follows nearest up-sampling. In fp32 and int8 it runs before it, as
            a 2×2 convolution for each of the four phases.
        rounded: it is int8 in an int8 graph, not fp32. Calibration may leave up-samplings, and some
            convolutions of a bitwise tokenizer, in fp32; they count as int8.
    """

    kind: Literal["conv", "norm", "mix"]
    before: int
    after: int
    grid: Grid
    kernel: int = 0
    doubled: bool = False
    rounded: bool = False

    def weights(self, precision: Precision) -> Weights:
        if self.kind != "conv":
            return Weights(full=2 * self.after if self.kind == "norm" else 0)
        phases = 4 if self.doubled and precision != "fp16" else 1
        kernels = phases * self._taps(precision) * self.before * self.after
        if precision != "int8":
            return Weights(compute=kernels + self.after)
        if self.rounded:  # with a scale and a bias for each kernel of each phase
            return Weights(compute=kernels, full=2 * phases * self.after)
        return Weights(full=kernels + self.after)

    def operations(self, precision: Precision) -> int:
        """Operations per image; only products count."""
        positions = math.prod(self.grid)
        if self.kind == "conv":
            return 2 * self._taps(precision) * self.before * self.after * positions
        return 4 * self.after * positions**2 if self.kind == "mix" else 0

    def _taps(self, precision: Precision) -> int:
        return 4 if self.doubled and precision != "fp16" else self.kernel**2


def _conv(before: int, after: int, grid: Grid, kernel: int = 3) -> Layer:
    return Layer(kind="conv", before=before, after=after, grid=grid, kernel=kernel)


def _norm(channels: int, grid: Grid) -> Layer:
    return Layer(kind="norm", before=channels, after=channels, grid=grid)


def _residual(before: int, after: int, grid: Grid) -> Iterator[Layer]:
    yield from (_norm(before, grid), _conv(before, after, grid))
    yield from (_norm(after, grid), _conv(after, after, grid))
    if before != after:
        yield _conv(before, after, grid, 1)


def _attention(channels: int, grid: Grid) -> Iterator[Layer]:
    yield from (_norm(channels, grid), _conv(channels, 3 * channels, grid, 1))
    yield Layer(kind="mix", before=channels, after=channels, grid=grid)
    yield _conv(channels, channels, grid, 1)


def _middle(channels: int, grid: Grid, attends: bool) -> Iterator[Layer]:
    yield from _residual(channels, channels, grid)
    if attends:
        yield from _attention(channels, grid)
    yield from _residual(channels, channels, grid)


def _level(before: int, after: int, blocks: int, grid: Grid, attends: bool) -> Iterator[Layer]:
    for number in range(blocks):
        yield from _residual(after if number else before, after, grid)
        if attends:
            yield from _attention(after, grid)


def decoder_layers(spec: TokenizerSpec | BitTokenizerSpec) -> list[Layer]:
    """Layers of the decoder (f_hat → image), as in docs/DESIGN.md.

    A bitwise tokenizer has no attention, and no convolution around f_hat besides.
    """
    codes = isinstance(spec, TokenizerSpec)
    widths = [spec.base_width * m for m in spec.width_multipliers]
    grid, top = spec.latent_grid, len(widths) - 1
    first = [_conv(spec.code_width, spec.code_width, grid)] if codes else []
    first.append(_conv(spec.code_width, widths[-1], grid))
    layers = list(_middle(widths[-1], grid, codes))
    for i in range(top, -1, -1):
        coming, attends = widths[min(i + 1, top)], codes and grid == spec.latent_grid
        layers += _level(coming, widths[i], spec.res_blocks + 1, grid, attends)
        if i:
            grid = (2 * grid[0], 2 * grid[1])
            after = _conv(widths[i], widths[i], grid)
            layers.append(dataclasses.replace(after, doubled=True))
    layers = [dataclasses.replace(layer, rounded=layer.kernel == 3) for layer in layers]
    last = [_norm(widths[0], grid), _conv(widths[0], spec.image_channels, grid)]
    return [*first, *layers, *last]


def encoder_layers(spec: TokenizerSpec | BitTokenizerSpec) -> list[Layer]:
    """Layers of the encoder (image → latent)."""
    codes = isinstance(spec, TokenizerSpec)
    widths = [spec.base_width * m for m in spec.width_multipliers]
    grid, coming = spec.image_size, spec.base_width
    layers = [_conv(spec.image_channels, spec.base_width, grid)]
    for i, width in enumerate(widths):
        attends = codes and grid == spec.latent_grid
        layers += _level(coming, width, spec.res_blocks, grid, attends)
        if i + 1 < len(widths):
            grid = (grid[0] // 2, grid[1] // 2)
            layers.append(_conv(width, width, grid))
        coming = width
    layers += _middle(coming, grid, codes)
    layers += [_norm(coming, grid), _conv(coming, spec.code_width, grid)]
    return [*layers, *([_conv(spec.code_width, spec.code_width, grid)] if codes else [])]


def autoencoder_weights(layers: list[Layer], precision: Precision) -> Weights:
    """Weights of layers, as the graphs of a precision hold them."""
    return sum((layer.weights(precision) for layer in layers), Weights())


def decoder_work(w: Workload, itemsize: int) -> Work:
    """Work of the decoder; `itemsize` as in `costs.launches`."""
    tok = w.model.tokenizer
    layers = decoder_layers(tok)
    image = math.prod(tok.image_size) * tok.image_channels
    image += tok.code_width * math.prod(tok.latent_grid)
    compute = full = 0
    for layer in layers:
        operations = w.batch * layer.operations(w.precision)
        if w.precision == "int8" and not layer.rounded:
            full += operations
        else:
            compute += operations
    return Work(
        name=names.DECODER,
        compute_operations=compute,
        full_operations=full,
        traffic=autoencoder_weights(layers, w.precision).nbytes(itemsize)
        + w.batch * image * FULL,
    )

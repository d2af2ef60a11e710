"""The `decoder` and `encoder` graphs: the tokenizer's autoencoder as operators.

Convolutions run in the graph's precision; GroupNorm, attention weights and everything around the
codebook in fp32. In an int8 decoder the convolutions that have a `Range` are int8, all others fp32;
an encoder is fp32 there, because its tokens are the nearest codes, and nearness wants precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.graphs.quantizer import codebook, phi, resize, to_maps
from var_deploy.export.int8.operators import Kernel, Ranges, dequantize, quantize, static_conv
from var_deploy.image.resize import area_matrix, bicubic_matrix
from var_deploy.spec import BitTokenizerSpec, Grid, TokenizerSpec, norm_groups

NORM_EPS = 1e-6


class Autoencoder:
    """Layers on maps [B, c, h, w]; fp32 between layers, so that residual sums are not rounded.

    Args:
        attention: whether there is attention at the lowest resolution; a bitwise tokenizer has
            none.
        ranges: value ranges of the convolutions that run in int8.
    """

    def __init__(
        self,
        b: GraphBuilder,
        spec: TokenizerSpec | BitTokenizerSpec,
        *,
        attention: bool,
        ranges: Ranges | None = None,
    ) -> None:
        self.b, self.spec, self.batch, self.ranges = b, spec, b.form.batch, ranges or {}
        self._attends = attention
        self.widths = [spec.base_width * m for m in spec.width_multipliers]

    def conv(
        self, key: str, x: str, channels: tuple[int, int], kernel: int = 3, far_side: bool = False
    ) -> str:
        """Add a convolution: stride 1 with the same size, or (`far_side`) stride 2 with zeros on
        the far side only."""
        b = self.b
        shape = (channels[1], channels[0], kernel, kernel)
        with b.scope(key):
            if key in self.ranges:
                ranges, name = self.ranges[key], f"{key}.weight"
                weights = Kernel(name=name, shape=shape, make=lambda read: read(name))
                rounded = quantize(b, x, ranges.input)
                y = static_conv(b, rounded, key, weights, ranges, [kernel // 2] * 4)
                return dequantize(b, y, ranges.output)
            weight = b.weight(f"{key}.weight", shape, dtype=b.compute)
            bias = b.weight(f"{key}.bias", (channels[1],), dtype=b.compute)
            near = 0 if far_side else kernel // 2
            y = b.op(
                "Conv",
                b.to_compute(x),
                weight,
                bias,
                kernel_shape=[kernel, kernel],
                pads=[near, near, kernel // 2, kernel // 2],
                strides=[2, 2] if far_side else [1, 1],
            )
            return b.to_float(y)

    def norm(self, key: str, x: str, channels: int, grid: Grid) -> str:
        """Add GroupNorm as InstanceNormalization over the groups, because the operator
        GroupNormalization changed its meaning between opsets."""
        b, groups = self.b, norm_groups(channels)
        with b.scope(key):
            ones, zeros = (b.constant(np.full(groups, v, np.float32)) for v in (1.0, 0.0))
            h = b.reshape(x, self.batch, groups, -1)
            h = b.op("InstanceNormalization", h, ones, zeros, epsilon=NORM_EPS)
            h = b.reshape(h, self.batch, channels, *grid)
            h = b.op("Mul", h, b.weight(f"{key}.weight", (channels, 1, 1)))
            return b.op("Add", h, b.weight(f"{key}.bias", (channels, 1, 1)))

    def residual(self, key: str, x: str, channels: tuple[int, int], grid: Grid) -> str:
        before, after = channels
        h = self.b.silu(self.norm(f"{key}.norm1", x, before, grid))
        h = self.conv(f"{key}.conv1", h, channels)
        h = self.b.silu(self.norm(f"{key}.norm2", h, after, grid))
        h = self.conv(f"{key}.conv2", h, (after, after))
        if before != after:
            x = self.conv(f"{key}.nin_shortcut", x, channels, kernel=1)
        return self.b.op("Add", x, h)

    def attention(self, key: str, x: str, channels: int, grid: Grid) -> str:
        b, positions = self.b, grid[0] * grid[1]
        h = self.norm(f"{key}.norm", x, channels, grid)
        h = self.conv(f"{key}.qkv", h, (channels, 3 * channels), kernel=1)
        with b.scope(key):
            q, k, v = (
                b.to_compute(b.reshape(part, self.batch, channels, positions))
                for part in b.split(h, 1, [channels] * 3)
            )
            q = b.op("Mul", b.transpose(q, 0, 2, 1), b.constant(channels**-0.5, b.compute))
            weights = b.op("Softmax", b.to_float(b.op("MatMul", q, k)), axis=-1)
            mixed = b.op("MatMul", v, b.transpose(b.to_compute(weights), 0, 2, 1))
            mixed = b.reshape(b.to_float(mixed), self.batch, channels, *grid)
        return b.op("Add", x, self.conv(f"{key}.proj_out", mixed, (channels, channels), kernel=1))

    def middle(self, key: str, x: str, grid: Grid) -> str:
        width = self.widths[-1]
        x = self.residual(f"{key}.block_1", x, (width, width), grid)
        if self._attends:
            x = self.attention(f"{key}.attn_1", x, width, grid)
        return self.residual(f"{key}.block_2", x, (width, width), grid)

    def level(self, key: str, x: str, channels: tuple[int, int], blocks: int, grid: Grid) -> str:
        """Add the residual blocks of a level; attention follows each at the lowest resolution."""
        before, after = channels
        for i in range(blocks):
            x = self.residual(f"{key}.block.{i}", x, (before if i == 0 else after, after), grid)
            if self._attends and grid == self.spec.latent_grid:
                x = self.attention(f"{key}.attn.{i}", x, after, grid)
        return x

    def upsample(self, key: str, x: str, channels: int, grid: Grid) -> str:
        """Add nearest 2× up-sampling and a 3×3 convolution: [B, c, h, w] → [B, c, 2h, 2w]."""
        b = self.b
        if not b.half:
            return self.phases(f"{key}.conv", x, channels, grid)
        scales = b.constant([1, 1, 2, 2], np.float32)
        x = b.op(
            "Resize",
            x,
            "",
            scales,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        return self.conv(f"{key}.conv", x, (channels, channels))

    def phases(self, key: str, x: str, channels: int, grid: Grid) -> str:
        """Compute up-sampling and convolution on the small map, with 4/9 of the operations.

        After nearest up-sampling, two of the three rows under the kernel are copies of one row of
        x. So each row of the result, even or odd, is a sum over two rows of x, and each column
        likewise: a 2×2 convolution for each of the four parities, with the weights of equal rows
        added up.
        """
        b, ranges, (height, width) = self.b, self.ranges.get(key), grid
        with b.scope(key):
            x = quantize(b, x, ranges.input) if ranges else x
            rows = []
            for down in (0, 1):
                phases = [self._phase(key, x, channels, down, right) for right in (0, 1)]
                row = b.op("Concat", *(b.op("Unsqueeze", y, b.ints(-1)) for y in phases), axis=-1)
                rows.append(b.reshape(row, self.batch, channels, height, 1, 2 * width))
            y = b.op("Concat", *rows, axis=3)  # [B, c, h, 2, 2w]
            y = dequantize(b, y, ranges.output) if ranges else y
            return b.reshape(y, self.batch, channels, 2 * height, 2 * width)

    def _phase(self, key: str, x: str, channels: int, down: int, right: int) -> str:
        """Compute the rows and columns of one parity, [B, c, h, w]."""
        b = self.b
        weights = Kernel(
            name=f"{key}.weight.phase_{down}{right}",
            shape=(channels, channels, 2, 2),
            make=phase_weight(f"{key}.weight", down, right),
        )
        pads = [1 - down, 1 - right, down, right]
        if key in self.ranges:
            return static_conv(b, x, key, weights, self.ranges[key], pads)
        weight = b.weight(weights.name, weights.shape, weights.make)
        bias = b.weight(f"{key}.bias", (channels,))
        return b.op("Conv", x, weight, bias, kernel_shape=[2, 2], pads=pads)

    def decode(self, f_hat: str) -> str:
        """Add the decoder: f_hat [B, Cv, h_K, w_K] → image [B, channels, height, width] in [0, 1],
        as the graph's output IMAGE [B, height, width, channels]."""
        spec, widths, b = self.spec, self.widths, self.b
        grid, top = spec.latent_grid, len(widths) - 1
        x = self.conv("decoder.conv_in", f_hat, (spec.code_width, widths[-1]))
        x = self.middle("decoder.mid", x, grid)
        for i in range(top, -1, -1):
            coming = widths[min(i + 1, top)]
            x = self.level(f"decoder.up.{i}", x, (coming, widths[i]), spec.res_blocks + 1, grid)
            if i > 0:
                x = self.upsample(f"decoder.up.{i}.upsample", x, widths[i], grid)
                grid = (2 * grid[0], 2 * grid[1])
        x = b.silu(self.norm("decoder.norm_out", x, widths[0], grid))
        x = self.conv("decoder.conv_out", x, (widths[0], spec.image_channels))
        x = b.op("Clip", x, b.constant(-1.0, np.float32), b.constant(1.0, np.float32))
        half = b.constant(0.5, np.float32)
        x = b.op("Add", b.op("Mul", x, half), half)
        b.output(names.IMAGE, np.float32, image_shape(spec, self.batch))
        return b.op("Transpose", x, perm=[0, 2, 3, 1], out=names.IMAGE)

    def encode(self) -> str:
        """Declare the input IMAGE [B, height, width, channels] in [0, 1] and add the encoder:
        latent [B, Cv, h_K, w_K]."""
        spec, widths, b = self.spec, self.widths, self.b
        grid = spec.image_size
        image = b.input(names.IMAGE, np.float32, image_shape(spec, self.batch))
        x = b.op("Mul", b.transpose(image, 0, 3, 1, 2), b.constant(2.0, np.float32))
        x = b.op("Sub", x, b.constant(1.0, np.float32))
        x = self.conv("encoder.conv_in", x, (spec.image_channels, spec.base_width))
        for i, width in enumerate(widths):
            coming = widths[i - 1] if i else spec.base_width
            x = self.level(f"encoder.down.{i}", x, (coming, width), spec.res_blocks, grid)
            if i < len(widths) - 1:
                key = f"encoder.down.{i}.downsample.conv"
                x = self.conv(key, x, (width, width), far_side=True)
                grid = (grid[0] // 2, grid[1] // 2)
        x = self.middle("encoder.mid", x, grid)
        x = b.silu(self.norm("encoder.norm_out", x, widths[-1], grid))
        return self.conv("encoder.conv_out", x, (widths[-1], spec.code_width))


def phase_weight(key: str, down: int, right: int) -> Callable[[ReadKey], NDArray[Any]]:
    """Return the 2×2 kernel [out, in, 2, 2] of one parity, from the 3×3 kernel after
    up-sampling."""
    # which of the three taps fall on each of the two rows, for even and for odd rows
    taps = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float64)

    def make(read: ReadKey) -> NDArray[Any]:
        added = np.einsum("ui,vj,ncij->ncuv", taps[down], taps[right], read(key))
        weight: NDArray[Any] = added.astype(np.float32)
        return weight

    return make


def image_shape(
    spec: TokenizerSpec | BitTokenizerSpec, batch: int
) -> tuple[int, int, int, int]:
    """Return the shape of an image tensor, [B, height, width, channels]."""
    return (batch, *spec.image_size, spec.image_channels)


def build_decoder(
    spec: TokenizerSpec, form: GraphForm, ranges: Ranges | None = None
) -> GraphBuilder:
    """Build the decoder: f_hat [B, Cv, p_K, p_K] → image [B, side, side, channels] in [0, 1].

    `ranges` names the convolutions that run in int8.
    """
    b, width = GraphBuilder(names.DECODER, form), spec.code_width
    f_hat = b.input(names.F_HAT, np.float32, (form.batch, width, *spec.latent_grid))
    layers = Autoencoder(b, spec, attention=True, ranges=ranges)
    layers.decode(layers.conv("post_quant_conv", f_hat, (width, width)))
    return b


def build_encoder(spec: TokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Build the encoder: image [B, side, side, channels] in [0, 1] → tokens of every scale
    [B, L_k]."""
    b, batch = GraphBuilder(names.ENCODER, form), form.batch
    layers = Autoencoder(b, spec, attention=True)
    latent = layers.conv("quant_conv", layers.encode(), (spec.code_width, spec.code_width))
    residual = b.op("Identity", latent, out=names.LATENT)
    width, side = spec.code_width, spec.latent_side
    for scale, patch in enumerate(spec.patch_nums):
        with b.scope(f"quantize.scale_{scale:02d}"):
            last = patch == side
            pooled = residual if last else resize(b, b.constant(area_matrix(side, patch)), residual)
            z = b.transpose(b.reshape(pooled, batch, width, patch * patch), 0, 2, 1)  # [B, L, Cv]
            table = codebook(b, spec, scale)
            distance = _distance(b, z, table)
            tokens = b.op("ArgMin", distance, axis=-1, keepdims=0, out=names.encoder_tokens(scale))
            b.output(tokens, np.int64, (batch, patch * patch))
            if last:
                break
            h = to_maps(b, b.op("Gather", table, tokens, axis=0), batch, width, patch)
            h = resize(b, b.constant(bicubic_matrix(patch, side)), h)
            if spec.phi_count:
                h = phi(b, spec, spec.phi_index(scale), h)
            residual = b.op("Sub", residual, h)
    return b


def _distance(b: GraphBuilder, z: str, table: str) -> str:
    """Compute |z|² + |e|² - 2 z·e, [B, L, V]."""
    zz = b.op("ReduceSumSquare", z, b.ints(-1), keepdims=1)
    ee = b.op("ReduceSumSquare", table, b.ints(-1), keepdims=0)
    ze = b.op("MatMul", z, b.transpose(table, 1, 0))
    twice = b.op("Mul", ze, b.constant(2.0, np.float32))
    return b.op("Sub", b.op("Add", zz, ee), twice)

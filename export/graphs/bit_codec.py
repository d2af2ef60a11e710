"""The graphs `decoder`, `encoder` and `accumulate` of a bitwise tokenizer (Infinity, arXiv
2412.04431): an autoencoder of convolutions alone, on maps that need not be square."""

from __future__ import annotations

import numpy as np

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.export.graphs.bits import codes, matrices, resize, to_maps, to_rows
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.codec import NORM_EPS, phase_weight
from var_deploy.image.resize import area_matrix
from var_deploy.spec import BitTokenizerSpec, Grid, norm_groups


class BitAutoencoder:
    """Layers on maps [B, c, h, w]; fp32 between layers, so that residual sums are not rounded."""

    def __init__(self, b: GraphBuilder, spec: BitTokenizerSpec) -> None:
        self.b, self.spec, self.batch = b, spec, b.form.batch
        self.widths = [spec.base_width * m for m in spec.width_multipliers]

    def conv(
        self, key: str, x: str, channels: tuple[int, int], kernel: int = 3, halve: bool = False
    ) -> str:
        """Add a convolution: stride 1 with the same size, or (`halve`) stride 2 with zeros right
        and below only."""
        b, near = self.b, 0 if halve else kernel // 2
        with b.scope(key):
            weight = b.weight(
                f"{key}.weight", (channels[1], channels[0], kernel, kernel), dtype=b.compute
            )
            bias = b.weight(f"{key}.bias", (channels[1],), dtype=b.compute)
            y = b.op(
                "Conv",
                b.to_compute(x),
                weight,
                bias,
                kernel_shape=[kernel, kernel],
                pads=[near, near, kernel // 2, kernel // 2],
                strides=[2, 2] if halve else [1, 1],
            )
            return b.to_float(y)

    def norm(self, key: str, x: str, channels: int, grid: Grid) -> str:
        """Add GroupNorm as InstanceNormalization over the groups, see `graphs/codec.py`."""
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

    def level(self, key: str, x: str, channels: tuple[int, int], blocks: int, grid: Grid) -> str:
        """Add the residual blocks of a level, the first of which changes the width."""
        before, after = channels
        for i in range(blocks):
            x = self.residual(f"{key}.block.{i}", x, (before if i == 0 else after, after), grid)
        return x

    def middle(self, key: str, x: str, grid: Grid) -> str:
        width = self.widths[-1]
        x = self.residual(f"{key}.block_1", x, (width, width), grid)
        return self.residual(f"{key}.block_2", x, (width, width), grid)

    def upsample(self, key: str, x: str, channels: int, grid: Grid) -> str:
        """Add nearest 2× up-sampling and a 3×3 convolution, on the small map where that is
        cheaper, see `graphs/codec.py`: [B, c, h, w] → [B, c, 2h, 2w]."""
        b = self.b
        if b.half:
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
        height, width = grid
        with b.scope(f"{key}.conv"):
            rows = []
            for down in range(2):
                columns = [
                    b.op(
                        "Unsqueeze", self._phase(f"{key}.conv", x, channels, down, right), b.ints(4)
                    )
                    for right in range(2)
                ]
                row = b.op("Concat", *columns, axis=4)  # [B, c, h, w, 2]
                rows.append(b.reshape(row, self.batch, channels, height, 1, 2 * width))
            y = b.op("Concat", *rows, axis=3)  # [B, c, h, 2, 2w]
            return b.reshape(y, self.batch, channels, 2 * height, 2 * width)

    def _phase(self, key: str, x: str, channels: int, down: int, right: int) -> str:
        """Compute the rows and columns of one parity, [B, c, h, w]."""
        b, name = self.b, f"{key}.weight"
        weight = b.weight(
            f"{name}.phase_{down}{right}",
            (channels, channels, 2, 2),
            phase_weight(name, down, right),
        )
        bias = b.weight(f"{key}.bias", (channels,))
        pads = [1 - down, 1 - right, down, right]
        return b.op("Conv", x, weight, bias, kernel_shape=[2, 2], pads=pads)

    def decode(self, f_hat: str) -> str:
        spec, widths, top = self.spec, self.widths, len(self.widths) - 1
        grid = spec.latent_grid
        x = self.conv("decoder.conv_in", f_hat, (spec.bits, widths[-1]))
        x = self.middle("decoder.mid", x, grid)
        for i in range(top, -1, -1):
            coming = widths[min(i + 1, top)]
            x = self.level(f"decoder.up.{i}", x, (coming, widths[i]), spec.res_blocks + 1, grid)
            if i > 0:
                x = self.upsample(f"decoder.up.{i}.upsample", x, widths[i], grid)
                grid = (2 * grid[0], 2 * grid[1])
        x = self.b.silu(self.norm("decoder.norm_out", x, widths[0], grid))
        return self.conv("decoder.conv_out", x, (widths[0], spec.image_channels))

    def encode(self, image: str) -> str:
        spec, widths = self.spec, self.widths
        grid = spec.image_size
        x = self.conv("encoder.conv_in", image, (spec.image_channels, spec.base_width))
        for i, width in enumerate(widths):
            coming = widths[i - 1] if i else spec.base_width
            x = self.level(f"encoder.down.{i}", x, (coming, width), spec.res_blocks, grid)
            if i < len(widths) - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", x, (width, width), halve=True)
                grid = (grid[0] // 2, grid[1] // 2)
        x = self.middle("encoder.mid", x, grid)
        x = self.b.silu(self.norm("encoder.norm_out", x, widths[-1], grid))
        return self.conv("encoder.conv_out", x, (widths[-1], spec.bits))


def build_bit_decoder(spec: BitTokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Build the decoder: f_hat [B, d, h_K, w_K] → image [B, height, width, channels] in [0, 1]."""
    b, shape = GraphBuilder(names.DECODER, form), (form.batch, spec.bits, *spec.latent_grid)
    x = BitAutoencoder(b, spec).decode(b.input(names.F_HAT, np.float32, shape))
    x = b.op("Clip", x, b.constant(-1.0, np.float32), b.constant(1.0, np.float32))
    half = b.constant(0.5, np.float32)
    x = b.op("Add", b.op("Mul", x, half), half)
    b.op("Transpose", x, perm=[0, 2, 3, 1], out=names.IMAGE)
    b.output(names.IMAGE, np.float32, image_shape(spec, form.batch))
    return b


def build_bit_encoder(spec: BitTokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Build the encoder: image [B, height, width, channels] in [0, 1] → bits of every scale
    [B, L_k, e].

    A bit is the sign of the residual that is averaged to the scale's grid.
    """
    b = GraphBuilder(names.ENCODER, form)
    image = b.input(names.IMAGE, np.float32, image_shape(spec, form.batch))
    x = b.op("Mul", image, b.constant(2.0, np.float32))
    x = b.transpose(b.op("Sub", x, b.constant(1.0, np.float32)), 0, 3, 1, 2)
    residual = b.op("Identity", BitAutoencoder(b, spec).encode(x), out=names.LATENT)
    last = len(spec.grids) - 1
    for scale, grid in enumerate(spec.latent_grids):
        with b.scope(f"scale_{scale:02d}"):
            z = residual
            if scale != last:
                rows, columns = (
                    b.constant(area_matrix(s, t))
                    for s, t in zip(spec.latent_grid, grid, strict=True)
                )
                z = resize(b, rows, columns, z)
            positive = b.cast(b.op("Greater", z, b.constant(0.0, np.float32)), np.int64)
            name = names.encoder_tokens(scale)
            bits = to_rows(b, spec, positive, scale, out=name)
            b.output(
                name,
                np.int64,
                (form.batch, spec.grids[scale][0] * spec.grids[scale][1], spec.token_bits),
            )
            if scale != last:
                code = _on_latent_grid(b, spec, bits, scale)
                residual = b.op("Sub", residual, code)
    return b


def build_bit_accumulate(spec: BitTokenizerSpec, form: GraphForm) -> GraphBuilder:
    """Build f_hats [K, B, d, h_K, w_K], f_hat after each scale, of the bits [B, L_k, e] of all."""
    b = GraphBuilder(names.ACCUMULATE, form)
    f_hat, sums = "", []
    for scale, (rows, columns) in enumerate(spec.grids):
        shape = (form.batch, rows * columns, spec.token_bits)
        bits = b.input(names.encoder_tokens(scale), np.int64, shape)
        with b.scope(f"scale_{scale:02d}"):
            h = _on_latent_grid(b, spec, bits, scale)
            f_hat = b.op("Add", f_hat, h) if scale else h
            sums.append(b.op("Unsqueeze", f_hat, b.ints(0)))
    b.op("Concat", *sums, axis=0, out=names.F_HATS)
    b.output(names.F_HATS, np.float32, (len(sums), form.batch, spec.bits, *spec.latent_grid))
    return b


def _on_latent_grid(b: GraphBuilder, spec: BitTokenizerSpec, bits: str, scale: int) -> str:
    """Return what the bits [B, L_k, e] of a scale add to f_hat, [B, d, h_K, w_K]."""
    h, grid = to_maps(b, spec, codes(b, spec, bits), scale), spec.latent_grids[scale]
    return h if grid == spec.latent_grid else resize(b, *matrices(b, grid, spec.latent_grid), h)


def image_shape(spec: BitTokenizerSpec, batch: int) -> tuple[int, int, int, int]:
    """Return the shape of an image tensor, [B, height, width, channels]."""
    return (batch, *spec.image_size, spec.image_channels)

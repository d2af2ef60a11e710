"""The multi-scale bitwise tokenizer of Infinity (arXiv 2412.04431, section 3.2).

A code is the sign of each channel: (2·bit - 1)/√d. Bits of a scale are [B, L_k, e], one row per
token, or, as maps, [B, ĥ_k, ŵ_k, d], one row per latent position; with patches a token is a block
of 2 × 2 positions. Keys are those of VAR's autoencoder (see `checkpoint.infinity_keys`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.export.models.autoencoder import Decoder, Encoder
from var_deploy.spec import BitTokenizerSpec, Grid


class BitTokenizer(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] ⇄ bits, one [B, L_k, e] per scale."""

    def __init__(self, spec: BitTokenizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec, attention=False)
        self.decoder = Decoder(spec, attention=False)

    # layouts

    def to_tokens(self, maps_BChw: Tensor) -> Tensor:
        """Maps [B, d, ĥ_k, ŵ_k] → rows of tokens [B, L_k, e]."""
        return F.pixel_unshuffle(maps_BChw, self.spec.patch).flatten(2).transpose(1, 2)

    def to_maps(self, scale: int, tokens_BLe: Tensor) -> Tensor:
        """Rows of tokens [B, L_k, e] → maps [B, d, ĥ_k, ŵ_k]."""
        maps = tokens_BLe.transpose(1, 2).unflatten(-1, self.spec.grids[scale])
        return F.pixel_shuffle(maps, self.spec.patch)

    # bits ⇄ f_hat

    def codes(self, scale: int, bits_BLe: Tensor) -> Tensor:
        """Bits of tokens [B, L_k, e] → codes [B, d, ĥ_k, ŵ_k]."""
        signs = 2 * bits_BLe.to(torch.float32) - 1
        return self.to_maps(scale, signs / self.spec.bits**0.5)

    def contribution(self, scale: int, bits_BLe: Tensor) -> Tensor:
        """Return the addend [B, d, ĥ_K, ŵ_K] of a scale's bits to f_hat."""
        return self._resized(self.codes(scale, bits_BLe), self.spec.latent_grid)

    def accumulate(self, bits: Sequence[Tensor]) -> Tensor:
        """Return f_hat [B, d, ĥ_K, ŵ_K], the sum over the first len(bits) scales."""
        f_hat = self.contribution(0, bits[0])
        for scale, bits_BLe in enumerate(bits[1:], 1):
            f_hat = f_hat + self.contribution(scale, bits_BLe)
        return f_hat

    def next_input(self, scale: int, f_hat: Tensor) -> Tensor:
        """f_hat after `scale` → input of the next scale [B, L_{k+1}, e]."""
        return self.to_tokens(self._resized(f_hat, self.spec.latent_grids[scale + 1]))

    def _resized(self, maps: Tensor, grid: Grid) -> Tensor:
        """Resize maps bilinearly, without antialiasing also where they shrink."""
        if tuple(maps.shape[-2:]) == grid:
            return maps
        return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)

    # images

    def features(self, image: Tensor) -> Tensor:
        """Return the continuous latent [B, d, ĥ_K, ŵ_K] of images."""
        out: Tensor = self.encoder(image)
        return out

    def quantize(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bits [B, L_k, e], f_hat so far [B, d, ĥ_K, ŵ_K]) scale by scale."""
        residual, f_hat = features, torch.zeros_like(features)
        for scale, grid in enumerate(self.spec.latent_grids):
            last = scale == len(self.spec.grids) - 1
            pooled = residual if last else F.interpolate(residual, size=grid, mode="area")
            bits = self.to_tokens((pooled > 0).to(torch.uint8))
            step = self.contribution(scale, bits)
            residual, f_hat = residual - step, f_hat + step
            yield bits, f_hat

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the bits [B, L_k, e] of every scale of images."""
        return [bits for bits, _ in self.quantize(self.features(image))]

    def decode(self, f_hat: Tensor) -> Tensor:
        """f_hat → image [B, 3, H, W] clamped to [-1, 1]."""
        out: Tensor = self.decoder(f_hat)
        return out.clamp(-1, 1)

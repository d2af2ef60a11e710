"""The multi-scale residual VQVAE of VAR (arXiv 2404.02905, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.export.models.autoencoder import Decoder, Encoder
from var_deploy.spec import TokenizerSpec


class Phi(nn.Conv2d):
    """φ(h) = (1-r)·h + r·conv(h), which smooths an up-sampled code map."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, width, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class SharedPhis(nn.Module):
    """n φ shared by the scales (key `qresi_ls`)."""

    def __init__(self, phis: Sequence[Phi]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)


class SinglePhi(nn.Module):
    """One φ for all scales (key `qresi`)."""

    def __init__(self, phi: Phi) -> None:
        super().__init__()
        self.qresi = phi


class MultiScaleQuantizer(nn.Module):
    """Codebook and φ: tokens of K scales ⇄ f_hat [B, Cv, p_K, p_K]."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, spec: TokenizerSpec) -> None:
        super().__init__()
        self.spec = spec
        scales = len(spec.patch_nums)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(scales, spec.vocab_size))
        phis = [Phi(spec.code_width, spec.phi_ratio) for _ in range(spec.phi_count)]
        if spec.phi_count and spec.shared_phi == 0:
            self.quant_resi: nn.Module = nn.ModuleList(phis)
        elif spec.phi_count and spec.shared_phi == 1:
            self.quant_resi = SinglePhi(phis[0])
        elif spec.phi_count:
            self.quant_resi = SharedPhis(phis)
        if spec.codebook_per_scale:
            self.embedding: nn.Module = nn.ModuleList(
                nn.Embedding(spec.vocab_size, spec.code_width) for _ in range(scales)
            )
        else:
            self.embedding = nn.Embedding(spec.vocab_size, spec.code_width)
        # aliases, one per scale; the modules above own the keys
        self._phis = [phis[spec.phi_index(k)] for k in range(scales)] if phis else []

    def codebook(self, scale: int) -> nn.Embedding:
        table = self.embedding[scale] if self.spec.codebook_per_scale else self.embedding  # type: ignore[index]
        assert isinstance(table, nn.Embedding)
        return table

    def phi(self, scale: int, h: Tensor) -> Tensor:
        """Apply φ_k to h; the identity where the tokenizer has no φ."""
        return self._phis[scale](h) if self._phis else h

    def contribution(self, scale: int, codes_BCpp: Tensor) -> Tensor:
        """Return the addend [B, Cv, p_K, p_K] of a map of codes [B, Cv, p_k, p_k] to f_hat."""
        side = self.spec.latent_side
        if self.spec.patch_nums[scale] != side:
            codes_BCpp = F.interpolate(codes_BCpp, size=(side, side), mode="bicubic")
        return self.phi(scale, codes_BCpp)

    def lookup(self, scale: int, tokens_BL: Tensor) -> Tensor:
        """Tokens [B, L_k] → codes [B, Cv, p_k, p_k]."""
        return self._maps(scale, self.codebook(scale)(tokens_BL))

    def blend(self, scale: int, weights_BLV: Tensor) -> Tensor:
        """Weights of the codes [B, L_k, V] → mixed codes [B, Cv, p_k, p_k]."""
        return self._maps(scale, weights_BLV @ self.codebook(scale).weight)

    def _maps(self, scale: int, codes_BLC: Tensor) -> Tensor:
        side = self.spec.patch_nums[scale]
        return codes_BLC.transpose(1, 2).reshape(len(codes_BLC), -1, side, side)

    def nearest(self, scale: int, z_BCpp: Tensor) -> Tensor:
        """Vectors [B, Cv, p, p] → nearest tokens [B, p²]: argmin of |z|² + |e|² - 2 z·e."""
        z = z_BCpp.flatten(2).transpose(1, 2)  # [B, L, Cv]
        codes = self.codebook(scale).weight
        distance = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * (z @ codes.T)
        return distance.argmin(dim=-1)

    def encode(self, f: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (scale, area-averaged residual, tokens, f_hat so far) scale by scale."""
        residual, f_hat = f, torch.zeros_like(f)
        for scale, side in enumerate(self.spec.patch_nums):
            last = side == self.spec.latent_side
            pooled = residual if last else F.interpolate(residual, size=(side, side), mode="area")
            tokens = self.nearest(scale, pooled)
            step = self.contribution(scale, self.lookup(scale, tokens))
            residual = residual - step
            f_hat = f_hat + step
            yield scale, pooled, tokens, f_hat

    def next_input(self, scale: int, f_hat: Tensor) -> Tensor:
        """f_hat after `scale` → input of the next scale [B, L_{k+1}, Cv]."""
        side = self.spec.patch_nums[scale + 1]
        return F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2)


class Tokenizer(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] ⇄ tokens, one [B, L_k] per scale."""

    def __init__(self, spec: TokenizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quantize = MultiScaleQuantizer(spec)
        self.quant_conv = nn.Conv2d(spec.code_width, spec.code_width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(spec.code_width, spec.code_width, 3, padding=1)

    def features(self, image: Tensor) -> Tensor:
        """Return the continuous latent f [B, Cv, p_K, p_K] of images."""
        out: Tensor = self.quant_conv(self.encoder(image))
        return out

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the tokens [B, L_k] of every scale of images."""
        return [tokens for _, _, tokens, _ in self.quantize.encode(self.features(image))]

    def accumulate(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return f_hat [B, Cv, p_K, p_K], the sum over the first len(tokens) scales."""
        return torch.stack(
            [
                self.quantize.contribution(k, self.quantize.lookup(k, t))
                for k, t in enumerate(tokens)
            ]
        ).sum(0)

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return the inputs of scales 1..K-1 [B, T - 1, Cv], given the tokens of all scales."""
        f_hat: Tensor | float = 0.0
        inputs = []
        for k, t in enumerate(tokens[:-1]):
            f_hat = f_hat + self.quantize.contribution(k, self.quantize.lookup(k, t))
            inputs.append(self.quantize.next_input(k, f_hat))
        return torch.cat(inputs, dim=1)

    def decode(self, f_hat: Tensor) -> Tensor:
        """f_hat → image [B, 3, S, S] clamped to [-1, 1]."""
        out: Tensor = self.decoder(self.post_quant_conv(f_hat))
        return out.clamp(-1, 1)

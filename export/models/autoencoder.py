"""The convolutional autoencoder of the tokenizers: vq-f16 (Esser et al., arXiv 2012.09841).

VAR's has attention at the lowest resolution, Infinity's has none. Module names are the keys of the
released state dicts of VAR.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.spec import BitTokenizerSpec, TokenizerSpec, norm_groups


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups(channels), channels, eps=1e-6, affine=True)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with GroupNorm and SiLU, added to the input."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class AttentionBlock(nn.Module):
    """Attention with one head over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, height * width).unbind(1)
        weights = (q.transpose(1, 2) @ k * c**-0.5).softmax(dim=-1)  # [B, HW, HW]
        h = v @ weights.transpose(1, 2)
        out: Tensor = x + self.proj_out(h.reshape(b, c, height, width))
        return out


class Downsample(nn.Module):
    """3×3 convolution with stride 2 that halves the map."""

    key = "downsample"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # zeros on the far side only, as the published autoencoder pads
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour 2× up-sampling and a 3×3 convolution."""

    key = "upsample"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest one.

    `resample` ends the level, under the key of its class; None at the last resolution.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        blocks: int,
        attention: bool,
        resample: type[Downsample] | type[Upsample] | None,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(
            ResidualBlock(before, after) for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList(AttentionBlock(channels_out) for _ in range(blocks * attention))
        self._resample = resample.key if resample else ""
        if resample:
            self.add_module(resample.key, resample(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self._resample:
            x = self.get_submodule(self._resample)(x)
        return x


class Middle(nn.Module):
    """Residual block, attention (where there is one) and residual block at the lowest
    resolution."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] → latent [B, Cv, H/f, W/f]."""

    def __init__(self, spec: TokenizerSpec | BitTokenizerSpec, attention: bool = True) -> None:
        super().__init__()
        widths = [spec.base_width * m for m in spec.width_multipliers]
        self.conv_in = nn.Conv2d(spec.image_channels, spec.base_width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            coming = widths[i - 1] if i else spec.base_width
            resample = None if last else Downsample
            self.down.append(Level(coming, width, spec.res_blocks, last and attention, resample))
        self.mid = Middle(widths[-1], attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], spec.code_width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latent [B, Cv, h, w] → image [B, 3, f·h, f·w], not yet clamped."""

    def __init__(self, spec: TokenizerSpec | BitTokenizerSpec, attention: bool = True) -> None:
        super().__init__()
        widths = [spec.base_width * m for m in spec.width_multipliers]
        self.conv_in = nn.Conv2d(spec.code_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            coming = widths[min(i + 1, len(widths) - 1)]
            resample = Upsample if i else None
            self.up.append(Level(coming, width, spec.res_blocks + 1, last and attention, resample))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], spec.image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out

"""Chooses the convolutions of a decoder that stay in fp32, so that its int8 graph keeps its bound.

What rounding one convolution does to the image adds up over all of them, and depends on the model:
a decoder with more levels, or weaker contrast, loses more. The PyTorch decoder rounds here as the
graph will, on the middle of a few images; where the sum is too much, the convolutions with the
largest part of it are left in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.export.int8.operators import (
    ConvRanges,
    Range,
    Ranges,
    kernel_rows,
    round_rows,
    weight_scale,
)
from var_deploy.export.models.bit_tokenizer import BitTokenizer

# dB that the rounded decoder must reach on the images of its calibration: 3 above what `verify`
# asks for, which decodes others, some with values beyond the ranges of these
WANTED_DECIBELS = 38.0
CROP = 16  # latent positions along a side of the middle of an image


@torch.inference_mode()
def within_bound(
    tokenizer: BitTokenizer,
    f_hats: Sequence[Tensor],
    ranges: Ranges,
    wanted: float = WANTED_DECIBELS,
) -> Ranges:
    """Return those of the ranges with which the decoder reaches `wanted` dB on every image.

    `f_hats` are [1, d, h, w]. The result is the same, or has no range for the convolutions whose
    rounding does most harm.
    """
    crops = [_middle(f_hat) for f_hat in f_hats]
    exact = [tokenizer.decode(crop) for crop in crops]

    def error(keys: Collection[str], image: int) -> float:
        """Mean square difference of an image in [0, 1]."""
        with _rounded(tokenizer, {key: ranges[key] for key in keys}):
            found = tokenizer.decode(crops[image])
        return float(((found - exact[image]) / 2).square().mean())

    most = 10 ** (-wanted / 10)
    left, harm = list(ranges), dict[str, float]()
    while left:
        errors = [error(left, image) for image in range(len(crops))]
        worst = max(range(len(crops)), key=errors.__getitem__)
        if errors[worst] <= most:
            break
        harm = harm or {key: error([key], worst) for key in left}
        left.sort(key=harm.__getitem__)
        # parts add up to the whole but for their interplay, so the next round measures again
        excess = (1 - most / errors[worst]) * sum(harm[key] for key in left)
        while left and excess > 0:
            excess -= harm[left.pop()]
    return {key: ranges[key] for key in ranges if key in left}


def _middle(f_hat: Tensor) -> Tensor:
    for axis in (2, 3):
        size = min(CROP, f_hat.shape[axis])
        f_hat = f_hat.narrow(axis, (f_hat.shape[axis] - size) // 2, size)
    return f_hat


@contextlib.contextmanager
def _rounded(tokenizer: BitTokenizer, ranges: Ranges) -> Iterator[None]:
    """Let these convolutions round their weights, inputs and outputs."""
    hooks = [
        module.register_forward_hook(_RoundedConv(module, ranges[key]))
        for key, module in tokenizer.named_modules()
        if key in ranges
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _RoundedConv:
    """A forward hook that replaces a convolution's output by that of int8 arithmetic."""

    def __init__(self, module: nn.Module, ranges: ConvRanges) -> None:
        assert isinstance(module, nn.Conv2d)
        self._ranges, self._module = ranges, module
        rows = kernel_rows(module.weight.numpy())
        scale = weight_scale(rows)
        rounded = torch.from_numpy(round_rows(rows, scale).astype("float32") * scale[:, None])
        out, width, *sides = module.weight.shape
        self._weight = rounded.view(out, *sides, width).permute(0, 3, 1, 2)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _round(inputs[0], self._ranges.input)
        y = F.conv2d(x, self._weight, self._module.bias, padding=1)
        return _round(y, self._ranges.output)


def _round(x: Tensor, to: Range) -> Tensor:
    return ((x / to.scale).round() + to.zero_point).clamp(0, 255).sub(to.zero_point) * to.scale

"""Measures the value ranges of the decoder's convolutions, for an int8 decoder.

The transformer needs no ranges, since its activations are quantised at run time. Its int8 graphs
generate the images in ONNX Runtime from a fixed seed, and hooks on the PyTorch decoder record the
values while it decodes them. A decoder of bits is then tried with these ranges, see
`decoder_noise`; those of VAR hold their bound without, and keep their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from var_deploy.export.checkpoint.assemble import LoadedModel, empty_modules, load_into
from var_deploy.export.checkpoint.drawn_prompts import drawn_prompts
from var_deploy.export.checkpoint.text_model import LoadedTextModel, empty_text_modules
from var_deploy.export.int8.decoder_noise import within_bound
from var_deploy.export.int8.operators import ConvRanges, Range, Ranges
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.int8_check import check_int8
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.buffers import Conditions
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import numbered, stack_uniforms
from var_deploy.spec import BitTokenizerSpec, TokenizerSpec

SEED = 0
# A range is widened to the next of these steps an octave, so that rounding on another machine,
# which moves the last digits of a maximum, does not move the bytes of a bundle.
STEPS_AN_OCTAVE = 16
# A residual block's rounded output is added to an exact sum; an up-sampling replaces the sum,
# so its rounding alone must leave room within the 35 dB that `verify` asks of the image. In pocket
# one of three has an output of few large values, and 29.5 dB.
TRUNK_DECIBELS = 35.0


def rounded_convs(spec: TokenizerSpec | BitTokenizerSpec) -> list[str]:
    """Return the keys of the decoder's convolutions that run in int8.

    These are the 3×3 ones within residual blocks and after up-sampling, 98 % of the operations. The
    others touch f_hat or the pixels, or are too small to be worth an error.
    """
    blocks = [f"decoder.mid.block_{n}" for n in (1, 2)]
    levels = range(len(spec.width_multipliers))
    blocks += [f"decoder.up.{i}.block.{j}" for i in levels for j in range(spec.res_blocks + 1)]
    ups = [f"decoder.up.{i}.upsample.conv" for i in levels if i > 0]
    return [f"{block}.conv{n}" for block in blocks for n in (1, 2)] + ups


def decoder_ranges(
    model: LoadedModel | LoadedTextModel,
    folder: Path,
    manifest: Manifest,
    images: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Ranges:
    """Generate `images` images with the int8 graphs in `folder`, and measure the decoder's ranges.

    A convolution that int8 would change too much has no range, and stays in fp32. Raises
    BackendError where this machine computes int8 wrongly.

    Args:
        manifest: of the folder, which needs no decoder.
        progress: called with (batches done, batches in all).
    """
    tokenizer = _tokenizer(model)
    seen = {key: _Conv() for key in rounded_convs(model.spec.tokenizer)}
    hooks = [
        module.register_forward_hook(seen[key])
        for key, module in tokenizer.named_modules()
        if key in seen
    ]
    batches = -(-images // manifest.batch)
    backend = OrtCpuBackend()
    check_int8(backend)  # ranges of noise would be another model's
    loop = ScaleLoop(folder, manifest, backend, "int8", "shared", decoder=False)
    f_hats = []
    try:
        for number in range(batches):
            tokens = _draw(loop, model, manifest, number)
            f_hats += _decode(tokenizer, tokens)
            progress(number + 1, batches)
    finally:
        loop.close()
    ranges = {
        key: found.ranges()
        for key, found in seen.items()
        if found.decibels >= TRUNK_DECIBELS or "upsample" not in key
    }
    if not isinstance(tokenizer, BitTokenizer):
        return ranges
    for hook in hooks:
        hook.remove()
    return within_bound(tokenizer, f_hats, ranges)


def _tokenizer(model: LoadedModel | LoadedTextModel) -> Tokenizer | BitTokenizer:
    tokenizer: Tokenizer | BitTokenizer
    if isinstance(model, LoadedTextModel):
        tokenizer, _ = empty_text_modules(model.spec)
    else:
        tokenizer, _ = empty_modules(model.spec)
    load_into(tokenizer, model.tokenizer)
    return tokenizer


def _draw(
    loop: ScaleLoop, model: LoadedModel | LoadedTextModel, manifest: Manifest, number: int
) -> list[NDArray[np.int64]]:
    """Generate the tokens of each scale, [B, L_k] or [B, L_k, e], of one batch."""
    batch = manifest.batch
    first = number * batch
    draws = stack_uniforms(numbered(SEED, first, batch), manifest.model.draws)
    conditions: Conditions
    if isinstance(model, LoadedTextModel):
        conditions = _prompts(model, range(first, first + batch))
    else:
        classes = max(model.spec.transformer.classes, 1)
        # multiples of the golden ratio never cluster, however many there are; those of
        # `spread_labels` would all be low numbers where images are few and classes many
        conditions = [int(classes * (n * 0.6180339887 % 1)) for n in range(first, first + batch)]
    return loop.generate_tokens(conditions, draws, manifest.defaults)


def _prompts(model: LoadedTextModel, images: range) -> PromptRows:
    """Return the text features of these images.

    Images with even numbers take the features that the model learned for "no prompt", which it was
    trained with as it was with texts; the others take drawn ones, which reach further.
    """
    t = model.spec.transformer
    rows = drawn_prompts(t, numbered(SEED, images.start, len(images)))
    for row, number in enumerate(images):
        if number % 2 == 0:
            rows.features[row] = model.transformer.read("cfg_uncond")[: t.text_length]
            rows.lengths[row] = t.text_length
    return rows


@torch.inference_mode()
def _decode(
    tokenizer: Tokenizer | BitTokenizer, tokens: list[NDArray[np.int64]]
) -> list[Tensor]:
    """Decode the images of a batch; return the f_hat [1, Cv, h_K, w_K] of each."""
    f_hats = []
    for image in range(len(tokens[0])):  # one by one: the memory of one is enough
        one = [torch.from_numpy(scale[image : image + 1]) for scale in tokens]
        f_hats.append(tokenizer.accumulate(one))
        tokenizer.decode(f_hats[-1])
    return f_hats


class _Values:
    """Extremes and mean square of a tensor over all images."""

    def __init__(self) -> None:
        self._low, self._high, self._squares, self._count = math.inf, -math.inf, 0.0, 0

    def see(self, values: Tensor) -> None:
        low, high = (float(v) for v in values.aminmax())
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._squares += float(values.double().square().sum())
        self._count += values.numel()

    @property
    def range(self) -> Range:
        return Range(low=_widen(self._low), high=_widen(self._high))

    @property
    def decibels(self) -> float:
        """Return the signal-to-noise ratio of quantisation, whose error is uniform within a
        step."""
        noise = float(self.range.scale) ** 2 / 12
        return 10 * math.log10(max(self._squares / self._count, 1e-30) / noise)


class _Conv:
    """Records the values of one convolution's input and output over all images."""

    def __init__(self) -> None:
        self._input, self._output = _Values(), _Values()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._input.see(inputs[0])
        self._output.see(output)

    @property
    def decibels(self) -> float:
        return min(self._input.decibels, self._output.decibels)

    def ranges(self) -> ConvRanges:
        return ConvRanges(input=self._input.range, output=self._output.range)


def _widen(value: float) -> float:
    """Round a bound away from zero to the next step."""
    if value == 0:
        return 0.0
    steps = math.ceil(math.log2(abs(value)) * STEPS_AN_OCTAVE)
    return math.copysign(2 ** (steps / STEPS_AN_OCTAVE), value)

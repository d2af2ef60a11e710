"""Trains the bitwise tokenizer: all of it, then its decoder on the finished bits.

Gradients pass the signs as if they were not there (straight-through), and the encoder is pulled
towards what the bits can say; see Binary Spherical Quantization (arXiv 2406.07548) and Infinity
(arXiv 2412.04431, section 3.2).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.pocket.fit_tokenizer import image_loss, to_tensor
from tools.pocket.optimizers import Optimizers
from tools.pocket_text.checkpoints import Log, decibels, run_steps
from tools.pocket_text.recipe import Recipe
from tools.pocket_text.scenes import draw_training
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.spec import BitTokenizerSpec

# each step draws pictures of its own: sets of seed FIRST_SEED + step, one range per stage
FIRST_SEED, STAGE_SEEDS = 20_000_000, 1_000_000


class Quantized(NamedTuple):
    """The bits of latents, scale by scale.

    Attributes:
        bits: the right bits of each scale, float [B, L_k, e]: after errors, those that mend them.
        inputs: of the transformer at every scale but the first, [B, L_k, e].
        f_hat: the sum of all codes [B, d, ĥ, ŵ].
    """

    bits: list[Tensor]
    inputs: list[Tensor]
    f_hat: Tensor


def quantize(
    model: BitTokenizer,
    features: Tensor,
    flips: float = 0.0,
    random: torch.Generator | None = None,
) -> Quantized:
    """Quantise latents [B, d, ĥ, ŵ]; without flips as `BitTokenizer.quantize` does.

    With flips, a share of each picture's bits, drawn between 0 and `flips`, enters the sum wrong;
    the residual that the next scales take their bits from has that error.
    """
    grids = model.spec.latent_grids
    residual, f_hat = features, torch.zeros_like(features)
    bits, inputs = [], []
    share = flips * torch.rand(len(features), 1, 1, generator=random) if flips else None
    for scale, grid in enumerate(grids):
        last = scale == len(grids) - 1
        pooled = residual if last else F.interpolate(residual, size=grid, mode="area")
        right = (model.to_tokens(pooled) > 0).float()
        bits.append(right)
        taken = right
        if share is not None:
            wrong = torch.rand(right.shape, generator=random) < share
            taken = torch.where(wrong, 1 - right, right)
        code = model.contribution(scale, taken)
        residual, f_hat = residual - code, f_hat + code
        if not last:
            inputs.append(model.next_input(scale, f_hat))
    return Quantized(bits, inputs, f_hat)


def train_tokenizer(
    recipe: Recipe, spec: BitTokenizerSpec, log: Log, checkpoint: Path | None = None
) -> BitTokenizer:
    """Train encoder and decoder on drawings; see `run_steps` for the checkpoint."""
    torch.manual_seed(recipe.seed)
    model = BitTokenizer(spec)
    steps = recipe.tokenizer_steps
    optimizers = Optimizers(model.named_parameters(), rate=recipe.tokenizer_rate, steps=steps)

    def take(step: int) -> dict[str, float]:
        target = _pictures(recipe, 0, step)
        f = model.features(target)
        with torch.no_grad():
            f_hat = quantize(model, f).f_hat
        commit = F.mse_loss(f, f_hat)
        output = model.decoder(f + (f_hat - f).detach())
        optimizers.step(image_loss(output, target) + recipe.commitment * commit)
        relative = (commit.detach() / f.detach().var()).item()
        return {"psnr": _psnr(output, target), "relative error": relative}

    run_steps("tokenizer", steps, take, {"model": model}, optimizers, log, checkpoint)
    return model.requires_grad_(False).eval()


def refine_decoder(
    model: BitTokenizer, recipe: Recipe, log: Log, checkpoint: Path | None = None
) -> BitTokenizer:
    """Train the decoder in place on the finished bits. No bit changes."""
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    steps = recipe.decoder_steps
    optimizers = Optimizers(model.named_parameters(), rate=recipe.decoder_rate, steps=steps)

    def take(step: int) -> dict[str, float]:
        target = _pictures(recipe, 1, step)
        with torch.no_grad():
            f_hat = quantize(model, model.features(target)).f_hat
        output = model.decoder(f_hat)
        optimizers.step(image_loss(output, target))
        return {"psnr": _psnr(output, target)}

    run_steps("decoder", steps, take, {"model": model.decoder}, optimizers, log, checkpoint)
    return model.requires_grad_(False).eval()


def _pictures(recipe: Recipe, stage: int, step: int) -> Tensor:
    seed = FIRST_SEED + (2 * recipe.seed + stage) * STAGE_SEEDS + step
    return to_tensor(draw_training(recipe.tokenizer_batch, seed)[0])


def _psnr(output: Tensor, target: Tensor) -> float:
    errors = (output.detach().clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return float(np.mean([decibels(error) for error in errors.tolist()]))

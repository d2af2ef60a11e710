"""Trains pocket's tokenizer in three stages: all of it, then its codes, then its decoder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tools.pocket.codebook import MovingCodebook
from tools.pocket.drawings import draw_set
from tools.pocket.optimizers import Optimizers
from tools.pocket.recipe import Recipe
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.spec import ModelSpec

Log = Callable[[str], None]


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] → float [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, with a little absolute error and edge error for crisp contours."""
    edges = sum((output.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.mse_loss(output, target) + 0.1 * F.l1_loss(output, target) + 0.1 * edges


def quantize(model: Tokenizer, f: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the vectors [N, Cv] that were quantised at all scales, their tokens [N], f_hat after
    each."""
    vectors, tokens, partial = [], [], []
    for _, pooled, scale_tokens, f_hat in model.quantize.encode(f):
        vectors.append(pooled.detach().flatten(2).transpose(1, 2).flatten(0, 1))
        tokens.append(scale_tokens.flatten())
        partial.append(f_hat)
    return torch.cat(vectors), torch.cat(tokens), partial


@torch.no_grad()
def first_codebook(model: Tokenizer, images: NDArray[np.uint8], table: Tensor) -> MovingCodebook:
    """Return codes that fit the autoencoder as it is: random features, then a few rounds of
    k-means."""
    f = torch.cat([model.features(to_tensor(part)) for part in np.array_split(images, 8)])
    rows = f.permute(0, 2, 3, 1).flatten(0, 2)
    table.copy_(rows[torch.randint(len(rows), (len(table),))])
    codebook = MovingCodebook(table, decay=0.5)
    for _ in range(15):
        vectors, tokens, _ = quantize(model, f)
        codebook.update(vectors, tokens, revive=True)
    codebook.decay = 0.98
    return codebook


def train_tokenizer(recipe: Recipe, spec: ModelSpec, log: Log) -> Tokenizer:
    """Train the tokenizer on drawn images: first without quantisation, then with it.

    The codebook learns by moving averages, φ and the decoder by gradients, the encoder through
    the straight-through estimator (van den Oord et al., arXiv 1711.00937).
    """
    torch.manual_seed(recipe.seed)
    images, _ = draw_set(recipe.tokenizer_images, recipe.seed)
    model = Tokenizer(spec.tokenizer)
    table = model.quantize.codebook(0).weight.requires_grad_(False)
    steps, plain = recipe.tokenizer_steps, recipe.plain_steps
    optimizers = Optimizers(model.named_parameters(), rate=recipe.tokenizer_rate, steps=steps)
    codebook: MovingCodebook | None = None
    order = np.random.default_rng([recipe.seed, 1])
    start, smooth = time.monotonic(), 0.0
    for step in range(steps):
        picks = order.integers(len(images), size=recipe.tokenizer_batch)
        target = to_tensor(images[picks])
        f = model.features(target)
        if step < plain:
            latent, commit = f, 0.01 * f.square().mean()
        else:
            if codebook is None:
                codebook = first_codebook(model, images[: 16 * recipe.tokenizer_batch], table)
            vectors, tokens, partial = quantize(model, f)
            codebook.update(vectors, tokens, revive=step < 0.8 * steps)
            # every scale teaches φ; only the sum of all pulls on the encoder, since pulling it
            # towards what one token can say would empty the latent
            commit = torch.stack([F.mse_loss(p, f.detach()) for p in partial]).mean()
            commit = commit + 0.25 * F.mse_loss(partial[-1].detach(), f)
            commit = commit * recipe.commitment
            latent = f + (partial[-1] - f).detach()
        output = model.decoder(model.post_quant_conv(latent))
        optimizers.step(image_loss(output, target) + commit)
        error = F.mse_loss(output.detach().clamp(-1, 1), target).item()
        smooth = error if step == 0 else 0.98 * smooth + 0.02 * error
        if step % 50 == 0 or step == steps - 1:
            log(
                f"tokenizer {step:5d}/{steps}  psnr {-10 * math.log10(smooth / 4):.2f} dB"
                f"  {time.monotonic() - start:.0f} s"
            )
    return model.eval()


def refine_codes(model: Tokenizer, recipe: Recipe, log: Log) -> Tokenizer:
    """Train codebook and φ in place, with a fixed encoder.

    While everything moves, the codes lag behind the encoder. On fixed latents this is cheap to
    correct, since no convolution network runs.
    """
    torch.manual_seed(recipe.seed + 2)
    images, _ = draw_set(recipe.refine_images, recipe.seed)
    with torch.no_grad():
        latents = torch.cat([model.features(to_tensor(b)) for b in np.array_split(images, 40)])
    model.requires_grad_(False)
    table = model.quantize.codebook(0).weight
    codebook = MovingCodebook(table, decay=0.95)
    phis = [p.requires_grad_(True) for p in model.quantize.quant_resi.parameters()]
    optimizer = torch.optim.Adam(phis, lr=1e-3)
    order = np.random.default_rng([recipe.seed, 3])
    steps = recipe.code_steps
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        f = latents[torch.from_numpy(order.integers(len(latents), size=64))]
        vectors, tokens, partial = quantize(model, f)
        codebook.update(vectors, tokens, revive=step < 0.7 * steps)
        loss = torch.stack([F.mse_loss(p, f) for p in partial]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            error = F.mse_loss(partial[-1].detach(), f) / f.var()
            used = len(tokens.unique())
            log(f"codes {step:5d}/{steps}  relative error {error.item():.4f}  {used} codes in use")
    return model.requires_grad_(False).eval()


def refine_decoder(model: Tokenizer, recipe: Recipe, log: Log) -> Tokenizer:
    """Train the decoder in place on f_hat of the finished codes. No token changes."""
    torch.manual_seed(recipe.seed + 3)
    images, _ = draw_set(recipe.tokenizer_images, recipe.seed)
    model.requires_grad_(False)
    learned = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    ]
    for _, parameter in learned:
        parameter.requires_grad_(True)
    steps = recipe.decoder_steps
    optimizers = Optimizers(learned, rate=recipe.decoder_rate, steps=steps)
    order = np.random.default_rng([recipe.seed, 4])
    start, smooth = time.monotonic(), 0.0
    for step in range(steps):
        target = to_tensor(images[order.integers(len(images), size=recipe.tokenizer_batch)])
        with torch.no_grad():
            f_hat = quantize(model, model.features(target))[2][-1]
        output = model.decoder(model.post_quant_conv(f_hat))
        optimizers.step(image_loss(output, target))
        error = F.mse_loss(output.detach().clamp(-1, 1), target).item()
        smooth = error if step == 0 else 0.98 * smooth + 0.02 * error
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * math.log10(smooth / 4)
            log(f"decoder {step:5d}/{steps}  psnr {psnr:.2f} dB  {time.monotonic() - start:.0f} s")
    return model.requires_grad_(False).eval()

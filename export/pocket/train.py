"""Trains pocket from nothing: draws the images, then fits the tokenizer, then the transformer.

`python -m var_deploy.export.pocket.train --out DIR` (or `make train`) repeats the shipped weights
from their seed. Each stage takes its settings from `Recipe`, so that a test can run a few steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Transformer
from var_deploy.export.pocket.codebook import MovingCodebook
from var_deploy.export.pocket.drawings import draw_set
from var_deploy.export.pocket.muon import Muon
from var_deploy.export.pocket.recipe import POCKET, Recipe
from var_deploy.spec import ModelSpec

TOKENIZER_FILE = "tokenizer.safetensors"
TRANSFORMER_FILE = "transformer.safetensors"


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] → float [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to a fiftieth."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, with a little absolute error and edge error for crisp contours."""
    edges = sum((output.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.mse_loss(output, target) + 0.1 * F.l1_loss(output, target) + 0.1 * edges


class Optimizers:
    """Muon for matrices and kernels, AdamW for the rest, on one cosine schedule."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate: float,
        steps: int,
        decay: float = 0.0,
    ) -> None:
        parameters = [(n, p) for n, p in named if p.requires_grad]
        self.all = [p for _, p in parameters]
        # tables and positions are looked up row by row: orthogonalising them mixes the rows
        matrices = [p for n, p in parameters if p.ndim in (2, 4) and "emb" not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.all if id(p) not in chosen]
        self.rate, self.steps, self.done = rate, steps, 0
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=rate, weight_decay=decay),
            torch.optim.AdamW(rest, lr=rate / 2, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, loss: Tensor) -> None:
        factor = cosine_rate(self.done, self.steps)
        for parameter in self.all:
            parameter.grad = None
        loss.backward()
        for part, share in zip(self.parts, (1.0, 0.5), strict=True):
            for group in part.param_groups:
                group["lr"] = self.rate * share * factor
            part.step()
        self.done += 1


def quantize(model: Tokenizer, f: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Vectors [N, Cv] that were quantised at all scales, their tokens [N], f_hat after each."""
    vectors, tokens, partial = [], [], []
    for _, pooled, scale_tokens, f_hat in model.quantize.encode(f):
        vectors.append(pooled.detach().flatten(2).transpose(1, 2).flatten(0, 1))
        tokens.append(scale_tokens.flatten())
        partial.append(f_hat)
    return torch.cat(vectors), torch.cat(tokens), partial


@torch.no_grad()
def first_codebook(model: Tokenizer, images: NDArray[np.uint8], table: Tensor) -> MovingCodebook:
    """Codes that fit the autoencoder as it is: random features, then a few rounds of k-means."""
    f = torch.cat([model.features(to_tensor(part)) for part in np.array_split(images, 8)])
    rows = f.permute(0, 2, 3, 1).flatten(0, 2)
    table.copy_(rows[torch.randint(len(rows), (len(table),))])
    codebook = MovingCodebook(table, decay=0.5)
    for _ in range(15):
        vectors, tokens, _ = quantize(model, f)
        codebook.update(vectors, tokens, revive=True)
    codebook.decay = 0.98
    return codebook


def train_tokenizer(recipe: Recipe, spec: ModelSpec, log: Callable[[str], None]) -> Tokenizer:
    """Fit the tokenizer to drawn images: first without quantising, then with.

    The codebook learns by moving averages, φ and the decoder by gradients, the encoder through
    the straight-through estimator (van den Oord et al., arXiv 1711.00937).
    """
    torch.manual_seed(recipe.seed)
    images, _ = draw_set(recipe.tokenizer_images, recipe.seed)
    model = Tokenizer(spec.tokenizer)
    table = model.quantize.codebook(0).weight.requires_grad_(False)
    steps, plain = recipe.tokenizer_steps, recipe.plain_steps
    optimizers = Optimizers(
        model.named_parameters(), rate=recipe.tokenizer_rate, steps=steps
    )
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


@torch.no_grad()
def encode_set(model: Tokenizer, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [count, T] and labels [count] of freshly drawn images."""
    tokens, labels = [], []
    for first in range(0, count, 1000):
        chunk = min(1000, count - first)
        images, chunk_labels = draw_set(chunk, seed + 1 + first)
        for batch in torch.from_numpy(images).split(100):
            tokens.append(torch.cat(model.encode(to_tensor(batch.numpy())), dim=1))
        labels.append(torch.from_numpy(chunk_labels))
    return torch.cat(tokens).to(torch.int16), torch.cat(labels)


def init_transformer(model: Transformer) -> None:
    """Small normal weights; gammas start near zero, so that every block starts as the identity."""
    width = model.spec.transformer.width
    for name, parameter in model.named_parameters():
        if name.endswith("scale_mul_1H11"):
            continue
        if parameter.ndim >= 2:
            nn.init.trunc_normal_(parameter, std=(1 / width / 3) ** 0.5)
        else:
            nn.init.zeros_(parameter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ada_gss"):
                parameter[:, :, 2:].mul_(0.5)
                parameter[:, :, :2].mul_(0.02)
            elif "ada_lin" in name and name.endswith("weight"):
                parameter.mul_(0.5)
                if "head_nm" not in name:
                    parameter[: 2 * width].mul_(0.1)
            elif name in ("head.weight",):
                parameter.mul_(0.02)


def train_transformer(
    recipe: Recipe, spec: ModelSpec, tokenizer: Tokenizer, log: Callable[[str], None]
) -> Transformer:
    """Fit the transformer to the tokens of drawn images, teacher-forced, with label dropout."""
    torch.manual_seed(recipe.seed + 1)
    all_tokens, all_labels = encode_set(tokenizer, recipe.transformer_images, 10_000_000)
    log(f"encoded {len(all_tokens)} images")
    model = Transformer(spec)
    init_transformer(model)
    average = copy.deepcopy(model).eval()
    optimizers = Optimizers(
        model.named_parameters(),
        rate=recipe.transformer_rate,
        steps=recipe.transformer_steps,
        decay=recipe.weight_decay,
    )
    steps, lengths = recipe.transformer_steps, list(spec.scale_lengths)
    order = np.random.default_rng([recipe.seed, 2])
    start, smooth = time.monotonic(), 0.0
    for step in range(steps):
        picks = torch.from_numpy(order.integers(len(all_tokens), size=recipe.transformer_batch))
        tokens, labels = all_tokens[picks].long(), all_labels[picks].clone()
        labels[torch.from_numpy(order.random(recipe.transformer_batch) < recipe.label_dropout)] = (
            spec.transformer.classes
        )
        with torch.no_grad():
            inputs = tokenizer.teacher_input(tokens.split(lengths, dim=1))
        logits = model(labels, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizers.step(loss)
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            log(
                f"transformer {step:5d}/{steps}  loss {loss.item():.4f}  mean {smooth:.4f}"
                f"  {time.monotonic() - start:.0f} s"
            )
    return average


def save_half(model: nn.Module, path: Path) -> None:
    """Write the weights as fp16 safetensors; integer buffers as they are.

    Buffers that follow from the sizes alone (masks, level numbers, statistics) are left out,
    except `lvl_1L`, from which the patch numbers are recognised.
    """
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(("attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")):
            continue
        value = value.detach().contiguous()
        state[name] = value.half() if value.is_floating_point() else value
    save_file(state, path)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--stage", type=click.Choice(["all", "tokenizer", "transformer"]), default="all")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, stage: str, seed: int) -> None:
    """Train pocket and write its two weight files into OUT."""
    recipe = Recipe(seed=seed)
    torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        click.echo(line, err=True)

    if stage != "transformer":
        save_half(train_tokenizer(recipe, POCKET, log), out / TOKENIZER_FILE)
    if stage != "tokenizer":
        # the transformer learns from the tokenizer as it ships: rounded to fp16
        tokenizer = Tokenizer(POCKET.tokenizer).eval()
        weights = {k: v.float() for k, v in load_file(out / TOKENIZER_FILE).items()}
        tokenizer.load_state_dict(weights, strict=False)
        save_half(train_transformer(recipe, POCKET, tokenizer, log), out / TRANSFORMER_FILE)


if __name__ == "__main__":
    main()

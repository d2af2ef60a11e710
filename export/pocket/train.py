"""Trains pocket from nothing: draws the images, then fits the tokenizer, then the transformer.

`python -m var_deploy.export.pocket.train --out DIR` (or `make train`) repeats the shipped weights
from their seed. Each stage takes its settings from `Recipe`, so that a test can run a few steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Transformer
from var_deploy.export.pocket.codebook import MovingCodebook
from var_deploy.export.pocket.drawings import draw_set
from var_deploy.export.pocket.recipe import POCKET, Recipe
from var_deploy.spec import ModelSpec

TOKENIZER_FILE = "tokenizer.safetensors"
TRANSFORMER_FILE = "transformer.safetensors"


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] → float [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to a fiftieth."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, absolute error, and absolute error of the edges (keeps contours crisp)."""
    edges = sum(
        (output.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (2, 3)
    )
    return F.mse_loss(output, target) + 0.2 * F.l1_loss(output, target) + 0.3 * edges


def train_tokenizer(recipe: Recipe, spec: ModelSpec, log: Callable[[str], None]) -> Tokenizer:
    """Fit the tokenizer to drawn images; the codebook learns by moving averages."""
    torch.manual_seed(recipe.seed)
    images, _ = draw_set(recipe.tokenizer_images, recipe.seed)
    model = Tokenizer(spec.tokenizer)
    table = model.quantize.codebook(0).weight.requires_grad_(False)
    codebook = MovingCodebook(table)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.tokenizer_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = recipe.tokenizer_steps
    order = np.random.default_rng([recipe.seed, 1])
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.tokenizer_rate * cosine_rate(step, steps)
        picks = order.integers(len(images), size=recipe.tokenizer_batch)
        target = to_tensor(images[picks]).contiguous()
        f = model.features(target)
        vectors, tokens, partial = [], [], []
        for _, pooled, scale_tokens, f_hat in model.quantize.encode(f):
            vectors.append(pooled.detach().flatten(2).transpose(1, 2).flatten(0, 1))
            tokens.append(scale_tokens.flatten())
            partial.append(f_hat)
        # f_hat_k → f teaches φ, f → f_hat_k keeps the encoder near what the codes can say
        commit = sum(
            F.mse_loss(p, f.detach()) + 0.25 * F.mse_loss(p.detach(), f) for p in partial
        ) / len(partial)
        straight_through = f + (partial[-1] - f).detach()
        output = model.decoder(model.post_quant_conv(straight_through))
        loss = image_loss(output, target) + commit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        revived = codebook.update(torch.cat(vectors), torch.cat(tokens), revive=step < 0.7 * steps)
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * math.log10(F.mse_loss(output.detach().clamp(-1, 1), target).item() / 4)
            log(
                f"tokenizer {step:5d}/{steps}  loss {loss.item():.4f}  psnr {psnr:.2f} dB"
                f"  revived {revived}  {time.monotonic() - start:.0f} s"
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
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.transformer_rate,
        betas=(0.9, 0.95),
    )
    steps, lengths = recipe.transformer_steps, list(spec.scale_lengths)
    order = np.random.default_rng([recipe.seed, 2])
    start, smooth = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.transformer_rate * cosine_rate(step, steps)
        picks = torch.from_numpy(order.integers(len(all_tokens), size=recipe.transformer_batch))
        tokens, labels = all_tokens[picks].long(), all_labels[picks].clone()
        labels[torch.from_numpy(order.random(recipe.transformer_batch) < recipe.label_dropout)] = (
            spec.transformer.classes
        )
        with torch.no_grad():
            inputs = tokenizer.teacher_input(tokens.split(lengths, dim=1))
        logits = model(labels, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
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

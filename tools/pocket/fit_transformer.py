"""Trains pocket's transformer on the tokens of drawn images."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.pocket.drawings import draw_set
from tools.pocket.fit_tokenizer import Log, to_tensor
from tools.pocket.optimizers import Optimizers
from tools.pocket.recipe import Recipe
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Transformer
from var_deploy.spec import ModelSpec

# far from the tokenizer's images and from every held-out set; drawn in sets, each with a seed
TRAINING_SEED = 10_000_001
TRAINING_CHUNK = 1000


@torch.no_grad()
def encode_set(model: Tokenizer, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens [count, T] and labels [count] of newly drawn images."""
    tokens, labels = [], []
    for first in range(0, count, TRAINING_CHUNK):
        chunk = min(TRAINING_CHUNK, count - first)
        images, chunk_labels = draw_set(chunk, seed + first)
        for batch in torch.from_numpy(images).split(100):
            tokens.append(torch.cat(model.encode(to_tensor(batch.numpy())), dim=1))
        labels.append(torch.from_numpy(chunk_labels))
    return torch.cat(tokens).to(torch.int16), torch.cat(labels)


def init_transformer(model: Transformer) -> None:
    """Initialise with small normal weights; gammas start near zero, so that every block starts as
    the identity."""
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
    recipe: Recipe, spec: ModelSpec, tokenizer: Tokenizer, log: Log
) -> Transformer:
    """Train on the tokens of drawn images, teacher-forced, with label dropout."""
    torch.manual_seed(recipe.seed + 1)
    all_tokens, all_labels = encode_set(tokenizer, recipe.transformer_images, TRAINING_SEED)
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

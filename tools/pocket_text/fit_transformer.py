"""Trains text encoder and transformer together, on the bits of drawings and their sentences."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tools.pocket.fit_tokenizer import to_tensor
from tools.pocket.optimizers import Optimizers
from tools.pocket_text.captions import caption, vocabulary
from tools.pocket_text.checkpoints import Log, run_steps
from tools.pocket_text.fit_tokenizer import quantize
from tools.pocket_text.recipe import Recipe
from tools.pocket_text.scenes import Scene, draw_training, scenes
from tools.pocket_text.words import tokenize, tokenizer_json
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.infinity import InfinityTransformer
from var_deploy.export.models.t5 import T5Encoder
from var_deploy.spec import TextEncoderSpec, TextModelSpec
from var_deploy.text.prompt_tokenizer import PromptTokenizer

# far from the tokenizer's pictures and from every held-out set; drawn in sets, each with a seed
TRAINING_SEED = 10_000_001
TRAINING_CHUNK = 1000
# parts of the names of parameters that are looked up row by row
TABLES = ("emb", "shared.weight", "cfg_uncond", "attention_bias")


@dataclass(frozen=True)
class Latents:
    """Training pictures as the encoder of the tokenizer gives them.

    Attributes:
        features: float16 [N, d, ĥ, ŵ].
        scenes: what the pictures show.
    """

    features: NDArray[np.float16]
    scenes: list[Scene]


class TextToBits(nn.Module):
    """Text encoder and transformer: token ids to the logits of all bits."""

    def __init__(self, encoder: TextEncoderSpec, model: TextModelSpec) -> None:
        super().__init__()
        self.text_encoder = T5Encoder(encoder)
        self.transformer = InfinityTransformer(model)

    def forward(
        self, ids_BS: Tensor, lengths_B: Tensor, dropped_B: Tensor, inputs: list[Tensor]
    ) -> Tensor:
        """Return the raw logits [B, T, 2e]; rows that are dropped see no text but its length."""
        mask = torch.arange(ids_BS.shape[1]) < lengths_B[:, None]
        features = self.text_encoder(ids_BS, mask)
        untold = self.transformer.cfg_uncond[: ids_BS.shape[1]]
        features = torch.where(dropped_B[:, None, None], untold, features)
        logits: Tensor = self.transformer(inputs, self.transformer.condition(features, lengths_B))
        return logits


@torch.no_grad()
def encode_set(
    model: BitTokenizer, count: int, log: Log, file: Path | None = None, seed: int = TRAINING_SEED
) -> Latents:
    """Draw and encode `count` training pictures; where `file` is there, their latents are read.

    `file` is written where it is not there.
    """
    sets = [(min(TRAINING_CHUNK, count - n), seed + n) for n in range(0, count, TRAINING_CHUNK)]
    if file is not None and file.is_file():
        kept = [scene for size, first in sets for scene, _ in scenes(size, first)]
        return Latents(np.load(file), kept)
    parts, kept, start = [], [], time.process_time()
    for size, first in sets:
        images, shown = draw_training(size, first)
        for batch in np.array_split(images, max(size // 100, 1)):
            parts.append(model.features(to_tensor(batch)).half().numpy())
        kept += shown
        if len(kept) % (10 * TRAINING_CHUNK) == 0 or len(kept) == count:
            log(f"encoded {len(kept)}/{count}  {time.process_time() - start:.0f} s of CPU")
    # the order in memory decides the last digits of what is computed from them
    features = np.ascontiguousarray(np.concatenate(parts))
    if file is not None:
        np.save(file, features)
    return Latents(features, kept)


def init_weights(model: InfinityTransformer) -> None:
    """Initialise with small normal weights; residual gates start near zero, so that every block
    starts as the identity."""
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0].rpartition(".")[2]  # the module that holds the parameter
        if name.endswith("scale_mul_1H11") or "norm" in owner:
            continue
        if parameter.ndim < 2:
            nn.init.zeros_(parameter)
        elif name.endswith(("cfg_uncond", "mat_q")):
            nn.init.trunc_normal_(parameter, std=1.0)
        else:
            # as wide as the input: features of any depth keep their size
            width = parameter.shape[-1]
            nn.init.trunc_normal_(parameter, std=0.6 * width**-0.5)
    width = model.spec.transformer.width
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ada_gss"):
                parameter.zero_()
                parameter[:, :, :2].fill_(0.05)
            elif "ada_lin" in name and name.endswith("weight"):
                parameter.mul_(0.3)
                if "head_nm" not in name:
                    parameter[: 2 * width].mul_(0.1)
            elif name.endswith(("pos_start", "lvl_embed.weight")) or (
                name.startswith("blocks.") and name.endswith(".ca.proj.weight")
            ):
                parameter.mul_(0.3)
            elif name == "head.weight":
                parameter.mul_(0.05)


def train_transformer(
    recipe: Recipe,
    spec: TextModelSpec,
    tokenizer: BitTokenizer,
    text_encoder: T5Encoder,
    log: Log,
    checkpoint: Path | None = None,
    latents_file: Path | None = None,
) -> TextToBits:
    """Train teacher-forced, from a text encoder that can read; return the moving average of the
    weights."""
    latents = encode_set(tokenizer, recipe.transformer_images, log, latents_file)
    words = PromptTokenizer(tokenizer_json(vocabulary()), text_encoder.spec.length)
    torch.manual_seed(recipe.seed + 1)
    model = TextToBits(text_encoder.spec, spec)
    init_weights(model.transformer)
    model.text_encoder.load_state_dict(text_encoder.state_dict())
    average = copy.deepcopy(model).eval()
    steps = recipe.transformer_steps
    optimizers = Optimizers(
        model.named_parameters(),
        rate=recipe.transformer_rate,
        steps=steps,
        decay=recipe.weight_decay,
        tables=TABLES,
    )
    weights = scale_weights(spec)

    def take(step: int) -> dict[str, float]:
        rng = np.random.default_rng([recipe.seed, 5, step])
        picks = rng.integers(len(latents.features), size=recipe.transformer_batch)
        texts = [caption(latents.scenes[i], rng) for i in picks]
        ids, lengths = tokenize(words, texts, rng, recipe.unknown_words)
        dropped = torch.from_numpy(rng.random(len(picks)) < recipe.text_dropout)
        random = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            features = torch.from_numpy(latents.features[picks]).float()
            bits = quantize(tokenizer, features, recipe.flips, random)
        logits = model(ids, lengths, dropped, bits.inputs)
        losses = bit_losses(logits, torch.cat(bits.bits, dim=1))
        optimizers.step((losses * weights).mean())
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        told = losses.detach()[~dropped]
        return {"loss": float(told.mean()), "first scales": float(told[:, : 1 + 4 + 9].mean())}

    parts: dict[str, nn.Module] = {"model": model, "average": average}
    run_steps("transformer", steps, take, parts, optimizers, log, checkpoint)
    return average.requires_grad_(False)


def bit_losses(logits_BTV: Tensor, bits_BTe: Tensor) -> Tensor:
    """Return the mean cross entropy of each token's bits, in nats [B, T].

    The two logits of a bit are a softmax of two, so only their difference counts.
    """
    pairs: Tensor = logits_BTV.unflatten(-1, (-1, 2))
    difference = pairs[..., 1] - pairs[..., 0]
    losses = F.binary_cross_entropy_with_logits(difference, bits_BTe, reduction="none")
    return losses.mean(dim=-1)


def scale_weights(spec: TextModelSpec) -> Tensor:
    """Return the weight of each token in the loss [T], 1 in the mean: the square root of what
    would give every scale the same, since the first scales decide what is shown."""
    lengths = torch.tensor(spec.scale_lengths)
    weights = lengths.float().rsqrt().repeat_interleave(lengths)
    return weights / weights.mean()

"""Trains the text encoder to read: what is shown, in which colour and size, and where.

The text encoders of released models were trained on text before any picture was drawn from their
features; this is the same in small. Learned queries attend to the features of a sentence, as the
tokens of a picture do later, and each answers one question. So the features of a noun have to say
what colour it has, and whether it stands to the left or above.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.pocket.optimizers import Optimizers
from tools.pocket_text.captions import caption, vocabulary
from tools.pocket_text.checkpoints import Log, run_steps
from tools.pocket_text.recipe import Recipe
from tools.pocket_text.scenes import (
    BACKGROUNDS,
    PLACES,
    SIZES,
    TIMES,
    Scene,
    direction,
    in_order,
    scenes,
)
from tools.pocket_text.things import COLOUR_NAMES, THINGS
from tools.pocket_text.words import tokenize, tokenizer_json
from var_deploy.export.models.t5 import BIAS_TABLE, T5Encoder
from var_deploy.spec import TextEncoderSpec
from var_deploy.text.prompt_tokenizer import PromptTokenizer

READING_SEED = 30_000_000  # of the scenes to read about: step i has those of seed READING_SEED + i
NOTHING = "nothing"  # where a second thing is asked for
# parts of the names of parameters that are looked up row by row
TABLES = ("shared.weight", "attention_bias", "queries")
# "first" is the left or upper thing of two, or the only one
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    **{"first": THINGS, "first colour": COLOUR_NAMES, "first size": SIZES},
    **{"second": (*THINGS, NOTHING), "second colour": (*COLOUR_NAMES, NOTHING)},
    **{"second size": (*SIZES, NOTHING), "where": (*PLACES, "beside", "stacked")},
    **{"background": BACKGROUNDS, "time": TIMES},
}
NEAR, FAR = 0.6, 0.05  # slopes of the first position biases
AWAY = -5.0  # first bias of the other direction


class QuestionAnswering(nn.Module):
    """A text encoder, and a question that attends to its features for each of QUESTIONS."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        width = spec.width
        self.encoder = T5Encoder(spec)
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = nn.ModuleList(nn.Linear(width, len(names)) for names in QUESTIONS.values())

    def forward(self, ids_BS: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """Return the logits of the answers to each question, [B, names]."""
        mask = torch.arange(ids_BS.shape[1]) < lengths_B[:, None]
        features = self.encoder(ids_BS, mask)
        scores = self.queries @ self.key(features).mT * self.key.in_features**-0.5
        attention = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
        found = attention @ self.value(features)
        return [head(found[:, n]) for n, head in enumerate(self.heads)]


def right_answers(scene: Scene) -> dict[str, str]:
    """Return the right answer to each of QUESTIONS."""
    first, *others = in_order(scene)
    second = others[0] if others else None
    where = scene.place if second is None else direction(scene)
    return {
        **{"first": first.thing, "first colour": first.colour, "first size": first.size},
        "second": second.thing if second else NOTHING,
        "second colour": second.colour if second else NOTHING,
        "second size": second.size if second else NOTHING,
        **{"where": where, "background": scene.background, "time": scene.time},
    }


def targets(shown: list[Scene]) -> list[Tensor]:
    """Return the number of the right answer to each question, [N]."""
    right = [right_answers(scene) for scene in shown]
    return [
        torch.tensor([names.index(row[question]) for row in right])
        for question, names in QUESTIONS.items()
    ]


def init_text_encoder(model: T5Encoder) -> None:
    """Initialise with small normal weights, and position biases that look one way.

    Half of the heads begin with what stands before a word, half with what comes after it, near or
    far, as in ALiBi (arXiv 2108.12409). With small random biases an encoder of this size does not
    learn the order of words: after 600 steps it read 36 of 100 pairs in their order, with these
    99 after 200.
    """
    spec = model.spec
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue  # norms
            std = 1.0 if name.endswith("shared.weight") else 0.6 * parameter.shape[-1] ** -0.5
            nn.init.trunc_normal_(parameter, std=std)
            if name.endswith("SelfAttention.q.weight"):
                # T5 does not divide its scores by the root of the head's width
                parameter.mul_(spec.head_width**-0.5)
        half = spec.buckets // 2
        bucket = torch.arange(half, dtype=torch.float32)
        exact = half // 2
        # the least distance of each bucket: the inverse of `bucket_of`
        far = exact * (spec.max_distance / exact) ** ((bucket - exact) / (half - exact))
        distance = torch.where(bucket < exact, bucket, far)
        table = model.get_parameter(BIAS_TABLE)  # what comes after a word is in the second half
        for head in range(spec.heads):
            slope = (FAR, NEAR)[head // 2 % 2]
            sides = (-slope * distance, torch.full((half,), AWAY))
            table[:, head] = torch.cat(sides if head % 2 == 0 else sides[::-1])


def train_text_encoder(
    recipe: Recipe, spec: TextEncoderSpec, log: Log, checkpoint: Path | None = None
) -> T5Encoder:
    """Train an encoder on sentences about training scenes; see `run_steps` for the checkpoint."""
    torch.manual_seed(recipe.seed + 2)
    model = QuestionAnswering(spec)
    init_text_encoder(model.encoder)
    words = PromptTokenizer(tokenizer_json(vocabulary()), spec.length)
    steps = recipe.text_encoder_steps
    optimizers = Optimizers(
        model.named_parameters(),
        rate=recipe.text_encoder_rate,
        steps=steps,
        decay=recipe.weight_decay,
        tables=TABLES,
    )

    def take(step: int) -> dict[str, float]:
        drawn = list(scenes(recipe.text_encoder_batch, READING_SEED + step))
        texts = [caption(scene, rng) for scene, rng in drawn]
        rng = np.random.default_rng([recipe.seed, 6, step])
        logits = model(*tokenize(words, texts, rng, recipe.unknown_words))
        right = targets([scene for scene, _ in drawn])
        losses = [F.cross_entropy(*each) for each in zip(logits, right, strict=True)]
        optimizers.step(torch.stack(losses).mean())
        answered = [
            (one.argmax(dim=1) == other).float().mean()
            for one, other in zip(logits, right, strict=True)
        ]
        return {"right": float(torch.stack(answered).mean())}

    run_steps("text-encoder", steps, take, {"model": model}, optimizers, log, checkpoint)
    return model.encoder

"""The classifier that evaluates pocket-text: what a picture shows, and where.

Two small networks of one form, each with several answers: one for pictures of one thing (thing,
colour, size, place, background, time), one for pictures of two (thing, colour and size of each,
and the relation). Which of the two a picture goes to is what its sentence asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tools.pocket.fit_classifier import moved_and_blurred
from tools.pocket.fit_tokenizer import to_tensor
from tools.pocket.optimizers import Optimizers
from tools.pocket_text.checkpoints import Log
from tools.pocket_text.recipe import Recipe
from tools.pocket_text.scenes import (
    BACKGROUNDS,
    PLACES,
    TIMES,
    Scene,
    any_scene,
    direction,
    draw_scene,
    in_order,
)
from tools.pocket_text.things import COLOUR_NAMES, THINGS

Images = NDArray[np.uint8]
Names = Mapping[str, tuple[str, ...]]
CLASSIFIER_SEED = Recipe().held_out_seed + 1  # of the drawings that the classifier learns from
CHECK_SEED = Recipe().held_out_seed + 2  # of the drawings that it is tested with

_AROUND: Names = {"background": BACKGROUNDS, "time": TIMES}
ALONE: Names = {"thing": THINGS, "colour": COLOUR_NAMES, "place": PLACES, **_AROUND}
# of a pair "first" and "second" are the left or upper thing and the other
PAIR: Names = {
    **{"first": THINGS, "first colour": COLOUR_NAMES},
    **{"second": THINGS, "second colour": COLOUR_NAMES},
    **{"across": ("beside", "stacked"), **_AROUND},
}


def answers(scene: Scene) -> dict[str, str]:
    """Return the right answers for a scene, under the names of ALONE or of PAIR."""
    around = {"background": scene.background, "time": scene.time}
    if len(scene.items) == 1:
        item = scene.items[0]
        return {"thing": item.thing, "colour": item.colour, "place": scene.place, **around}
    first, second = in_order(scene)
    return {
        **{"first": first.thing, "first colour": first.colour},
        **{"second": second.thing, "second colour": second.colour},
        **{"across": direction(scene), **around},
    }


class SceneClassifier(nn.Module):
    """A convolution network with one linear head per question."""

    def __init__(self, questions: Names, width: int = 32) -> None:
        super().__init__()
        self.questions = questions
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.hidden = nn.Linear(widths[-1] * 16, 6 * width)  # a 4 × 4 map: it knows where
        self.heads = nn.Linear(6 * width, sum(map(len, questions.values())))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures [B, 3, 64, 64] in [-1, 1] → logits [B, names] of each question."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        logits = self.heads(F.silu(self.hidden(x.flatten(1))))
        parts = logits.split([len(names) for names in self.questions.values()], dim=1)
        return dict(zip(self.questions, parts, strict=True))

    @torch.no_grad()
    def predict(self, images: Images) -> list[dict[str, str]]:
        """Pictures uint8 [N, 64, 64, 3] → the answer to each question, by its name."""
        found: list[dict[str, str]] = [{} for _ in images]
        for first in range(0, len(images), 250):
            logits = self(to_tensor(images[first : first + 250]))
            for question, values in logits.items():
                for i, index in enumerate(values.argmax(dim=1).tolist(), first):
                    found[i][question] = self.questions[question][index]
        return found


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Distort pictures [B, 3, S, S] in [-1, 1] in ways in which a generator's may differ, and that
    change no answer: moved by up to two pixels, blurred, lighter or darker, and noisy."""
    x = moved_and_blurred(x, random)
    gain, lift, noise = torch.rand(3, len(x), 1, 1, 1, generator=random)
    x = x * (0.9 + 0.2 * gain) + 0.1 * (lift - 0.5)
    out: Tensor = x + 0.1 * noise * torch.randn(x.shape, generator=random)
    return out


def draw_any(count: int, seed: int, things: int) -> tuple[Images, list[Scene]]:
    """Draw `count` scenes with one or two things, of all combinations, held out or not."""
    images, kept = [], []
    for i in range(count):
        rng = np.random.default_rng([seed, things, i])
        scene = any_scene(rng)
        while len(scene.items) != things:
            scene = any_scene(rng)
        images.append(draw_scene(scene, rng))
        kept.append(scene)
    return np.stack(images), kept


def targets(shown: list[Scene], questions: Names) -> dict[str, Tensor]:
    """Return the number of the right answer to each question, [N]."""
    right = [answers(scene) for scene in shown]
    return {
        question: torch.tensor([names.index(row[question]) for row in right])
        for question, names in questions.items()
    }


def train_classifier(
    questions: Names, recipe: Recipe, log: Log, seed: int = CLASSIFIER_SEED
) -> SceneClassifier:
    """Fit a classifier for pictures of one thing (ALONE) or of two (PAIR)."""
    things = 2 if questions is PAIR else 1
    images, shown = draw_any(recipe.classifier_images, seed, things)
    right = targets(shown, questions)
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SceneClassifier(questions)
    steps = recipe.classifier_steps
    optimizers = Optimizers(model.named_parameters(), rate=3e-3, steps=steps, decay=0.05)
    for step in range(steps):
        picks = torch.randint(len(images), (64,), generator=random)
        logits = model(augment(to_tensor(images[picks.numpy()]), random))
        losses = [
            F.cross_entropy(values, right[question][picks], label_smoothing=0.02)
            for question, values in logits.items()
        ]
        optimizers.step(torch.stack(losses).sum())
        if step % 100 == 0 or step == steps - 1:
            parts = "  ".join(
                f"{name} {float(loss.detach()):.3f}"
                for name, loss in zip(questions, losses, strict=True)
            )
            log(f"classifier {step:5d}/{steps}  {parts}")
    return model.requires_grad_(False).eval()


def accuracies(model: SceneClassifier, images: Images, shown: list[Scene]) -> dict[str, float]:
    """Return the share of right answers to each question."""
    found = model.predict(images)
    right = [answers(scene) for scene in shown]
    pairs = list(zip(found, right, strict=True))
    return {q: float(np.mean([a[q] == b[q] for a, b in pairs])) for q in model.questions}

"""Trains the classifier that evaluates pocket, on drawings and their distortions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.pocket.drawings import draw_set
from tools.pocket.recipe import Recipe
from var_deploy.export.pocket.classifier import PocketClassifier, pool

CLASSIFIER_SEED = Recipe().held_out_seed + 1  # seed of the drawings that the classifier learns from
CHECK_SEED = Recipe().held_out_seed + 2  # seed of the drawings that the classifier is tested with


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Distort pictures [B, 3, S, S] in [0, 1] in the ways in which a generator's may differ.

    Mirrored, moved by up to two pixels, blurred, with other saturation, brightness and contrast,
    and noisy; blur and mirror are drawn for the batch, the rest for each picture.
    """

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(x), channels, 1, 1, generator=random)

    if torch.rand((), generator=random) < 0.5:
        x = x.flip(3)
    x = moved_and_blurred(x, random)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * uniform(0.0, 1.3)
    x = x * uniform(0.75, 1.25, 3) + uniform(-0.1, 0.1)
    return (x + uniform(0.0, 0.05) * torch.randn(x.shape, generator=random)).clamp(0, 1)


def moved_and_blurred(x: Tensor, random: torch.Generator) -> Tensor:
    """Move pictures [B, C, S, S] by up to two pixels, and blur them in half of all calls."""
    side = x.shape[-1]
    top, left = torch.randint(0, 5, (2,), generator=random).tolist()
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, top : top + side, left : left + side]
    if torch.rand((), generator=random) < 0.5:
        small = int(torch.randint(side // 2, side, (), generator=random))
        x = F.interpolate(x, size=(small, small), mode="bilinear", antialias=True)
        x = F.interpolate(x, size=(side, side), mode="bilinear")
    return x


def train_classifier(
    count: int = Recipe().classifier_images,
    seed: int = CLASSIFIER_SEED,
    steps: int = Recipe().classifier_steps,
    log: Callable[[str], None] | None = None,
) -> PocketClassifier:
    """Fit a classifier to `count` drawn pictures; about half a minute on one core.

    The seed draws the pictures, the first weights and the distortions: the same one gives the
    same classifier. The global random state is left alone.
    """
    images, labels = draw_set(count, seed)
    pooled, targets = pool(images), torch.from_numpy(labels)
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = PocketClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        picks = torch.randint(count, (64,), generator=random)
        logits = classifier(augment(pooled[picks], random))
        loss = F.cross_entropy(logits, targets[picks], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if log is not None and (step % 100 == 0 or step == steps - 1):
            log(f"classifier {step:4d}/{steps}  loss {loss.item():.4f}")
    return classifier.eval().requires_grad_(False)

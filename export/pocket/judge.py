"""Judges the pictures that pocket generates: right class, varied, not copied, sharply coded.

`python -m var_deploy.export.pocket.judge BUNDLE` prints the report. Whatever is drawn here to judge
with comes from seeds next to `Recipe.held_out_seed`, training images from `Recipe.seed` and from
TRAINING_SEED on. Every picture has a random stream of its own, spawned from its seed and its place
in the set, so sets of different seeds share no picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.pocket.drawings import CLASS_NAMES, draw_set
from var_deploy.export.pocket.recipe import Recipe

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Distances = NDArray[np.float32]

JUDGE_SEED = Recipe().held_out_seed + 1  # what the judge learns from
CHECK_SEED = Recipe().held_out_seed + 2  # what it is checked with
TRAINING_SEED = 10_000_001  # the transformer learns from sets of 1000 with seeds this, + 1000, …
TRAINING_CHUNK = 1000


class Judge(nn.Module):
    """Classifier of drawn things that looks at 32×32 pixels, where crispness no longer shows."""

    def __init__(self, classes: int = len(CLASS_NAMES), width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1:])
        self.hidden = nn.Linear(widths[-1] * 4, 4 * width)  # from a 2×2 map: place tells little
        self.head = nn.Linear(4 * width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Pooled pictures [B, 3, 32, 32] in [0, 1] → features [B, F]."""
        x = 2 * x - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        out: Tensor = F.silu(self.hidden(F.avg_pool2d(x, 2).flatten(1)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Pooled pictures [B, 3, 32, 32] in [0, 1] → logits [B, classes]."""
        out: Tensor = self.head(self.embed(x))
        return out

    @torch.no_grad()
    def features(self, images: Images) -> NDArray[np.float32]:
        """uint8 [N, 64, 64, 3] → the activations before the last layer, float32 [N, F]."""
        parts = [self.embed(pool(part)) for part in _batches(images)]
        return torch.cat(parts).numpy()

    def predict(self, images: Images) -> Labels:
        """uint8 [N, 64, 64, 3] → labels int64 [N]."""
        with torch.no_grad():
            return self.head(torch.from_numpy(self.features(images))).argmax(dim=1).numpy()


def pool(images: Images) -> Tensor:
    """uint8 [B, 64, 64, 3] → float [B, 3, 32, 32] in [0, 1], averaged over 2×2 pixels."""
    return F.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, 2)


def _batches(images: Images, size: int = 250) -> list[Images]:
    return [images[first : first + size] for first in range(0, len(images), size)]


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Distort pictures [B, 3, S, S] in [0, 1] in the ways in which a generator's may differ.

    Mirrored, moved by up to two pixels, blurred, with other saturation, brightness and contrast,
    and noisy; blur and mirror are drawn for the batch, the rest for each picture.
    """
    batch, _, side, _ = x.shape

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(batch, channels, 1, 1, generator=random)

    if torch.rand((), generator=random) < 0.5:
        x = x.flip(3)
    top, left = torch.randint(0, 5, (2,), generator=random).tolist()
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, top : top + side, left : left + side]
    if torch.rand((), generator=random) < 0.5:
        small = int(torch.randint(side // 2, side, (), generator=random))
        x = F.interpolate(x, size=(small, small), mode="bilinear", antialias=True)
        x = F.interpolate(x, size=(side, side), mode="bilinear")
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * uniform(0.3, 1.3)
    x = x * uniform(0.75, 1.25, 3) + uniform(-0.1, 0.1)
    return (x + uniform(0.0, 0.05) * torch.randn(x.shape, generator=random)).clamp(0, 1)


def train_judge(
    count: int = 4000,
    seed: int = JUDGE_SEED,
    steps: int = 700,
    log: Callable[[str], None] | None = None,
) -> Judge:
    """Fit a judge to `count` drawn pictures; under half a minute on one core.

    The seed draws the pictures, the first weights and the distortions: the same one gives the
    same judge. The global random state is left alone.
    """
    images, labels = draw_set(count, seed)
    pooled, targets = pool(images), torch.from_numpy(labels)
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        picks = torch.randint(count, (64,), generator=random)
        logits = judge(augment(pooled[picks], random))
        loss = F.cross_entropy(logits, targets[picks], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if log is not None and (step % 100 == 0 or step == steps - 1):
            log(f"judge {step:4d}/{steps}  loss {loss.item():.4f}")
    return judge.eval().requires_grad_(False)


def accuracy(judge: Judge, images: Images, labels: Labels) -> float:
    """Share of the pictures that the judge names right."""
    return float((judge.predict(images) == labels).mean())

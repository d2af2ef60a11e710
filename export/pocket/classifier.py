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
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from var_deploy.errors import CheckpointError, UsageError, VarDeployError, one_line
from var_deploy.export.checkpoint import build_modules, load_model
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.pocket.drawings import CLASS_NAMES, draw_set
from var_deploy.export.pocket.fit_transformer import TRAINING_CHUNK, TRAINING_SEED
from var_deploy.export.pocket.recipe import Recipe
from var_deploy.pipeline import Pipeline

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Distances = NDArray[np.float32]

JUDGE_FILE = Path(__file__).parent / "judge.safetensors"
JUDGE_SEED = Recipe().held_out_seed + 1  # what the judge learns from
CHECK_SEED = Recipe().held_out_seed + 2  # what it is checked with


class Judge(nn.Module):
    """Classifier of drawn things that looks at 32×32 pixels, where crispness no longer shows."""

    def __init__(self, classes: int = len(CLASS_NAMES), width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
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
            logits = self.head(torch.from_numpy(self.features(images)))
        labels: Labels = logits.argmax(dim=1).numpy()
        return labels


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
    x = grey + (x - grey) * uniform(0.0, 1.3)
    x = x * uniform(0.75, 1.25, 3) + uniform(-0.1, 0.1)
    return (x + uniform(0.0, 0.05) * torch.randn(x.shape, generator=random)).clamp(0, 1)


def train_judge(
    count: int = Recipe().judge_images,
    seed: int = JUDGE_SEED,
    steps: int = Recipe().judge_steps,
    log: Callable[[str], None] | None = None,
) -> Judge:
    """Fit a judge to `count` drawn pictures; about half a minute on one core.

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
        loss.backward()
        optimizer.step()
        schedule.step()
        if log is not None and (step % 100 == 0 or step == steps - 1):
            log(f"judge {step:4d}/{steps}  loss {loss.item():.4f}")
    return judge.eval().requires_grad_(False)


def load_judge(path: Path = JUDGE_FILE) -> Judge:
    """The judge that ships in the package: rounded to fp16, computed in fp32.

    Raises CheckpointError where the file is missing or no judge.
    """
    judge = Judge()
    try:
        judge.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        why = f"{path} is not pocket's judge ({one_line(error)})"
        raise CheckpointError(f"{why}; make train makes it") from None
    return judge.eval().requires_grad_(False)


def accuracy(judge: Judge, images: Images, labels: Labels) -> float:
    """Share of the pictures that the judge names right."""
    return float((judge.predict(images) == labels).mean())


def nearest_distance(samples: Images, references: Images, chunk: int = 500) -> Distances:
    """Root mean square pixel difference (0..255) of each sample to its nearest reference, [N]."""
    rows, others = (torch.from_numpy(x).flatten(1) for x in (samples, references))
    centred = rows.float() - 127.5
    best = torch.full((len(rows),), torch.inf)
    nearest = torch.zeros(len(rows), dtype=torch.int64)
    for first in range(0, len(others), chunk):
        part = others[first : first + chunk].float() - 127.5
        # |a - b|² less |a|², which is the same for every b
        distance, index = (part.square().sum(1) - 2 * centred @ part.T).min(dim=1)
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], index[closer] + first
    # the expanded square loses digits near zero, where copies lie: measured again, plainly
    squares = (rows.float() - others[nearest].float()).square()
    return squares.mean(dim=1).sqrt().numpy()


def _pairwise(images: Images) -> Tensor:
    """Root mean square differences (0..255) of all pairs [N, N]."""
    rows = torch.from_numpy(images).flatten(1).double()
    plain = "donot_use_mm_for_euclid_dist"
    distance: Tensor = torch.cdist(rows, rows, compute_mode=plain) / rows.shape[1] ** 0.5
    return distance


def diversity(images: Images) -> float:
    """Mean root mean square difference (0..255) of all pairs of pictures of one class."""
    count = len(images)
    return float(_pairwise(images).sum() / (count * (count - 1)))


def spacing(images: Images) -> float:
    """Mean distance to the nearest other picture of one class: small where a few are repeated."""
    return float(_pairwise(images).fill_diagonal_(torch.inf).min(dim=1).values.mean())


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Images) -> Images:
    """Pictures [N, 64, 64, 3] encoded to the tokens of all scales and decoded again."""
    parts = []
    for part in _batches(images, 50):
        image = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = tokenizer.decode(tokenizer.accumulate(tokenizer.encode(image)))
        levels = ((decoded + 1) * 127.5).round().to(torch.uint8)
        parts.append(levels.permute(0, 2, 3, 1).contiguous().numpy())
    return np.concatenate(parts)


def psnr(images: Images, others: Images) -> float:
    """Mean of each picture's peak signal-to-noise ratio in dB, peak 255."""
    squares = np.square(images.astype(np.float32) - others.astype(np.float32))
    error = squares.reshape(len(images), -1).mean(axis=1)
    # two equal pictures count as one grey level off in one value, not as infinitely good
    floor = 1 / squares[0].size
    return float((10 * np.log10(255**2 / np.maximum(error, floor))).mean())


def tokenizer_psnr(tokenizer: Tokenizer, images: Images) -> float:
    """Mean reconstruction PSNR in dB through all scales, on pictures as 8-bit files hold them."""
    return psnr(images, reconstruct(tokenizer, images))


def training_images(count: int) -> Images:
    """The first `count` pictures [count, 64, 64, 3] that the transformer learned from."""
    starts = range(0, count, TRAINING_CHUNK)
    sets = [
        draw_set(min(TRAINING_CHUNK, count - start), TRAINING_SEED + start)[0] for start in starts
    ]
    return np.concatenate(sets)


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """One class: share named right, and how its samples vary (as drawings do)."""

    name: str
    accuracy: float
    diversity: float
    drawn_diversity: float
    spacing: float
    drawn_spacing: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """How good pocket is.

    Attributes:
        judge_accuracy: of the judge itself, on drawings that it has not learned from.
        accuracy: share of the samples that it names as intended.
        psnr: of the tokenizer on held-out drawings, dB.
        nearest: distance of each sample to the nearest training picture, [N].
        fresh_nearest: that of as many fresh drawings. The training pictures and the drawings are
            taken through the tokenizer first: what the transformer was shown, so that a sample
            learned by heart lies at 0, and none is near only because it is as smooth.
    """

    judge_accuracy: float
    accuracy: float
    classes: tuple[ClassReport, ...]
    psnr: float
    nearest: Distances
    fresh_nearest: Distances

    def table(self) -> str:
        """The report as lines to print."""
        lines = [f"{'class':10s}{'accuracy':>10s}{'diversity':>11s}{'drawn':>7s}"]
        lines[0] += f"{'spacing':>10s}{'drawn':>7s}"
        lines += [
            f"{c.name:10s}{c.accuracy:10.1%}{c.diversity:11.1f}{c.drawn_diversity:7.1f}"
            f"{c.spacing:10.1f}{c.drawn_spacing:7.1f}"
            for c in self.classes
        ]
        points = (0, 1, 5, 50)
        heading = "".join(f"{'least' if p == 0 else f'{p} %':>8s}" for p in points)
        lines += [
            f"{'all':10s}{self.accuracy:10.1%}   ({len(self.nearest)} samples; the judge itself "
            f"reaches {self.judge_accuracy:.2%} on drawings)",
            "",
            f"distance to the nearest training picture{heading}",
        ]
        for name, distances in (("samples", self.nearest), ("fresh drawings", self.fresh_nearest)):
            values = "".join(f"{v:8.1f}" for v in np.percentile(distances, points))
            lines.append(f"{name:40s}{values}")
        return "\n".join([*lines, "", f"tokenizer PSNR on held-out drawings: {self.psnr:.2f} dB"])


def measure(
    judge: Judge, tokenizer: Tokenizer, samples: Images, *, references: int = 2000
) -> Report:
    """Judge samples [N, 64, 64, 3] of the classes 0..9 in turn against as many fresh drawings."""
    drawn, labels = draw_set(len(samples), Recipe().held_out_seed)
    check, check_labels = draw_set(1000, CHECK_SEED)
    coded = reconstruct(tokenizer, drawn)
    shown = reconstruct(tokenizer, training_images(references))
    named = judge.predict(samples)
    classes = tuple(
        ClassReport(
            name=name,
            accuracy=float((named[labels == c] == c).mean()),
            diversity=diversity(samples[labels == c]),
            drawn_diversity=diversity(drawn[labels == c]),
            spacing=spacing(samples[labels == c]),
            drawn_spacing=spacing(drawn[labels == c]),
        )
        for c, name in enumerate(CLASS_NAMES)
    )
    return Report(
        judge_accuracy=accuracy(judge, check, check_labels),
        accuracy=float((named == labels).mean()),
        classes=classes,
        psnr=psnr(drawn, coded),
        nearest=nearest_distance(samples, shown),
        fresh_nearest=nearest_distance(coded, shown),
    )


def shipped_tokenizer() -> Tokenizer:
    """The tokenizer that ships in the package. Raises CheckpointError where it is missing."""
    return build_modules(load_model("pocket"))[0]


def generate_samples(bundle: Path, count: int, seed: int = 0) -> Images:
    """`count` pictures of the classes 0..9 in turn through the bundle, at its default settings.

    Raises UsageError where the bundle is not one of pocket.
    """
    with Pipeline.load(bundle) as pipe:
        if pipe.manifest.labels != CLASS_NAMES:
            raise UsageError(f"{bundle} does not hold pocket's classes; export pocket and judge it")
        return pipe.generate([i % len(CLASS_NAMES) for i in range(count)], seed=seed)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--samples", type=click.IntRange(min=20), default=500, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(bundle: Path, samples: int, seed: int) -> None:
    """Judge pictures generated through BUNDLE, exported from the shipped weights of pocket."""

    def log(line: str) -> None:
        click.echo(f"{line}  {time.monotonic() - start:.0f} s", err=True)

    start = time.monotonic()
    try:
        images = generate_samples(bundle, samples, seed)
        log(f"generated {samples} samples with seed {seed}")
        report = measure(load_judge(), shipped_tokenizer(), images)
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None
    click.echo(report.table())


if __name__ == "__main__":
    main()

"""Evaluates the pictures that pocket generates: right class, varied, not copied, sharply coded.

`python -m tools.pocket.evaluate BUNDLE` prints the report. Drawings for the evaluation come from
seeds next to `Recipe.held_out_seed`, training images from `Recipe.seed` and from TRAINING_SEED on.
Every picture has a random stream of its own, spawned from its seed and its place in the set, so
sets of different seeds share no picture.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.pocket.drawings import draw_set
from tools.pocket.fit_classifier import CHECK_SEED
from tools.pocket.fit_transformer import TRAINING_CHUNK, TRAINING_SEED
from tools.pocket.recipe import Recipe
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.export.checkpoint.assemble import build_modules, load_model
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.pocket.classifier import (
    Images,
    PocketClassifier,
    accuracy,
    batches,
    load_classifier,
)
from var_deploy.export.pocket.model import CLASS_NAMES
from var_deploy.image.images import psnr as image_psnr
from var_deploy.pipeline import Pipeline

Distances = NDArray[np.float32]


def nearest_distance(samples: Images, references: Images, chunk: int = 500) -> Distances:
    """Return the root mean square pixel difference (0..255) of each sample to its nearest
    reference, [N]."""
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
    """Return the root mean square differences (0..255) of all pairs, [N, N]."""
    rows = torch.from_numpy(images).flatten(1).double()
    plain = "donot_use_mm_for_euclid_dist"
    distance: Tensor = torch.cdist(rows, rows, compute_mode=plain) / rows.shape[1] ** 0.5
    return distance


def diversity(images: Images) -> float:
    """Return the mean root mean square difference (0..255) of all pairs of pictures of one
    class."""
    count = len(images)
    return float(_pairwise(images).sum() / (count * (count - 1)))


def spacing(images: Images) -> float:
    """Return the mean distance to the nearest other picture of one class; repeated pictures make it
    small."""
    return float(_pairwise(images).fill_diagonal_(torch.inf).min(dim=1).values.mean())


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer | BitTokenizer, images: Images) -> Images:
    """Encode pictures [N, 64, 64, 3] to the tokens of all scales and decode them again."""
    parts = []
    for part in batches(images, 50):
        image = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = tokenizer.decode(tokenizer.accumulate(tokenizer.encode(image)))
        levels = ((decoded + 1) * 127.5).round().to(torch.uint8)
        parts.append(levels.permute(0, 2, 3, 1).contiguous().numpy())
    return np.concatenate(parts)


def psnr(images: Images, others: Images) -> float:
    """Return the mean of each picture's peak signal-to-noise ratio in dB, peak 255."""
    # two equal pictures count as one grey level off in one value, not as infinitely good
    most = 10 * np.log10(255**2 * images[0].size)
    pairs = zip(images / np.float32(255), others / np.float32(255), strict=True)
    return float(np.mean([min(most, image_psnr(*pair)) for pair in pairs]))


def tokenizer_psnr(tokenizer: Tokenizer, images: Images) -> float:
    """Return the mean reconstruction PSNR in dB through all scales, on pictures as 8-bit files hold
    them."""
    return psnr(images, reconstruct(tokenizer, images))


def training_images(count: int) -> Images:
    """Return the first `count` pictures [count, 64, 64, 3] that the transformer learned from."""
    starts = range(0, count, TRAINING_CHUNK)
    sets = [
        draw_set(min(TRAINING_CHUNK, count - start), TRAINING_SEED + start)[0] for start in starts
    ]
    return np.concatenate(sets)


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """Measurements of one class: share classified correctly, and variety beside that of
    drawings."""

    name: str
    accuracy: float
    diversity: float
    drawn_diversity: float
    spacing: float
    drawn_spacing: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of pocket: classes, variety, copies and reconstruction.

    Attributes:
        classifier_accuracy: of the classifier itself, on drawings that it has not learned from.
        accuracy: share of the samples that it names as intended.
        psnr: of the tokenizer on held-out drawings, dB.
        nearest: distance of each sample to the nearest training picture, [N].
        fresh_nearest: that of as many fresh drawings. The training pictures and the drawings are
            taken through the tokenizer first: what the transformer was shown, so that a sample
            learned by heart lies at 0, and none is near only because it is as smooth.
    """

    classifier_accuracy: float
    accuracy: float
    classes: tuple[ClassReport, ...]
    psnr: float
    nearest: Distances
    fresh_nearest: Distances

    def table(self) -> str:
        """Return the evaluation as lines to print."""
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
            f"{'all':10s}{self.accuracy:10.1%}   ({len(self.nearest)} samples; the classifier "
            f"itself reaches {self.classifier_accuracy:.2%} on drawings)",
            "",
            f"distance to the nearest training picture{heading}",
        ]
        for name, distances in (("samples", self.nearest), ("fresh drawings", self.fresh_nearest)):
            values = "".join(f"{v:8.1f}" for v in np.percentile(distances, points))
            lines.append(f"{name:40s}{values}")
        return "\n".join([*lines, "", f"tokenizer PSNR on held-out drawings: {self.psnr:.2f} dB"])


def evaluate(
    classifier: PocketClassifier, tokenizer: Tokenizer, samples: Images, *, references: int = 2000
) -> Evaluation:
    """Compare samples [N, 64, 64, 3] of the classes 0..9 in turn with as many fresh drawings."""
    drawn, labels = draw_set(len(samples), Recipe().held_out_seed)
    check, check_labels = draw_set(1000, CHECK_SEED)
    coded = reconstruct(tokenizer, drawn)
    shown = reconstruct(tokenizer, training_images(references))
    named = classifier.predict(samples)
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
    return Evaluation(
        classifier_accuracy=accuracy(classifier, check, check_labels),
        accuracy=float((named == labels).mean()),
        classes=classes,
        psnr=psnr(drawn, coded),
        nearest=nearest_distance(samples, shown),
        fresh_nearest=nearest_distance(coded, shown),
    )


def shipped_tokenizer() -> Tokenizer:
    """Load the tokenizer that ships in the package. Raises CheckpointError where it is missing."""
    return build_modules(load_model("pocket"))[0]


def generate_samples(bundle: Path, count: int, seed: int = 0) -> Images:
    """Generate `count` pictures of the classes 0..9 in turn, at the bundle's default settings.

    Raises UsageError where the bundle is not one of pocket.
    """
    with Pipeline.load(bundle) as pipe:
        if pipe.manifest.labels != CLASS_NAMES:
            raise UsageError(f"{bundle} does not hold pocket's classes: give a bundle of pocket")
        return pipe.generate([i % len(CLASS_NAMES) for i in range(count)], seed=seed)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--samples", type=click.IntRange(min=20), default=500, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(bundle: Path, samples: int, seed: int) -> None:
    """Evaluate pictures generated through BUNDLE, exported from the shipped weights of pocket."""

    def log(line: str) -> None:
        click.echo(f"{line}  {time.monotonic() - start:.0f} s", err=True)

    start = time.monotonic()
    try:
        images = generate_samples(bundle, samples, seed)
        log(f"generated {samples} samples with seed {seed}")
        report = evaluate(load_classifier(), shipped_tokenizer(), images)
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None
    click.echo(report.table())


if __name__ == "__main__":
    main()

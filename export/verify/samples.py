"""Evaluates int8 on many images: are they still of their class, and of the same distribution?

Single images cannot tell, since one differing token makes another picture. So a classifier
evaluates sets of them, by class accuracy and by the Fréchet distance between its features (Heusel
et al. 2017, arXiv 1706.08500). Both carry noise; a second set of fp32 images, from another seed,
shows how much. Distances depend on the size of the sets (Chong and Forsyth 2020, arXiv 1911.07023),
so they are compared within one study only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import UsageError, VarDeployError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.pocket.classifier import load_classifier
from var_deploy.manifest import Manifest
from var_deploy.pipeline import Pipeline
from var_deploy.progress import Progress
from var_deploy.runtime.request import Request
from var_deploy.sampling import MAX_SEED, numbered

ACCURACY_BOUND = 0.015  # largest difference of int8's class accuracy from fp32's
# with fewer images, chance moves the accuracy by as much as the bound
LEAST_BOUND = 500
LEAST_SAMPLES = 20


class Classifier(Protocol):
    """A classifier of the images of one preset."""

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images [N, H, W, C] → activations before the last layer, [N, F]."""

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Images [N, H, W, C] → labels [N]."""


CLASSIFIERS: Mapping[str, Callable[[], Classifier]] = {"pocket": load_classifier}  # by preset


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Measurements of one set of images, of one precision and seed.

    Attributes:
        accuracy: share that the classifier names as intended.
        to_first, to_second: Fréchet distance to the fp32 images of the first and of the second
            seed, None for the set itself.
    """

    precision: str
    seed: int
    accuracy: float
    to_first: float | None
    to_second: float | None


@dataclass(frozen=True, kw_only=True)
class SampleStudy:
    """Three sets of `count` images: fp32 and int8 from the same seed, fp32 from another one.

    Attributes:
        judge: the preset whose classifier evaluated the images (the key in the manifest).
        bound: largest difference in accuracy that passes; None where too few images were drawn.
    """

    judge: str
    count: int
    fp32: SampleSet
    int8: SampleSet
    noise: SampleSet
    bound: float | None

    @property
    def failure(self) -> str | None:
        """One line, None if int8 is within the bound."""
        if self.bound is None or abs(self.int8.accuracy - self.fp32.accuracy) <= self.bound:
            return None
        return (
            f"{self.int8.accuracy:.1%} are of their class, {self.fp32.accuracy:.1%} in fp32, "
            f"bound {100 * self.bound:g} points"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "failure": self.failure}

    def text(self) -> str:
        """Return a table with one line per set."""
        first, second = (f"to fp32 seed {s.seed}" for s in (self.fp32, self.noise))
        head = ("samples", "class accuracy", f"Fréchet distance {first}", second)
        rows = [
            head,
            _row("fp32", self.fp32),
            _row("int8", self.int8),
            _row("fp32", self.noise, " (noise alone)"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join([name.ljust(widths[0]), *(map(str.rjust, cells, widths[1:]))])
            for name, *cells in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        how = f"{self.count} images a set, named by the classifier of {self.judge}; "
        if self.bound is None:
            how += f"not bound: fewer than {LEAST_BOUND}"
        else:
            how += f"accuracy of int8 within {100 * self.bound:g} points of fp32"
        return "\n".join([*lines, how])


@dataclass(frozen=True, kw_only=True)
class SkippedStudy:
    """The reason why no samples were evaluated; a failure where they should have been."""

    why: str
    failed: bool = False

    @property
    def failure(self) -> str | None:
        return self.why if self.failed else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"skipped": self.why, "failure": self.failure}

    def text(self) -> str:
        """Return the reason in one line."""
        return f"samples: not evaluated: {self.why}"


def study_samples(
    bundle: Path,
    manifest: Manifest,
    model: LoadedModel,
    *,
    count: int,
    seed: int = 0,
    progress: Progress = lambda message, fraction: None,
) -> SampleStudy | SkippedStudy:
    """Generate `count` images three times and evaluate them; 0 skips.

    fp32 graphs that the bundle lacks are exported to a temporary folder.
    """
    make_classifier = CLASSIFIERS.get(manifest.preset)
    if not count:
        return SkippedStudy(why="no samples were asked for")
    if make_classifier is None:
        name = manifest.preset or "this model"
        known = ", ".join(CLASSIFIERS)
        return SkippedStudy(why=f"there is no classifier of {name}, only of {known}")
    if "random_weights" in manifest.checkpoint["transformer"]:
        return SkippedStudy(why="images of random weights have no class")
    classifier = make_classifier()
    classes = manifest.model.transformer.classes
    labels = [i % classes for i in range(count)]
    other = (seed + 1) % (MAX_SEED + 1)
    drawn: dict[tuple[str, int], NDArray[np.uint8]] = {}
    try:
        with _fp32_bundle(bundle, manifest, model) as plain:
            for number, (folder, precision, s) in enumerate(
                [(plain, "fp32", seed), (bundle, "int8", seed), (plain, "fp32", other)]
            ):

                def report(done: int, total: int, number: int = number) -> None:
                    progress("samples", (number + done / total) / 3)

                drawn[precision, s] = _draw(folder, precision, labels, s, report)
    except VarDeployError as error:
        return SkippedStudy(why=str(error), failed=True)
    features = {key: classifier.features(images) for key, images in drawn.items()}
    first, second = ("fp32", seed), ("fp32", other)

    def sample_set(key: tuple[str, int]) -> SampleSet:
        named = classifier.predict(drawn[key])
        one, two = (
            None if key == to else frechet_distance(features[key], features[to])
            for to in (first, second)
        )
        return SampleSet(
            precision=key[0],
            seed=key[1],
            accuracy=float((named == np.array(labels)).mean()),
            to_first=one,
            to_second=two,
        )

    return SampleStudy(
        judge=manifest.preset,
        count=count,
        fp32=sample_set(first),
        int8=sample_set(("int8", seed)),
        noise=sample_set(second),
        bound=ACCURACY_BOUND if count >= LEAST_BOUND else None,
    )


def check_count(count: int) -> None:
    """Raise UsageError for a number of samples that is too small to be meaningful."""
    if count and count < LEAST_SAMPLES:
        raise UsageError(f"samples must be 0 or at least {LEAST_SAMPLES}, found {count}")


@contextlib.contextmanager
def _fp32_bundle(bundle: Path, manifest: Manifest, model: LoadedModel) -> Iterator[Path]:
    """Yield a bundle with fp32 graphs of the same form: `bundle` itself where it has them."""
    if "fp32" in manifest.graphs:
        yield bundle
        return
    with tempfile.TemporaryDirectory() as name:
        options = ExportOptions(batch=manifest.batch, guidance=manifest.guidance, layout="shared")
        export_bundle(model, Path(name) / "fp32", options)
        yield Path(name) / "fp32"


def _draw(
    bundle: Path,
    precision: str,
    labels: Sequence[int],
    seed: int,
    report: Callable[[int, int], None],
) -> NDArray[np.uint8]:
    """The images of a set, not of a call: those of one seed and the next have nothing in common."""
    count, streams = len(labels), numbered(seed, 0, len(labels))
    with Pipeline.load(
        bundle, backend="onnxruntime-cpu", precision=precision, check="sizes"
    ) as pipe:
        batch, drawn = pipe.manifest.batch, list[NDArray[np.uint8]]()
        for rows in (slice(first, first + batch) for first in range(0, count, batch)):
            drawn.append(
                pipe.draw(
                    Request(
                        labels=labels[rows],
                        rng_keys=streams[rows],
                        sampling=pipe.manifest.defaults,
                    )
                )
            )
            report(min(rows.stop, count), count)
    return np.concatenate(drawn)


def frechet_distance(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> float:
    """Return |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) of features [N, F] and [M, F], N, M ≥ 2.

    The trace of the root is taken from the symmetric Σ₁^½ Σ₂ Σ₁^½, which has the same eigenvalues.
    They are real and not negative even where N < F makes Σ singular, so that no multiple of the
    identity has to be added, as is usual before a general matrix root; what rounding puts below
    zero is zero.
    """
    first, second = one.astype(np.float64), other.astype(np.float64)
    apart = float(np.square(first.mean(axis=0) - second.mean(axis=0)).sum())
    spread, other_spread = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second))
    values, vectors = np.linalg.eigh(spread)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ other_spread @ root)
    overlap = float(np.sqrt(np.maximum(shared, 0)).sum())
    distance = apart + float(np.trace(spread) + np.trace(other_spread)) - 2 * overlap
    return max(distance, 0.0)


def _row(name: str, samples: SampleSet, remark: str = "") -> tuple[str, ...]:
    distances = (samples.to_first, samples.to_second)
    shown = ("–" if d is None else f"{d:.3f}" for d in distances)
    return (f"{name} seed {samples.seed}{remark}", f"{samples.accuracy:.1%}", *shown)

"""Measures what a cluster adds to generation, with a cluster on this machine; prints tables.

    python -m tools.cluster_overhead build/pocket

Workers of one thread draw sets into a temporary folder; medians of rounds whose order alternates.
The last table projects them to GPUs: images/s = min(GPUs · S / (S · t + w), S / d), with S images a
shard, t seconds per image, w between two shards of a worker, and d per shard on the driver.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import ray

from var_deploy.cluster.connect import LOCAL, connected
from var_deploy.cluster.sets import ClusterRun, make_missing
from var_deploy.config import CPU, RuntimeConfig
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.spec import SHARD_SIZE, SetSpec
from var_deploy.manifest import read_manifest

ROUNDS = 3
SIZES, BASE = (1, 4, 16, 64), 16  # images per shard; BASE compares the workers
SECONDS = 8.0  # seconds of generation in a run
LARGE = 25_000_000  # bytes of a shard of 256 images with 256 × 256 pixels
GPUS, PROJECTED = 100, (0.02, 0.1, 0.5)  # seconds per image on one GPU


@dataclass(frozen=True, kw_only=True)
class Run:
    """Means of one run: images per second while all workers generated, and seconds per shard."""

    rate: float
    drawing: float
    waiting: float
    receiving: float
    writing: float


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True)
def main(bundle: Path, rounds: int) -> None:
    """Measure what a cluster adds to drawing with BUNDLE."""
    with connected(LOCAL):
        first = draw(bundle, workers=1, size=BASE, images=4 * BASE)
        images = max(int(SECONDS / first.drawing * BASE), 16 * BASE)
        plan = [(1, BASE), (2, BASE), *((2, size) for size in SIZES if size != BASE)]
        runs: dict[tuple[int, int], list[Run]] = {key: [] for key in plan}
        for number in range(rounds):
            for workers, size in plan if number % 2 == 0 else reversed(plan):
                run = draw(bundle, workers=workers, size=size, images=images)
                runs[workers, size].append(run)
        receiving, writing = large(bundle)
    found = {key: median(those) for key, those in runs.items()}
    lines = [f"{images} images a run, medians of {rounds} runs", ""]
    lines += scaling(runs[1, BASE], runs[2, BASE])
    lines += overhead({size: found[2, size] for size in SIZES})
    lines += [
        f"A shard of {LARGE / 1e6:.0f} MB: received in {1e3 * receiving:.0f} ms, hashed and "
        f"written in {1e3 * writing:.0f} ms, {LARGE / (receiving + writing) / 1e6:.0f} MB/s",
        "",
    ]
    lines += projection(found[2, BASE].waiting, receiving + writing)
    click.echo("\n".join(lines))


def scaling(alone: Sequence[Run], beside: Sequence[Run]) -> list[str]:
    """Compare one worker with two; efficiencies are ratios within a round, which share its load."""
    lines = ["| workers | images/s | ms an image | waiting, ms a shard |", "|---|---|---|---|"]
    for workers, runs in ((1, alone), (2, beside)):
        run = median(runs)
        times = f"{1e3 * run.drawing / BASE:.1f} | {1e3 * run.waiting:.2f}"
        lines.append(f"| {workers} | {run.rate:.1f} | {times} |")
    pairs = list(zip(alone, beside, strict=True))
    whole = statistics.median(two.rate / one.rate / 2 for one, two in pairs)
    pace = statistics.median(one.drawing / two.drawing for one, two in pairs)
    drew = statistics.median(two.drawing / (two.drawing + two.waiting) for two in beside)
    return [
        *lines,
        "",
        f"Efficiency from one to two workers: {whole:.3f}. Beside another a worker draws at "
        f"{pace:.3f} of its pace, which is the machine's; it drew {100 * drew:.1f} % of its time, "
        "the rest is Ray's and the driver's.",
        "",
    ]


def overhead(runs: Mapping[int, Run]) -> list[str]:
    lines = ["| images per shard | generation, ms | worker waits, ms | share | driver, ms |"]
    lines.append("|---|---|---|---|---|")
    for size, run in runs.items():
        share = run.waiting / (run.waiting + run.drawing)
        driver = 1e3 * (run.receiving + run.writing)
        times = f"{1e3 * run.drawing:.0f} | {1e3 * run.waiting:.2f} | {100 * share:.2f} %"
        lines.append(f"| {size} | {times} | {driver:.2f} |")
    return [*lines, ""]


def projection(waiting: float, driver: float) -> list[str]:
    """Project to GPUs; `waiting` and `driver` are seconds per shard."""
    lines = [
        f"Projection, not measured: {GPUS} GPUs, {SHARD_SIZE} images ({LARGE // 10**6} MB) a shard",
        "",
        "| seconds per image | GPUs generate | driver writes | images/s | efficiency |",
        "|---|---|---|---|---|",
    ]
    for image in PROJECTED:
        gpus = GPUS * SHARD_SIZE / (SHARD_SIZE * image + waiting)
        rate = min(gpus, SHARD_SIZE / driver)
        share = rate * image / GPUS
        row = f"{gpus:.0f}/s | {SHARD_SIZE / driver:.0f}/s | {rate:.0f} | {share:.2f}"
        lines.append(f"| {image:g} | {row} |")
    return lines


def draw(bundle: Path, *, workers: int, size: int, images: int) -> Run:
    """Generate a set of about so many images; return means without the shards during which not all
    workers generated."""
    spec = set_of(bundle, size, images)
    with tempfile.TemporaryDirectory() as name:
        folder = SetFolder(path=Path(name) / "set")
        shards = range(spec.images // size)  # whole ones
        made = make_missing(
            bundle,
            folder,
            spec,
            shards,
            lambda message, done: None,
            config=RuntimeConfig(threads=1),
            workers=workers,
        )
        written = sorted(path.stat().st_mtime for path in folder.path.glob("*.tar"))
    return means(made, written, size)


def set_of(bundle: Path, size: int, images: int) -> SetSpec:
    manifest = read_manifest(bundle)
    transformer = manifest.model.transformer
    classes = transformer.classes if transformer.conditional else 0
    return SetSpec(
        bundle=manifest.digest(),
        precision="auto",
        backend=CPU,
        layout="auto",
        sampling=manifest.defaults,
        seed=0,
        classes=classes,
        per_class=-(-images // max(classes, 1)),
        shard_size=size,
    )


def means(made: ClusterRun, written: Sequence[float], size: int) -> Run:
    skipped = min(2 * made.workers, len(written) // 4)
    middle = written[skipped : len(written) - skipped]
    shards = len(made.shards)
    return Run(
        rate=size * (len(middle) - 1) / (middle[-1] - middle[0]),
        drawing=made.drawing / shards,
        waiting=made.waiting / (shards - made.workers),  # the first shards waited for no other
        receiving=made.receiving / shards,
        writing=made.writing / shards,
    )


def median(runs: Sequence[Run]) -> Run:
    names = [field.name for field in dataclasses.fields(Run)]
    return Run(**{name: statistics.median(getattr(run, name) for run in runs) for name in names})


def large(bundle: Path) -> tuple[float, float]:
    """Measure the driver's seconds for a shard of LARGE bytes: receiving, hashing, writing."""
    make = ray.remote(noise)
    spec, times = set_of(bundle, 1, 10), []
    with tempfile.TemporaryDirectory() as name:
        folder = SetFolder(path=Path(name))
        for shard in range(10):
            call = make.remote(LARGE)
            ray.wait([call])
            started = time.monotonic()
            data = ray.get(call)
            received = time.monotonic()
            folder.write(spec, shard, data)
            times.append((received - started, time.monotonic() - received))
    receiving, writing = (statistics.median(column) for column in zip(*times, strict=True))
    return receiving, writing


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


if __name__ == "__main__":
    main()

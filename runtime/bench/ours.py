"""This project's own contender: a `Pipeline` with a clock between its launches.

    python -m var_deploy.runtime.bench.ours BUNDLE --batch N --threads N --precision fp32
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_deploy import __version__
from var_deploy.manifest import check_files, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import choose_backend
from var_deploy.runtime.bench.contender import Sample, serve
from var_deploy.runtime.cuda import CudaMemory
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.measure import ClockedBackend, CudaClock, WallClock, launch_names
from var_deploy.runtime.protocol import Backend


class Ours:
    """Loaded as `Pipeline.load` does it, hashes included, but for the clock.

    Args:
        images: of one generation, whatever the bundle's batch.
        threads: 0 leaves it to the pipeline.
    """

    def __init__(
        self, bundle: Path, images: int, *, precision: str, backend: str, threads: int
    ) -> None:
        manifest = read_manifest(bundle)
        choice = choose_backend(
            bundle, manifest, backend=backend, precision=precision, threads=threads or None
        )
        precision, layout, how = choice.precision, choice.layout, choice.backend.describe()
        if choice.reason:
            how["chosen because"] = choice.reason
        try:
            if choice.reads_graphs:
                check_files(bundle, manifest, prefix=f"{precision}/")
            self._clock = _clock_of(choice.backend)
        except BaseException:
            choice.backend.close()
            raise
        clocked = ClockedBackend(choice.backend, self._clock, gaps=True)
        loop = ScaleLoop(bundle, manifest, clocked, precision, layout)
        self._clock.each = True
        self._pipeline = Pipeline(manifest, loop, precision, layout, how)
        classes = max(manifest.model.transformer.classes, 1)
        self._labels = [7 * n % classes for n in range(images)]
        self._launches, self._batch = launch_names(manifest), manifest.batch

    def describe(self) -> dict[str, str]:
        return {
            "var-deploy": __version__,
            **self._pipeline.describe(),
            "images a launch": str(self._batch),
            "clock": self._clock.source,
        }

    def generate(self) -> Sample:
        """Labels to uint8 images; launches of several batches are added up."""
        self._clock.laps()  # what was marked before belongs to nobody
        started = time.perf_counter()
        self._pipeline.generate(self._labels)
        seconds = time.perf_counter() - started
        laps = self._clock.laps()[::2]  # the others lie between two launches
        count = len(self._launches)
        batches = -(-len(self._labels) // self._batch)
        if len(laps) != batches * count:
            return Sample(seconds=seconds)
        return Sample(
            seconds=seconds,
            launches={name: sum(laps[n::count]) for n, name in enumerate(self._launches)},
        )

    def close(self) -> None:
        self._clock.close()
        self._pipeline.close()


def _clock_of(backend: Backend) -> WallClock | CudaClock:
    """CUDA events where launches go to a GPU: nothing has to wait for them."""
    if isinstance(backend, CudaMemory):
        return CudaClock(backend._cuda.stream)
    return WallClock(backend.synchronize)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m var_deploy.runtime.bench.ours")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="images of one generation")
    parser.add_argument("--threads", type=int, default=0, help="0: what the pipeline takes")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto")
    given: Any = parser.parse_args(arguments)

    def load() -> Ours:
        return Ours(
            given.bundle,
            given.batch,
            precision=given.precision,
            backend=given.backend,
            threads=given.threads,
        )

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())

"""This project's own contender: a `Pipeline` with a clock between its launches.

    python -m var_deploy.runtime.bench.ours BUNDLE --batch N --threads N --precision fp32
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_deploy import __version__
from var_deploy.config import RuntimeConfig
from var_deploy.labels import spread_labels
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import choose_backend
from var_deploy.runtime.bench.contender import About, Sample, contender_parser, serve
from var_deploy.runtime.cuda import CudaMemory
from var_deploy.runtime.measure import (
    ClockedBackend,
    CudaClock,
    WallClock,
    add_launches,
    launch_names,
)
from var_deploy.runtime.protocol import Backend


class Ours:
    """Loaded as `Pipeline.load` does it, hashes included, but for the clock.

    Args:
        images: of one generation, whatever the bundle's batch.
    """

    def __init__(self, bundle: Path, images: int, config: RuntimeConfig) -> None:
        manifest = read_manifest(bundle)
        choice = choose_backend(bundle, manifest, config)
        try:
            self._clock = _clock_of(choice.backend)
        except BaseException:
            choice.backend.close()
            raise
        clocked = ClockedBackend(choice.backend, self._clock, gaps=True)
        choice = dataclasses.replace(choice, backend=clocked)
        self._pipeline = Pipeline.assemble(bundle, manifest, choice)
        self._clock.each = True
        self._labels = spread_labels(manifest.model.transformer.classes, images)
        self._launches, self._batch = launch_names(manifest), manifest.batch
        self._threads = choice.config.threads or 0

    def describe(self) -> About:
        loaded = self._pipeline.describe()
        return About(
            settings={
                "var-deploy": __version__,
                **dataclasses.replace(loaded, reason="").to_json(),
                "images a launch": str(self._batch),
                "clock": self._clock.source,
            },
            graphs=loaded.precision,
            backend=loaded.backend,
            threads=self._threads,
            reason=loaded.reason,
        )

    def generate(self) -> Sample:
        """Labels to uint8 images; launches of several batches are added up."""
        self._clock.laps()  # what was marked before belongs to nobody
        started = time.perf_counter()
        self._pipeline.generate(self._labels)
        seconds = time.perf_counter() - started
        return Sample(
            seconds=seconds, launches=add_launches(self._clock.laps(), self._launches)
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
    parser = contender_parser(
        "var_deploy.runtime.bench.ours", threads="what the pipeline takes"
    )
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto")
    given: Any = parser.parse_args(arguments)

    def load() -> Ours:
        config = RuntimeConfig(
            precision=given.precision, backend=given.backend, threads=given.threads or None
        )
        return Ours(given.bundle, given.batch, config)

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())

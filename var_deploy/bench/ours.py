"""The worker of this project: a `Pipeline` with a clock between its launches.

    python -m var_deploy.bench.ours BUNDLE --batch N --threads N --precision fp32
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_deploy import __version__
from var_deploy.bench.worker import About, Sample, serve, worker_parser
from var_deploy.config import RuntimeConfig
from var_deploy.labels import spread_labels
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.measure import add_launches, launch_names


class Ours:
    """The worker that runs a bundle with `Pipeline`; loading includes the check of hashes.

    Args:
        images: number of images per generation, which may differ from the bundle's batch.
    """

    def __init__(self, bundle: Path, images: int, config: RuntimeConfig) -> None:
        self._pipeline = Pipeline.open(bundle, config)
        self._clock = self._pipeline.start_clock()
        self._clock.each = True
        manifest = self._pipeline.manifest
        self._labels = spread_labels(manifest.model.transformer.classes, images)
        self._launches, self._batch = launch_names(manifest), manifest.batch

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
            threads=loaded.threads or 0,
            reason=loaded.reason,
            loading=loaded.loading,
        )

    def generate(self) -> Sample:
        """Time a generation from labels to uint8 images; launches are summed over batches."""
        self._clock.laps()  # drop earlier marks
        started = time.perf_counter()
        self._pipeline.generate(self._labels)
        seconds = time.perf_counter() - started
        return Sample(
            seconds=seconds, launches=add_launches(self._clock.laps(), self._launches)
        )

    def close(self) -> None:
        self._pipeline.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = worker_parser(
        "var_deploy.bench.ours", threads="what the pipeline takes"
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

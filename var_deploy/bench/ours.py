"""The workers of this project: a `Pipeline` with a clock between its launches, and the text encoder
of a text-to-image bundle.

    python -m var_deploy.bench.ours BUNDLE --batch N --threads N --precision fp32
    python -m var_deploy.bench.ours BUNDLE --text-encoder --batch N --threads N --precision fp32
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from var_deploy import __version__, names
from var_deploy.bench.conditions import bench_prompts, bench_texts
from var_deploy.bench.worker import About, Sample, Worker, serve, worker_parser
from var_deploy.config import Precision, RuntimeConfig
from var_deploy.errors import BackendError
from var_deploy.labels import spread_labels
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.planning.text_costs import text_encoder_work
from var_deploy.runtime.measure import add_launches, launch_names
from var_deploy.runtime.text_encoder import TextEncoder
from var_deploy.runtime.text_features import find_text_encoder
from var_deploy.spec import TextModelSpec


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
        model = manifest.model
        self._conditions: dict[str, Any] = (
            {"prompts": bench_prompts(model, images)}
            if isinstance(model, TextModelSpec)
            else {"labels": spread_labels(model.transformer.classes, images)}
        )
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
        """Time a generation from labels, or features of prompts, to uint8 images; launches are
        summed over batches."""
        self._clock.laps()  # drop earlier marks
        started = time.perf_counter()
        self._pipeline.generate(**self._conditions)
        seconds = time.perf_counter() - started
        return Sample(
            seconds=seconds, launches=add_launches(self._clock.laps(), self._launches)
        )

    def close(self) -> None:
        self._pipeline.close()


class OurTextEncoder:
    """The worker that encodes prompts with the text encoder of a bundle.

    Args:
        prompts: number of prompts that are encoded at a time; no prompt comes twice.

    Raises BackendError for a bundle without a text encoder.
    """

    def __init__(self, bundle: Path, prompts: int, config: RuntimeConfig) -> None:
        encoder = find_text_encoder(bundle, read_manifest(bundle), config)
        if not isinstance(encoder, TextEncoder):
            raise BackendError(f"{bundle.name} has no text encoder in it or beside it")
        self._encoder, self._prompts, self._encoded = encoder, prompts, 0

    def describe(self) -> About:
        started = time.perf_counter()
        loaded = self._encoder.describe()  # loads the weights
        opened = time.perf_counter() - started
        manifest = self._encoder.manifest
        precision = cast(Precision, loaded.precision)
        work = text_encoder_work(manifest.model, precision)  # of one prompt, padded to the length
        return About(
            settings={
                "var-deploy": __version__,
                **dataclasses.replace(loaded, reason="").to_json(),
                "tokens of the graph": str(manifest.model.length),
            },
            graphs=loaded.precision,
            backend=loaded.backend,
            threads=loaded.threads or 0,
            reason=loaded.reason,
            loading={"opening": opened},  # with the check of hashes
            work={
                "weights": manifest.graphs[precision][names.TEXT_ENCODER].weight_bytes,
                "compute": self._prompts * work.compute_operations,
                "full": self._prompts * work.full_operations,
            },
        )

    def generate(self) -> Sample:
        """Time the way from texts to features, one launch per prompt."""
        texts = bench_texts(self._encoded, self._prompts)
        self._encoded += self._prompts
        started = time.perf_counter()
        self._encoder.encode(texts)
        return Sample(seconds=time.perf_counter() - started)

    def close(self) -> None:
        self._encoder.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = worker_parser(
        "var_deploy.bench.ours", threads="what the pipeline takes"
    )
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--text-encoder", action="store_true", help="encode prompts instead")
    given: Any = parser.parse_args(arguments)

    def load() -> Worker:
        config = RuntimeConfig(
            precision=given.precision,
            backend=given.backend,
            layout=given.layout,
            threads=given.threads or None,
        )
        worker = OurTextEncoder if given.text_encoder else Ours
        return worker(given.bundle, given.batch, config)

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())

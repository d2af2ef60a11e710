"""The Ray actor that generates shards of an image set, with a pipeline of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from var_deploy.cluster.place import BundleSource
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.datasets.shards import described, draw_shard
from var_deploy.datasets.spec import SetSpec

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A shard's file, the seconds to generate it, and the seconds since the worker's last shard."""

    data: bytes
    drawing: float
    waiting: float


class Worker:
    """Generates shards with the bundle of `source`.

    Args:
        config: how to run the bundle, except what the set decides.
        cores: CPU threads of this worker, used where it runs on the CPU.
    """

    def __init__(self, source: BundleSource, config: RuntimeConfig, cores: int) -> None:
        self._source, self._config, self._cores = source, config, cores
        self._pipe: Pipeline | None = None
        self._free: float | None = None

    def load(self, spec: SetSpec) -> Loaded:
        """Load the bundle for a set, whose settings may be "auto"; returns what `described` does.

        Raises what `BundleSource.open` and `described` raise.
        """
        return described(self._loaded(spec), spec)

    def draw(self, spec: SetSpec, shard: int) -> ShardResult:
        """Generate a shard. Raises what `load` and `draw_shard` raise."""
        started = time.monotonic()
        pipe = self._loaded(spec)
        data = draw_shard(pipe, spec, shard)
        waiting = 0.0 if self._free is None else started - self._free
        self._free = time.monotonic()
        return ShardResult(data=data, drawing=self._free - started, waiting=waiting)

    def close(self) -> None:
        """Close the pipeline, if one is loaded."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _loaded(self, spec: SetSpec) -> Pipeline:
        if self._pipe is not None:
            if spec.drawn_by(described(self._pipe, spec)):
                return self._pipe
            self.close()
        config = spec.config(self._config)
        self._pipe = self._source.open(config, self._cores, spec.text_config(self._config))
        return self._pipe

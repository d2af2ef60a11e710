"""What runs at the far end: an actor with a pipeline of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from var_deploy.cluster.place import BundleSource
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.datasets.shards import draw_shard
from var_deploy.datasets.spec import SetSpec

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A shard's file; seconds that it took, and that its worker waited for it since the last."""

    data: bytes
    drawing: float
    waiting: float


class Worker:
    """Draws shards of an source bundle.

    Args:
        config: how to run it, but for what the set decides.
        cores: CPU threads that are this worker's, for where it draws without a GPU after all.
    """

    def __init__(self, source: BundleSource, config: RuntimeConfig, cores: int) -> None:
        self._source, self._config, self._cores = source, config, cores
        self._pipe: Pipeline | None = None
        self._free: float | None = None

    def load(self, spec: SetSpec) -> Loaded:
        """Have the bundle loaded for a set, which may leave "auto" open; `Pipeline.describe` of it.

        Raises what `BundleSource.path` and `Pipeline.load` raise.
        """
        return self._loaded(spec).describe()

    def draw(self, spec: SetSpec, shard: int) -> ShardResult:
        """Raises what `load` and `draw_shard` raise."""
        started = time.monotonic()
        pipe = self._loaded(spec)
        data = draw_shard(pipe, spec, shard)
        waiting = 0.0 if self._free is None else started - self._free
        self._free = time.monotonic()
        return ShardResult(data=data, drawing=self._free - started, waiting=waiting)

    def close(self) -> None:
        """Give the bundle back, if one is loaded."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _loaded(self, spec: SetSpec) -> Pipeline:
        from var_deploy.pipeline import Pipeline

        if self._pipe is not None:
            if spec.drawn_by(self._pipe.describe()):
                return self._pipe
            self.close()
        self._pipe = Pipeline.open(
            self._source.path(),
            spec.config(self._config),
            digest=self._source.digest,
            cores=self._cores,
        )
        return self._pipe

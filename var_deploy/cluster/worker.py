"""What runs at the far end: an actor with a pipeline of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from var_deploy.cluster.place import Offer
from var_deploy.sets.shards import draw_shard
from var_deploy.sets.spec import SetSpec

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A shard's file; seconds that it took, and that its worker waited for it since the last."""

    data: bytes
    drawing: float
    waiting: float


class Worker:
    """Draws shards of an offered bundle. `options` are those of `Pipeline.load` besides
    those that the set decides."""

    def __init__(self, offered: Offer, options: Mapping[str, Any]) -> None:
        self._offered, self._options = offered, options
        self._pipe: Pipeline | None = None
        self._free: float | None = None

    def load(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """Have the bundle loaded as `chosen`, which may be "auto"; `Pipeline.describe` of it.

        Raises what `Offer.path` and `Pipeline.load` raise.
        """
        self._loaded(chosen)
        assert self._pipe is not None
        return self._pipe.describe()

    def draw(self, spec: SetSpec, shard: int) -> Drawn:
        """Raises what `load` and `draw_shard` raise."""
        started = time.monotonic()
        pipe = self._loaded(spec.decided)
        data = draw_shard(pipe, spec, shard)
        waiting = 0.0 if self._free is None else started - self._free
        self._free = time.monotonic()
        return Drawn(data=data, drawing=self._free - started, waiting=waiting)

    def _loaded(self, chosen: Mapping[str, str]) -> Pipeline:
        from var_deploy.pipeline import Pipeline

        if self._pipe is not None:
            how = self._pipe.describe()
            if all(wanted in ("auto", how[name]) for name, wanted in chosen.items()):
                return self._pipe
            self._pipe.close()
            self._pipe = None
        options = {**self._options, **chosen, "digest": self._offered.digest}
        self._pipe = Pipeline.load(self._offered.path(), **options)
        return self._pipe

"""The work of one process on a set: the shards of its share that are missing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from var_deploy.errors import VarDeployError
from var_deploy.progress import span, speed
from var_deploy.sets.folder import SetFolder
from var_deploy.sets.shards import draw_shard
from var_deploy.sets.spec import SetSpec

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline

Tell = Callable[[str, float], object]  # a message, and how much of the work is done


def make_missing(
    pipe: Pipeline, folder: SetFolder, spec: SetSpec, shards: Sequence[int], tell: Tell
) -> list[int]:
    """Draw those of `shards` that are not there; returns which.

    A shard that another process has finished meanwhile is left alone. However this ends, set.json
    lists what is there then.

    Raises what `draw_shard` and `SetFolder.write` raise.
    """
    missing = folder.missing(spec, shards)
    tally, made = Tally(spec, shards, missing, tell), []
    with listing(folder, spec):
        for shard in missing:
            if folder.has(spec, shard):
                tally.skip(shard)
                continue
            folder.write(spec, shard, draw_shard(pipe, spec, shard, tally.tell))
            tally.add(shard)
            made.append(shard)
    return made


class Tally:
    """How far `shards` are, of which `missing` have to be drawn: images, rate and time left."""

    def __init__(
        self, spec: SetSpec, shards: Sequence[int], missing: Sequence[int], tell: Tell
    ) -> None:
        self._spec, self._tell = spec, tell
        self._wanted, self._left = self._images(shards), self._images(missing)
        self._drawn, self._started = 0, time.monotonic()

    def add(self, shard: int) -> None:
        """A shard was drawn."""
        self._drawn += self._images([shard])
        self.skip(shard)

    def skip(self, shard: int) -> None:
        """A shard has turned up."""
        self._left -= self._images([shard])

    def tell(self, more: int = 0) -> None:
        """Tell of it, and of `more` images that are drawn of the next shard."""
        took = max(time.monotonic() - self._started, 1e-9)
        still, rate = self._left - more, (self._drawn + more) / took
        done = self._wanted - still
        pace = f"{speed(rate)}, {span(still / rate)} left" if rate else "nothing drawn yet"
        self._tell(f"image {done} of {self._wanted}, {pace}", done / self._wanted)

    def _images(self, shards: Sequence[int]) -> int:
        return sum(len(self._spec.numbers(shard)) for shard in shards)


@contextlib.contextmanager
def listing(folder: SetFolder, spec: SetSpec) -> Iterator[None]:
    """However the block ends, set.json lists the shards that are there then."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(VarDeployError):  # what went wrong first is what counts
            folder.list_shards(spec)
        raise
    folder.list_shards(spec)

"""The work of one process on a set: it generates the missing shards of its part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.shards import draw_shard
from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import VarDeployError
from var_deploy.progress import Progress, span, speed

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline


def make_missing(
    pipe: Pipeline, folder: SetFolder, spec: SetSpec, shards: Sequence[int], progress: Progress
) -> list[int]:
    """Generate those of `shards` that are missing; return their numbers.

    A shard that another process has finished meanwhile is skipped. Even where this raises, set.json
    lists the existing shards at the end.

    Raises what `draw_shard` and `SetFolder.write` raise.
    """
    missing = folder.missing(spec, shards)
    done, written = SetProgress(spec, shards, missing, progress), []
    with listing(folder, spec):
        for shard in missing:
            if folder.has(spec, shard):
                done.skip(shard)
                continue
            folder.write(spec, shard, draw_shard(pipe, spec, shard, done.report))
            done.add(shard)
            written.append(shard)
    return written


class SetProgress:
    """Progress of `shards`, of which `missing` are to be generated: images, rate and time left."""

    def __init__(
        self, spec: SetSpec, shards: Sequence[int], missing: Sequence[int], progress: Progress
    ) -> None:
        self._spec, self._progress = spec, progress
        self._wanted, self._left = self._images(shards), self._images(missing)
        self._drawn, self._started = 0, time.monotonic()

    def add(self, shard: int) -> None:
        """Count a shard that was generated."""
        self._drawn += self._images([shard])
        self.skip(shard)

    def skip(self, shard: int) -> None:
        """Count a shard that another process has made."""
        self._left -= self._images([shard])

    def report(self, more: int = 0) -> None:
        """Report the progress, with `more` images generated of the next shard."""
        took = max(time.monotonic() - self._started, 1e-9)
        still, rate = self._left - more, (self._drawn + more) / took
        done = self._wanted - still
        pace = f"{speed(rate)}, {span(still / rate)} left" if rate else "no image yet"
        self._progress(f"image {done} of {self._wanted}, {pace}", done / self._wanted)

    def _images(self, shards: Sequence[int]) -> int:
        return sum(len(self._spec.numbers(shard)) for shard in shards)


@contextlib.contextmanager
def listing(folder: SetFolder, spec: SetSpec) -> Iterator[None]:
    """Update the list of shards in set.json when the block ends, even with an error."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(VarDeployError):  # the first error is the one to report
            folder.list_shards(spec)
        raise
    folder.list_shards(spec)

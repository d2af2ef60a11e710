"""The work of one process on a set: the shards of its share that are missing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from var_deploy.errors import VarDeployError
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
    wanted = sum(len(spec.numbers(shard)) for shard in shards)
    missing = folder.missing(spec, shards)
    left = sum(len(spec.numbers(shard)) for shard in missing)
    drawn, made = 0, []
    started = time.monotonic()

    def told(more: int) -> None:
        took = max(time.monotonic() - started, 1e-9)
        still, rate = left - more, (drawn + more) / took
        message = f"{wanted - still} of {wanted} images, {rate:.2f}/s, {span(still / rate)} left"
        tell(message, (wanted - still) / wanted)

    try:
        for shard in missing:
            count = len(spec.numbers(shard))
            if not folder.has(spec, shard):
                folder.write(spec, shard, draw_shard(pipe, spec, shard, told))
                made.append(shard)
                drawn += count
            left -= count
    except BaseException:
        with contextlib.suppress(VarDeployError):  # what went wrong first is what counts
            folder.list_shards(spec)
        raise
    folder.list_shards(spec)
    return made


def span(seconds: float) -> str:
    """A time to wait, as roughly as it is known: "8 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

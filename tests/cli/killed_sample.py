"""A `sample` that SIGKILL ends in its second shard. Arguments: "drawn" (half-way through the images
of the shard) or "written" (half-way through its file), then those of var-deploy."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from var_deploy.cli import main
from var_deploy.datasets import folder
from var_deploy.pipeline import Pipeline

moment = sys.argv.pop(1)
draw, whole_file = Pipeline.draw, folder.whole_file
count = {"drawn": 0, "written": 0}


def kill(what: str, at: int) -> None:
    count[what] += 1
    if moment == what and count[what] == at:
        os.kill(os.getpid(), signal.SIGKILL)


def counted_draw(self: Pipeline, *arguments: Any) -> Any:
    kill("drawn", 4)  # two launches a shard
    return draw(self, *arguments)


class HalfFile:
    """A file of which the first half reaches the disk when the process is killed."""

    def __init__(self, path: Any, **options: Any) -> None:
        self._path, self._context = path, whole_file(path, **options)

    def __enter__(self) -> HalfFile:
        self._stream = self._context.__enter__()
        return self

    def write(self, data: bytes) -> None:
        if self._path.suffix == ".tar":
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            kill("written", 2)
            data = data[len(data) // 2 :]
        self._stream.write(data)

    def __exit__(self, *error: Any) -> Any:
        return self._context.__exit__(*error)


Pipeline.draw = counted_draw  # type: ignore[method-assign]
folder.whole_file = HalfFile  # type: ignore[assignment]
main()

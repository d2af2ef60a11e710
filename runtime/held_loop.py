"""`HeldLoop`: the scale loop of a pipeline, which may leave the memory and come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from var_deploy.bundle.files import BundleFiles
from var_deploy.config import Layout, RuntimeConfig
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.choice import choose_backend
from var_deploy.runtime.backends.host_memory import trim_heap
from var_deploy.runtime.backends.protocol import Clock
from var_deploy.runtime.generated import Images
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.request import Batches, Request, ScaleEvent, TimingModel

OpenLoop = Callable[[], ScaleLoop]


class HeldLoop:
    """A scale loop that is always open, or one that is opened when it is needed.

    Calls must not overlap: the pipeline has one turn.

    Args:
        loop: the loop, or a function that opens one each time that it is needed again.
        cancelled: called before each launch; True cancels the request.
    """

    def __init__(
        self, manifest: Manifest, loop: ScaleLoop | OpenLoop, cancelled: Callable[[], bool]
    ) -> None:
        self._manifest, self._cancelled = manifest, cancelled
        self._timing = TimingModel(manifest.model.scale_lengths)
        self._again = loop if callable(loop) else None
        self._held: tuple[ScaleLoop, Batches] | None = None
        self._clocked = False
        if self._again is None:
            self._use(cast(ScaleLoop, loop))

    @property
    def comes_back(self) -> bool:
        """Whether the loop may leave the memory."""
        return self._again is not None

    def open(self) -> ScaleLoop:
        """Return the loop, opened where it is not; raises what `ScaleLoop` raises."""
        if self._held is None:
            assert self._again is not None
            self._use(self._again())
        assert self._held is not None
        return self._held[0]

    def draw(
        self,
        request: Request,
        on_progress: Callable[[int, int], None] | None = None,
        on_scale: Callable[[ScaleEvent], object] | None = None,
        end: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Images:
        """Generate the images of a request, see `Batches.draw`."""
        self.open()
        assert self._held is not None
        return self._held[1].draw(request, on_progress, on_scale, end, cancelled)

    def start_clock(self) -> Clock:
        """Start timing, see `ScaleLoop.start_clock`; the loop stays in memory from then on."""
        self._clocked = True
        return self.open().start_clock()

    def leave(self) -> None:
        """Release the loop's memory until it is opened again; one with a clock stays."""
        if not self._clocked:
            self.close()

    def close(self) -> None:
        """Release the loop's memory; safe to call twice."""
        if self._held is not None:
            self._held[0].close()
            self._held = None
            trim_heap()

    def _use(self, loop: ScaleLoop) -> None:
        self._held = loop, Batches(self._manifest, loop, self._cancelled, self._timing)


def loop_opener(
    bundle: Path, files: BundleFiles, manifest: Manifest, config: RuntimeConfig
) -> OpenLoop:
    """Return a function that opens a scale loop of a bundle with a new backend.

    `config` has nothing left open; the function raises what `choose_backend` and `ScaleLoop` raise.
    """

    def opened() -> ScaleLoop:
        backend = choose_backend(bundle, manifest, config).backend
        layout = cast(Layout, config.layout)
        return ScaleLoop(files, manifest, backend, config.precision, layout)

    return opened

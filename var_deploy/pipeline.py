"""`Pipeline`: from a bundle to images in two calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from var_deploy.errors import BackendError, UsageError
from var_deploy.labels import resolve_labels
from var_deploy.manifest import Manifest, check_files, read_manifest
from var_deploy.sampling import Sampling, check_seed, uniforms

BACKENDS = ("auto", "tensorrt", "tensorrt_rtx", "onnxruntime-cuda", "onnxruntime-cpu")
PRECISIONS = ("auto", "fp32", "fp16", "int8")
LAYOUTS = ("auto", "per-scale", "shared")


class Pipeline:
    """A loaded bundle. Made by `load`; a context manager that releases everything on exit.

    One generation runs at a time; calls from other threads wait for their turn.
    """

    def __init__(
        self, manifest: Manifest, loop: Any, precision: str, layout: str, how: dict[str, str]
    ) -> None:
        self.manifest = manifest
        self._loop, self._lock, self._busy = loop, threading.RLock(), False
        self._how = {"precision": precision, "layout": layout, **how}

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        precision: str = "auto",
        layout: str = "auto",
        *,
        threads: int | None = None,
        cuda_graph: bool = True,
        check: Literal["hashes", "sizes"] = "hashes",
    ) -> Pipeline:
        """Check a bundle and load its graphs.

        Args:
            bundle: folder written by `var-deploy export`.
            backend: one of BACKENDS; "auto" takes the first that can run the bundle here:
                engines built for this very device, ONNX Runtime on a GPU, ONNX Runtime on a CPU.
                `describe()["chosen because"]` says what was passed over, and why it is int8 where
                that was left open.
            precision: "fp32", "fp16" or "int8", which runs on ONNX Runtime on a CPU alone. "auto"
                takes fp16 on a GPU, else fp32; on a CPU int8 where the bundle has it, since it has
                it only where its export was asked for it, else fp32, else fp16, which a CPU
                computes in fp32 anyway.
            layout: "shared" (one graph for all scales, one copy of the weights), "per-scale" (a
                static graph a scale), or "auto": with ONNX Runtime shared, since sessions cannot
                share packed weights, and static graphs that read them unpacked are slower; with
                TensorRT what was built, and by free memory where both were. Pipelines of one
                bundle in one process share weights on a CPU, where threads and layout agree;
                elsewhere each has its own.
            threads: CPU threads; None takes every physical core. With "auto" a number asks for
                the CPU.
            cuda_graph: TensorRT only: record each launch once and replay it.
            check: "hashes" reads every file once; "sizes" trusts files of the right size. Engines
                are always checked whole.

        Raises BundleError for a bundle that cannot be trusted, BackendError where the runtime is
        missing or refuses, UsageError for an unknown option.
        """
        for name, value, known in (
            ("backend", backend, BACKENDS),
            ("precision", precision, PRECISIONS),
            ("layout", layout, LAYOUTS),
        ):
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, found {value!r}")
        folder = Path(bundle)
        manifest = read_manifest(folder)
        from var_deploy.runtime.backends import choose_backend
        from var_deploy.runtime.loop import ScaleLoop

        choice = choose_backend(
            folder,
            manifest,
            backend=backend,
            precision=precision,
            layout=layout,
            threads=threads,
            cuda_graph=cuda_graph,
        )
        precision = choice.precision
        try:
            if choice.reads_graphs:
                check_files(folder, manifest, prefix=f"{precision}/", hashes=check == "hashes")
        except BaseException:
            choice.backend.close()
            raise
        loop = ScaleLoop(folder, manifest, choice.backend, precision, choice.layout)
        how = choice.backend.describe()
        if choice.reason:
            how["chosen because"] = choice.reason
        return cls(manifest, loop, precision, choice.layout, how)

    def generate(
        self,
        labels: Sequence[int | str] | None = None,
        seed: int = 0,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """One image a label, [N, side, side, channels] uint8; the array is the caller's.

        Image n depends on (seed, n, its label and the settings) alone, not on the batch size.

        Args:
            labels: class numbers or names; None is one image without a class. An unconditional
                model takes the count from the length alone.
            seed: 0 … 2⁶⁴-1.
            cfg, top_k, top_p, temperature: see `Sampling`; None takes the bundle's default.
            on_progress: called with (launches done, launches in all).

        Raises UsageError (LabelError) for labels, seeds or settings out of range, BackendError
        where the pipeline is closed or the runtime fails.
        """
        manifest, spec = self.manifest, self.manifest.model
        sampling = manifest.defaults.replace(
            cfg=cfg, top_k=top_k, top_p=top_p, temperature=temperature
        )
        if cfg and not manifest.guidance and spec.transformer.conditional:
            raise UsageError("this bundle was exported with --no-guidance: cfg must be 0")
        seed = check_seed(seed)
        numbers = self._numbers(labels)
        side, channels = spec.tokenizer.image_side, spec.tokenizer.image_channels
        images = np.empty((len(numbers), side, side, channels), np.uint8)
        with self._lock:
            if self._loop is None:
                raise BackendError("this pipeline is closed")
            self._refuse_callback()
            self._busy = True
            try:
                self._fill(images, numbers, seed, sampling, on_progress)
            finally:
                self._busy = False
        return images

    def describe(self) -> dict[str, str]:
        """Backend, versions, precision, layout: what a result should be reported with."""
        return dict(self._how)

    def close(self) -> None:
        """Release the sessions; safe to call twice."""
        with self._lock:
            self._refuse_callback()
            if self._loop is not None:
                self._loop.close()
                self._loop = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(
        self,
        images: NDArray[np.uint8],
        labels: list[int],
        seed: int,
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Generate batch by batch into `images`; the last batch is padded with its last label."""
        batch, total = self.manifest.batch, self.manifest.model.total_tokens
        launches = self.manifest.model.scales + 1
        all_steps = -(-len(labels) // batch) * launches
        for number, first in enumerate(range(0, len(labels), batch)):
            part = labels[first : first + batch]
            padded = part + [part[-1]] * (batch - len(part))
            draws = np.stack([uniforms(seed, first + i, total) for i in range(batch)])

            def step(done: int, before: int = number * launches) -> None:
                if on_progress:
                    on_progress(before + done, all_steps)

            result = self._loop.run(padded, draws, sampling, step)
            images[first : first + len(part)] = np.rint(result[: len(part)] * 255)

    def _refuse_callback(self) -> None:
        """Only a callback of a running generation can hold the lock and get here."""
        if self._busy:
            raise UsageError("a callback of generate cannot use the pipeline that calls it")

    def _numbers(self, labels: Sequence[int | str] | None) -> list[int]:
        transformer = self.manifest.model.transformer
        if labels is None:
            return [transformer.classes]
        if not transformer.conditional:
            return [0] * len(labels)
        return resolve_labels(labels, self.manifest.labels, transformer.classes)

"""The scale loop: condition once, one launch a scale, decode once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle_files import BundleFiles
from var_deploy.config import Layout
from var_deploy.editing import Kept
from var_deploy.errors import BackendError, CancelledError
from var_deploy.graph_refs import generation_graphs, scale_graphs
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.runtime.buffers import LoopBuffers
from var_deploy.runtime.plausible import check_f_hat, check_image, check_tokens
from var_deploy.runtime.protocol import Arrays, Backend, Launch, Session
from var_deploy.sampling import Sampling


class ScaleLoop:
    """Generates batches of exactly B images.

    All buffers are bound when it is made; a generation only fills the small inputs and launches.

    Args:
        bundle: folder, whose files are then opened and checked as they are needed, or files that
            are held open already; these are not closed with the loop.
        backend: the loop's own from here on; closed with it, also when this fails.
        layout: "shared" drives all scales through the one `step` graph, which keeps one copy of
            the weights in memory; "per-scale" opens the K static graphs.
    """

    def __init__(
        self,
        bundle: Path | BundleFiles,
        manifest: Manifest,
        backend: Backend,
        precision: str,
        layout: Layout,
    ) -> None:
        self._manifest, self._spec, self._backend = manifest, manifest.model, backend
        self._half = precision == "fp16"
        self._scale_names = [graph.name for graph in scale_graphs(self._spec, layout)]
        self._opened: dict[str, Session] = {}
        self._launches: Sequence[Launch] = ()  # all but the decoder
        self._decoders: Sequence[Launch] = ()  # the last one reads what the last scale leaves
        self._done = 0
        self._own_files: BundleFiles | None = None
        if isinstance(bundle, BundleFiles):
            files = bundle
        else:
            files = self._own_files = BundleFiles(bundle, manifest, precision)
        try:
            graphs = self._graphs(precision, layout)
            cache = np.float16 if self._half else np.float32
            self._buffers = LoopBuffers(manifest, cache, backend)
            # the decoder first: its weights are reordered while it loads, and that passing second
            # copy should not come on top of everything else
            for name in sorted(graphs, key=lambda name: name != names.DECODER):
                self._opened[name] = backend.open(files.graph(name))
            launches = self._bind_all(graphs, layout)
            # a backend may run everything once: with a generation that is as good as any
            draws = np.zeros((manifest.batch, self._spec.total_tokens), np.float32)
            self._buffers.fill([0] * manifest.batch, draws, Sampling())
            ready = list(backend.finish(launches))
            decoders = min(self._spec.scales, 2)
            self._launches, self._decoders = ready[:-decoders], ready[-decoders:]
        except BaseException:
            self.close()
            raise

    def run(
        self,
        labels: Sequence[int],
        uniforms_BT: NDArray[np.float32],
        sampling: Sampling,
        on_step: Callable[[int], object] | None = None,
        forced: Sequence[NDArray[np.int64]] = (),
        keep: Kept | None = None,
        cancelled: Callable[[], bool] | None = None,
        noise: Sequence[NDArray[np.float32]] = (),
    ) -> NDArray[np.float32]:
        """Images [B, side, side, channels] in [0, 1] of B labels and their uniforms [B, T].

        The returned array is overwritten by the next run, and by `preview` and `decode`.

        Args:
            on_step: called after each scale with how many are done, and with K + 1 after the
                decoder; on a GPU that makes the host wait at each. Where it returns True after a
                scale, that was the last one: what there is gets decoded.
            forced: the tokens [B, L_k] of the first scales; the others are drawn.
            keep: tokens of the other scales that are not drawn either.
            cancelled: asked before each launch, which waits for nothing.
            noise: of a bundle with `more_smooth`, `sampling.gumbel` of each image [T, V]. Without
                it codes are mixed by their likelihood alone, for what only wants the work done.

        Raises BackendError where logits, tokens, f_hat or image are not what a model can give, and
        CancelledError where `cancelled` says True; the loop can be used again after both.
        """
        self._check_open()
        buffers, backend = self._buffers, self._backend
        self._done = 0
        buffers.fill(labels, uniforms_BT, sampling, forced, keep, noise)
        try:
            self._draw(on_step, cancelled)
            buffers.arena.forget()  # the decoder needs the room, not the cache
            _refuse_cancelled(cancelled)
            self._decode()
            if on_step:
                backend.synchronize()
                on_step(self._spec.scales + 1)
            buffers.made.download()
            buffers.latent.download()
        except BaseException:
            with contextlib.suppress(BackendError):
                backend.synchronize()  # nothing may still read what the next run is given
            raise
        backend.synchronize()
        for scale in range(self._done):
            self._check_tokens(scale)
        self._check_f_hat()
        return self._checked_image(self._done)

    @property
    def scales_done(self) -> int:
        """Scales of the run that is going on, or of the last one."""
        return self._done

    def drawn(self, scale: int) -> NDArray[np.int64]:
        """A copy of the tokens [B, L_k] of a scale that is done, also from within `on_step`.

        Raises BackendError where they are no codes.
        """
        self._buffers.made.download()
        self._backend.synchronize()
        self._check_tokens(scale)
        tokens: NDArray[np.int64] = self._buffers.tokens(scale).copy()
        return tokens

    def f_hat(self) -> NDArray[np.float32]:
        """A copy of what the scales that are done add up to, [B, Cv, p_K, p_K]."""
        self._buffers.latent.download()
        self._backend.synchronize()
        latent: NDArray[np.float32] = self._buffers.f_hat(self._done).copy()
        return latent

    def preview(self) -> NDArray[np.float32]:
        """What the scales that are done look like, decoded [B, side, side, channels] in [0, 1].

        For use within `on_step`. The returned array is overwritten by the next one. Raises
        BackendError where f_hat or the image are not what a model can give.
        """
        self._check_open()
        self._decode()
        self._buffers.made.download()
        self._buffers.latent.download()
        self._backend.synchronize()
        self._check_f_hat()
        return self._checked_image(self._done)

    def decode(self, f_hat: NDArray[np.float32]) -> NDArray[np.float32]:
        """f_hat [B, Cv, p_K, p_K] → images [B, side, side, channels] in [0, 1], not during a run.

        The returned array is overwritten by the next one. Raises BackendError where the image is
        not what a decoder can give.
        """
        self._check_open()
        self._buffers.fill_f_hat(f_hat)
        self._decoders[-1]()
        self._buffers.made.download()
        self._backend.synchronize()
        return self._checked_image(None)

    def _draw(
        self, on_step: Callable[[int], object] | None, cancelled: Callable[[], bool] | None
    ) -> None:
        """All scales, or those until `on_step` says that it is enough."""
        before = len(self._launches) - self._spec.scales  # `condition`, where there is one
        for number, launch in enumerate(self._launches):
            _refuse_cancelled(cancelled)
            launch()
            if number < before:
                continue
            self._done = number - before + 1
            if on_step:
                self._backend.synchronize()
                if on_step(self._done) is True:
                    return

    def _decode(self) -> None:
        """Start the decoder on f_hat as it is after the last scale that is done."""
        self._decoders[-1 - (self._spec.scales - self._done) % 2]()

    def _check_open(self) -> None:
        if not self._launches:
            raise BackendError("this scale loop is closed")

    def _check_tokens(self, scale: int) -> None:
        codes, graph = self._spec.tokenizer.vocab_size, self._scale_names[scale]
        check_tokens(self._buffers.tokens(scale), codes, scale, graph)

    def _check_f_hat(self) -> None:
        """f_hat after the last scale that is done; valid after `latent.download()`."""
        last = self._done - 1
        check_f_hat(self._buffers.f_hat(self._done), last, self._scale_names[last])

    def _checked_image(self, scales: int | None) -> NDArray[np.float32]:
        image = self._buffers.image()
        check_image(image, scales, self._half)
        return image

    def tokens(self) -> list[NDArray[np.int64]]:
        """Copies of the last run's tokens, [B, L_k] a scale that it came to."""
        return [self._buffers.tokens(k).copy() for k in range(self._done)]

    def close(self) -> None:
        """Release every session and the backend's memory; safe to call twice."""
        for session in self._opened.values():
            session.close()
        self._opened.clear()
        self._launches = self._decoders = ()
        self._backend.close()
        if self._own_files is not None:
            self._own_files.close()

    def _graphs(self, precision: str, layout: Layout) -> dict[str, GraphInfo]:
        wanted = generation_graphs(self._spec, layout)
        return {graph.name: self._manifest.graph(precision, graph.name) for graph in wanted}

    def _bind_all(self, graphs: Mapping[str, GraphInfo], layout: Layout) -> list[Launch]:
        """Launches in the order of a generation.

        The decoder is there twice: scales leave f_hat in two places in turn, and a preview is
        decoded from the place where the last scale does not leave it.
        """
        b, scales = self._buffers, self._scale_names
        launches = []
        if names.CONDITION in graphs:
            condition = graphs[names.CONDITION]
            launches.append(
                self._bind(condition, names.CONDITION, b.condition_inputs(), b.condition_outputs())
            )
        for k, name in enumerate(scales):
            launches.append(
                self._bind(graphs[name], name, b.scale_inputs(k), b.scale_outputs(k))
            )
        decoder, outputs = graphs[names.DECODER], b.decoder_outputs()
        for done in range(max(len(scales) - 1, 1), len(scales) + 1):
            launches.append(self._bind(decoder, names.DECODER, b.decoder_inputs(done), outputs))
        return launches

    def _bind(self, graph: GraphInfo, name: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """Bind what the graph names out of what there is."""
        wanted = {t.name: inputs[t.name] for t in graph.inputs}
        given = {t.name for t in graph.outputs}
        return self._opened[name].bind(wanted, {k: v for k, v in outputs.items() if k in given})


def _refuse_cancelled(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise CancelledError("the generation was cancelled")

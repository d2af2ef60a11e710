"""The scale loop: launches `condition` once, one graph per scale, and the decoder once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.bundle.graph_refs import generation_graphs, scale_graphs
from var_deploy.config import Layout
from var_deploy.errors import BackendError, CancelledError
from var_deploy.image.editing import Kept
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.runtime.backends.protocol import Arrays, Backend, Clock, Launch, Session
from var_deploy.runtime.buffers import Conditions, FHatPlace, LoopBuffers
from var_deploy.runtime.measure import clocked
from var_deploy.runtime.plausible import check_f_hat, check_image, check_tokens
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import Sampling
from var_deploy.spec import TextModelSpec


class Answer(Enum):
    """Answer of an `Observer` after a scale: continue with the next scale, or decode now."""

    GO_ON = "generate the next scale"
    DECODE = "stop here: decode the scales that are done"


class Observer(Protocol):
    """Receives a call after each scale of a running `ScaleLoop`, and after the decoder.

    The loop waits for the device before each call. Within a call the observer may use the loop's
    methods `drawn`, `f_hat` and `preview`.
    """

    def after_scale(self, done: int) -> Answer:
        """Called when `done` of K scales are done. After the last scale the answer is ignored."""
        ...

    def after_decoder(self) -> None:
        """Called when the decoder is done."""
        ...


class ScaleLoop:
    """Generates batches of exactly B images with the graphs of a bundle.

    All buffers are bound in the constructor; a generation fills the small inputs and launches.

    Args:
        bundle: the bundle's folder, whose files are opened and checked as they are needed, or
            files that are open already, which are not closed with the loop.
        backend: owned by the loop, which closes it, also where the constructor fails.
        layout: "shared" drives all scales through the one `step` graph, which keeps one copy of
            the weights in memory; "per-scale" opens the K static graphs.
        decoder: False leaves the decoder out, which the bundle may then lack: for
            `generate_tokens` alone.
    """

    def __init__(
        self,
        bundle: Path | BundleFiles,
        manifest: Manifest,
        backend: Backend,
        precision: str,
        layout: Layout,
        *,
        decoder: bool = True,
    ) -> None:
        self._manifest, self._spec, self._backend = manifest, manifest.model, backend
        self._half = precision == "fp16"
        self._scale_names = [graph.name for graph in scale_graphs(self._spec, layout)]
        self._opened: dict[str, Session] = {}
        self._conditions: dict[str, Launch] = {}
        self._scales: list[Launch] = []
        self._decoders: dict[FHatPlace, Launch] = {}
        self._done = 0
        self._clock: Clock | None = None
        self._own_files: BundleFiles | None = None
        if isinstance(bundle, BundleFiles):
            files = bundle
        else:
            files = self._own_files = BundleFiles(bundle, manifest, precision)
        try:
            graphs = self._graphs(precision, layout, decoder)
            cache = np.float16 if self._half else np.float32
            self._buffers = LoopBuffers(manifest, cache, backend)
            # the decoder first: its weights are reordered while it loads, and that passing second
            # copy should not come on top of everything else
            for name in sorted(graphs, key=lambda name: name != names.DECODER):
                self._opened[name] = backend.open(files.graph(name))
            bound = self._bind_all(graphs)
            files.verified()  # no graph runs on weights whose hash was not compared
            # `prepare` may run every launch once, so the inputs hold a valid generation
            draws = np.zeros((manifest.batch, self._spec.draws), np.float32)
            self._buffers.fill(_anything(manifest), draws, manifest.defaults)
            ready = dict(zip(bound, backend.prepare(list(bound.values())), strict=True))
            launches = self._buffers.condition_launches()
            self._conditions = {name: ready[name] for name in launches if name in ready}
            self._scales = [ready[scale] for scale in range(self._spec.scales)]
            self._decoders = {place: ready[place] for place in FHatPlace if place in ready}
        except BaseException:
            self.close()
            raise

    def run(
        self,
        conditions: Conditions,
        uniforms_BT: NDArray[np.float32],
        sampling: Sampling,
        observer: Observer | None = None,
        forced: Sequence[NDArray[np.int64]] = (),
        keep: Kept | None = None,
        cancelled: Callable[[], bool] | None = None,
        noise: Sequence[NDArray[np.float32]] = (),
    ) -> NDArray[np.float32]:
        """Generate images [B, height, width, channels] in [0, 1] of B labels, or B prompts, with
        uniforms [B, `NextScaleSpec.draws`].

        The returned array is overwritten by the next `run`, `preview` or `decode`.

        Args:
            observer: called after each scale and after the decoder; may stop after a scale.
            forced: the tokens [B, L_k] of the first scales; the other scales are sampled.
            keep: tokens of the other scales that are not sampled.
            cancelled: called before each launch, without waiting for the device; True cancels.
            noise: for a bundle with `more_smooth`, `sampling.gumbel` of each image [T, V]. Without
                noise, codes are mixed by their likelihood alone, which is enough for timing.

        Raises BackendError where logits, tokens, f_hat or image are not what a model can give, and
        CancelledError where `cancelled` returns True; the loop can be used again after both.
        """
        self._check_open()
        self._buffers.fill(conditions, uniforms_BT, sampling, forced, keep, noise)
        with self._completed():
            self._run_scales(observer, cancelled)
            self._run_decoder(observer, cancelled)
            self._buffers.outputs.download()
            self._buffers.latent.download()
        self._check_scales()
        return self._checked_image(self._done)

    def generate_tokens(
        self, conditions: Conditions, uniforms_BT: NDArray[np.float32], sampling: Sampling
    ) -> list[NDArray[np.int64]]:
        """Generate the tokens [B, L_k] of every scale, as `run` does, without decoding an image.

        Raises BackendError where logits, tokens or f_hat are not what a model can give.
        """
        self._check_open()
        self._buffers.fill(conditions, uniforms_BT, sampling)
        with self._completed():
            self._run_scales(None, None)
            self._buffers.outputs.download()
            self._buffers.latent.download()
        self._check_scales()
        return self.tokens()

    def _run_scales(
        self, observer: Observer | None, cancelled: Callable[[], bool] | None
    ) -> None:
        """Launch the scales in order, until the last one or until the observer answers DECODE."""
        self._done = 0
        for name in self._buffers.wanted:
            if name in self._conditions:
                _refuse_cancelled(cancelled)
                self._conditions[name]()
        for launch in self._scales:
            _refuse_cancelled(cancelled)
            launch()
            self._done += 1
            if observer is not None:
                self._backend.synchronize()
                if observer.after_scale(self._done) is Answer.DECODE:
                    break
        self._buffers.arena.discard()  # the decoder needs the room, not the cache

    def _run_decoder(
        self, observer: Observer | None, cancelled: Callable[[], bool] | None
    ) -> None:
        """Decode f_hat of the last scale that was launched."""
        _refuse_cancelled(cancelled)
        decode = self._decoder_after(self._done)
        if self._clock is not None:
            decode = clocked(decode, self._clock, last=True)
        decode()
        if observer is not None:
            self._backend.synchronize()
            observer.after_decoder()

    def _decoder_after(self, scales: int) -> Launch:
        """The launch that decodes f_hat after the first `scales` scales."""
        if not self._decoders:
            raise BackendError("this scale loop was made without a decoder")
        return self._decoders[FHatPlace.after(scales)]

    @contextlib.contextmanager
    def _completed(self) -> Iterator[None]:
        """Wait for all launches and copies at the end of the block, also after an exception: no
        launch may still read the input buffers when the next run fills them."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(BackendError):
                self._backend.synchronize()
            raise
        self._backend.synchronize()

    @property
    def scales(self) -> int:
        """K, the number of scales."""
        return self._spec.scales

    @property
    def scales_done(self) -> int:
        """Number of scales done in the current run, or in the last one."""
        return self._done

    def tokens(self) -> list[NDArray[np.int64]]:
        """Copies of the last run's tokens, [B, L_k] for each scale that was generated."""
        return [self._buffers.tokens(k).copy() for k in range(self._done)]

    def drawn(self, scale: int) -> NDArray[np.int64]:
        """A copy of the tokens [B, L_k] of a scale that is done; for use by an observer.

        Raises BackendError where they are not codes of the model.
        """
        self._buffers.outputs.download()
        self._backend.synchronize()
        self._check_tokens(scale)
        tokens: NDArray[np.int64] = self._buffers.tokens(scale).copy()
        return tokens

    def f_hat(self) -> NDArray[np.float32]:
        """A copy of f_hat [B, Cv, p_K, p_K] after the scales that are done; for an observer."""
        self._buffers.latent.download()
        self._backend.synchronize()
        latent: NDArray[np.float32] = self._buffers.f_hat(self._done).copy()
        return latent

    def preview(self) -> NDArray[np.float32]:
        """Decode the scales that are done: images [B, side, side, channels] in [0, 1].

        For use by an observer. The returned array is overwritten by the next `run`, `preview` or
        `decode`. Raises BackendError where f_hat or the image are not what a model can give.
        """
        self._check_open()
        self._decoder_after(self._done)()
        self._buffers.outputs.download()
        self._buffers.latent.download()
        self._backend.synchronize()
        self._check_f_hat()
        return self._checked_image(self._done)

    def decode(self, f_hat: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode f_hat [B, Cv, p_K, p_K] to images [B, side, side, channels] in [0, 1].

        Not for use during a run. The returned array is overwritten by the next `run` or `decode`.
        Raises BackendError where the image is not what a decoder can give.
        """
        self._check_open()
        self._buffers.fill_f_hat(f_hat)
        self._decoder_after(self._spec.scales)()
        self._buffers.outputs.download()
        self._backend.synchronize()
        return self._checked_image(None)

    def start_clock(self) -> Clock:
        """Start timing the following runs; the returned clock is closed with the loop.

        The clock marks the start of a run's first launch and the end of its decoder; with
        `Clock.each` the start and the end of every launch. Previews are not marked.
        """
        if self._clock is None:
            self._clock = clock = self._backend.clock()
            before = self._conditions
            self._conditions = {
                name: clocked(launch, clock, first=name == names.CONDITION)
                for name, launch in before.items()
            }
            self._scales = [
                clocked(launch, clock, first=not before and scale == 0)
                for scale, launch in enumerate(self._scales)
            ]
        return self._clock

    def close(self) -> None:
        """Release every session and the backend's memory; safe to call twice."""
        if self._clock is not None:
            self._clock.close()
            self._clock = None
        for session in self._opened.values():
            session.close()
        self._opened.clear()
        self._conditions, self._scales, self._decoders = {}, [], {}
        self._backend.close()
        if self._own_files is not None:
            self._own_files.close()

    def _check_open(self) -> None:
        if not self._scales:
            raise BackendError("this scale loop is closed")

    def _check_scales(self) -> None:
        """Check tokens and f_hat of the scales that are done, after the download."""
        for scale in range(self._done):
            self._check_tokens(scale)
        self._check_f_hat()

    def _check_tokens(self, scale: int) -> None:
        codes, graph = self._spec.tokenizer.token_values, self._scale_names[scale]
        check_tokens(self._buffers.tokens(scale), codes, scale, graph)

    def _check_f_hat(self) -> None:
        last = self._done - 1
        check_f_hat(self._buffers.f_hat(self._done), last, self._scale_names[last])

    def _checked_image(self, scales: int | None) -> NDArray[np.float32]:
        image = self._buffers.image()
        check_image(image, scales, self._half)
        return image

    def _graphs(self, precision: str, layout: Layout, decoder: bool) -> dict[str, GraphInfo]:
        wanted = generation_graphs(self._spec, layout, guidance=self._manifest.guidance)
        if not decoder:
            wanted = tuple(graph for graph in wanted if graph.kind != "decoder")
        return {graph.name: self._manifest.graph(precision, graph.name) for graph in wanted}

    def _bind_all(self, graphs: Mapping[str, GraphInfo]) -> dict[Hashable, Launch]:
        """Bind all graphs, in the order of a generation: the condition graphs by the name of the
        launch, each scale by its number, and the decoder by `FHatPlace`. The decoder is bound to
        both buffers of f_hat, since a preview may be decoded from either; the one that the last
        scale writes to comes last."""
        b, scales = self._buffers, self._spec.scales
        bound: dict[Hashable, Launch] = {}
        for launch, how in b.condition_launches().items():
            if how.graph in graphs:
                bound[launch] = self._bind(graphs, how.graph, how.inputs, how.outputs)
        for scale, name in enumerate(self._scale_names):
            inputs, outputs = b.scale_inputs(scale), b.scale_outputs(scale)
            bound[scale] = self._bind(graphs, name, inputs, outputs)
        if names.DECODER in graphs:
            for place in map(FHatPlace.after, range(max(scales - 1, 1), scales + 1)):
                inputs, outputs = b.decoder_inputs(place), b.decoder_outputs()
                bound[place] = self._bind(graphs, names.DECODER, inputs, outputs)
        return bound

    def _bind(
        self, graphs: Mapping[str, GraphInfo], name: str, inputs: Arrays, outputs: Arrays
    ) -> Launch:
        """Bind the inputs and outputs that a graph declares."""
        wanted = {t.name: inputs[t.name] for t in graphs[name].inputs}
        declared = {t.name for t in graphs[name].outputs}
        return self._opened[name].bind(wanted, {k: v for k, v in outputs.items() if k in declared})


def _anything(manifest: Manifest) -> Conditions:
    """Valid conditions of a batch."""
    model = manifest.model
    if isinstance(model, TextModelSpec):
        t = model.transformer
        rows = PromptRows.blank(manifest.batch, t.text_length, t.text_width)
        return dataclasses.replace(rows, negative=rows if manifest.guidance else None)
    return [0] * manifest.batch


def _refuse_cancelled(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise CancelledError("the generation was cancelled")

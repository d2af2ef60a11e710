"""`Pipeline`: from a bundle to images in two calls, and from images to others."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from var_deploy.bundle.files import BundleFiles
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.errors import BackendError, BundleChangedError, UsageError
from var_deploy.image.images import grid_columns
from var_deploy.image.pictures import Mask, Picture, frame_of, read_edit, read_pictures
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.runtime import diffusers_call
from var_deploy.runtime.assembly import assemble
from var_deploy.runtime.backends.choice import choose_backend
from var_deploy.runtime.backends.protocol import Clock
from var_deploy.runtime.calls import Call, Prompts, call_anew, call_of
from var_deploy.runtime.generated import Images, Origin
from var_deploy.runtime.generation_options import (
    SETTINGS,
    GenerationOptions,
    takes_generation_options,
)
from var_deploy.runtime.held_loop import HeldLoop, OpenLoop
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.prompts import PromptEncoder, PromptRows
from var_deploy.runtime.request import Request, ScaleEvent, end_of, to_uint8
from var_deploy.runtime.text_features import TextFeatures, find_text_encoder, stays_in_memory
from var_deploy.runtime.tokenizer import TokenizerGraphs, check_tokens
from var_deploy.sampling import Sampling
from var_deploy.sizes import Sizes, sizes_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Pipeline:
    """A loaded bundle. Made by `load`; a context manager that releases everything on exit.

    One generation runs at a time; calls from other threads wait for their turn.
    """

    def __init__(
        self,
        manifest: Manifest,
        loop: ScaleLoop | OpenLoop,
        loaded: Loaded,
        tokenizer: TokenizerGraphs | None = None,
        files: BundleFiles | None = None,
        text: PromptEncoder | None = None,
    ) -> None:
        self.manifest, self._files = manifest, files
        self._graphs, self._loaded, self._closed = tokenizer, loaded, False
        self._lock, self._busy, self._cancelled = threading.RLock(), False, threading.Event()
        self._loop = HeldLoop(manifest, loop, self._cancelled.is_set)
        self._text = TextFeatures(manifest, text, self._alone if self._loop.comes_back else None)

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
        check: Literal["changed", "hashes", "sizes"] = "changed",
        digest: str | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        keep_text_encoder: bool = False,
    ) -> Pipeline:
        """Check a bundle and load its graphs.

        Args:
            bundle: folder written by `var-deploy export`.
            backend: one of `config.BACKENDS`; "auto" takes the first that can run the bundle here:
                engines built for this very device, ONNX Runtime on a GPU, ONNX Runtime on a CPU.
                `describe().reason` says what was passed over, and why it is int8 where that was
                left open.
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
            threads: CPU threads; None takes one for each physical core that the process may use,
                within the quota of its control groups. With "auto" a number asks for the CPU.
            cuda_graph: on a GPU, record each launch once and replay it.
            check: "changed" compares the hashes of all files and looks for weights that are not
                finite, but does not read weights again that have not changed since an earlier
                process of this user did; "hashes" reads every file; "sizes" trusts files of the
                right size. Engines are always checked whole.
            digest: `Manifest.digest()` that the bundle must have; None takes any.
            text_encoder: folder of the text encoder of a text-to-image bundle; None looks in the
                bundle and beside it. Without one, `generate` takes features instead of texts.
            keep_text_encoder: keep the text encoder in memory once it is loaded. Otherwise it is,
                where the free memory suffices for it and the scales together; else the two take
                turns: each new prompt loads it, runs it and releases it before the scales are
                loaded (again). Features of the last prompts are kept either way.

        A bundle that is replaced meanwhile is loaded once more from the beginning. Afterwards the
        pipeline stays with the files that it has checked: a call that needs another graph of a
        bundle that was replaced, or weights that were overwritten, raises BundleError.

        Raises BundleError for a bundle that cannot be trusted, BackendError where the runtime is
        missing or refuses, UsageError for an unknown option.
        """
        config = RuntimeConfig(
            backend=backend,
            precision=precision,
            layout=layout,
            threads=threads,
            cuda_graph=cuda_graph,
            check=check,
            keep_text_encoder=keep_text_encoder,
        )
        return cls.open(bundle, config, digest=digest, text_encoder=text_encoder)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        config: RuntimeConfig,
        *,
        digest: str | None = None,
        cores: int | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        text_config: RuntimeConfig | None = None,
    ) -> Pipeline:
        """Load a bundle as `load` does, with its options in one value.

        `cores` is how many CPU threads are taken where `config` leaves that open, as in a process
        that shares the machine with others; None takes those that the process may use.
        `text_config` is how the text encoder is run; None takes `config`.
        """
        folder = Path(bundle)

        def load(*, again: bool = False) -> Pipeline:
            manifest = read_manifest(folder)
            if digest not in (None, manifest.digest()):
                raise BundleChangedError(
                    f"the bundle at {folder} was replaced: its digest is "
                    f"{manifest.digest()[:16]}, expected {str(digest)[:16]}; start again"
                )
            own = text_config or config
            text = find_text_encoder(folder, manifest, own, text_encoder, cores)
            choice = choose_backend(folder, manifest, config, cores=cores)
            stays = text is None or stays_in_memory(manifest, choice.config, text.manifest)[0]
            made = assemble(folder, manifest, choice, check_first=again, take_turns=not stays)
            return cls(made.manifest, made.loop, made.loaded, made.tokenizer, made.files, text)

        try:
            return load()
        except BundleChangedError:
            return load(again=True)

    @takes_generation_options
    def generate(
        self,
        labels: Sequence[int | str | None] | None = None,
        seed: int | Sequence[int] = 0,
        *,
        prompts: Prompts | None = None,
        negative: str | None = None,
        count: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Images:
        """Generate images, [N, height, width, channels] uint8; the array is the caller's.

        Image i has seed + i, and depends on that, its label or prompt and the settings alone, not
        on its neighbours or the batch size: `generate([label], seed + i)` makes it again.

        Args:
            prompts: of a text-to-image model, which takes these and no labels: one text or several,
                repeated in order up to `count`; or the features of prompts.
            negative: what the images are guided away from; None or "" for what the model learned
                to take for "no prompt".
            labels: class numbers, names, or None for an image without a class; repeated in order
                up to `count`. None instead of a list stands for images without a class. A model
                without classes takes the count from the length alone.
            seed: 0 … 2⁶⁴-1; or several, one per image.
            count: N; None makes one image per label or one per seed, whichever are more.
            options: settings, callbacks and a deadline, see `GenerationOptions`.

        Raises UsageError (LabelError) for labels, seeds or settings out of range and for a count
        that would leave labels out, BackendError where the pipeline is closed or the runtime
        fails, CancelledError after `cancel`.
        """
        end, sampling = end_of(options.get("deadline")), self._sampling(options)
        asked = call_of(
            self.manifest, self._text, labels, prompts, negative, seed, count, sampling
        )
        with self._running():
            images = self._generate(asked.request, options, end)
        return self._signed(images, asked, options)

    @takes_generation_options
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: diffusers_call.Generators | None = None,
        seed: int | Sequence[int] = 0,
        output_type: diffusers_call.OutputType = "pil",
        **options: Unpack[GenerationOptions],
    ) -> diffusers_call.PipelineOutput:
        """`generate` in the words of diffusers: `pipe("a red star").images[0]` is a PIL image.

        Args:
            prompt, negative_prompt: of a text-to-image model.
            class_labels: of a model with classes, numbers or names; none is an image without one.
            num_images_per_prompt: images of each prompt or label, which stand in a row.
            guidance_scale: instead of `cfg`, see `diffusers_call.cfg_of`; up to 1 is none.
            generator: a `torch.Generator`, or one per image, whose seed is taken; else `seed`.
            output_type: "pil" or "np".

        The other arguments, the seeds of images and the errors are those of `generate`.
        """
        return diffusers_call.draw(
            self.generate,
            self.manifest,
            options,
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            generator=generator,
            seed=seed,
            output_type=output_type,
        )

    def draw(
        self,
        request: Request,
        on_scale: Callable[[ScaleEvent], object] | None = None,
        deadline: float | None = None,
        unwanted: Callable[[], bool] | None = None,
    ) -> Images:
        """Generate the images of a request whose values the caller has validated; see `generate`.

        `unwanted` is asked before each launch: True ends the call as `cancel` does.
        """
        with self._running():
            return self._loop.draw(request, None, on_scale, end_of(deadline), unwanted)

    def encode(self, images: Picture | Sequence[Picture]) -> list[NDArray[np.int64]]:
        """Encode images to the tokens [N, L_k] of every scale.

        Args:
            images: arrays, PIL images or paths, see `pictures.read_pictures`: of any size, brought
                to the model's as in its training.

        Raises UsageError for files that are not pictures, BundleError or BackendError where the
        encoder cannot be run.
        """
        pixels = self._pixels(images)
        with self._running():
            return self._tokenizer.encode(pixels)

    def decode(
        self, tokens: Sequence[NDArray[np.int64]], scales: int | None = None
    ) -> NDArray[np.uint8]:
        """Decode tokens of the first `scales` scales to images uint8 [N, height, width, channels].

        `tokens` has [N, L_k] a scale; without `scales` all that are given are taken. Raises
        UsageError for tokens that this model cannot have, BundleError for a bundle from before
        it could do this.
        """
        scales = len(tokens) if scales is None else scales
        checked = check_tokens(self.manifest.model, tokens, scales)
        tokenizer = self.manifest.model.tokenizer
        shape = (len(checked[0]), *tokenizer.image_size, tokenizer.image_channels)
        images = np.empty(shape, np.uint8)
        with self._running():
            loop = self._loop.open()
            for rows, f_hat in self._tokenizer.f_hats(checked, scales):
                images[rows] = to_uint8(loop.decode(f_hat)[: len(rows)])
        return images

    @takes_generation_options
    def edit(
        self,
        image: Picture,
        mask: Mask,
        label: int | str | None = None,
        seed: int | Sequence[int] = 0,
        *,
        prompt: str | PromptRows | None = None,
        negative: str | None = None,
        keep_pixels: bool = False,
        count: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Images:
        """Inpaint a part of an image: generated images [N, height, width, channels] uint8.

        The image's tokens stay outside the mask at every scale, see `editing.keep_masks`, and far
        from it the image comes back as the tokenizer reconstructs it.

        Args:
            image: see `encode`.
            mask: where the image is to be new: bool [H, W] or an image, see `pictures.read_mask`.
            label: what to put there; None lets the surroundings decide.
            prompt: what to put there, for a text-to-image model; None is "".
            keep_pixels: outside the mask put the pixels back as they were; the seam is feathered,
                within the mask.
            count: N; None makes one image per seed.

        The other arguments and errors are those of `generate`; image i has seed + i.
        """
        end, sampling = end_of(options.get("deadline")), self._sampling(options)
        tokenizer = self.manifest.model.tokenizer
        edit = read_edit(image, mask, tokenizer, keep_pixels=keep_pixels)
        asked = call_anew(
            self.manifest, self._text, label, prompt, negative, seed, count, sampling
        )
        rows = [0] * len(asked.request.labels)
        with self._running():
            kept = edit.kept(self._tokenizer.encode(edit.pixels)).rows(rows)
            images = self._generate(dataclasses.replace(asked.request, kept=kept), options, end)
        if keep_pixels:
            images[...] = edit.finish(images)
        told = {"keep_pixels": "yes"} if keep_pixels else {}
        return self._signed(images, asked, options, {**_file_name("picture", image), **told})

    @takes_generation_options
    def vary(
        self,
        image: Picture,
        from_scale: int,
        label: int | str | None = None,
        seed: int | Sequence[int] = 0,
        *,
        prompt: str | PromptRows | None = None,
        negative: str | None = None,
        count: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Images:
        """Keep an image's tokens of the scales before `from_scale` and sample the others.

        [N, side, side, channels] uint8. `from_scale` 0 keeps nothing, K everything. The other
        arguments and errors are those of `edit`; image i has seed + i.
        """
        end, scales = end_of(options.get("deadline")), self.manifest.model.scales
        if isinstance(from_scale, bool) or not 0 <= from_scale <= scales:
            raise UsageError(f"from_scale must lie between 0 and {scales}, found {from_scale}")
        sampling = self._sampling(options)
        pixels = self._pixels(image)
        if len(pixels) != 1:
            raise UsageError(f"vary takes one image, found {len(pixels)}")
        asked = call_anew(
            self.manifest, self._text, label, prompt, negative, seed, count, sampling
        )
        rows = [0] * len(asked.request.labels)
        with self._running():
            tokens = self._tokenizer.encode(pixels)[:from_scale]
            request = dataclasses.replace(asked.request, forced=tuple(t[rows] for t in tokens))
            images = self._generate(request, options, end)
        told = {**_file_name("picture", image), "from_scale": str(from_scale)}
        return self._signed(images, asked, options, told)

    def cancel(self) -> None:
        """Cancel the running generation, from another thread or from a callback.

        The running call raises CancelledError before its next launch; the pipeline can be used
        again. Without a running call nothing happens; calls that wait for their turn go on.
        """
        if self._busy:
            self._cancelled.set()

    def features(
        self, prompts: Sequence[str], negatives: Sequence[str] | None = None
    ) -> PromptRows:
        """The text features of N prompts, which `generate` and `draw` take as well as texts.

        Args:
            negatives: negative prompts, one per prompt; None for what the model learned to take
                for "no prompt".

        Raises UsageError where the bundle takes no prompts, no text encoder was found, or a prompt
        is not text; and what the text encoder raises.
        """
        return self._text(prompts, negatives)

    def check_text_encoder(self) -> None:
        """Raise UsageError where the bundle takes prompts and no text encoder was found."""
        if self.manifest.takes_text:
            self._text.found()

    def describe_text_encoder(self) -> Loaded:
        """Precision, backend and digest (one of `settings`) of the text encoder, which is loaded
        for that.

        Raises UsageError where none was found, and what the text encoder raises.
        """
        return self._text.describe()

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Say, in a line each, which prompts are cut off and where, and which words the text
        encoder does not know. Raises as `generate` for prompts."""
        return self._text.remarks(prompts)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Return the words of prompts that the text encoder does not know, each once and as it is
        written there. Raises as `generate` for prompts."""
        return self._text.unknown_words(prompts)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, index = label; empty where the classes have none, see `sizes.classes`."""
        return self.manifest.labels

    @property
    def sizes(self) -> Sizes:
        """How large images, tokens and batches of this model are."""
        return sizes_of(self.manifest)

    def describe(self) -> Loaded:
        """Return backend, versions, precision and layout, to be reported with a result."""
        return self._loaded

    def start_clock(self) -> Clock:
        """A clock of the generations to come, closed with the pipeline; see
        `ScaleLoop.start_clock`."""
        with self._running():
            return self._loop.start_clock()

    def close(self) -> None:
        """Release all sessions and memory; safe to call twice."""
        with self._lock:
            self._refuse_callback()
            if self._graphs is not None:
                self._graphs.close()
            self._text.close()
            self._loop.close()
            if self._files is not None:
                self._files.close()
            self._closed = True

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """The pipeline's one turn."""
        with self._lock:
            self._check_open()
            self._refuse_callback()
            if self._files is not None:
                self._files.check_unchanged()
            self._cancelled.clear()
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The pipeline's one turn, with nothing of the scales in memory."""
        with self._lock:
            self._check_open()
            self._refuse_callback()
            if self._graphs is not None:
                self._graphs.close()
            self._loop.leave()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("this pipeline is closed")

    def _sampling(self, options: GenerationOptions) -> Sampling:
        given = {name: cast(Any, options.get(name)) for name in SETTINGS}
        return self.manifest.sampling(options.get("sampling"), **given)

    def _generate(
        self, request: Request, options: GenerationOptions, end: float | None
    ) -> Images:
        """Images of a request, with the callbacks of `options`, by `end`."""
        return self._loop.draw(request, options.get("on_progress"), options.get("on_scale"), end)

    def _signed(
        self,
        images: Images,
        asked: Call,
        options: GenerationOptions,
        source: Mapping[str, str] | None = None,
    ) -> Images:
        """The images, which now know what they were made from."""
        request = asked.request
        transformer = self.manifest.model.transformer
        classes = transformer.classes if transformer.conditional else 0
        timed = options.get("deadline") is not None
        images.origin = Origin(
            manifest=self.manifest,
            precision=self._loaded.precision,
            sampling=request.sampling,
            labels=tuple(n if n < classes else None for n in request.labels),
            seeds=tuple(seed for seed, _ in request.rng_keys),
            source={**(source or {}), **({"negative": asked.negative} if asked.negative else {})},
            scales_done=tuple(images.scales_done.tolist()) if timed else None,
            columns=grid_columns(asked.given, len(images)),
            prompts=asked.prompts,
        )
        return images

    @property
    def _tokenizer(self) -> TokenizerGraphs:
        if self._graphs is None:
            raise BackendError("this pipeline has no tokenizer: make it with Pipeline.load")
        return self._graphs

    def _refuse_callback(self) -> None:
        """Only a callback of a running generation can hold the lock and get here."""
        if self._busy:
            raise UsageError("a callback of generate cannot use the pipeline that calls it")

    def _pixels(self, images: Picture | Sequence[Picture]) -> NDArray[np.uint8]:
        tokenizer = self.manifest.model.tokenizer
        return read_pictures(images, frame_of(tokenizer), tokenizer.image_channels)


def _file_name(key: str, picture: Picture) -> dict[str, str]:
    """What the text of an image says of the file that it was made from; nothing of an array."""
    if isinstance(picture, (str, os.PathLike)):
        return {key: Path(picture).name}
    return {}

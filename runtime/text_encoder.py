"""`TextEncoder`: prompts to text features, from the folder of a text encoder."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.bundle.hash_record import HashRecord
from var_deploy.config import Loaded, Precision, RuntimeConfig
from var_deploy.errors import BackendError, BundleChangedError, BundleError, UsageError
from var_deploy.runtime.backends.choice import Choice, choose_single_graph_backend
from var_deploy.runtime.backends.host_memory import trim_heap
from var_deploy.runtime.plausible import check_features
from var_deploy.runtime.tokenizer import SingleGraph
from var_deploy.runtime.weights_check import check_weights
from var_deploy.text.feature_cache import FeatureCache
from var_deploy.text.manifest import (
    TextEncoderManifest,
    read_text_encoder,
    read_tokenizer_json,
)
from var_deploy.text.prompt_tokenizer import PromptTokenizer, TokenizedPrompt

DEFAULT = RuntimeConfig()


class TextEncoder:
    """A text encoder whose weights are loaded at the first prompt. Made by `open`.

    A context manager that releases everything on exit. Calls from several threads take turns.

    Attributes:
        manifest: sizes and files.
        cache: features of the last prompts.
    """

    def __init__(
        self,
        folder: Path,
        manifest: TextEncoderManifest,
        tokenizer: PromptTokenizer,
        config: RuntimeConfig,
        cache: FeatureCache,
        cores: int | None = None,
    ) -> None:
        self.manifest, self.cache = manifest, cache
        self._folder, self._tokenizer = folder, tokenizer
        self._config, self._cores = config, cores
        # what a cache's key holds besides the prompt, known before anything is loaded
        self._key = (manifest.digest(), config.precision)
        self._files: BundleFiles | None = None
        self._graph: SingleGraph | None = None
        self._loaded: Loaded | None = None
        self._closed = False
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        config: RuntimeConfig = DEFAULT,
        *,
        digest: str | None = None,
        cache: FeatureCache | None = None,
        cores: int | None = None,
    ) -> TextEncoder:
        """Check the manifest and the tokenizer; the weights are loaded at the first prompt.

        Args:
            folder: written by `export_text_encoder`.
            config: backend, precision, threads and check; the layout is ignored.
            digest: `TextEncoderManifest.digest()` that the folder must have; None takes any.
            cache: where features are kept; None makes a cache of this encoder alone.
            cores: CPU threads where `config` leaves their number open; None: all usable cores.

        Raises BundleError for a folder that cannot be trusted or has another digest, BackendError
        where `tokenizers` is not installed.
        """
        path = Path(folder)
        manifest = read_text_encoder(path)
        manifest.check_digest(path, digest)
        spec = manifest.model
        tokenizer = PromptTokenizer(
            read_tokenizer_json(path, manifest), spec.length, vocab_size=spec.vocab_size
        )
        kept = FeatureCache() if cache is None else cache  # an empty one is false
        return cls(path, manifest, tokenizer, config, kept, cores)

    def tokenize(self, prompt: str, length: int | None = None) -> TokenizedPrompt:
        """Return the tokens of a prompt and what is cut off; `length` as in `encode`."""
        return self._tokenizer(prompt, self._length(length))

    def encode(
        self, prompts: Sequence[str], length: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return features [N, length, Ct], zero beyond each prompt, and the token counts [N].

        The arrays are the caller's. A prompt's features depend on its text alone, not on the other
        prompts or on `length` where it is long enough.

        Args:
            length: tokens that the caller takes, at most those of the graph; a longer prompt is
                truncated there. None: as many as the graph takes.

        Raises UsageError for prompts that are not text, BundleError for files that cannot be
        trusted, BackendError where the runtime is missing or fails or the encoder was closed.
        """
        if isinstance(prompts, str):
            raise UsageError('prompts must be a list of texts, such as ["a red fox"]')
        length = self._length(length)
        tokens = [self._tokenizer(prompt, length) for prompt in prompts]
        features = np.zeros((len(tokens), length, self.manifest.model.width), np.float32)
        with self._lock:
            for row, prompt, found in zip(features, prompts, tokens, strict=True):
                row[: found.length] = self._features(prompt, length, found)
        return features, np.array([found.length for found in tokens], np.int64)

    def knows(self, prompts: Sequence[str], length: int | None = None) -> bool:
        """Return whether the features of all these prompts are kept, so that `encode` need not
        load the weights. Raises as `encode` for prompts."""
        length = self._length(length)
        tokens = (self._tokenizer(prompt, length) for prompt in prompts)
        keys = [
            self._key_of(prompt, length, found)
            for prompt, found in zip(prompts, tokens, strict=True)
        ]
        return all(self.cache.get(key) is not None for key in keys)

    def describe(self) -> Loaded:
        """Return what runs the encoder, whose digest is one of the settings; loads it where it is
        not loaded. Raises as `encode`."""
        with self._lock:
            if self._loaded is None:
                self._load()
            assert self._loaded is not None
            return self._loaded

    def release(self) -> None:
        """Release the weights and the inference library's memory; the next prompt loads them again.

        Features that are kept, and the open files, stay.
        """
        with self._lock:
            if self._graph is not None:
                self._graph.close()
                self._graph = None
                trim_heap()

    def close(self) -> None:
        """Release everything; may be called twice."""
        with self._lock:
            self.release()
            if self._files is not None:
                self._files.close()
                self._files = None
            self._closed = True

    def __enter__(self) -> TextEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _length(self, length: int | None) -> int:
        most = self.manifest.model.length
        if length is None:
            return most
        if isinstance(length, bool) or not 1 <= length <= most:
            raise UsageError(
                f"the text encoder takes 1 to {most} tokens, found {length}; export it again with "
                "a larger text length"
            )
        return length

    def _features(self, prompt: str, length: int, found: TokenizedPrompt) -> NDArray[np.float32]:
        """Return features [len, Ct] of one prompt, which are kept."""
        key = self._key_of(prompt, length, found)
        kept = self.cache.get(key)
        if kept is not None and not self._closed:
            return kept
        spec = self.manifest.model
        ids, mask = np.zeros((1, spec.length), np.int64), np.zeros((1, spec.length), np.bool_)
        ids[0, : found.length], mask[0, : found.length] = found.ids[: found.length], True
        graph = self._load()
        if self._files is not None:
            self._files.check_unchanged()
        made = graph({names.TEXT_IDS: ids, names.TEXT_MASK: mask})[names.TEXT_FEATURES]
        features: NDArray[np.float32] = made[0, : found.length].copy()
        check_features(features)
        self.cache.put(key, features)
        return features

    def _key_of(self, prompt: str, length: int, found: TokenizedPrompt) -> Hashable:
        """Return the cache's key of a prompt, which is the same at every length that it fits."""
        return (*self._key, prompt, length if found.truncation else 0)

    def _load(self) -> SingleGraph:
        """Return the graph, loaded; a folder that is replaced meanwhile is an error."""
        if self._closed:
            raise BackendError("the text encoder is closed")
        if self._graph is not None:
            return self._graph
        choice = choose_single_graph_backend(self.manifest.graphs, self._config, cores=self._cores)
        # the same precision after a release, whatever "auto" would take by then
        self._config = dataclasses.replace(self._config, precision=choice.config.precision)
        try:
            files = self._files or self._checked_files(choice)
        except BaseException:
            choice.backend.close()
            raise
        precision = choice.config.precision
        settings = {k: v for k, v in choice.backend.describe().items() if k != "backend"}
        settings["digest"] = self.manifest.digest()
        try:
            self._graph = SingleGraph(
                files, self.manifest, precision, names.TEXT_ENCODER, choice.backend
            )
        except BaseException:
            if self._files is None:
                files.close()
            raise
        self._files = files
        files.loaded((names.TEXT_ENCODER,))
        self._loaded = Loaded(
            precision=precision,
            backend=choice.config.backend,
            layout="single graph",
            settings=settings,
            reason=choice.reason,
            threads=choice.config.threads,
        )
        return self._graph

    def _checked_files(self, choice: Choice) -> BundleFiles:
        hashes = self._config.check != "sizes"
        record = HashRecord() if self._config.check == "changed" else None
        precision = cast(Precision, choice.config.precision)
        files = BundleFiles(
            self._folder,
            self.manifest,
            precision,
            hashes=hashes,
            record=record,
            read=read_text_encoder,
        )
        try:
            files.check()
            if hashes:
                check_weights(files)
        except BaseException as error:
            changed = isinstance(error, BundleError) and files.replaced()
            files.close()
            if changed:
                raise BundleChangedError(
                    f"the text encoder at {self._folder} changed while it was read; load it again "
                    "once it is complete"
                ) from None
            raise
        return files

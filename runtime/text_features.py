"""The text features of a pipeline's prompts, and where its text encoder is found."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import (
    AUTO,
    CPU,
    TENSORRT,
    TENSORRT_RTX,
    Layout,
    Loaded,
    Precision,
    RuntimeConfig,
)
from var_deploy.errors import UsageError, one_line
from var_deploy.host.machine import Machine
from var_deploy.manifest import Manifest
from var_deploy.runtime.prompts import PromptEncoder, PromptRows
from var_deploy.spec import TextModelSpec

if TYPE_CHECKING:
    from var_deploy.runtime.text_encoder import TextEncoder
    from var_deploy.text.manifest import TextEncoderManifest
    from var_deploy.text.prompt_tokenizer import TokenizedPrompt

# words, or prompts that are cut off, that are named; characters of a word
MOST_LISTED, LONGEST_LISTED = 10, 40


class TextFeatures:
    """Turns prompts into what the condition graphs of a bundle read.

    Args:
        encoder: the bundle's text encoder, which is closed with this; None where none was found,
            and for a bundle that takes no prompts.
        alone: holds everything else out of memory while the text encoder is loaded, which is
            released before it returns; None where the text encoder stays in memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        encoder: PromptEncoder | None,
        alone: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self._manifest, self._encoder, self._lock = manifest, encoder, threading.Lock()
        self._alone = alone

    def __call__(
        self, prompts: Sequence[str], negatives: Sequence[str] | None = None
    ) -> PromptRows:
        """Return the features of prompts, see `Pipeline.features`."""
        length = self._length()
        if negatives is not None and len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        features, lengths = self._encode([*prompts, *(negatives or ())], length)
        rows = PromptRows(features=features, lengths=lengths)
        if negatives is None:
            return rows
        count = len(prompts)
        negative = rows.rows(range(count, 2 * count))
        return dataclasses.replace(rows.rows(range(count)), negative=negative)

    def _encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        encoder = self.found()
        if self._alone is None or encoder.knows(texts, length):
            with self._lock:
                return encoder.encode(texts, length)
        # the pipeline's turn comes first, as in every call that waits for both
        with self._alone(), self._lock:
            try:
                return encoder.encode(texts, length)
            finally:
                encoder.release()

    def found(self) -> PromptEncoder:
        """Return the text encoder. Raises UsageError where none was found."""
        if self._encoder is None:
            raise _not_found(self._manifest)
        return self._encoder

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Return what there is to say of prompts, see `Pipeline.remarks`."""
        found = self._tokenized(prompts)
        cut = [tokens.truncation for tokens in found if tokens.truncation]
        lines = cut[:MOST_LISTED]
        if len(cut) > MOST_LISTED:
            lines.append(f"{len(cut) - MOST_LISTED:,} more prompts are cut off")
        if unknown := _unknown(found):
            name = self._manifest.preset or "the text encoder"
            lines.append(f"{name} does not know: {_listed(unknown)}")
        return lines

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Return the words that the text encoder does not know, see `Pipeline.unknown_words`."""
        return _unknown(self._tokenized(prompts))

    def _tokenized(self, prompts: Sequence[str]) -> list[TokenizedPrompt]:
        """Return the tokens of each prompt that differs; [] without a text encoder."""
        if self._encoder is None:
            return []
        length, encoder = self._length(), self._encoder
        return [encoder.tokenize(prompt, length) for prompt in dict.fromkeys(prompts)]

    def describe(self) -> Loaded:
        """Return what runs the text encoder, see `Pipeline.describe_text_encoder`."""
        return self.found().describe()

    def close(self) -> None:
        """Release the text encoder; safe to call twice."""
        if self._encoder is not None:
            self._encoder.close()

    def _length(self) -> int:
        """Return the tokens that the bundle takes. Raises UsageError where it takes no prompts."""
        model = self._manifest.model
        if isinstance(model, TextModelSpec):
            return model.transformer.text_length
        takes = "labels" if model.transformer.conditional else "no condition"
        raise UsageError(f"this bundle takes {takes}, not prompts")


def _unknown(found: Sequence[TokenizedPrompt]) -> list[str]:
    """Return the unknown words of prompts, each once."""
    return list(dict.fromkeys(word for tokens in found for word in tokens.unknown))


def _listed(words: Sequence[str]) -> str:
    """Return words as one line: the first MOST_LISTED of them, and how many there are besides."""
    first = ", ".join(one_line(ValueError(word[:LONGEST_LISTED])) for word in words[:MOST_LISTED])
    rest = len(words) - MOST_LISTED
    return f"{first} and {rest} more" if rest > 0 else first


def text_encoder_folder(
    bundle: Path, manifest: Manifest, given: str | os.PathLike[str] | None = None
) -> Path | None:
    """Return the folder of a bundle's text encoder: `given`, or the one that the manifest names, in
    the bundle or beside it; None where it is in neither, or the bundle takes no prompts.

    Raises UsageError for one that is given to a bundle that takes no prompts.
    """
    if not manifest.takes_text:
        if given is not None:
            raise UsageError("this bundle takes no prompts: leave the text encoder out")
        return None
    ref = manifest.text_encoder
    if given is not None or ref is None:
        return None if given is None else Path(given)
    beside = (bundle / ref.folder, Path(os.path.abspath(bundle)).parent / ref.folder)
    return next((p for p in beside if (p / names.MANIFEST).is_file()), None)


def checked_text_encoder(
    bundle: Path, manifest: Manifest, given: str | os.PathLike[str] | None = None
) -> tuple[Path, TextEncoderManifest]:
    """Return the folder and the manifest of the text encoder that a bundle needs.

    Raises UsageError where none is found, BundleError for one that cannot be trusted or is another
    than the one that the bundle was exported with.
    """
    from var_deploy.text.manifest import read_text_encoder

    place, ref = text_encoder_folder(bundle, manifest, given), manifest.text_encoder
    if place is None:
        raise _not_found(manifest)
    found = read_text_encoder(place)
    found.check_digest(place, ref.digest if ref else None)
    return place, found


def _not_found(manifest: Manifest) -> UsageError:
    ref = manifest.text_encoder
    what = f"{ref.folder} (digest {ref.digest[:16]})" if ref else "of any name"
    return UsageError(
        f"a text encoder {what} is neither in the bundle nor beside it: give its folder "
        "with --text-encoder (text_encoder in Python)"
    )


def find_text_encoder(
    bundle: Path,
    manifest: Manifest,
    config: RuntimeConfig,
    given: str | os.PathLike[str] | None = None,
    cores: int | None = None,
) -> TextEncoder | None:
    """Return the text encoder of a bundle, whose weights are loaded at the first prompt.

    Its folder is that of `text_encoder_folder`; None where there is none. Raises UsageError as that
    does, BundleError for one that cannot be trusted or is another.
    """
    place = text_encoder_folder(bundle, manifest, given)
    if place is None:
        return None
    from var_deploy.runtime.text_encoder import TextEncoder
    from var_deploy.text.manifest import read_text_encoder

    ref = manifest.text_encoder
    # it has precisions of its own, and no engines
    changes: dict[str, Any] = {"precision": own_precision(read_text_encoder(place), config)}
    if config.backend in (TENSORRT, TENSORRT_RTX):
        changes["backend"] = AUTO
    own = dataclasses.replace(config, **changes)
    return TextEncoder.open(place, own, digest=ref.digest if ref else None, cores=cores)


def own_precision(manifest: TextEncoderManifest, config: RuntimeConfig) -> str:
    """Return the precision in which a text encoder is run beside an image bundle: that of `config`
    where it has it, else "auto"."""
    return config.precision if config.precision in manifest.graphs else AUTO


def stays_in_memory(
    manifest: Manifest,
    config: RuntimeConfig,
    encoder: TextEncoderManifest,
    machine: Machine | None = None,
) -> tuple[bool, str]:
    """Decide whether the text encoder of a bundle stays in memory beside the scales: (stays,
    reason); see `planning.text_memory.keeps_text_encoder`.

    `config` is that of the scales, with nothing left open.
    """
    from var_deploy.planning.devices import cpu_device, this_device
    from var_deploy.planning.memory import footprint
    from var_deploy.planning.precisions import ON_GPU
    from var_deploy.planning.text_memory import (
        keeps_text_encoder,
        text_encoder_memory,
        text_encoder_precision,
    )
    from var_deploy.planning.workload import workload_of
    from var_deploy.runtime.backends.choice import has_cuda_provider

    if config.keep_text_encoder:
        return keeps_text_encoder(0, 0, None, keep=True)
    here = machine or Machine()
    try:
        device = cpu_device(here) if config.backend == CPU else this_device(here)
    except UsageError:  # a system that does not tell its memory
        return keeps_text_encoder(0, 0, None)
    scales_on_gpu = device.sm is not None
    for_gpu = any(precision in encoder.graphs for precision in ON_GPU)
    encoder_on_gpu = scales_on_gpu and for_gpu and has_cuda_provider()
    if scales_on_gpu and not encoder_on_gpu and not device.one_memory:
        return True, "it is in the memory of the host, the scales in that of the GPU"
    scales = footprint(
        workload_of(manifest, cast(Precision, config.precision)),
        cast(Layout, config.layout),
        "tensorrt" if scales_on_gpu else "onnxruntime-cpu",
        one_memory=device.one_memory,
    )
    precision = text_encoder_precision(encoder.graphs, config.precision, gpu=encoder_on_gpu)
    memory = text_encoder_memory(encoder.model, precision, gpu=encoder_on_gpu)
    return keeps_text_encoder(scales.peak, memory.peak, device.available)

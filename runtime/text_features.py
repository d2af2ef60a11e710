"""The text features of a pipeline's prompts, and where its text encoder is found."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_deploy import names
from var_deploy.config import AUTO, TENSORRT, TENSORRT_RTX, RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.runtime.prompts import PromptEncoder, PromptRows
from var_deploy.spec import TextModelSpec


class TextFeatures:
    """Turns prompts into what the condition graphs of a bundle read.

    Args:
        encoder: the bundle's text encoder, which is closed with this; None where none was found,
            and for a bundle that takes no prompts.
    """

    def __init__(self, manifest: Manifest, encoder: PromptEncoder | None) -> None:
        self._manifest, self._encoder, self._lock = manifest, encoder, threading.Lock()

    def __call__(
        self, prompts: Sequence[str], negatives: Sequence[str] | None = None
    ) -> PromptRows:
        """Return the features of prompts, see `Pipeline.features`."""
        length = self._length()
        if negatives is not None and len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        encoder = self.found()
        with self._lock:
            features, lengths = encoder.encode([*prompts, *(negatives or ())], length)
        rows = PromptRows(features=features, lengths=lengths)
        if negatives is None:
            return rows
        count = len(prompts)
        negative = rows.rows(range(count, 2 * count))
        return dataclasses.replace(rows.rows(range(count)), negative=negative)

    def found(self) -> PromptEncoder:
        """Return the text encoder. Raises UsageError where none was found."""
        if self._encoder is None:
            ref = self._manifest.text_encoder
            what = f"{ref.folder} (digest {ref.digest[:16]})" if ref else "of any name"
            raise UsageError(
                f"a text encoder {what} is neither in the bundle nor beside it: give its folder "
                "with --text-encoder (text_encoder in Python)"
            )
        return self._encoder

    def truncations(self, prompts: Sequence[str]) -> list[str]:
        """Return where prompts are cut off, see `Pipeline.truncations`."""
        if self._encoder is None:
            return []
        length, encoder = self._length(), self._encoder
        found = (encoder.tokenize(prompt, length) for prompt in dict.fromkeys(prompts))
        return [tokens.truncation for tokens in found if tokens.truncation]

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


def find_text_encoder(
    bundle: Path,
    manifest: Manifest,
    config: RuntimeConfig,
    given: str | os.PathLike[str] | None = None,
    cores: int | None = None,
) -> PromptEncoder | None:
    """Return the text encoder of a bundle, whose weights are loaded at the first prompt.

    It is `given`, or the folder that the manifest names, in the bundle or beside it; None where it
    is in neither. Raises UsageError for one that is given to a bundle that takes no prompts,
    BundleError for one that cannot be trusted or is another.
    """
    if not manifest.takes_text:
        if given is not None:
            raise UsageError("this bundle takes no prompts: leave the text encoder out")
        return None
    from var_deploy.runtime.text_encoder import TextEncoder
    from var_deploy.text.manifest import read_text_encoder

    ref = manifest.text_encoder
    place = Path(given) if given is not None else find_folder(bundle, manifest)
    if place is None:
        return None
    # it has precisions of its own, and no engines
    changes: dict[str, Any] = {}
    if config.precision != AUTO and config.precision not in read_text_encoder(place).graphs:
        changes["precision"] = AUTO
    if config.backend in (TENSORRT, TENSORRT_RTX):
        changes["backend"] = AUTO
    own = dataclasses.replace(config, **changes)
    return TextEncoder.open(place, own, digest=ref.digest if ref else None, cores=cores)


def find_folder(bundle: Path, manifest: Manifest) -> Path | None:
    """Return the folder of the text encoder that the manifest names, in the bundle or beside it;
    None where it is in neither."""
    ref = manifest.text_encoder
    if ref is None:
        return None
    beside = (bundle / ref.folder, Path(os.path.abspath(bundle)).parent / ref.folder)
    return next((place for place in beside if (place / names.MANIFEST).is_file()), None)

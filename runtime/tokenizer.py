"""Runs the graphs `encoder` (images → tokens) and `accumulate` (tokens → f_hat)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.errors import UsageError
from var_deploy.manifest import ListedFiles, Manifest
from var_deploy.runtime.backends.protocol import Backend
from var_deploy.runtime.blocks import Fields, SharedBlock
from var_deploy.runtime.plausible import check_encoded, check_f_hat
from var_deploy.spec import NextScaleSpec


class SingleGraph:
    """One static graph on a backend that it owns and closes, also where the constructor fails."""

    def __init__(
        self,
        files: BundleFiles,
        manifest: ListedFiles,
        precision: str,
        graph: str,
        backend: Backend,
    ) -> None:
        self._backend = backend
        try:
            info = manifest.graph(precision, graph)
            self._inputs, self._outputs = (
                SharedBlock(backend, _fields(tensors)) for tensors in (info.inputs, info.outputs)
            )
            self._session = backend.open(files.graph(graph))
            (self._launch,) = backend.prepare([self._session.bind(self._inputs, self._outputs)])
        except BaseException:
            backend.close()
            raise

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph: inputs by name → outputs by name, which the next call overwrites."""
        for name, value in inputs.items():
            self._inputs.host[name][...] = value
        self._inputs.upload()
        self._launch()
        self._outputs.download()
        self._backend.synchronize()
        return self._outputs.host

    def close(self) -> None:
        self._session.close()
        self._backend.close()


class TokenizerGraphs:
    """The graphs `encoder` and `accumulate`, each loaded at its first use.

    Args:
        files: the bundle's files that the scale loop uses too.
        new_backend: returns a new backend of the same kind as the scale loop's.
    """

    def __init__(
        self,
        files: BundleFiles,
        manifest: Manifest,
        precision: str,
        new_backend: Callable[[], Backend],
    ) -> None:
        self._files, self._manifest, self._precision = files, manifest, precision
        self._new_backend = new_backend
        self._opened: dict[str, SingleGraph] = {}

    def encode(self, images: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
        """uint8 [N, height, width, channels] → tokens [N, L_k] (bits [N, L_k, e]) of every
        scale.

        Raises BundleError where the bundle has no encoder, BackendError where the runtime fails or
        returns tokens that cannot come from an encoder.
        """
        scales = range(self._manifest.model.scales)
        model = self._manifest.model
        codes, token = model.tokenizer.token_values, model.token_shape
        tokens = [
            np.empty((len(images), length, *token), np.int64) for length in model.scale_lengths
        ]
        for rows, padded in self._batches(len(images)):
            pixels = images[padded].astype(np.float32) / 255
            found = self._graph(names.ENCODER)({names.IMAGE: pixels})
            encoded = [found[names.encoder_tokens(k)][: len(rows)] for k in scales]
            check_encoded(encoded, codes, self._precision == "fp16")
            for k in scales:
                tokens[k][rows] = encoded[k]
        return tokens

    def f_hats(
        self, tokens: Sequence[NDArray[np.int64]], scales: int
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Tokens → f_hat after the first `scales` scales: (rows, [B, Cv, p_K, p_K]) per batch.

        `tokens` holds [N, L_k] for at least these scales. Raises BundleError where the bundle has
        no graph `accumulate`, BackendError where f_hat is not finite.
        """
        model = self._manifest.model
        for rows, padded in self._batches(len(tokens[0])):
            inputs: dict[str, NDArray[Any]] = {}
            for k, length in enumerate(model.scale_lengths):
                # tokens of later scales do not change f_hat of the earlier ones
                shape = (len(padded), length, *model.token_shape)
                known = tokens[k][padded] if k < scales else np.zeros(shape)
                inputs[names.encoder_tokens(k)] = known
            f_hat = self._graph(names.ACCUMULATE)(inputs)[names.F_HATS][scales - 1]
            check_f_hat(f_hat, scales - 1, names.ACCUMULATE)
            yield rows, f_hat

    def close(self) -> None:
        """Release both graphs; safe to call twice."""
        while self._opened:
            self._opened.popitem()[1].close()

    def _graph(self, name: str) -> SingleGraph:
        if name not in self._opened:
            self._manifest.graph(self._precision, name)  # refuses before a backend is made
            self._opened[name] = SingleGraph(
                self._files, self._manifest, self._precision, name, self._new_backend()
            )
        return self._opened[name]

    def _batches(self, count: int) -> Iterator[tuple[list[int], list[int]]]:
        """(rows, padded) of each batch: image indices, and these indices padded to B."""
        batch = self._manifest.batch
        for first in range(0, count, batch):
            rows = list(range(first, min(first + batch, count)))
            yield rows, rows + rows[-1:] * (batch - len(rows))


def _fields(tensors: Sequence[Any]) -> Fields:
    return {t.name: (tuple(int(n) for n in t.shape), np.dtype(t.dtype)) for t in tensors}


def check_tokens(
    spec: NextScaleSpec, tokens: Sequence[NDArray[np.int64]], scales: int
) -> list[NDArray[np.int64]]:
    """Validate the tokens [N, L_k] of the first `scales` scales and return them as int64.

    Raises UsageError where scales are missing, or shape, type or values do not fit the model.
    """
    most = min(len(tokens), spec.scales)
    if isinstance(scales, bool) or not 1 <= scales <= most:
        raise UsageError(f"scales must lie between 1 and {most}, found {scales}")
    vocab = spec.tokenizer.token_values
    arrays = [np.asarray(tokens[k]) for k in range(scales)]
    for k, array in enumerate(arrays):
        count = len(arrays[0]) if arrays[0].ndim else 0
        wanted = (count, spec.scale_lengths[k], *spec.token_shape)
        if array.shape != wanted or not np.issubdtype(array.dtype, np.integer):
            raise UsageError(
                f"tokens of scale {k} must be whole numbers {list(wanted)}, found {array.dtype} "
                f"{list(array.shape)}"
            )
        if array.size and not 0 <= array.min() <= array.max() < vocab:
            raise UsageError(f"tokens of scale {k} must lie between 0 and {vocab - 1}")
    return [array.astype(np.int64) for array in arrays]

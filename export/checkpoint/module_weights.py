"""Reads the weights of PyTorch modules in memory, as the exporter reads those of files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.files import WRAPPERS, WeightSource

# Told by its shape alone, and younger than the hashes in bundles that were made without it.
UNHASHED = frozenset({"heads_1H"})


class ModuleWeights:
    """The weights of a module in memory, read at the moment of each call.

    Keys are those of the state dict without what torch.compile and the parallel wrappers put into
    them. Arrays are copies, so that nothing done to them reaches the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._name = type(module).__name__
        state = module.state_dict()  # shares the memory
        self._state: Mapping[str, torch.Tensor] = {
            WRAPPERS.sub("", "." + key)[1:]: tensor
            for key, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        }

    @property
    def description(self) -> Mapping[str, Any]:
        return {"module": self._name, "sha256": weights_sha256(self)}

    def __str__(self) -> str:
        return f"the {self._name} in memory"

    def keys(self) -> Collection[str]:
        return self._state.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def read(self, key: str) -> NDArray[Any]:
        tensor = self._state[key].detach()
        if tensor.is_meta or tensor.is_complex() or tensor.is_quantized or tensor.is_sparse:
            kind = "meta" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{self}: {key} is a {kind} tensor, expected real, dense values")
        dtype = torch.float32 if tensor.is_floating_point() else torch.int64
        array: NDArray[Any] = tensor.to("cpu", dtype, copy=True).contiguous().numpy()
        return array


def weights_sha256(source: WeightSource) -> str:
    """Hash all names, shapes and values: equal for a module and for the file it was saved to."""
    digest = hashlib.sha256()
    for key in sorted(set(source.keys()) - UNHASHED):
        digest.update(f"{key}{source.shape(key)}".encode())
        array = source.read(key)
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

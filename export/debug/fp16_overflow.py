"""Measures how near the values of fp16 graphs come to the largest fp16 number."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from var_deploy import names
from var_deploy.export.debug.interpreter import OnValue, TorchGraph
from var_deploy.export.debug.interpreter_backend import Generation, generate, study_conditions
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.progress import Progress

HALF_MAX = 65504.0  # the largest number of fp16
MARGIN = 8.0  # values within this factor of the largest number are reported
PADDING = -1e8  # below it lies only what is added to the scores of padding


class HalfOverflowError(Exception):
    """An fp16 value became infinite or NaN; `Magnitudes` knows where."""


@dataclass
class Magnitudes:
    """The largest magnitude of every fp16 value: (graph, node) → magnitude.

    Recording ends with HalfOverflowError at the first value that is not finite: later values mean
    little.

    Attributes:
        full: the largest magnitude of every fp32 value, for what would overflow in fp16; filled
            where `watch` is asked to.
    """

    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    full: dict[tuple[str, str], float] = field(default_factory=dict)

    def watch(self, graph: str, *, full: bool = False) -> OnValue:
        def see(node: str, name: str, value: Tensor) -> None:
            if full and value.dtype == torch.float32:
                reached = float(value.where(value > PADDING, 0.0).abs().max())
                self.full[graph, node] = max(reached, self.full.get((graph, node), 0.0))
            if value.dtype != torch.float16:
                return
            low, high = value.aminmax()  # unlike abs() it needs no second copy
            found = float(torch.maximum(-low, high))
            place = (graph, node)
            if not found <= self.largest.get(place, 0.0):  # true of NaN, too
                self.largest[place] = found
            if not math.isfinite(found):
                raise HalfOverflowError

        return see

    @property
    def overflow(self) -> tuple[str, str] | None:
        """The first graph and node that overflowed."""
        return next((k for k, found in self.largest.items() if not math.isfinite(found)), None)

    def warning(self) -> str:
        """One line if a value overflowed or came within `MARGIN` of it, else ""."""
        if self.overflow:
            graph, node = self.overflow
            return (
                f"fp16/{graph}: {node} overflows fp16, which ends at {HALF_MAX:.0f}; "
                "export with --precision fp32"
            )
        close = {place: v for place, v in self.largest.items() if v > HALF_MAX / MARGIN}
        if not close:
            return ""
        graph, node = worst = max(close, key=close.__getitem__)
        layers = {layer_of(name) for _, name in close} - {layer_of(node)}
        more = f"; {len(layers)} more layers come within a factor {MARGIN:.0f}" if layers else ""
        return (
            f"fp16/{graph}: {node} reaches {close[worst]:.0f}, fp16 ends at {HALF_MAX:.0f}{more}; "
            "other images may overflow, --precision fp32 does not"
        )


def layer_of(node: str) -> str:
    """Return the layer of a node: blocks.3.ffn/Gelu_88 → blocks.3.ffn."""
    return node.rpartition("/")[0] or node


def encode_watched(
    bundle: Path, manifest: Manifest, generation: Generation, magnitudes: Magnitudes
) -> None:
    """Run the fp16 encoder on a generated image; it is the one graph that a generation does not
    run."""
    encoder = TorchGraph(bundle / manifest.graph("fp16", names.ENCODER).file)
    encoder.run({names.IMAGE: generation.image}, on_value=magnitudes.watch(names.ENCODER))


def calibrate(bundle: Path, samples: int, progress: Progress | None = None) -> str:
    """Generate `samples` images (whole batches) with the fp16 graphs, encode them, and look for
    overflow.

    Returns a warning in one line, or "". The graphs run in true fp16 arithmetic; memory stays at
    the activations and one weight.
    """
    manifest, magnitudes = read_manifest(bundle), Magnitudes()
    for first in range(0, samples, manifest.batch):

        def report(message: str, fraction: float, done: int = first) -> None:
            if progress:
                part = min(manifest.batch, samples - done) * fraction
                progress(f"looking for overflow: {message}", (done + part) / samples)

        try:
            generation = generate(
                bundle,
                manifest,
                "fp16",
                study_conditions(manifest, first),
                first=first,
                watch=magnitudes.watch,
                progress=report,
            )
            encode_watched(bundle, manifest, generation, magnitudes)
        except HalfOverflowError:
            break
    return magnitudes.warning()

"""The input of a prediction, `Workload`, and the counts that it is made of, `Weights` and `Work`.

Notation as in `spec`. A multiply-add counts as two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from var_deploy import names
from var_deploy.config import Precision
from var_deploy.manifest import Manifest
from var_deploy.spec import ModelSpec, TextModelSpec

FULL = 4  # bytes of an fp32 or int32 number


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with batch, guidance and precision: all inputs of a cost besides the device."""

    model: ModelSpec | TextModelSpec
    batch: int = 1
    guidance: bool = True
    precision: Precision = "fp16"
    more_smooth: bool = False

    @property
    def rows(self) -> int:
        """G, the rows of a batch: 2·B with guidance, else B."""
        return 2 * self.batch if self.guidance else self.batch

    @property
    def itemsize(self) -> int:
        """Bytes per weight that is stored in the graph's precision."""
        return itemsize_of(self.precision)

    @property
    def cache_itemsize(self) -> int:
        """Bytes per number in the cache and other intermediates; int8 graphs use fp32 there."""
        return 2 if self.precision == "fp16" else FULL

    @property
    def codes(self) -> ModelSpec:
        """The sizes of a model whose tokens are codes; for what counts such models alone."""
        assert isinstance(self.model, ModelSpec)
        return self.model

    @property
    def text(self) -> TextModelSpec:
        """The sizes of a text-to-image model; for what counts such models alone."""
        assert isinstance(self.model, TextModelSpec)
        return self.model

    @property
    def scale_graphs(self) -> tuple[str, ...]:
        """Names of the static graphs of all scales."""
        return tuple(names.scale_graph(k) for k in range(self.model.scales))


def itemsize_of(precision: Precision) -> int:
    """Return the bytes per weight that is stored in a graph's precision."""
    return {"fp32": FULL, "fp16": 2, "int8": 1}[precision]


def workload_of(manifest: Manifest, precision: Precision) -> Workload:
    """The workload of a bundle in a precision."""
    return Workload(
        model=manifest.model,
        batch=manifest.of(precision).batch,
        guidance=manifest.guidance,
        precision=precision,
        more_smooth=manifest.more_smooth,
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Number of weights of a graph in weights.bin.

    Attributes:
        compute: weights in the graph's precision; in int8, only matrices and kernels.
        full: weights of four bytes in every precision: fp32, and the int32 biases of int8.
        tables: part of `full` that are lookup tables, of which a launch reads a few rows.
    """

    compute: int = 0
    full: int = 0
    tables: int = 0

    def nbytes(self, itemsize: int) -> int:
        """Size in bytes, as `weight_bytes` in the manifest."""
        return self.compute * itemsize + self.full * FULL

    def read(self, itemsize: int) -> int:
        """Bytes that every launch reads: all weights except lookup tables."""
        return self.nbytes(itemsize) - self.tables * FULL

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            compute=self.compute + other.compute,
            full=self.full + other.full,
            tables=self.tables + other.tables,
        )

    def __mul__(self, count: int) -> Weights:
        return Weights(
            compute=count * self.compute, full=count * self.full, tables=count * self.tables
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and memory traffic of one launch.

    Attributes:
        name: name of the static graph.
        compute_operations: operations in the graph's precision; in int8, products of int8 numbers.
        full_operations: operations in fp32, in every precision.
        traffic: least bytes that are read and written: weights, cache, inputs, outputs.
    """

    name: str
    compute_operations: int
    full_operations: int
    traffic: int


def linear(
    before: int, after: int, precision: Precision, *, bias: bool = True, full: bool = False
) -> Weights:
    """Count a matrix and its bias; int8 stores the bias in fp32, and one scale per column.

    `full`: the matrix is fp32 in every precision.
    """
    matrix, offsets = before * after, after if bias else 0
    if full:
        return Weights(full=matrix) + unrounded(offsets, precision)
    if precision == "int8":
        return Weights(compute=matrix, full=after + offsets)
    return Weights(compute=matrix + offsets)


def unrounded(count: int, precision: Precision) -> Weights:
    """Count weights that follow the graph's precision, but are fp32 in an int8 graph."""
    return Weights(full=count) if precision == "int8" else Weights(compute=count)

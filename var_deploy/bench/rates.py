"""Measures this machine's best rates of products, convolutions and copies, for rooflines.

    python -m var_deploy.bench.rates --threads N

It is a worker like the others, so that rates are measured in the same minutes as the times that
they are compared with. The graphs are those of `export/graphs/probes.py`, opened as a bundle's are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from var_deploy.bench.worker import About, Sample, serve
from var_deploy.bundle.files import GraphFile
from var_deploy.host.machine import Machine, usable_cores
from var_deploy.runtime.backends.host_memory import host_view
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.protocol import Array

K, N = 1024, 4096  # of the products: the first layer of a d16's feed-forward part
LENGTHS = (72, 200, 512)  # M: rows of two images at a middle scale, of the last ones, and of more
CHANNELS, SIDE = 160, 128  # of the convolutions: a layer of the released decoder
GEMM_FP32, GEMM_INT8, CONV_FP32, CONV_INT8 = "gemm_fp32", "gemm_int8", "conv_fp32", "conv_int8"
COPY = "copy"
# bytes that each thread copies, far more than caches hold; and those of all threads at most
COPIED, MOST_COPIED = 1 << 26, 1 << 31
REPEATS = 3  # of a probe in one generation, after one that is not counted


def amounts(threads: int) -> dict[str, float]:
    """Probe → its number of operations; for `copy`, the bytes that are read and written."""
    found: dict[str, float] = {
        f"{kind} {length}": 2.0 * length * K * N
        for kind in (GEMM_FP32, GEMM_INT8)
        for length in LENGTHS
    }
    found |= {kind: 2.0 * 9 * CHANNELS**2 * SIDE**2 for kind in (CONV_FP32, CONV_INT8)}
    return {**found, COPY: 2.0 * threads * _copied(threads)}


def _copied(threads: int) -> int:
    return min(COPIED, MOST_COPIED // threads)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of this machine, per second.

    Attributes:
        gemm: "fp32" and "int8" → operations of matrix products, the best over all lengths.
        conv: "fp32" and "int8" → operations of convolutions.
        bandwidth: bytes read and written in copies by all threads at once.
        probes: probe → its rate.
        threads: number of threads in use.
    """

    gemm: Mapping[str, float]
    conv: Mapping[str, float]
    bandwidth: float
    probes: Mapping[str, float]
    threads: int

    @classmethod
    def of(cls, samples: Sequence[Sample], threads: int) -> Rates:
        """Compute the rates from the medians over all samples."""
        probes = {
            name: amount / statistics.median(sample.launches[name] for sample in samples)
            for name, amount in amounts(threads).items()
        }
        return cls(
            gemm={
                precision: max(probes[f"{kind} {length}"] for length in LENGTHS)
                for precision, kind in (("fp32", GEMM_FP32), ("int8", GEMM_INT8))
            },
            conv={"fp32": probes[CONV_FP32], "int8": probes[CONV_INT8]},
            bandwidth=probes[COPY],
            probes=probes,
            threads=threads,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": "operations a second; bytes a second for copy",
            "threads": self.threads,
            "gemm": {key: round(rate) for key, rate in self.gemm.items()},
            "conv": {key: round(rate) for key, rate in self.conv.items()},
            "bandwidth": round(self.bandwidth),
            "probes": {key: round(rate) for key, rate in self.probes.items()},
        }


class RateProbes:
    """The `Worker` that measures rates: its launches are the probes.

    Args:
        threads: number of threads; 0 takes every core that the process may use.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads or usable_cores() or Machine().threads()
        self._backend = OrtCpuBackend(self._threads)
        self._probes: dict[str, Callable[[], object]] = {}
        for kind in (GEMM_FP32, GEMM_INT8):
            graph = self._open(kind)
            for length in LENGTHS:
                x, y = self._array(np.float32, length, K), self._array(np.float32, length, N)
                self._probes[f"{kind} {length}"] = graph.bind({"x": x}, {"y": y})
        for kind, dtype in ((CONV_FP32, np.float32), (CONV_INT8, np.uint8)):
            x, y = (self._array(dtype, 1, CHANNELS, SIDE, SIDE) for _ in range(2))
            self._probes[kind] = self._open(kind).bind({"x": x}, {"y": y})
        self._pool = ThreadPoolExecutor(self._threads)
        size = _copied(self._threads)
        # ones: pages of zeros that were never written are all the same physical page
        self._copies = [
            (np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(self._threads)
        ]
        self._probes[COPY] = self._copy

    def describe(self) -> About:
        settings = {**self._backend.describe(), "threads": str(self._threads)}
        return About(settings=settings, threads=self._threads)

    def generate(self) -> Sample:
        """Run every probe a few times; the launches are the medians."""
        started = time.perf_counter()
        launches = {name: _typical(run) for name, run in self._probes.items()}
        return Sample(seconds=time.perf_counter() - started, launches=launches)

    def close(self) -> None:
        self._probes.clear()
        self._pool.shutdown()
        self._backend.close()

    def _open(self, kind: str) -> Any:
        return self._backend.open(GraphFile.outside(Path(__file__).with_name(f"{kind}.onnx")))

    def _array(self, dtype: Any, *shape: int) -> Array:
        """An array of random numbers."""
        kind = np.dtype(dtype)
        block = self._backend.allocate(int(np.prod(shape)) * kind.itemsize)
        array = Array(block.address, shape, kind, block.owner)
        drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
        view = host_view(array)
        view[:] = drawn if kind == np.float32 else np.clip(128 + 40 * drawn, 0, 255).astype(kind)
        return array

    def _copy(self) -> None:
        """Copy in all threads at once; NumPy releases the interpreter's lock meanwhile."""
        for done in [self._pool.submit(np.copyto, *pair) for pair in self._copies]:
            done.result()


def _typical(run: Callable[[], object]) -> float:
    """Median seconds of REPEATS runs after one that is not counted."""
    run()
    seconds = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m var_deploy.bench.rates")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args(arguments)
    return serve(lambda: RateProbes(given.threads))


if __name__ == "__main__":
    sys.exit(main())

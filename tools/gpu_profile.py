"""Profiles a generation on a GPU: time per kernel, and how long the GPU waits between kernels.

    python -m tools.gpu_profile BUNDLE --precision fp16 --layout shared

PyTorch's profiler sees every kernel of the process, those of ONNX Runtime included. CUDA graphs are
off, so that each kernel is launched, and named, by itself.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from var_deploy.labels import spread_labels
from var_deploy.manifest import read_manifest
from var_deploy.runtime.backends.onnxruntime_cuda import OrtCudaBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import uniforms

SHOWN = 10
RUNS = 5


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--precision", default="fp16", show_default=True)
@click.option("--layout", type=click.Choice(["per-scale", "shared"]), default="shared")
@click.option("--cuda-graph/--no-cuda-graph", default=False, show_default=True)
def main(bundle: Path, precision: str, layout: Any, cuda_graph: bool) -> None:
    """Profile BUNDLE with ONNX Runtime's CUDA provider; print its kernels by time."""
    manifest = read_manifest(bundle)
    backend = OrtCudaBackend(cuda_graph=cuda_graph)
    loop = ScaleLoop(bundle, manifest, backend, precision, layout)
    tokens = manifest.model.total_tokens
    draws = np.stack([uniforms(0, n, tokens) for n in range(manifest.batch)])
    labels = spread_labels(manifest.model.transformer.classes, manifest.batch, 0)
    for _ in range(3):
        loop.run(labels, draws, manifest.defaults)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(RUNS):
            loop.run(labels, draws, manifest.defaults)
    loop.close()
    events = [e for e in found.events() if e.device_type.name == "CUDA"]
    report(events)


def report(events: list[Any]) -> None:
    """Print kernels by time, their sum, and how long the device did nothing, per generation."""
    spent, count = Counter[str](), Counter[str]()
    for event in events:
        spent[event.name] += event.time_range.elapsed_us()
        count[event.name] += 1
    ranges = sorted((e.time_range.start, e.time_range.end) for e in events)
    gaps, reached = [], ranges[0][1]
    for start, end in ranges[1:]:
        gaps.append(max(0, start - reached))
        reached = max(reached, end)
    total, whole = sum(spent.values()), ranges[-1][1] - ranges[0][0]
    torch_version = torch.__version__
    print(f"PyTorch {torch_version}; {RUNS} generations; per generation:")
    print(f"  {len(events) / RUNS:.0f} kernels and copies, {total / RUNS / 1e3:.3f} ms of them")
    print(f"  {whole / RUNS / 1e3:.3f} ms from the first to the last")
    told = f"median {np.median(gaps):.1f} µs, p95 {np.percentile(gaps, 95):.1f} µs"
    print(f"  {sum(gaps) / RUNS / 1e3:.3f} ms between them, {told}")
    for name, microseconds in spent.most_common(SHOWN):
        share, number = microseconds / total, count[name] / RUNS
        print(f"  {share:6.1%} {microseconds / RUNS / 1e3:8.3f} ms {number:7.0f} ×  {name[:90]}")


if __name__ == "__main__":
    main()

"""The memory that `plan` predicts against what the runtime allocates and the process holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var_deploy.config import Layout, Precision
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.planning.costs import graph_weights
from var_deploy.planning.memory import (
    CPU_IMPORTS,
    buffer_bytes,
    cache_bytes,
    footprint,
    upload_bytes,
)
from var_deploy.planning.workload import Workload
from var_deploy.runtime.backends.host_memory import HostMemory
from var_deploy.runtime.buffers import CacheArena, LoopBuffers
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

FACTOR = 1.35  # between the predicted and the measured peak, either way
SMAPS = Path("/proc/self/smaps_rollup")

# Generates and prints the highest PSS, sampled all the while, less that after the imports.
MEASURE = """
import json, sys, threading, time
import numpy, onnxruntime
from var_deploy.pipeline import Pipeline
import var_deploy.runtime.loop, var_deploy.runtime.backends.onnxruntime_cpu
from var_deploy.runtime.prompts import PromptRows

def pss():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))

before, peak, done = pss(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, pss())
        time.sleep(0.003)

watching = threading.Thread(target=watch)
watching.start()
bundle, precision, layout = sys.argv[1:]
with Pipeline.load(
    bundle, backend="onnxruntime-cpu", precision=precision, layout=layout, threads=1
) as pipe:
    what = {"labels": [0]}
    if pipe.manifest.takes_text:
        t = pipe.manifest.model.transformer
        what = {"prompts": PromptRows.blank(1, t.text_length, t.text_width)}
    pipe.generate(**what, count=3)  # a peak comes again, should one sample miss it
done.set()
watching.join()
print(json.dumps({"before": before, "peak": peak - before}))
"""


def manifest_of(model: ModelSpec, batch: int, guidance: bool) -> Manifest:
    return Manifest(
        model=model,
        preset="",
        batch=batch,
        guidance=guidance,
        graphs={},
        files={},
        checkpoint={},
        tools={},
        defaults=Sampling(),
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_nums": (1, 2, 3, 5), "depth": 3, "width": 36, "heads": 3, "code_width": 5},
        {"patch_nums": (1,)},
        {"family": "gpt2", "classes": 0, "qk_l2_norm": False, "codebook_per_scale": True},
        {"more_smooth": True},
    ],
    ids=str,
)
def test_cache_and_buffers_are_exact(
    family_member: Callable[..., ModelSpec], changes: dict[str, Any], precision: Precision
) -> None:
    mixes = changes.get("more_smooth", False)
    model = family_member(**{k: v for k, v in changes.items() if k != "more_smooth"})
    guidance = model.transformer.conditional
    workload = Workload(
        model=model, batch=3, guidance=guidance, precision=precision, more_smooth=mixes
    )
    manifest = dataclasses.replace(manifest_of(model, 3, guidance), more_smooth=mixes)
    dtype = np.float16 if precision == "fp16" else np.float32
    assert CacheArena(manifest, dtype, HostMemory()).nbytes == cache_bytes(workload)
    buffers = LoopBuffers(manifest, dtype, HostMemory())
    assert buffers.nbytes == cache_bytes(workload) + buffer_bytes(workload)
    assert buffers.inputs.nbytes == upload_bytes(workload)


@pytest.fixture(scope="session")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few weights and long sequences: its peak is scratch memory."""
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.assemble import assemble, empty_modules
    from var_deploy.export.checkpoint.random_weights import RandomWeights
    from var_deploy.spec import TokenizerSpec, TransformerSpec

    spec = ModelSpec(
        tokenizer=TokenizerSpec(
            patch_nums=(1, 4, 9, 16, 24),
            vocab_size=512,
            code_width=8,
            base_width=32,
            width_multipliers=(1,),
            res_blocks=1,
        ),
        transformer=TransformerSpec(depth=2, width=256, heads=8, classes=4, ffn_width=1024),
    )
    weights = [
        RandomWeights({key: tuple(p.shape) for key, p in module.named_parameters()}, 0)
        for module in empty_modules(spec)
    ]
    out = tmp_path_factory.mktemp("wide") / "bundle"
    options = ExportOptions(precisions=("fp32", "fp16", "int8"), layout="both", calibration=1)
    export_bundle(assemble(spec, *weights), out, options)
    return out


@pytest.fixture(scope="session")
def wide_text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image bundle with few weights, long sequences and large maps."""
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.text_model import random_text_model
    from var_deploy.scale_lists import ScaleList
    from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

    grids = ((1, 1), (4, 6), (10, 15), (20, 30))
    spec = TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=grids, bits=8, base_width=32, width_multipliers=(1, 1, 1), res_blocks=1
        ),
        transformer=TextTransformerSpec(
            depth=2,
            width=256,
            heads=8,
            ffn_width=1024,
            text_width=128,
            text_length=64,
            pool_heads=2,
            rope_grid=grids[-1],
        ),
    )
    scales = ScaleList(resolution="", aspect="", grids=grids, rope_grid=grids[-1])
    out = tmp_path_factory.mktemp("wide-text") / "bundle"
    options = ExportOptions(precisions=("fp32", "int8"), layout="shared")
    export_bundle(random_text_model(spec, 1, scales=scales), out, options)
    return out


def measured_peak(bundle: Path, precision: str, layout: str) -> int:
    """Bytes above those of the interpreter with its imports."""
    pytest.importorskip("onnxruntime")
    if not SMAPS.exists():
        pytest.skip("this system has no /proc/self/smaps_rollup")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(bundle), precision, layout],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # the imports alone: shared with other processes, PSS counts a part of them
    assert found["before"] < CPU_IMPORTS * FACTOR
    return int(found["peak"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weights_are_those_of_the_files(wide_bundle: Path, precision: Precision) -> None:
    manifest = read_manifest(wide_bundle)
    workload = Workload(model=manifest.model, precision=precision)
    for name, graph in manifest.graphs[precision].items():
        predicted = graph_weights(workload, name).nbytes(workload.itemsize)
        assert predicted == graph.weight_bytes, name


@pytest.mark.parametrize(
    ("bundle", "precision", "layout"),
    [
        *(
            (bundle, precision, layout)
            for bundle, precision in (
                ("pocket_bundle", "fp32"),
                ("wide_bundle", "fp32"),
                ("wide_bundle", "fp16"),
                ("wide_bundle", "int8"),
            )
            for layout in ("shared", "per-scale")
        ),
        ("wide_text_bundle", "fp32", "shared"),
        ("wide_text_bundle", "int8", "shared"),
    ],
)
def test_the_peak_of_a_generation(
    request: pytest.FixtureRequest, bundle: str, precision: Precision, layout: Layout
) -> None:
    folder: Path = request.getfixturevalue(bundle)
    peak = measured_peak(folder, precision, layout)
    workload = Workload(model=read_manifest(folder).model, precision=precision)
    held = footprint(workload, layout, "onnxruntime-cpu")
    predicted = held.peak - CPU_IMPORTS
    assert predicted / FACTOR < peak < predicted * FACTOR, (peak / 1e6, predicted / 1e6, held)

"""One copy of the weights on a CPU, and no more memory after many images than after a few."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var_deploy import names
from var_deploy.bundle.files import BundleFiles, GraphFile
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.host_memory import WORTH_GIVING_BACK, HostMemory, host_view
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.spec import ModelSpec

ExportTo = Callable[..., Path]

SMAPS = Path("/proc/self/smaps_rollup")
needs_smaps = pytest.mark.skipif(
    not SMAPS.exists(), reason="memory is read from /proc/self/smaps_rollup, which is not here"
)


def anonymous() -> int:
    """Bytes that this process alone holds: what others do with shared libraries does not count."""
    lines = SMAPS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@needs_smaps
@pytest.mark.parametrize(("layout", "images"), [("shared", 200), ("per-scale", 50)])
def test_many_images_of_pocket_do_not_grow(
    pocket_bundle: Path, layout: str, images: int
) -> None:
    with Pipeline.load(pocket_bundle, "onnxruntime-cpu", layout=layout) as pipe:

        def many(count: int) -> int:
            for seed in range(count):
                pipe.generate([seed % 10], seed=seed)
            gc.collect()
            return anonymous()

        many(10)  # whatever is allocated on first use
        before = many(10)
        cache = 2 * 4 * 39 * 2 * 192 * 4  # bytes of the keys and values of four scales, a block
        assert many(images) - before < images * cache / 4, "less than a quarter of that an image"


MEASURE = """
import gc, sys
import numpy, onnxruntime
from var_deploy.pipeline import Pipeline
def pss():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
before = pss()
pipes = []
for layout in sys.argv[2:]:
    pipes.append(Pipeline.load(sys.argv[1], "onnxruntime-cpu", layout=layout, threads=1))
    pipes[-1].generate([0])
gc.collect()
print(pss() - before)
"""


@pytest.fixture(scope="module")
def wide(
    tmp_path_factory: pytest.TempPathFactory,
    family_member: Callable[..., ModelSpec],
    random_model: Callable[[ModelSpec], Any],
) -> tuple[Path, int]:
    """A bundle whose weights outweigh everything else, and their bytes."""
    pytest.importorskip("torch", reason="torch exports the bundle")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("wide") / "bundle"
    model = random_model(family_member(width=640, heads=10, ffn_width=2560))
    export_bundle(dataclasses.replace(model, labels=()), out, ExportOptions())
    graphs = read_manifest(out).graphs["fp32"]
    once = sum(graphs[name].weight_bytes for name in ("condition", "step", "decoder"))
    assert 30e6 < graphs["step"].weight_bytes < once < 100e6
    return out, once


@needs_smaps
@pytest.mark.parametrize("layouts", [["shared"], ["per-scale"], ["shared", "shared", "shared"]])
def test_weights_are_held_once(wide: tuple[Path, int], layouts: list[str]) -> None:
    """In either layout, and by several pipelines of one process together."""
    bundle, once = wide
    held = int(subprocess.check_output([sys.executable, "-c", MEASURE, bundle, *layouts]))
    assert 0.9 * once < held < 1.35 * once + 20e6  # the library's own memory on top


@needs_smaps
def test_that_is_not_because_nothing_counts(wide: tuple[Path, int]) -> None:
    """The control: the two layouts share nothing, so both together hold more than one copy."""
    bundle, once = wide
    measure = [sys.executable, "-c", MEASURE, bundle, "shared", "per-scale"]
    assert int(subprocess.check_output(measure)) > 1.35 * once + 20e6


def test_pipelines_share_sessions_while_they_live(export_to: ExportTo, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(export_to(), bundle)
    def graph() -> GraphFile:
        return BundleFiles(bundle, read_manifest(bundle), "fp32").graph("step")

    backend, other = OrtCpuBackend(), OrtCpuBackend(7)
    first, second = backend.open(graph()), OrtCpuBackend().open(graph())
    assert second.loading is first.loading
    assert other.open(graph()).loading is not first.loading, "another number of threads"
    # a bundle written anew in the same place is another one
    shutil.rmtree(bundle)
    shutil.copytree(export_to(), bundle)
    assert backend.open(graph()).loading is not first.loading


def test_closing_one_pipeline_leaves_the_other(export_to: ExportTo) -> None:
    bundle = export_to()
    first, second = (Pipeline.load(bundle, "onnxruntime-cpu") for _ in range(2))
    expected = first.generate([0, 1], seed=5)
    first.close()
    np.testing.assert_array_equal(second.generate([0, 1], seed=5), expected)
    second.close()


def test_forgotten_memory_comes_back_as_zeros_or_as_it_was() -> None:
    memory = HostMemory()
    large, small = memory.allocate(4 * WORTH_GIVING_BACK), memory.allocate(4096)
    for array in (large, small):
        host_view(array)[:] = 7
        memory.discard(array)
        values = host_view(array)
        assert set(np.unique(values).tolist()) <= {0, 7}
    assert (host_view(small) == 7).all(), "too small to be worth it"
    if sys.platform == "linux":
        middle = host_view(large)[1 << 20 : -(1 << 20)]
        assert not middle.any(), "its pages were given back"
    host_view(large)[:] = 3
    assert (host_view(large) == 3).all()


def test_keys_and_values_of_the_last_scale_share_one_place(pipe: Pipeline) -> None:
    """ONNX Runtime would keep those of every block until the run ends. What is generated so equals
    the other layout's images: see `test_pipeline`."""
    t, spec = pipe.manifest.model.transformer, pipe.manifest.model
    loop: Any = pipe._loop.open()
    bound = loop._scales[-1]._keep[1]  # the outputs, by name
    for name in (names.new_key, names.new_value):
        places = {bound[name(layer)].address for layer in range(t.depth)}
        assert len(places) == 1 < t.depth
        shape = (spec.scale_lengths[-1], pipe.manifest.rows, t.heads, t.head_width)
        assert {bound[name(layer)].shape for layer in range(t.depth)} == {shape}
    apart = bound[names.new_key(0)].address - bound[names.new_value(0)].address
    assert abs(apart) >= bound[names.new_key(0)].nbytes
    earlier = loop._scales[-2]._keep[1]
    stored = {a.address for n, a in earlier.items() if n.startswith("new_key_values")}
    assert len(stored) == 2 * t.depth, "rows that later scales read have a place each"

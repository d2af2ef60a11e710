"""TensorRT for RTX builds our graphs, through our own build code, on a machine without a GPU.

Its parser and compiler are TensorRT's: a refused operator, a wrong type or a size left open would
show here. The engines cannot run here, and are not those of a Jetson.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from var_deploy import names
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint import load_model
from var_deploy.manifest import read_manifest
from var_deploy.runtime.buffers import step_shapes
from var_deploy.runtime.tensorrt.build import build_bundle
from var_deploy.runtime.tensorrt.engine_files import find_target, load_plan
from var_deploy.runtime.tensorrt.library import Library, load_library
from var_deploy.runtime.tensorrt.network import build_engine
from var_deploy.runtime.tensorrt.target import BuildOptions, Target

pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt_rtx is not installed (it exists for x86-64 alone)"
)
# the least search: what is refused is refused at every level
QUICK = 0


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtx") / "pocket"
    export_bundle(load_model("pocket"), out, ExportOptions(precisions=("fp16",), layout="both"))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89])
def test_every_graph_of_pocket_builds(pocket: Path, library: Library, capability: int) -> None:
    options = BuildOptions(compute_capability=capability, optimization_level=QUICK)
    report = build_bundle(pocket, layout="both", options=options, library=library)
    manifest = read_manifest(pocket)
    assert {engine.graph for engine in report.engines} == set(manifest.graphs["fp16"])
    assert not any(engine.kept for engine in report.engines)
    target = Target(
        library=library.name,
        version=library.version,
        device="some GPU",
        sm=capability,
        precision="fp16",
    )
    assert find_target(pocket, target).engines[names.STEP].profiles == manifest.model.scales
    for graph in manifest.graphs["fp16"]:
        record, plan = load_plan(pocket, manifest, graph, target)
        assert len(plan) == record.size > manifest.graph("fp16", graph).weight_bytes
    again = build_bundle(pocket, layout="both", options=options, library=library)
    assert all(engine.kept for engine in again.engines)


@pytest.mark.slow
def test_ten_profiles_do_not_copy_the_weights_of_a_d16(tmp_path: Path, library: Library) -> None:
    export_bundle(
        load_model("var-d16", random_weights=0),
        tmp_path / "d16",
        ExportOptions(precisions=("fp16",), layout="shared"),
    )
    manifest = read_manifest(tmp_path / "d16")
    step = manifest.graph("fp16", names.STEP)
    options = BuildOptions(compute_capability=86, optimization_level=QUICK)
    shapes = [step_shapes(manifest, "fp16", k) for k in range(manifest.model.scales)]
    samples = weight_samples(tmp_path / "d16" / step.file)
    assert len(samples) > 4 * manifest.model.transformer.depth

    sizes = []
    for profiles in (shapes[-1:], shapes):
        built = build_engine(library, tmp_path / "d16" / step.file, profiles, options)
        plan = bytes(built.plan)
        # TensorRT keeps matrices as they are, so each is found, and found once
        assert {name: plan.count(sample) for name, sample in samples.items()} == dict.fromkeys(
            samples, 1
        )
        sizes.append(len(plan))
        del built, plan
    one, ten = sizes
    print(f"d16 step: {step.weight_bytes} bytes of weights, plan {one} with one profile, {ten}")
    # what a profile adds is the source text of its kernels, which TensorRT for RTX compiles on the
    # GPU: about 85 of them, 160 kB each
    assert step.weight_bytes < one < ten < one + 9 * 16_000_000


def weight_samples(graph: Path) -> dict[str, bytes]:
    """64 bytes out of the middle of each large matrix that a graph refers to."""
    weights = np.memmap(graph.with_name(names.WEIGHTS), np.uint8, mode="r")
    samples = {}
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if len(tensor.dims) == 2 and int(place.get("length", 0)) > 1_000_000:
            middle = int(place["offset"]) + int(place["length"]) // 2
            samples[tensor.name] = weights[middle : middle + 64].tobytes()
    # positions may be cut into the rows of each scale
    return {name: sample for name, sample in samples.items() if name != "pos_1LC"}

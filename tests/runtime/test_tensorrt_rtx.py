"""TensorRT for RTX builds our graphs, through our own build code, on a machine without a GPU.

Its parser and compiler are TensorRT's: a refused operator, a wrong type or a size left open would
show here. The engines cannot run here, and are not those of a Jetson.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from golden_infinity import OWN, load_case

from var_deploy import names
from var_deploy.export import export_modules
from var_deploy.export import var as library_call
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import load_model, random_model
from var_deploy.export.checkpoint.presets import find_preset
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
def test_every_graph_of_pocket_builds(pocket: Path, library: Library) -> None:
    options = BuildOptions(compute_capability=89, optimization_level=QUICK)
    report = build_bundle(pocket, layout="both", options=options, library=library)
    manifest = read_manifest(pocket)
    assert {engine.graph for engine in report.engines} == set(manifest.graphs["fp16"])
    assert not any(engine.kept for engine in report.engines)
    target = Target(
        library=library.name,
        version=library.version,
        device="some GPU",
        sm=89,
        precision="fp16",
    )
    assert find_target(pocket, target).engines[names.STEP].profiles == manifest.model.scales
    for graph in manifest.graphs["fp16"]:
        record, plan = load_plan(pocket, manifest, graph, target)
        assert len(plan) == record.size > manifest.graph("fp16", graph).weight_bytes
    again = build_bundle(pocket, layout="both", options=options, library=library)
    assert all(engine.kept for engine in again.engines)


@pytest.mark.slow
def test_every_graph_of_the_gpt2_form_builds(tmp_path: Path, library: Library) -> None:
    """A codebook a scale, token tables for the next input, no condition and no guidance."""
    sizes: dict[str, Any] = {"scales": (1, 2, 3), "codebook_size": 32}
    model = library_call.build(hidden_size=32, num_layers=2, num_heads=4, **sizes)
    encoder, _ = library_call.build_tokenizer(image_size=12, embed_dim=8, in_channels=1, **sizes)
    bundle = tmp_path / "bundle"
    manifest = export_modules(model, encoder, bundle, precisions=("fp16",), batch=2)
    options = BuildOptions(compute_capability=89, optimization_level=QUICK)
    report = build_bundle(bundle, layout="both", options=options, library=library)
    assert {engine.graph for engine in report.engines} == set(manifest.graphs["fp16"])
    assert names.CONDITION not in manifest.graphs["fp16"]


@pytest.mark.slow
def test_every_graph_of_a_text_model_builds(tmp_path: Path, library: Library) -> None:
    """Patches, grids that are not square, and profiles of all open sizes of `step`."""
    bundle = tmp_path / "bundle"
    model = load_case(OWN / "seeded-small").model()
    manifest = export_bundle(model, bundle, ExportOptions(precisions=("fp16",), guidance=None))
    options = BuildOptions(compute_capability=89, optimization_level=QUICK)
    report = build_bundle(bundle, layout="both", options=options, library=library)
    assert {engine.graph for engine in report.engines} == set(manifest.graphs["fp16"])
    assert names.UNCONDITIONAL in manifest.graphs["fp16"]


@pytest.mark.slow
def test_ten_profiles_do_not_copy_the_weights(tmp_path: Path, library: Library) -> None:
    """Four blocks of a d16, at its ten scales; docs/BENCHMARKS.md has all sixteen."""
    spec = find_preset("var-d16").spec
    transformer = dataclasses.replace(spec.transformer, depth=4)
    bundle = tmp_path / "bundle"
    export_bundle(
        random_model(dataclasses.replace(spec, transformer=transformer), 0),
        bundle,
        ExportOptions(precisions=("fp16",), layout="shared"),
    )
    manifest = read_manifest(bundle)
    step = manifest.graph("fp16", names.STEP)
    options = BuildOptions(compute_capability=86, optimization_level=QUICK)
    shapes = [step_shapes(manifest, "fp16", k) for k in range(manifest.model.scales)]
    samples = weight_samples(bundle / step.file)
    assert len(samples) > 4 * transformer.depth

    sizes = []
    for profiles in (shapes[-1:], shapes):
        built = build_engine(library, bundle / step.file, profiles, options)
        plan = bytes(built.plan)
        # TensorRT keeps matrices as they are, so each is found, and found once
        assert {name: plan.count(sample) for name, sample in samples.items()} == dict.fromkeys(
            samples, 1
        )
        sizes.append(len(plan))
        del built, plan
    one, ten = sizes
    print(f"{step.weight_bytes} bytes of weights; a plan of {one} with one profile, {ten} with ten")
    # what a profile adds is the source text of its kernels, which TensorRT for RTX compiles on the
    # GPU: 8 MB here. Nine of them are less than the weights once more
    assert step.weight_bytes < one < ten < one + step.weight_bytes


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

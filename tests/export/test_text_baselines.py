"""Text to image in `bench`: PyTorch as published computes the model, and work is counted as the
graphs do it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import t5_case
from var_deploy import names
from var_deploy.bench.conditions import bench_prompts
from var_deploy.bench.text_work import text_encoder_work, text_launches, weights_in_use
from var_deploy.bundle.graph_refs import generation_graphs
from var_deploy.config import GraphForm
from var_deploy.export.baselines.text_path import (
    generate_text_as_published,
    random_text_modules,
)
from var_deploy.export.baselines.torch_bench import TorchContender
from var_deploy.export.bundle import ExportOptions, build_graphs
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.text_encoder import build_text_encoder
from var_deploy.export.verify.text_reference import TextInputs, TextTrace, trace_text_generation
from var_deploy.manifest import FileInfo, GraphInfo, Manifest
from var_deploy.sampling import BitSampling, call_keys, stack_uniforms
from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec
from var_deploy.text.manifest import TextEncoderManifest

SAMPLING = BitSampling(cfg=2.5, top_p=0.9, temperature=0.8)
GRIDS = ((1, 1), (2, 1), (2, 3))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(patch: int = 1, depth: int = 2) -> TextModelSpec:
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=GRIDS,
            bits=4,
            patch=patch,
            base_width=24,
            width_multipliers=(1, 2, 2),
            res_blocks=1,
        ),
        transformer=TextTransformerSpec(
            depth=depth,
            width=32,
            heads=2,
            ffn_width=64,
            text_width=24,
            text_length=40,
            pool_heads=2,
            rope_grid=(4, 6),
        ),
    )


def manifest(spec: TextModelSpec, guidance: bool = True, **changes: Any) -> Manifest:
    return Manifest(
        model=spec,
        preset="",
        batch=changes.pop("batch", 1),
        guidance=guidance,
        graphs={"fp32": {}},
        files={},
        checkpoint={"tokenizer": {}, "transformer": {}},
        tools={},
        defaults=SAMPLING,
        **changes,
    )


def draws(spec: TextModelSpec) -> Any:
    return stack_uniforms(call_keys(0, 2), spec.draws)


def reference(spec: TextModelSpec, guidance: bool, lengths: list[int] | None = None) -> TextTrace:
    prompts = bench_prompts(spec, 2)
    if lengths is not None:
        prompts = dataclasses.replace(prompts, lengths=np.array(lengths))
    inputs = TextInputs(conditions=prompts, uniforms=draws(spec))
    return trace_text_generation(*random_text_modules(spec), inputs, manifest(spec, guidance))


@pytest.mark.parametrize(
    ("patch", "guidance", "lengths"), [(1, True, None), (2, True, [3, 40]), (1, False, [5, 5])]
)
def test_the_published_path_computes_the_model(
    patch: int, guidance: bool, lengths: list[int] | None
) -> None:
    spec, moments = model(patch), list[None]()
    expected = reference(spec, guidance, lengths)
    prompts = bench_prompts(spec, 2)
    if lengths is not None:
        prompts = dataclasses.replace(prompts, lengths=np.array(lengths))
    found = generate_text_as_published(
        *random_text_modules(spec),
        prompts,
        torch.from_numpy(draws(spec)),
        SAMPLING,
        guidance=guidance,
        mark=lambda: moments.append(None),
    )
    assert len(moments) == 1 + 1 + spec.scales + 1
    for bits, scale in zip(found.tokens, expected.scales, strict=True):
        np.testing.assert_array_equal(bits.numpy(), scale.outputs[names.TOKENS])
    assert expected.image.std() > 0.05, "or the comparison would be hollow"
    np.testing.assert_allclose(found.image.permute(0, 2, 3, 1).numpy(), expected.image, atol=1e-5)


def test_contenders_make_the_bundles_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published way projects the text in every block at every scale; compiled, once."""
    spec = model(depth=1)
    manifest(spec).save(tmp_path)
    expected = np.rint(reference(spec, guidance=True).image * 255)
    counter, projected = CompileCounter(), list[None]()
    for name in ("torch", "torch-compile", "torch-bf16"):
        contender = TorchContender(tmp_path, name, 2, threads=1, compiler=counter)
        sample = contender.generate()
        scales = [f"scale_{k:02d}" for k in range(3)]
        assert list(sample.launches) == ["condition", *scales, "decoder"]
        assert contender.images.shape == expected.shape
        if name != "torch-bf16":
            assert np.abs(contender.images - expected).max() <= 1
        assert ("compiled" in contender.describe().settings["path"]) == (name == "torch-compile")
    assert counter.frame_count == 4, "a graph a scale and one for the decoder"
    transformer: Any
    tokenizer, transformer = random_text_modules(spec)
    for block in transformer.blocks:
        inner = block.ca.keys_values
        monkeypatch.setattr(
            block.ca, "keys_values", lambda text, f=inner: projected.append(None) or f(text)
        )
    generate_text_as_published(
        tokenizer, transformer, bench_prompts(spec, 2), torch.from_numpy(draws(spec)), SAMPLING,
        guidance=True,
    )
    assert len(projected) == spec.transformer.depth * spec.scales


# work


def products(built: GraphBuilder) -> int:
    """Operations of all products and convolutions of a static graph, by its inferred shapes."""
    graph = onnx.shape_inference.infer_shapes(built.model(lambda weight: ("w", 0, 0))).graph
    sizes = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        sizes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    found = 0
    for node in graph.node:
        made = math.prod(sizes[node.output[0]])
        if node.op_type == "MatMul":
            found += 2 * made * sizes[node.input[0]][-1]
        elif node.op_type == "Conv":
            found += 2 * made * math.prod(sizes[node.input[1]][1:])
    return found


@pytest.mark.parametrize(("patch", "precision"), [(1, "fp32"), (2, "fp16")])
def test_work_is_that_of_the_graphs(patch: int, precision: Any) -> None:
    spec, built, infos = model(patch), {}, {}
    options = ExportOptions(batch=2, layout="per-scale")
    wanted = {ref.name for ref in generation_graphs(spec, "per-scale")}
    for graph in build_graphs(spec, precision, options):
        if graph.name not in wanted:
            continue
        built[graph.name] = graph
        infos[graph.name] = GraphInfo(
            file=f"{graph.name}.onnx",
            inputs=tuple(graph.inputs),
            outputs=tuple(graph.outputs),
            weight_bytes=sum(weight.nbytes for weight in graph.weights.values()),
        )
    whole = dataclasses.replace(manifest(spec, batch=2), graphs={precision: infos})
    works = text_launches(whole, precision)
    assert [work.name for work in works] == list(built)
    for work in works:
        counted = work.compute_operations + work.full_operations
        assert counted == products(built[work.name]), work.name
        assert work.traffic > infos[work.name].weight_bytes


@pytest.mark.parametrize("layout", ["shared", "per-scale"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_weight_counts_once(precision: Any, layout: Any) -> None:
    spec, weights, infos = model(), dict[str, int](), dict[str, GraphInfo]()
    wanted = {ref.name for ref in generation_graphs(spec, layout)}
    for graph in build_graphs(spec, precision, ExportOptions(layout=layout)):
        if graph.name in wanted:
            sizes = {name: weight.nbytes for name, weight in graph.weights.items()}
            weights |= sizes
            total = sum(sizes.values())
            infos[graph.name] = GraphInfo(file="", inputs=(), outputs=(), weight_bytes=total)
    whole = dataclasses.replace(manifest(spec), graphs={precision: infos})
    assert weights_in_use(whole, precision) == sum(weights.values())


def test_int8_counts_what_stays_fp32() -> None:
    """Attention, head and, while its weights are fp32, the decoder."""
    spec = model()
    infos = {
        ref.name: GraphInfo(file="", inputs=(), outputs=(), weight_bytes=10**9)
        for ref in generation_graphs(spec, "per-scale")
    }
    whole = dataclasses.replace(manifest(spec), graphs={"fp32": infos, "int8": infos})
    for full, work in zip(text_launches(whole, "fp32"), text_launches(whole, "int8"), strict=True):
        both = work.compute_operations + work.full_operations
        assert both == full.compute_operations + full.full_operations
        assert (work.compute_operations > 0) == (work.name != names.DECODER), work.name
        assert work.full_operations > 0, work.name
    small = {**infos, names.DECODER: dataclasses.replace(infos[names.DECODER], weight_bytes=10**4)}
    smaller = dataclasses.replace(whole, graphs={"int8": small})
    decoder = text_launches(smaller, "int8")[-1]
    assert decoder.compute_operations > 10 * decoder.full_operations > 0


def test_work_of_the_text_encoder_is_that_of_its_graph() -> None:
    spec = t5_case.SPEC
    graph = build_text_encoder(spec, GraphForm(precision="fp32"))
    weights = sum(weight.nbytes for weight in graph.weights.values())
    info = GraphInfo(file="fp32/text_encoder.onnx", inputs=(), outputs=(), weight_bytes=weights)
    described = TextEncoderManifest(
        model=spec,
        graphs={"fp32": {names.TEXT_ENCODER: info}},
        files={"fp32/text_encoder.onnx": FileInfo(size=1, sha256="0" * 64)},
        checkpoint={},
        tools={},
    )
    work = text_encoder_work(described, "fp32", 3)
    assert work["compute"] + work["full"] == 3 * products(graph)
    assert work["weights"] == weights

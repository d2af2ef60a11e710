"""Text to image in `bench`: PyTorch as published computes the model, and weights count once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from var_deploy import names
from var_deploy.bench.conditions import bench_prompts
from var_deploy.bench.run import weights_used
from var_deploy.bundle.graph_refs import generation_graphs
from var_deploy.export.baselines.text_path import (
    generate_text_as_published,
    random_text_modules,
)
from var_deploy.export.baselines.torch_bench import TorchBaseline
from var_deploy.export.bundle import ExportOptions, build_graphs
from var_deploy.export.int8.decoder_ranges import rounded_convs
from var_deploy.export.int8.operators import ConvRanges, Range
from var_deploy.export.verify.text_reference import TextInputs, TextTrace, trace_text_generation
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.sampling import BitSampling, call_keys, stack_uniforms
from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

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


def test_baselines_make_the_bundles_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published way projects the text in every block at every scale; compiled, once."""
    spec = model(depth=1)
    manifest(spec).save(tmp_path)
    expected = np.rint(reference(spec, guidance=True).image * 255)
    counter, projected = CompileCounter(), list[None]()
    for name in ("torch", "torch-compile", "torch-bf16"):
        baseline = TorchBaseline(tmp_path, name, 2, threads=1, compiler=counter)
        sample = baseline.generate()
        scales = [f"scale_{k:02d}" for k in range(3)]
        assert list(sample.launches) == ["condition", *scales, "decoder"]
        assert baseline.images.shape == expected.shape
        if name != "torch-bf16":
            assert np.abs(baseline.images - expected).max() <= 1
        assert ("compiled" in baseline.describe().settings["path"]) == (name == "torch-compile")
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


@pytest.mark.parametrize("layout", ["shared", "per-scale"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_weight_counts_once(precision: Any, layout: Any) -> None:
    spec, weights, infos = model(), dict[str, int](), dict[str, GraphInfo]()
    wanted = {ref.name for ref in generation_graphs(spec, layout)}
    some = Range(low=-1.0, high=1.0)
    keys = rounded_convs(spec.tokenizer) if precision == "int8" else ()
    ranges = {key: ConvRanges(input=some, output=some) for key in keys}
    for graph in build_graphs(spec, precision, ExportOptions(layout=layout), ranges):
        if graph.name in wanted:
            sizes = {name: weight.nbytes for name, weight in graph.weights.items()}
            weights |= sizes
            total = sum(sizes.values())
            infos[graph.name] = GraphInfo(file="", inputs=(), outputs=(), weight_bytes=total)
    whole = dataclasses.replace(manifest(spec), graphs={precision: infos})
    assert weights_used(whole, precision) == sum(weights.values())

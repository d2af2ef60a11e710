"""The GPT-2 form through the same path as the rest: exported, verified, generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, as_loaded_model
from var_deploy.export.var import build, build_tokenizer, next_scale_prediction
from var_deploy.export.verify.bundle import verify_model
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import Sampling

SCALES, CODES, SIDE, BATCH = (1, 2, 4), 48, 16, 2
LAYOUTS = ("per-scale", "shared")


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    """(model, decoder), as the library call returns them, with weights that say something."""
    torch.manual_seed(3)
    model = build(
        hidden_size=48, num_layers=2, num_heads=3, mlp_ratio=2.5, scales=SCALES, codebook_size=CODES
    )
    _, decoder = build_tokenizer(
        image_size=SIDE, scales=SCALES, codebook_size=CODES, embed_dim=8, in_channels=1
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # GPT-2's 0.02 leaves every code equally likely
                parameter.mul_(6.0)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1)
        for table in decoder.tokenizer.quantize.embedding:
            table.weight.normal_(std=2.0)
    return model, decoder


@pytest.fixture(scope="module")
def loaded(made: tuple[Any, Any]) -> LoadedModel:
    return as_loaded_model(*made)


@pytest.fixture(scope="module")
def bundle(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpt2") / "bundle"
    options = ExportOptions(precisions=("fp32", "fp16"), batch=BATCH, guidance=False)
    export_bundle(loaded, out, options)
    return out


def generate(bundle: Path, layout: str, count: int = BATCH, **options: Any) -> Any:
    with Pipeline.load(bundle, layout=layout, precision="fp32", threads=1) as pipe:
        return pipe.generate([0] * count, **options)


def test_the_bundle_has_no_condition_and_no_guidance(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.model.transformer.family == "gpt2"
    assert manifest.rows == BATCH
    for precision, graphs in manifest.graphs.items():
        assert set(graphs) == {
            names.STEP,
            *(names.scale_graph(k) for k in range(len(SCALES))),
            names.DECODER,
            names.ENCODER,
            names.ACCUMULATE,
        }
        for graph in graphs.values():
            taken = {tensor.name for tensor in graph.inputs}
            assert not taken & {names.CFG, names.MODULATION, names.LABELS}
            path = bundle / graph.file
            onnx.checker.check_model(str(path), full_check=True)
            assert path.parent.name == precision


def test_verify_passes(bundle: Path, loaded: LoadedModel) -> None:
    report = verify_model(bundle, loaded)
    assert report.passed, report.table()
    assert {check.precision for check in report.checks} == {"fp32", "fp16"}
    exact = [c for c in report.checks if c.precision == "fp32" and c.graph.startswith("loop")]
    total = BATCH * sum(side * side for side in SCALES)
    shown = total * -(-4 // BATCH)  # four images, in whole batches
    assert [check.tokens for check in exact] == [f"{shown}/{shown}"] * 2


def test_greedy_tokens_are_those_of_the_library_call(made: tuple[Any, Any], bundle: Path) -> None:
    model, decoder = made
    expected: list[Any] = []
    with torch.inference_mode():
        for scale in range(len(SCALES)):
            logits = next_scale_prediction(model, expected, scale)
            expected.append(logits.argmax(-1))
        image = decoder(expected).numpy()
    assert len({int(token) for token in expected[-1].ravel()}) > 1
    draws = np.full((BATCH, sum(side * side for side in SCALES)), 0.4, np.float32)
    for layout in LAYOUTS:
        loop = ScaleLoop(bundle, read_manifest(bundle), OrtCpuBackend(1), "fp32", layout)
        try:
            found = loop.run([0] * BATCH, draws, Sampling(cfg=0.0, top_k=1, top_p=0.0))
            for tokens, wanted in zip(loop.tokens(), expected, strict=True):
                np.testing.assert_array_equal(tokens, np.repeat(wanted.numpy(), BATCH, axis=0))
            np.testing.assert_allclose(found, np.repeat(image, BATCH, axis=0), atol=2e-4)
        finally:
            loop.close()


def test_both_layouts_generate_the_same_images_and_seeds_differ(bundle: Path) -> None:
    first, second = (generate(bundle, layout, seed=5) for layout in LAYOUTS)
    assert first.shape == (BATCH, SIDE, SIDE, 1)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, generate(bundle, "shared", seed=5))
    other = generate(bundle, "shared", seed=6)
    assert (first != other).mean() > 0.2
    assert (first[0] != first[1]).mean() > 0.2  # each image of a batch has numbers of its own


def test_any_count_is_cut_into_batches(bundle: Path) -> None:
    five = generate(bundle, "auto", count=5, seed=5)
    np.testing.assert_array_equal(five[:BATCH], generate(bundle, "auto", seed=5))
    assert len({image.tobytes() for image in five}) == 5
    with Pipeline.load(bundle, threads=1) as pipe:
        np.testing.assert_array_equal(pipe.generate(seed=5), five[:1])


def test_guidance_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no guidance"):
        export_bundle(loaded, tmp_path / "out", ExportOptions())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_another_codebook_is_noticed(
    bundle: Path, loaded: LoadedModel, made: tuple[Any, Any]
) -> None:
    model, decoder = made
    table = decoder.tokenizer.quantize.embedding[1].weight
    with torch.no_grad():
        table += 0.1
    try:
        report = verify_model(bundle, as_loaded_model(model, decoder), precision="fp32")
    finally:
        with torch.no_grad():
            table -= 0.1
    assert report.failure is not None
    assert report.failure.startswith(f"fp32/{names.scale_graph(1)}: {names.NEW_F_HAT} is off by ")


def test_operators_are_those_of_the_other_family(
    bundle: Path, golden_bundle: Callable[[str], Path]
) -> None:
    def operators(folder: Path) -> set[str]:
        return {
            node.op_type
            for path in folder.glob("fp32/*.onnx")
            for node in onnx.load(str(path), load_external_data=False).graph.node
        }

    extra = operators(bundle) - operators(golden_bundle("seeded-shared-aln"))
    assert extra <= {"Expand", "Pad"}

"""int8 bundles of every form run, agree between layouts, and come out the same twice."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from var_deploy import names
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules, load_model
from var_deploy.export.lint.int8 import lint_int8
from var_deploy.export.verify.bundle import BOUNDS, verify_model
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline

Model = Callable[..., LoadedModel]
GPT2: dict[str, Any] = {
    "guidance": False,
    "family": "gpt2",
    "classes": 0,
    "qk_l2_norm": False,
    "codebook_per_scale": True,
}
FORMS: list[dict[str, Any]] = [
    {"guidance": False, "batch": 1, "shared_adaln": True, "qk_l2_norm": False},
    {"vocab_size": 50, "shared_phi": 0, "batch": 3},
    {"shared_phi": 1, "codebook_per_scale": True},
    GPT2,
]


def nodes_of(path: Path) -> Counter[str]:
    model = onnx.load(str(path), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_runs_in_int8(form: dict[str, Any], small_model: Model, tmp_path: Path) -> None:
    sizes = {k: v for k, v in form.items() if k not in ("batch", "guidance")}
    options = {k: form[k] for k in ("batch", "guidance") if k in form}
    model = small_model(**sizes)
    bundle = tmp_path / "bundle"
    given = {"precisions": ("int8",), "batch": 2, "calibration": 8, **options}
    export_bundle(model, bundle, ExportOptions(**given))
    labels = [0, 1, 0] if model.spec.transformer.conditional else [0, 0, 0]
    images = []
    for layout in ("shared", "per-scale"):
        with Pipeline.load(bundle, precision="int8", layout=layout, threads=1) as pipe:
            images.append(pipe.generate(labels, seed=3, top_k=1))
    assert images[0].std() > 5
    np.testing.assert_array_equal(*images)  # one function, two ways to run it
    report = verify_model(bundle, model)
    assert report.passed, report.table()
    assert {check.precision for check in report.checks} == {"int8"}


@pytest.mark.parametrize("form", [{}, GPT2], ids=str)
def test_an_image_does_not_depend_on_what_is_drawn_beside_it(
    form: dict[str, Any], small_model: Model, tmp_path: Path
) -> None:
    """Activations are rounded by extremes: by those of their own image."""
    sizes = {k: v for k, v in form.items() if k != "guidance"}
    guidance = form.get("guidance", True)
    model = small_model(**sizes)
    made = []
    for batch in (1, 3):
        given: dict[str, Any] = {"precisions": ("int8",), "guidance": guidance, "layout": "shared"}
        export_bundle(model, tmp_path / str(batch), ExportOptions(batch=batch, **given))
        with Pipeline.load(tmp_path / str(batch), threads=1) as pipe:
            seeds = [7, 8, 9]
            labels = range(3) if model.spec.transformer.conditional else [0, 0, 0]
            made.append(pipe.generate(labels, seed=seeds))
            alone = [pipe.generate([n], seed=s)[0] for n, s in zip(labels, seeds, strict=True)]
            np.testing.assert_array_equal(made[-1], alone)
    np.testing.assert_array_equal(*made)
    assert (made[0][0] != made[0][1]).mean() > 0.5


@pytest.fixture(scope="module")
def bundle(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three precisions."""
    out = tmp_path_factory.mktemp("int8") / "bundle"
    export_bundle(small_model(), out, ExportOptions(precisions=("fp32", "fp16", "int8")))
    return out


def test_what_is_int8_and_what_is_not(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    depth, scales = manifest.model.transformer.depth, manifest.model.scales
    for name in (names.STEP, *(names.scale_graph(k) for k in range(scales))):
        kinds = nodes_of(bundle / manifest.graph("int8", name).file)
        assert kinds["MatMulInteger"] == kinds["DynamicQuantizeLinear"] == 4 * depth
    assert nodes_of(bundle / "int8/condition.onnx")["MatMulInteger"] == depth + 1
    decoder = nodes_of(bundle / "int8/decoder.onnx")
    assert decoder["QLinearConv"] > decoder["Conv"] > 0 and not decoder["Resize"]
    # the encoder is that of fp32, node by node
    files = [bundle / p / "encoder.onnx" for p in ("fp32", "int8")]
    assert nodes_of(files[0]) == nodes_of(files[1])
    checked: set[Any] = set()
    for graph in manifest.graphs["int8"].values():
        assert lint_int8(bundle / graph.file, checked) == []
    # four matrices a block, one for its modulation, one for the head's, and each kernel
    assert len(checked) == 5 * depth + 1 + decoder["QLinearConv"]


def test_up_sampling_in_four_phases_and_in_fp16_as_it_was(bundle: Path) -> None:
    levels = len(read_manifest(bundle).model.tokenizer.width_multipliers)
    kernels = {}
    for precision in ("fp32", "fp16"):
        model = onnx.load(str(bundle / precision / "decoder.onnx"), load_external_data=False)
        shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
        convs = [node for node in model.graph.node if node.op_type == "Conv"]
        kernels[precision] = [shapes[node.input[1]][2:] for node in convs]
        resizes = [node for node in model.graph.node if node.op_type == "Resize"]
        assert len(resizes) == (levels - 1 if precision == "fp16" else 0)
    assert kernels["fp32"].count((2, 2)) == 4 * (levels - 1)
    assert kernels["fp16"].count((2, 2)) == 0
    assert kernels["fp16"].count((3, 3)) == kernels["fp32"].count((3, 3)) + levels - 1


@pytest.mark.parametrize("levels", [(1, 2), (1, 1, 2)])
def test_the_four_phases_are_the_model(
    levels: tuple[int, ...], small_model: Model, tmp_path: Path
) -> None:
    """On an f_hat that no generation gave, with every border in it."""
    model = small_model(width_multipliers=levels)
    export_bundle(model, tmp_path / "bundle", ExportOptions(batch=2, layout="shared"))
    spec = model.spec.tokenizer
    shape = (2, spec.code_width, spec.latent_side, spec.latent_side)
    f_hat = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "bundle/fp32/decoder.onnx"))
    (found,) = session.run(None, {names.F_HAT: f_hat})
    tokenizer, _ = build_modules(model)
    with torch.no_grad():
        image = (tokenizer.decode(torch.from_numpy(f_hat)) + 1) / 2
    expected = image.permute(0, 2, 3, 1).numpy()
    assert found.shape == (2, spec.image_side, spec.image_side, 3)
    assert np.abs(found - expected).max() <= BOUNDS["fp32"] * np.abs(expected).max()


def test_pockets_decoder_holds_on_what_it_draws(tmp_path: Path) -> None:
    """Trained weights have channels that random ones do not: three times as many images as
    `verify` draws, at the default calibration."""
    model = load_model("pocket")
    export_bundle(model, tmp_path / "bundle", ExportOptions(precisions=("int8",), layout="shared"))
    for seed in (0, 1, 2):
        report = verify_model(tmp_path / "bundle", model, seed=seed, samples=0)
        assert report.passed, report.table()


def test_keys_and_values_are_outputs_without_a_copy(bundle: Path) -> None:
    for precision in ("fp32", "int8"):
        model = onnx.load(str(bundle / precision / "scale_01.onnx"), load_external_data=False)
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        cache = [v.name for v in model.graph.output if re.match(r"new_key_values", v.name)]
        assert len(cache) == 4
        assert {makers[name] for name in cache} == {"Split", "Div"}


def test_the_same_model_gives_the_same_bytes(
    bundle: Path, small_model: Model, tmp_path: Path
) -> None:
    export_bundle(small_model(), tmp_path / "again", ExportOptions(precisions=("int8",)))
    files = sorted(p for p in (tmp_path / "again" / "int8").iterdir())
    assert len(files) > 6
    for path in files:
        same = bundle / "int8" / path.name
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(
            same.read_bytes()
        ).digest(), path.name

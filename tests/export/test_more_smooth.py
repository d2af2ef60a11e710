"""More smooth sampling: the graphs against the published formula and against PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from var_deploy import names
from var_deploy.bundle.graph_refs import graph_ref
from var_deploy.config import GraphForm
from var_deploy.errors import UsageError
from var_deploy.export.bundle import ExportOptions, build_graphs, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.sampler import mix, sample
from var_deploy.export.models.sampler import filter_logits, mix_weights
from var_deploy.export.verify.bundle import verify_model
from var_deploy.manifest import FileInfo, file_sha256, read_manifest
from var_deploy.sampling import gumbel, smoothing, uniforms

Model = Callable[..., LoadedModel]
SCALES = 10


def published(kept: torch.Tensor, noise: torch.Tensor, scale: int) -> torch.Tensor:
    """As `autoregressive_infer_cfg` says it, in fp64; the noise is given instead of drawn."""
    ratio = scale / (SCALES - 1)
    tau = max(0.27 * (1 - ratio * 0.95), 0.005)
    gumbels = (kept.double().mul(1 + ratio) + noise) / tau
    return gumbels.softmax(-1)


def weights_of_the_graph(
    logits: Any, noise: Any, scale: int, top_k: int, top_p: float, temperature: float
) -> Any:
    b, shape = GraphBuilder("mix", GraphForm(precision="fp32")), logits.shape
    given = (
        b.input(names.LOGITS, np.float32, shape),
        b.input(names.UNIFORMS, np.float32, shape[:2]),
        b.input(names.TEMPERATURE, np.float32, ()),
        b.input(names.TOP_K, np.int64, ()),
        b.input(names.TOP_P, np.float32, ()),
    )
    b.op("Identity", sample(b, *given, length=shape[1], codes=shape[-1]), out=names.TOKENS)
    b.input(names.NOISE, np.float32, shape)
    numbers = [b.constant(value, np.float32) for value in smoothing(scale, SCALES)]
    mixed = mix(b, names.LOGITS, names.KEPT_MASS, names.NOISE, names.TEMPERATURE, *numbers)
    b.op("Identity", mixed, out="weights")
    b.output("weights", np.float32, shape)
    model = b.model(lambda name: (name, 0, 0)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = {
        names.LOGITS: logits,
        names.UNIFORMS: np.stack([uniforms(0, i, shape[1]) for i in range(shape[0])]),
        names.TEMPERATURE: np.array(temperature, np.float32),
        names.TOP_K: np.array(top_k),
        names.TOP_P: np.array(top_p, np.float32),
        names.NOISE: noise,
    }
    return session.run(["weights"], feed)[0]


@pytest.mark.parametrize("codes", [5, 512, 4096])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (900, 0.95), (1, 0.0), (3, 0.6)])
def test_weights_are_the_published_ones(codes: int, top_k: int, top_p: float) -> None:
    random = np.random.default_rng(codes)
    logits = (3 * random.standard_normal((2, 6, codes)) - 20).astype(np.float32)
    noise = np.stack([gumbel(9, image, 6, codes) for image in range(2)])
    for scale, temperature in ((0, 1.0), (4, 0.5), (9, 1.0)):
        kept = filter_logits(torch.from_numpy(logits) / temperature, top_k, top_p)
        expected = published(kept, torch.from_numpy(noise), scale).numpy()
        found = weights_of_the_graph(logits, noise, scale, top_k, top_p, temperature)
        # 1/tau of what fp32 rounds in numbers of about 16
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
        assert (found[~np.isfinite(kept.numpy())] == 0).all()
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
        peers = mix_weights(kept, torch.from_numpy(noise), scale, SCALES).numpy()
        np.testing.assert_allclose(peers, expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_nums": (1,)},
        {"patch_nums": (1, 2), "shared_phi": 1, "shared_adaln": True},
        {"patch_nums": (1, 2, 3), "shared_phi": 0},
        {"codebook_per_scale": True, "phi_ratio": 0.0},
    ],
    ids=str,
)
def test_every_scale_is_the_models(
    changes: dict[str, Any], small_model: Model, tmp_path: Path
) -> None:
    """In both layouts; in each scale what a mix makes of the graph's own logits."""
    model = small_model(**changes)
    # a single token makes a map of one pixel, which has no norm to speak of in fp16
    alone: dict[str, Any] = {"precisions": ("fp32",), "layout": "per-scale"}
    both: dict[str, Any] = {"precisions": ("fp32", "fp16")}
    given = alone if model.spec.scales == 1 else both
    options = ExportOptions(batch=2, more_smooth=True, **given)
    export_bundle(model, tmp_path / "out", options)
    report = verify_model(tmp_path / "out", model)
    assert report.passed, report.table()


def test_every_scale_in_int8(small_model: Model, tmp_path: Path) -> None:
    options = ExportOptions(
        precisions=("int8",), batch=2, more_smooth=True, layout="shared", calibration=1
    )
    model = small_model()
    export_bundle(model, tmp_path / "out", options)
    report = verify_model(tmp_path / "out", model, precision="int8", samples=0)
    scales = [c for c in report.checks if c.graph.startswith(("scale", "step", "accumulate"))]
    assert len(scales) == model.spec.scales + 1
    # random weights are no promise for int8's own bounds; f_hat is held to those of fp32
    assert not [c for c in scales if names.NEW_F_HAT in c.detail or names.NEXT_INPUT in c.detail]


@pytest.fixture(scope="module")
def smooth(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smooth") / "bundle"
    export_bundle(small_model(), out, ExportOptions(more_smooth=True, layout="per-scale"))
    return out


def change_constant(bundle: Path, graph: str, before: float, after: float) -> None:
    """Another number in a graph, and a hash that agrees."""
    manifest = read_manifest(bundle)
    file = manifest.graph("fp32", graph).file
    path = bundle / file
    proto, found = onnx.load(str(path), load_external_data=False), 0
    for tensor in proto.graph.initializer:
        scalar = not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT
        if scalar and numpy_helper.to_array(tensor) == np.float32(before):
            replaced = numpy_helper.from_array(np.array(after, np.float32), tensor.name)
            tensor.CopyFrom(replaced)
            found += 1
    assert found == 1
    path.write_bytes(proto.SerializeToString())
    info = FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
    dataclasses.replace(manifest, files={**manifest.files, file: info}).save(bundle)


def test_verify_finds_another_tau(smooth: Path, small_model: Model, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(smooth, tmp_path / "bundle"))
    tau = smoothing(1, 3)[1]
    change_constant(bundle, names.scale_graph(1), tau, 1.1 * tau)
    report = verify_model(bundle, small_model(), precision="fp32")
    wrong = [check for check in report.checks if not check.passed]
    assert wrong[0].graph == names.scale_graph(1) and names.NEW_F_HAT in wrong[0].detail


def test_the_manifest_and_the_noise_go_together(smooth: Path, pocket_bundle: Path) -> None:
    for bundle, mixes in ((smooth, True), (pocket_bundle, False)):
        manifest = read_manifest(bundle)
        assert manifest.more_smooth is mixes
        for name, graph in manifest.graphs["fp32"].items():
            noise = [t.shape for t in graph.inputs if t.name == names.NOISE]
            kind = graph_ref(manifest.model, "fp32", name).kind
            assert len(noise) == (mixes and kind in ("scale", "step")), name
    shapes = [
        read_manifest(smooth).graph("fp32", names.scale_graph(k)).input(names.NOISE).shape
        for k in range(3)
    ]
    assert shapes == [(1, 1, 48), (1, 4, 48), (1, 16, 48)]


def test_a_graph_without_it_is_what_it_was(small_model: Model) -> None:
    """No node and no name of it: the bytes of other bundles do not change with it."""
    spec = small_model().spec
    for graph in build_graphs(spec, "fp32", ExportOptions()):
        text = graph.model(lambda name: (name, 0, 0)).SerializeToString()
        assert names.NOISE.encode() not in text
        assert not any(n.op_type == "Softmax" and "sampler" in n.name for n in graph._nodes)


def test_the_gpt2_form_has_no_such_way(tmp_path: Path) -> None:
    from var_deploy.export.var import build

    transformer = build(hidden_size=32, num_layers=1, num_heads=2, scales=(1, 2), codebook_size=16)
    model = type("Model", (), {"spec": transformer.spec})()
    with pytest.raises(UsageError, match="no more-smooth sampling"):
        options = ExportOptions(more_smooth=True, guidance=False)
        export_bundle(model, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()

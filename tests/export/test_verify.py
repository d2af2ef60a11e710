"""`verify` passes what is right and names what is wrong, by graph and by tensor."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from var_deploy import names
from var_deploy.cli import main
from var_deploy.errors import BundleError, UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules, load_model
from var_deploy.export.verify import bundle as verifying
from var_deploy.export.verify.bundle import verify_bundle, verify_model
from var_deploy.export.verify.report import Check, VerifyReport
from var_deploy.labels import class_stride
from var_deploy.manifest import FileInfo, file_sha256, read_manifest
from var_deploy.pipeline import Pipeline

SCALE_1 = names.scale_graph(1)
Model = Callable[..., LoadedModel]


@pytest.fixture(scope="module")
def model(small_model: Model) -> LoadedModel:
    """Two blocks, three scales."""
    return small_model()


@pytest.fixture(scope="module")
def exported(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(model, out, ExportOptions(precisions=("fp32", "fp16"), batch=2))
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def save(model: LoadedModel, folder: Path) -> dict[str, Path]:
    """The weights as two files, by option of the command line."""
    files = {}
    for option, module in zip(("tokenizer", "checkpoint"), build_modules(model), strict=True):
        files[option] = folder / f"{option}.safetensors"
        state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
        save_file(state, files[option])
    return files


@pytest.fixture(scope="module")
def checkpoint(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save(model, tmp_path_factory.mktemp("checkpoint"))


def update_hash(bundle: Path, file: str) -> None:
    """Make a file that was changed look as if it had been exported so."""
    manifest = read_manifest(bundle)
    path = bundle / file
    info = FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
    dataclasses.replace(manifest, files={**manifest.files, file: info}).save(bundle)


def plant(bundle: Path, graph: str, weight: str, instead: str, precision: str = "fp32") -> None:
    """Let one graph read `instead`'s bytes for `weight`; the other graphs stay as they are."""
    file = f"{precision}/{names.graph_file(graph)}"
    proto = onnx.load(str(bundle / file), load_external_data=False)
    tensors = {t.name: t for t in proto.graph.initializer}
    places = {name: {e.key: e for e in tensors[name].external_data} for name in (weight, instead)}
    assert places[weight]["length"].value == places[instead]["length"].value
    assert places[weight]["offset"].value != places[instead]["offset"].value
    places[weight]["offset"].value = places[instead]["offset"].value
    (bundle / file).write_bytes(proto.SerializeToString())
    update_hash(bundle, file)


def failed(report: VerifyReport) -> dict[str, Check]:
    return {check.graph: check for check in report.checks if not check.passed}


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *(str(a) for a in arguments)])


def options(checkpoint: dict[str, Path]) -> list[object]:
    return [part for name, path in checkpoint.items() for part in (f"--{name}", path)]


# --- what is right


def test_the_table_has_a_readable_line_a_graph(bundle: Path, model: LoadedModel) -> None:
    report = verify_model(bundle, model, precision="fp32")
    header, rule, *lines = report.table().splitlines()
    assert header.split("  ")[0] == "graph"
    columns = ("worst tensor", "abs error", "rel error", "bound", "tokens", "PSNR")
    starts = [header.index(column) for column in columns]
    assert starts == sorted(starts)
    assert set(rule) == {"-"}
    assert lines[-1].startswith("fp32: 84 of 84 tokens of 4 images equal the PyTorch model's, ")
    assert lines[-1].endswith(": the deployed graphs are the model")
    rows = lines[:-2]
    assert len(rows) == len(report.checks)
    for row, check in zip(rows, report.checks, strict=True):
        assert row.startswith(f"fp32/{check.graph} ")
        assert row.endswith(" ok")
        assert f"{check.error:.2e}" in row and check.tensor in row
    assert max(map(len, rows)) < 140
    for start in starts[1:3]:
        assert all(re.match(r"\d\.\d\de-\d\d  ", row[start:]) for row in rows)


# --- planted errors


def test_one_wrong_bias_in_one_graph(bundle: Path, model: LoadedModel) -> None:
    plant(bundle, SCALE_1, "blocks.0.ffn.fc1.bias", "blocks.1.ffn.fc1.bias")
    report = verify_model(bundle, model, precision="fp32")
    found = failed(report)
    # the static loop runs through the graph, everything else is as it was
    assert set(found) <= {SCALE_1, "loop per-scale"}
    # block 0 is wrong after its own keys and values: the next block's keys are the first to show
    assert found[SCALE_1].detail.startswith(f"{names.new_key(1)} is off by ")
    assert "bound 2e-04" in found[SCALE_1].detail
    assert report.failure is not None
    assert report.failure.startswith(f"fp32/{SCALE_1}: {names.new_key(1)} is off by ")
    assert report.table().endswith(f"FAILED {report.failure}")
    assert read_manifest(bundle).parity == report.to_json()
    assert not report.to_json()["passed"]


@pytest.mark.parametrize(
    ("graph", "weight", "instead", "checks", "tensor"),
    [
        (
            SCALE_1,
            "blocks.1.ffn.fc1.bias",  # of the last block
            "blocks.0.ffn.fc1.bias",
            {SCALE_1, "loop per-scale"},
            names.LOGITS,
        ),
        (
            names.CONDITION,
            "blocks.1.ada_lin.1.weight",
            "blocks.0.ada_lin.1.weight",
            {names.CONDITION, "loop shared", "loop per-scale"},
            names.MODULATION,
        ),
        (
            names.STEP,
            "quantize.quant_resi.qresi_ls.3.weight",
            "quantize.quant_resi.qresi_ls.1.weight",
            {f"{names.STEP} @ 2", "loop shared"},
            names.NEW_F_HAT,
        ),
        (
            names.DECODER,
            "decoder.mid.block_1.conv1.weight",
            "decoder.mid.block_1.conv2.weight",
            {names.DECODER, "loop shared", "loop per-scale"},
            names.IMAGE,
        ),
        (
            names.ENCODER,
            "encoder.mid.block_1.conv1.bias",
            "encoder.mid.block_1.conv2.bias",
            {names.ENCODER},
            names.LATENT,
        ),
        (
            names.ACCUMULATE,
            "quantize.quant_resi.qresi_ls.3.weight",
            "quantize.quant_resi.qresi_ls.0.weight",
            {names.ACCUMULATE},
            names.F_HATS,
        ),
    ],
)
def test_a_wrong_weight_of_any_graph(
    bundle: Path,
    model: LoadedModel,
    graph: str,
    weight: str,
    instead: str,
    checks: set[str],
    tensor: str,
) -> None:
    plant(bundle, graph, weight, instead)
    report = verify_model(bundle, model, precision="fp32")
    found = failed(report)
    # a loop may come out right where the error is small; a graph may not
    assert checks - {"loop per-scale"} <= set(found) <= checks
    first = next(iter(found))
    assert first.partition(" ")[0] == graph
    assert found[first].detail.startswith(f"{tensor} is off by ")


def test_fp16_is_checked_by_itself(bundle: Path, model: LoadedModel) -> None:
    plant(bundle, SCALE_1, "blocks.0.attn.proj.bias", "blocks.1.attn.proj.bias", "fp16")
    report = verify_model(bundle, model)
    assert report.failure is not None and report.failure.startswith(f"fp16/{SCALE_1}: ")
    assert {check.precision for check in report.checks if not check.passed} == {"fp16"}


def test_a_value_that_is_not_finite(bundle: Path, model: LoadedModel) -> None:
    file = f"fp32/{names.graph_file(names.DECODER)}"
    proto = onnx.load(str(bundle / file), load_external_data=False)
    place = {
        e.key: int(e.value)
        for t in proto.graph.initializer
        if t.name == "decoder.conv_out.bias"
        for e in t.external_data
        if e.key != "location"
    }
    weights = f"fp32/{names.WEIGHTS}"
    with (bundle / weights).open("r+b") as stream:
        stream.seek(place["offset"])
        stream.write(np.full(1, np.nan, np.float32).tobytes())
    update_hash(bundle, weights)
    report = verify_model(bundle, model, precision="fp32")
    assert set(failed(report)) == {names.DECODER, "loop shared", "loop per-scale"}
    json.dumps(report.to_json(), allow_nan=False)
    assert "200.0 dB" not in report.table()


def change_graph(bundle: Path, graph: str, change: Callable[[onnx.ModelProto], object]) -> None:
    file = f"fp32/{names.graph_file(graph)}"
    proto = onnx.load(str(bundle / file), load_external_data=False)
    change(proto)
    (bundle / file).write_bytes(proto.SerializeToString())
    update_hash(bundle, file)


def test_a_wrong_shape_is_named_before_any_value(bundle: Path, model: LoadedModel) -> None:
    def change(proto: onnx.ModelProto) -> None:
        f_hat = next(v for v in proto.graph.input if v.name == names.F_HAT)
        f_hat.type.tensor_type.shape.dim[-1].dim_value = 7

    change_graph(bundle, SCALE_1, change)
    check = failed(verify_model(bundle, model, precision="fp32"))[SCALE_1]
    assert "input f_hat has another type or shape than manifest.json says" in check.detail


@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_tensor_that_the_manifest_does_not_list_is_named(
    kind: str, bundle: Path, model: LoadedModel
) -> None:
    change_graph(bundle, names.DECODER, lambda proto: _add(proto, kind))
    report = verify_model(bundle, model, precision="fp32")
    found = failed(report)
    assert f"{kind} 'more' is not in manifest.json" in found.pop(names.DECODER).detail
    # without a decoder no loop runs, and the report still says what the matter is
    assert set(found) == {"loop shared", "loop per-scale"}
    assert all("not run, because decoder" in check.detail for check in found.values())


def _add(proto: onnx.ModelProto, kind: str) -> None:
    values = proto.graph.input if kind == "input" else proto.graph.output
    values.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def test_a_graph_that_cannot_be_loaded_is_named(bundle: Path, model: LoadedModel) -> None:
    file = f"fp32/{names.graph_file(SCALE_1)}"
    (bundle / file).write_bytes(b"no graph at all")
    update_hash(bundle, file)
    report = verify_model(bundle, model, precision="fp32")
    assert report.failure is not None
    assert report.failure.startswith(f"fp32/{SCALE_1}: cannot be loaded: ")
    assert "\n" not in report.failure


def test_spoiled_weights_with_a_true_hash_are_found(bundle: Path, model: LoadedModel) -> None:
    weights = f"fp32/{names.WEIGHTS}"
    data = np.fromfile(bundle / weights, np.float32)
    middle = len(data) // 2
    data[middle : middle + 20_000] = 0.0
    data.tofile(bundle / weights)
    update_hash(bundle, weights)
    report = verify_model(bundle, model, precision="fp32")
    assert not report.passed
    assert read_manifest(bundle).parity is not None
    Pipeline.load(bundle, precision="fp32", threads=1).close()  # nothing else could have told


def test_a_checkpoint_that_differs_a_little_is_another(small_model: Model, tmp_path: Path) -> None:
    model = small_model()
    export_bundle(model, tmp_path / "bundle", ExportOptions(layout="shared"))
    assert verify_model(tmp_path / "bundle", model).passed

    class Nudged:
        description = model.transformer.description
        keys, shape = model.transformer.keys, model.transformer.shape

        def read(self, key: str) -> Any:
            value = model.transformer.read(key)
            return value + np.float32(0.05) if key == "blocks.1.attn.proj.bias" else value

    other = dataclasses.replace(model, transformer=Nudged())
    found = failed(verify_model(tmp_path / "bundle", other))
    assert next(iter(found)) == f"{names.STEP} @ 0"
    assert names.CONDITION not in found


# --- the command line, and bundles that cannot be compared


def test_the_command_ends_with_0_and_prints_the_table(
    bundle: Path, checkpoint: dict[str, Path]
) -> None:
    result = run_cli(bundle, "--precision", "fp32", *options(checkpoint))
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("the deployed graphs are the model")
    assert f"fp32/{SCALE_1}" in result.stdout
    assert not result.stderr
    parity = read_manifest(bundle).parity
    assert parity is not None and parity["passed"]
    assert read_manifest(bundle).parity_is_current()


def test_the_command_ends_with_1_and_one_line(bundle: Path, checkpoint: dict[str, Path]) -> None:
    plant(bundle, SCALE_1, "blocks.0.ffn.fc1.bias", "blocks.1.ffn.fc1.bias")
    result = run_cli(bundle, "--precision", "fp32", "--json", *options(checkpoint))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert json.loads(result.stderr)["error"].startswith(
        f"fp32/{SCALE_1}: {names.new_key(1)} is off by "
    )
    listed = json.loads(result.stdout)
    assert listed["passed"] is False
    assert listed.pop("unstored") == ""
    assert listed == read_manifest(bundle).parity


def test_damaged_files_are_refused_before_they_are_run(
    bundle: Path, checkpoint: dict[str, Path]
) -> None:
    (bundle / "fp32" / names.WEIGHTS).write_bytes(b"short")
    result = run_cli(bundle, *options(checkpoint))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "expected" in result.stderr
    assert read_manifest(bundle).parity is None


def test_weights_from_files_must_be_given(bundle: Path, checkpoint: dict[str, Path]) -> None:
    for given in ({}, {"checkpoint": checkpoint["checkpoint"]}):
        with pytest.raises(UsageError, match="--checkpoint and --tokenizer"):
            verify_bundle(bundle, **given)


def test_a_checkpoint_of_another_architecture_is_refused(
    bundle: Path, small_model: Model, tmp_path: Path
) -> None:
    other = small_model(width=128)
    with pytest.raises(UsageError, match="another architecture"):
        verify_bundle(bundle, **save(other, tmp_path))


def test_another_checkpoint_of_the_same_architecture_is_noticed(
    bundle: Path, small_model: Model, tmp_path: Path
) -> None:
    report = verify_bundle(bundle, **save(small_model(2), tmp_path), precision="fp32")
    assert report.failure is not None
    assert report.failure.startswith(f"fp32/{names.CONDITION}: {names.FIRST_INPUT} is off by ")


def test_random_weights_are_drawn_again(tmp_path: Path) -> None:
    """The manifest tells the seed, so no file needs to be given."""
    model = load_model("pocket", random_weights=5)
    export_bundle(model, tmp_path / "bundle", ExportOptions(layout="shared"))
    report = verify_bundle(tmp_path / "bundle")
    assert report.passed, report.table()
    assert (len(report.labels), len(set(report.labels))) == (4, 4)


def test_images_seed_and_labels_are_asked_for(bundle: Path, model: LoadedModel) -> None:
    asked = {"precision": "fp32", "images": 3, "seed": 5}
    report = verify_model(bundle, model, labels="4,1,2", **asked)  # type: ignore[arg-type]
    assert report.passed, report.table()
    assert (report.labels, report.seed) == ((4, 1, 2, 4), 5), "whole batches of two"
    assert "84 of 84 tokens of 4 images" in report.verdict()[0]
    for wrong, told in (({"images": 0}, "images"), ({"labels": [9]}, "label 9 is out of range")):
        with pytest.raises(UsageError, match=told):
            verify_model(bundle, model, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [1, 2, 5, 7, 14, 21, 1000])
def test_images_are_of_other_classes(classes: int) -> None:
    stride = class_stride(classes)
    assert len({stride * n % classes for n in range(classes)}) == classes


def test_images_that_do_not_fit_together_are_compared_in_turns(
    bundle: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is the same: one line a graph, files looked at once."""
    together = verify_model(bundle, model, precision="fp32")
    held: list[int] = []
    verifier = verifying.GraphVerifier

    def counted(*given: Any, **options: Any) -> Any:
        held.append(len(given[3]))
        return verifier(*given, **options)

    monkeypatch.setattr(verifying, "GraphVerifier", counted)
    monkeypatch.setattr(verifying, "TRACE_BYTES", 1)
    assert verify_model(bundle, model, precision="fp32").verdict() == together.verdict()
    assert held == [1, 1]
    plant(bundle, SCALE_1, "blocks.0.ffn.fc1.bias", "blocks.1.ffn.fc1.bias")
    assert SCALE_1 in failed(verify_model(bundle, model, precision="fp32"))


def test_options_of_images_do_not_go_with_bisect(bundle: Path) -> None:
    for option, value in (("--images", 2), ("--seed", 1), ("--labels", "1"), ("--module", "a:b")):
        result = run_cli(bundle, "--bisect", "onnxruntime,pytorch", option, value)
        assert result.exit_code == 2 and f"{option} does not go with --bisect" in result.stderr


def test_a_precision_that_the_bundle_lacks(bundle: Path, model: LoadedModel) -> None:
    manifest = read_manifest(bundle)
    dataclasses.replace(manifest, graphs={"fp32": manifest.graphs["fp32"]}).save(bundle)
    with pytest.raises(BundleError, match="--precision fp16"):
        verify_model(bundle, model, precision="fp16")

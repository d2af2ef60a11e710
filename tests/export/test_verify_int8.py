"""`verify` of int8: what rounding does is measured and bound, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from cli_steps import run
from var_deploy import names
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.export.lint.int8 import lint_int8
from var_deploy.export.verify import bundle as verifying
from var_deploy.export.verify.bundle import tolerance, verify_model
from var_deploy.export.verify.difference import norm_error, place_of_error, top_1_agreement
from var_deploy.export.verify.graphs import GraphVerifier
from var_deploy.export.verify.int8 import DECODER_PSNR, LOGITS_BOUND
from var_deploy.export.verify.reference import Reference, trace_reference
from var_deploy.export.verify.report import Check, VerifyReport
from var_deploy.manifest import FileInfo, file_sha256, read_manifest

STEP_0, STEP_1, STEP_2 = (f"{names.STEP} @ {k}" for k in range(3))


@pytest.fixture(scope="module")
def model(small_model: Callable[..., LoadedModel]) -> LoadedModel:
    return small_model()


@pytest.fixture(scope="module")
def exported(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify-int8") / "bundle"
    export_bundle(model, out, ExportOptions(precisions=("int8", "fp32"), batch=2, layout="shared"))
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def reference(model: LoadedModel, exported: Path) -> Reference:
    return trace_reference(model, read_manifest(exported), seed=0)


def broken(bundle: Path, reference: Reference, *graphs: str) -> dict[str, str]:
    """What fails of these graphs alone, which is quicker than a whole `verify`."""
    manifest = read_manifest(bundle)
    verifier = GraphVerifier(bundle, manifest, "int8", [reference], tolerance("int8"))
    checks = [check for graph in graphs for check in verifier.graph(graph)]
    return {c.graph: c.detail for c in checks if not c.passed}


def check(report: VerifyReport, graph: str, precision: str = "int8") -> Check:
    return next(c for c in report.checks if (c.precision, c.graph) == (precision, graph))


def failed(report: VerifyReport) -> dict[str, str]:
    return {c.graph: c.detail for c in report.checks if not c.passed}


def update_hash(bundle: Path, file: str) -> None:
    manifest = read_manifest(bundle)
    info = FileInfo(size=(bundle / file).stat().st_size, sha256=file_sha256(bundle / file))
    dataclasses.replace(manifest, files={**manifest.files, file: info}).save(bundle)


def change(
    bundle: Path, graph: str, weight: str, how: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    """Change a weight of the int8 folder in place, in every graph that uses it."""
    path = bundle / "int8" / names.graph_file(graph)
    proto = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == weight)
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = np.memmap(
        bundle / "int8" / names.WEIGHTS, dtype, "r+", int(where["offset"]), tuple(tensor.dims)
    )
    data[:] = how(np.array(data))
    data.flush()
    update_hash(bundle, f"int8/{names.WEIGHTS}")


# --- what is right


def test_the_report_has_what_rounding_did(bundle: Path, model: LoadedModel) -> None:
    report = verify_model(bundle, model)
    assert report.passed, report.table()
    assert [c.precision for c in report.checks] == sorted(
        (c.precision for c in report.checks), key=("fp32", "int8").index
    ), "the widest first"
    lengths = model.spec.scale_lengths
    for name, length in zip((STEP_0, STEP_1, STEP_2), lengths, strict=True):
        found, exact = check(report, name), check(report, name, "fp32")
        assert found.logits is not None and 1e-3 < found.logits <= LOGITS_BOUND
        assert exact.logits is not None and 0 < exact.logits < 1e-4
        assert exact.top_1 == exact.tokens == f"{4 * length}/{4 * length}"
        agree, total = map(int, found.top_1.split("/"))
        assert 0.5 * total <= agree <= total == 4 * length
        assert found.bound == LOGITS_BOUND and found.relative >= found.logits * 0.999
    decoder = check(report, names.DECODER)
    assert decoder.psnr is not None and DECODER_PSNR <= decoder.psnr < 70
    assert (decoder.bound, decoder.least_psnr) == (None, DECODER_PSNR)
    assert check(report, names.ENCODER).relative < 1e-4, "the encoder is fp32"
    drawn = check(report, "decoder drawn")
    assert drawn.psnr is not None and DECODER_PSNR <= drawn.psnr < 70
    assert drawn.detail == "the worst of 16 that it drew"
    loop = check(report, "loop shared")
    assert loop.bound is None and loop.least_psnr is None
    assert loop.psnr is not None and loop.tokens.endswith(f"/{4 * sum(lengths)}")
    assert loop.detail == "reported, not bounded"


def test_table_json_and_manifest_carry_it(bundle: Path, model: LoadedModel) -> None:
    report = verify_model(bundle, model, precision="int8")
    stored = read_manifest(bundle).parity
    assert stored == report.to_json() == json.loads(json.dumps(report.to_json(), allow_nan=False))
    first = check(report, STEP_1)
    listed = next(c for c in stored["checks"] if c["graph"] == STEP_1)
    assert (listed["logits"], listed["top_1"]) == (first.logits, first.top_1)
    assert stored["samples"]["skipped"].startswith("there is no classifier of this model")
    header, _, *lines = report.table().splitlines()
    row = next(line for line in lines if line.startswith(f"int8/{STEP_1} "))
    assert row[header.index("logits") :].startswith(f"{first.logits:.1e}")
    assert row[header.index("top-1") :].startswith(first.top_1)
    row = next(line for line in lines if line.startswith("int8/decoder "))
    assert row[header.index("bound") :].startswith("35 dB")
    row = next(line for line in lines if line.startswith("int8/loop shared "))
    assert row[header.index("bound") :].startswith(" ") and row.endswith(" reported, not bounded")
    assert any(line.startswith("int8: rel error is |found - expected| / ") for line in lines)
    assert any(line.startswith("samples: not evaluated: there is no classifier") for line in lines)
    assert lines[-1] == report.verdict()[-1]
    assert lines[-1].startswith("int8: within the bounds for int8")
    assert lines[-1].endswith(" dB)") and "are the model" not in report.table()


def test_fp32_alone_says_nothing_of_samples(bundle: Path, model: LoadedModel) -> None:
    report = verify_model(bundle, model, precision="fp32")
    assert report.samples is None and report.to_json()["samples"] is None
    assert "samples" not in report.table() and "int8" not in report.table()


# --- what is wrong


def test_a_doubled_scale_is_named_and_the_command_ends_with_1(
    bundle: Path, model: LoadedModel, tmp_path: Path
) -> None:
    change(bundle, names.STEP, "blocks.0.attn.proj.weight.scale", lambda scale: 2 * scale)
    files: list[object] = []
    for option, module in zip(("tokenizer", "checkpoint"), build_modules(model), strict=True):
        state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
        save_file(state, tmp_path / f"{option}.safetensors")
        files += [f"--{option}", tmp_path / f"{option}.safetensors"]
    result = run("verify", bundle, "--json", *files)
    assert result.exit_code == 1
    said = json.loads(result.stderr)["error"]
    assert said.startswith(f"int8/{STEP_0}: ") and "of its norm, bound 6%" in said
    listed = json.loads(result.stdout)
    wrong = [(c["precision"], c["graph"]) for c in listed["checks"] if not c["passed"]]
    assert wrong == [("int8", STEP_0), ("int8", STEP_1), ("int8", STEP_2)]
    assert all(c["logits"] > LOGITS_BOUND for c in listed["checks"] if not c["passed"])
    # the loops ran all the same
    assert [c["graph"] for c in listed["checks"]][-2:] == ["loop shared", "decoder drawn"]


@pytest.mark.parametrize(
    ("graph", "weight", "told"),
    [
        (names.CONDITION, "head_nm.ada_lin.1.weight.scale", "modulation is off by"),
        (names.DECODER, "decoder.up.0.block.1.conv2.weight.scale", "dB, bound 35 dB"),
        (names.ENCODER, "encoder.mid.block_1.conv1.bias", "latent is off by"),
    ],
)
def test_a_wrong_weight_of_the_other_graphs(
    graph: str, weight: str, told: str, bundle: Path, reference: Reference
) -> None:
    change(bundle, graph, weight, lambda values: 2 * values)
    graphs = (names.CONDITION, names.STEP, names.DECODER, names.ENCODER)
    ((where, detail),) = broken(bundle, reference, *graphs).items()
    assert where == graph and told in detail


def test_what_is_fp32_in_int8_is_held_to_fp32(bundle: Path, reference: Reference) -> None:
    """φ is no product of the transformer: two percent in it are an error."""
    key = "quantize.quant_resi.qresi_ls.3.weight"  # of the last scale
    change(bundle, names.STEP, key, lambda values: values * np.float32(1.02))
    found = broken(bundle, reference, names.STEP)
    assert set(found) == {STEP_2}
    assert found[STEP_2].startswith(f"{names.NEW_F_HAT} is off by ")
    assert "bound 2e-04" in found[STEP_2]


def test_keys_and_values_are_bound_too(bundle: Path, reference: Reference) -> None:
    """The last block's keys are felt in its own attention a little, and by later scales."""

    def spoil(scale: NDArray[Any]) -> NDArray[Any]:
        scale[len(scale) // 3 : len(scale) // 3 + 16] *= 1.5
        return scale

    change(bundle, names.STEP, "blocks.1.attn.mat_qkv.weight.scale", spoil)
    found = broken(bundle, reference, names.STEP)
    assert found[STEP_1].startswith(f"{names.new_key(1)} is off by ")


def test_an_image_beyond_the_calibration_is_found(
    bundle: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of many images that loses what the decoder's ranges cut off: the worst is told."""
    trace = verifying.reference_of

    def one_cut_off(*arguments: Any, **options: Any) -> Reference:
        reference, calls = trace(*arguments, **options), iter(range(100))

        def decode(tokens: Any) -> Any:
            image = reference.decode(tokens)
            if next(calls) == 5:  # the second image of the sixth batch
                image[1, :4] = 1 - image[1, :4]
            return image

        return dataclasses.replace(reference, decode=decode)

    monkeypatch.setattr(verifying, "reference_of", one_cut_off)
    report = verify_model(bundle, model, precision="int8")
    assert set(failed(report)) == {"decoder drawn"}
    assert report.failure is not None and report.failure.endswith("dB, bound 35 dB")


def test_values_that_are_not_numbers(bundle: Path, model: LoadedModel) -> None:
    change(bundle, names.DECODER, "decoder.conv_out.bias", lambda bias: bias * np.float32(np.nan))
    report = verify_model(bundle, model, precision="int8")
    assert set(failed(report)) == {names.DECODER, "loop shared"}
    assert "not finite (the first is nan" in failed(report)["loop shared"]
    json.dumps(report.to_json(), allow_nan=False)
    change(bundle, names.STEP, "head.bias", lambda bias: bias * np.float32(np.nan))
    report = verify_model(bundle, model, precision="int8")
    assert "the logits of scale 0 are not numbers" in failed(report)["loop shared"]
    json.dumps(report.to_json(), allow_nan=False)


def test_a_graph_that_cannot_run_ends_loops_and_samples(bundle: Path, model: LoadedModel) -> None:
    (bundle / "int8" / "decoder.onnx").write_bytes(b"no graph at all")
    update_hash(bundle, "int8/decoder.onnx")
    report = verify_model(bundle, model, precision="int8")
    assert set(failed(report)) == {names.DECODER, "loop shared"}
    assert report.failure is not None
    assert report.failure.startswith("int8/decoder: cannot be loaded: ")
    assert report.to_json()["samples"]["skipped"] == "decoder cannot be run"


# --- what int8 promises of its files


def test_a_pair_that_would_be_cut_off_is_told(bundle: Path, reference: Reference) -> None:
    def raise_pair(weight: NDArray[Any]) -> NDArray[Any]:
        weight[6:8, 11] = 90, 45  # [in, out]
        return weight

    path = bundle / "int8" / names.graph_file(names.STEP)
    assert lint_int8(path, set()) == []
    change(bundle, names.STEP, "blocks.1.ffn.fc1.weight", raise_pair)
    (problem,) = lint_int8(path, set())
    assert problem.startswith("blocks.1.ffn/MatMulInteger_")
    assert "blocks.1.ffn.fc1.weight: two neighbours come to 135, more than 128" in problem
    found = broken(bundle, reference, names.STEP)
    assert found[STEP_0].startswith("not as int8 graphs are promised to be: blocks.1.ffn/")


def test_a_kernel_with_such_a_pair_is_told(bundle: Path) -> None:
    def raise_pair(kernel: NDArray[Any]) -> NDArray[Any]:
        kernel[3, 4:6, 1, 2] = -100, -29  # neighbours are two channels of one tap
        return kernel

    path = bundle / "int8" / names.graph_file(names.DECODER)
    change(bundle, names.DECODER, "decoder.mid.block_2.conv1.weight", raise_pair)
    (problem,) = lint_int8(path, set())
    assert problem.startswith("decoder.mid.block_2.conv1/QLinearConv_")
    assert "two neighbours come to 129" in problem


def spoiled(bundle: Path, graph: str, plant: Callable[[onnx.ModelProto], None]) -> list[str]:
    path = bundle / "int8" / names.graph_file(graph)
    model = onnx.load(str(path), load_external_data=False)
    plant(model)
    path.write_bytes(model.SerializeToString())
    return lint_int8(path, set())


def weight_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def test_other_broken_promises_are_told(exported: Path, tmp_path: Path) -> None:
    def other_domain(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def inside(model: onnx.ModelProto) -> None:
        tensor = weight_of(model, "blocks.0.ffn.fc2.weight")
        shape = tuple(tensor.dims)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, np.int8), tensor.name))

    def unsigned(model: onnx.ModelProto) -> None:
        weight_of(model, "blocks.0.ffn.fc2.weight").data_type = TensorProto.UINT8

    def half(model: onnx.ModelProto) -> None:
        tensor = numpy_helper.from_array(np.zeros(2, np.float16), "halves")
        model.graph.initializer.append(tensor)

    def plain(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "MatMulInteger")
        node.op_type = "MatMul"
        del node.input[2:]

    def computed(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.op_type == "MatMulInteger").input[1] = "made"

    def zero_point(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "QLinearConv")
        tensor = weight_of(model, node.input[5])
        ones = np.ones(tuple(tensor.dims), np.int8)
        tensor.CopyFrom(numpy_helper.from_array(ones, tensor.name))

    for number, (graph, plant, told) in enumerate(
        [
            (names.STEP, other_domain, "operators of com.microsoft 1"),
            (names.STEP, inside, "blocks.0.ffn.fc2.weight: does not lie in weights.bin"),
            (names.STEP, unsigned, "blocks.0.ffn.fc2.weight: is uint8, expected int8"),
            (names.STEP, half, "halves: is fp16 in an int8 graph"),
            (names.STEP, plain, "MatMul with a weight runs in fp32, it should run in int8"),
            (names.CONDITION, plain, "MatMul with a weight runs in fp32, it should run in int8"),
            (names.STEP, computed, "weight made: it is computed"),
            (names.DECODER, zero_point, "its zero point is not 0"),
        ]
    ):
        folder = Path(shutil.copytree(exported, tmp_path / str(number)))
        problems = spoiled(folder, graph, plant)
        assert any(told in problem for problem in problems), (told, problems)
        assert all("\n" not in problem for problem in problems)


# --- measures


def test_norm_error_and_top_1() -> None:
    want = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    got = want + np.array([[0.0, 0.0], [0.3, 0.4]], np.float32)
    assert norm_error(want, got) == pytest.approx(0.1)
    assert norm_error(want, want) == 0
    assert norm_error(want, got[:1]) == norm_error(want, got * np.nan) == float("inf")
    assert place_of_error(want, got) == "1, 1"
    assert top_1_agreement(want, got) == "1/2"

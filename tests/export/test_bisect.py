"""`verify --bisect` names the first layer at which two backends part."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from planted_weights import plant
from safetensors.torch import save_file

from cli_steps import assert_one_line, run
from var_deploy import names
from var_deploy.errors import BackendError, UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.export.debug import bisect as bisecting
from var_deploy.export.debug import bisect_backends
from var_deploy.export.debug.bisect import Bisection, Side, bisect, parse_sides
from var_deploy.export.debug.bisect_backends import (
    RUNNERS,
    run_onnxruntime,
    run_pytorch,
    run_tensorrt,
)
from var_deploy.export.verify.bundle import verify_model
from var_deploy.export.verify.reference import Reference, trace_reference
from var_deploy.manifest import Manifest, read_manifest

SCALE_1 = names.scale_graph(1)
ORT = Side(backend="onnxruntime", precision="fp32")
TORCH = Side(backend="pytorch", precision="fp32")
HALF = Side(backend="pytorch", precision="fp16")


@pytest.fixture(scope="module")
def model(small_model: Callable[..., LoadedModel]) -> LoadedModel:
    return small_model()


@pytest.fixture(scope="module")
def exported(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bisect") / "bundle"
    export_bundle(model, out, ExportOptions(precisions=("fp32", "fp16")))
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def manifest(exported: Path) -> Manifest:
    return read_manifest(exported)


@pytest.fixture(scope="module")
def reference(model: LoadedModel, manifest: Manifest) -> Reference:
    return trace_reference(model, manifest, seed=0)


# --- nothing to find


@pytest.mark.parametrize("second", [TORCH, HALF], ids=str)
def test_right_backends_agree_on_every_value(
    second: Side, exported: Path, manifest: Manifest, reference: Reference
) -> None:
    told: list[float] = []
    result = bisect(
        exported,
        manifest,
        reference,
        (ORT, second),
        progress=lambda message, fraction: told.append(fraction),
    )
    assert result.divergence is None, result.text()
    scales = range(3)
    assert result.graphs == (
        names.CONDITION,
        *(names.scale_graph(k) for k in scales),
        *(f"{names.STEP} @ {k}" for k in scales),
        names.DECODER,
        names.ENCODER,
        names.ACCUMULATE,
    )
    assert result.compared > 500
    assert result.text() == result.headline and " agree on " in result.headline
    assert told == sorted(told)


# --- planted errors


def test_a_wrong_bias_in_the_half_graph_is_named(
    bundle: Path, manifest: Manifest, reference: Reference
) -> None:
    plant(bundle, SCALE_1, "fp16", "blocks.0.ffn.fc1.bias", "blocks.1.ffn.fc1.bias")
    result = bisect(bundle, manifest, reference, (ORT, HALF))
    found = result.divergence
    assert found is not None
    assert found.graph == SCALE_1 and found.operator == "Add"
    proto = onnx.load(str(bundle / f"fp16/{SCALE_1}.onnx"), load_external_data=False)
    node = next(n for n in proto.graph.node if "blocks.0.ffn.fc1.bias" in n.input)
    assert (found.node, found.value) == (node.name, node.output[0])
    (product, off), (bias, constant) = found.inputs
    assert bias == "blocks.0.ffn.fc1.bias" and constant is None
    assert product == node.input[0] and off is not None and off < found.bound < found.error
    # stops there: the graphs before, then this one
    assert result.graphs == (names.CONDITION, names.scale_graph(0), SCALE_1)
    lines = result.text().splitlines()
    assert lines[0] == result.headline
    assert lines[0].startswith("onnxruntime:fp32 and pytorch:fp16 part in ")
    assert f"{SCALE_1} at {node.name} (Add): off by" in lines[0]
    assert lines[2].strip() == "its input blocks.0.ffn.fc1.bias: constant"
    data = json.loads(json.dumps(result.to_json()))
    assert data["sides"] == ["onnxruntime:fp32", "pytorch:fp16"]
    assert data["divergence"]["node"] == node.name


def spoiled(node: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
    """The interpreter with one node's first output changed where it is looked at."""

    def runner(
        path: Path, inputs: Mapping[str, NDArray[Any]], wanted: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        values = dict(run_pytorch(path, inputs, wanted))
        for name in values:
            if name.startswith(node):
                values[name] = change(values[name])
        return values

    return {**RUNNERS, "pytorch": runner}


@pytest.mark.parametrize(
    ("graph", "node", "operator"),
    [
        (names.DECODER, "decoder.mid.block_1.conv1/Conv", "Conv"),
        (names.ENCODER, "encoder.conv_out/Conv", "Conv"),
        (f"{names.STEP} @ 2", "head/MatMul", "MatMul"),
        (f"{names.STEP} @ 0", "blocks.1.attn/Where", "Where"),
    ],
)
def test_a_node_that_computes_wrong_is_named(
    graph: str,
    node: str,
    operator: str,
    exported: Path,
    manifest: Manifest,
    reference: Reference,
) -> None:
    runners = spoiled(node, lambda value: value * np.float32(1.001))
    result = bisect(exported, manifest, reference, (ORT, TORCH), graph=graph, runners=runners)
    assert result.divergence is not None
    assert result.divergence.node.startswith(node)
    assert result.divergence.operator == operator
    assert result.divergence.error == pytest.approx(1e-3, rel=0.01)
    assert result.graphs == (graph,)


def test_a_value_that_is_no_number_diverges(
    exported: Path, manifest: Manifest, reference: Reference
) -> None:
    runners = spoiled("decoder.norm_out/Mul", lambda value: value * np.float32(np.nan))
    result = bisect(
        exported, manifest, reference, (ORT, TORCH), graph=names.DECODER, runners=runners
    )
    assert result.divergence is not None and result.divergence.error == float("inf")
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["divergence"]["error"] is None


def test_tokens_are_judged_by_how_firm_they_were(
    exported: Path, manifest: Manifest, reference: Reference
) -> None:
    proto = onnx.load(str(exported / f"fp32/{SCALE_1}.onnx"), load_external_data=False)
    choice = next(n for n in proto.graph.node if names.TOKENS in n.output).input[2]
    wrong = spoiled(choice, lambda tokens: tokens + 1)
    result = bisect(exported, manifest, reference, (ORT, TORCH), graph=SCALE_1, runners=wrong)
    assert result.divergence is not None and result.divergence.value == choice
    # one token that lay on the edge of its interval is a toss of the coin
    margins = np.array(reference.trace.scales[1].margins)
    edge = np.unravel_index(int(margins.argmin()), margins.shape)
    margins[edge] = 1e-6
    scales = list(reference.trace.scales)
    scales[1] = dataclasses.replace(scales[1], margins=margins)
    trace = dataclasses.replace(reference.trace, scales=scales)

    def toss(tokens: NDArray[Any]) -> NDArray[Any]:
        tokens = tokens.copy()
        tokens[edge] += 1
        return tokens

    firm = dataclasses.replace(reference, trace=trace)
    runners = spoiled(choice, toss)
    result = bisect(exported, manifest, firm, (ORT, TORCH), graph=SCALE_1, runners=runners)
    assert result.divergence is None, result.text()


def test_values_are_held_in_portions(
    exported: Path,
    manifest: Manifest,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compared() -> tuple[int, list[int]]:
        sizes: list[int] = []

        def count(path: Path, inputs: Any, wanted: Sequence[str]) -> Any:
            values = run_pytorch(path, inputs, wanted)
            sizes.append(sum(value.nbytes for value in values.values()))
            return values

        runners = {**RUNNERS, "pytorch": count}
        result = bisect(
            exported, manifest, reference, (ORT, TORCH), graph=names.DECODER, runners=runners
        )
        assert result.divergence is None
        return result.compared, sizes

    whole, sizes = compared()
    assert len(sizes) == 1
    monkeypatch.setattr(bisecting, "AT_ONCE", sizes[0] // 8)
    parts, sizes = compared()
    assert parts == whole and len(sizes) > 4
    assert max(sizes) < sizes[0] * 8


def test_a_wrong_up_sampling_in_the_half_graph_is_named(
    bundle: Path, manifest: Manifest, reference: Reference
) -> None:
    """One convolution there, four in fp32: they are compared as one node."""
    weight = "decoder.up.1.upsample.conv.weight"
    plant(bundle, names.DECODER, "fp16", weight, "decoder.up.1.block.1.conv2.weight")
    result = bisect(bundle, manifest, reference, (ORT, HALF), graph=names.DECODER)
    found = result.divergence
    assert found is not None
    assert (found.node, found.operator) == ("decoder.up.1.upsample.conv/Upsample_0", "Upsample")
    proto = onnx.load(str(bundle / f"fp16/{names.DECODER}.onnx"), load_external_data=False)
    assert found.value == next(n for n in proto.graph.node if weight in n.input).output[0]
    errors = dict(found.inputs)
    assert errors.pop(weight) is None
    (before,) = (error for error in errors.values() if error is not None)
    assert 0 < before < found.bound < found.error


def test_the_graph_that_failed_verify_is_taken(
    bundle: Path, model: LoadedModel, reference: Reference
) -> None:
    plant(bundle, names.STEP, "fp32", "blocks.1.ffn.fc1.bias", "blocks.0.ffn.fc1.bias")
    assert not verify_model(bundle, model, precision="fp32").passed
    result = bisect(bundle, read_manifest(bundle), reference, (ORT, HALF))
    assert result.graphs == (f"{names.STEP} @ 0",)
    assert result.divergence is not None
    assert result.divergence.node.startswith("blocks.1.ffn/Add")
    # what is wrong with int8 alone is no matter of the other two
    parity = {"checks": [{"precision": "int8", "graph": f"{names.STEP} @ 1", "passed": False}]}
    left = dataclasses.replace(read_manifest(bundle), parity=parity)
    result = bisect(bundle, left, reference, (ORT, HALF))
    assert result.graphs[-1] == f"{names.STEP} @ 0" and len(result.graphs) == 5


# --- TensorRT, through what stands for Polygraphy


class Stand:
    """polygraphy.backend.trt with the calls that are made, on ONNX Runtime."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.marked: list[str] = []
        self.path = Path()

    def network_from_onnx_path(self, path: str, strongly_typed: bool | None = None) -> Any:
        assert strongly_typed, "fp16 is in the graph, not in a flag"
        self.path = Path(path)
        return "builder", StandNetwork(self.path), "parser"

    def modify_network_outputs(self, network: Any, outputs: Sequence[str]) -> Any:
        known = {t.name for layer in network[1] for t in layer.tensors}
        assert set(outputs) <= known
        self.marked = list(outputs)
        return network

    def Profile(self) -> Stand:  # noqa: N802
        return self

    def add(self, name: str, min: Any, opt: Any, max: Any) -> Stand:
        assert min == opt == max
        self.shapes[name] = min
        return self

    def CreateConfig(self, profiles: Any) -> Any:  # noqa: N802
        return profiles

    def engine_from_network(self, network: Any, config: Any) -> str:
        assert network[0] == "builder" and config == [self]
        return "engine"

    def TrtRunner(self, engine: str) -> Any:  # noqa: N802
        assert engine == "engine"
        return StandRunner(self)


class StandLayer:
    def __init__(self, outputs: Sequence[str]) -> None:
        self.tensors = [StandTensor(name, ()) for name in outputs]
        self.num_outputs = len(outputs) + 1

    def get_output(self, index: int) -> Any:
        return self.tensors[index] if index < len(self.tensors) else None


@dataclasses.dataclass
class StandTensor:
    name: str
    shape: tuple[int, ...]


class StandNetwork:
    """Layers lose the names of some values, as TensorRT's do."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(str(path), load_external_data=False).graph
        self._layers = [
            StandLayer([name for name in node.output if "Reshape" not in name])
            for node in graph.node
        ]
        self._inputs = [
            StandTensor(v.name, tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim))
            for v in graph.input
        ]
        self.num_inputs = len(self._inputs)

    def __iter__(self) -> Iterator[StandLayer]:
        return iter(self._layers)

    def get_input(self, index: int) -> StandTensor:
        return self._inputs[index]


class StandRunner:
    def __init__(self, stand: Stand) -> None:
        self._stand = stand

    def __enter__(self) -> StandRunner:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def get_input_metadata(self) -> dict[str, Any]:
        graph = onnx.load(str(self._stand.path), load_external_data=False).graph
        return {value.name: None for value in graph.input}

    def infer(self, feed_dict: Mapping[str, NDArray[Any]]) -> Any:
        for name, shape in self._stand.shapes.items():
            assert feed_dict[name].shape == shape
        return run_onnxruntime(self._stand.path, feed_dict, self._stand.marked)


def test_tensorrt_is_driven_through_polygraphy(
    bundle: Path, manifest: Manifest, reference: Reference
) -> None:
    stand = Stand()
    sides = (ORT, Side(backend="tensorrt", precision="fp16"))

    def runner(path: Path, inputs: Any, wanted: Sequence[str]) -> Any:
        return run_tensorrt("tensorrt", path, inputs, wanted, polygraphy=stand)

    def search(graph: str) -> Bisection:
        return bisect(
            bundle, manifest, reference, sides, graph=graph, runners={**RUNNERS, "tensorrt": runner}
        )

    result = search(f"{names.STEP} @ 1")
    assert result.divergence is None, result.text()
    assert stand.shapes[names.INPUT] == (1, 4, 8)
    assert stand.shapes[names.past_key(0)][0] == 1
    assert set(stand.shapes) >= {names.UP_MATRIX, names.NEXT_MATRIX, names.UNIFORMS}
    assert names.F_HAT not in stand.shapes, "its size is known"
    assert not any("Reshape" in name for name in stand.marked)
    stand.shapes.clear()
    plant(bundle, names.DECODER, "fp16", "decoder.mid.block_1.conv1.weight",
          "decoder.mid.block_2.conv1.weight")  # fmt: skip
    result = search(names.DECODER)
    assert result.divergence is not None
    assert result.divergence.node.startswith("decoder.mid.block_1.conv1/Conv")
    assert not stand.shapes, "a static graph needs no profile"


def test_a_backend_that_fails_is_named(exported: Path, manifest: Manifest) -> None:
    path = exported / manifest.graph("fp16", names.DECODER).file

    class Broken(Stand):
        def engine_from_network(self, network: Any, config: Any) -> str:
            raise RuntimeError("no\nroom")

    with pytest.raises(BackendError, match=r"^tensorrt failed in decoder: no room$"):
        run_tensorrt("tensorrt", path, {}, [names.IMAGE], polygraphy=Broken())
    with pytest.raises(BackendError, match=r"^ONNX Runtime failed in decoder: ") as caught:
        run_onnxruntime(path, {}, [names.IMAGE])
    assert "\n" not in str(caught.value)


def test_the_calls_exist_in_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
    trt = pytest.importorskip("polygraphy.backend.trt")
    for name, arguments in (
        ("NetworkFromOnnxPath", {"path", "strongly_typed"}),
        ("ModifyNetworkOutputs", {"network", "outputs"}),
        ("EngineFromNetwork", {"network", "config"}),
        ("TrtRunner", {"engine"}),
    ):
        assert arguments <= set(inspect.signature(getattr(trt, name).__init__).parameters), name
    for name in ("network_from_onnx_path", "modify_network_outputs", "engine_from_network"):
        assert callable(getattr(trt, name))
    assert list(inspect.signature(trt.Profile.add).parameters)[1:] == ["name", "min", "opt", "max"]
    assert callable(trt.TrtRunner.get_input_metadata) and callable(trt.TrtRunner.infer)
    assert hasattr(pytest.importorskip("polygraphy.config"), "USE_TENSORRT_RTX")
    logger = pytest.importorskip("polygraphy.logger").G_LOGGER
    assert hasattr(logger, "use_python_logging_system") and logger.letter in (True, False)


def test_a_library_that_is_missing_is_told(
    exported: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported / manifest.graph("fp16", names.DECODER).file

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with monkeypatch.context() as patch:
        patch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
        patch.setattr(bisect_backends, "load_library", lambda name: None)
        patch.setattr(bisect_backends.importlib, "import_module", missing)
        with pytest.raises(BackendError, match=r"pip install .polygraphy>=0\.53"):
            run_tensorrt("tensorrt", path, {}, [names.IMAGE])


# --- the command line


def test_two_different_backends_are_wanted(manifest: Manifest) -> None:
    assert parse_sides("onnxruntime, pytorch:fp16", manifest) == (ORT, HALF)
    for text, message in (
        ("onnxruntime", "two different backends"),
        ("onnxruntime,onnxruntime:fp32", "two different backends"),
        ("onnxruntime,pytorch,tensorrt", "two different backends"),
        ("onnxruntime,caffe", "found 'caffe'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_sides(text, manifest)


def test_int8_is_not_compared_and_never_taken_by_default(manifest: Manifest) -> None:
    graphs = {**manifest.graphs, "int8": manifest.graphs["fp32"]}
    rounded = dataclasses.replace(manifest, graphs=graphs)
    assert parse_sides("onnxruntime,pytorch", rounded) == (ORT, TORCH)
    with pytest.raises(UsageError, match="int8 rounds every layer"):
        parse_sides("onnxruntime,pytorch:int8", rounded)
    only = dataclasses.replace(manifest, graphs={"int8": graphs["int8"]})
    with pytest.raises(UsageError, match="int8 rounds every layer"):
        parse_sides("onnxruntime,pytorch", only)


def test_the_command(bundle: Path, model: LoadedModel, tmp_path: Path) -> None:
    files: list[object] = []
    for option, module in zip(("tokenizer", "checkpoint"), build_modules(model), strict=True):
        state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
        save_file(state, tmp_path / f"{option}.safetensors")
        files += [f"--{option}", tmp_path / f"{option}.safetensors"]
    command = ("verify", bundle, *files, "--bisect", "onnxruntime:fp32,pytorch:fp16")
    before = (bundle / names.MANIFEST).read_text()
    result = run(*command, "--graph", names.CONDITION)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("onnxruntime:fp32 and pytorch:fp16 agree on ")
    assert not result.stderr
    plant(bundle, names.CONDITION, "fp16", "blocks.0.ada_lin.1.bias", "blocks.1.ada_lin.1.bias")
    planted = (bundle / names.MANIFEST).read_text()
    assert planted != before
    result = run(*command, "--json")
    assert result.exit_code == 1
    assert "part in condition at blocks.0.ada_lin.1/Add_" in json.loads(result.stderr)["error"]
    assert json.loads(result.stdout)["divergence"]["graph"] == names.CONDITION
    assert (bundle / names.MANIFEST).read_text() == planted, "no report is stored"
    assert_one_line(run(*command, "--graph", "scale_09"), 2, "no graph 'scale_09'")
    assert_one_line(run(*command, "--precision", "fp16"), 2, "not --precision")
    assert_one_line(run("verify", bundle, "--graph", "step"), 2, "--graph goes with --bisect")
    assert_one_line(run("verify", bundle, "--bisect", "x,y"), 2, "found 'x'")

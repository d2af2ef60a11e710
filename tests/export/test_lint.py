"""Every graph passes the limits of TensorRT 10.3, and a graph that breaks one is told by node."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from var_deploy import names
from var_deploy.bundle.graph_refs import graph_ref
from var_deploy.bundle.operators import FLOAT_OPERATORS
from var_deploy.export.bundle import ExportOptions, build_graphs, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.export.debug.interpreter import OPERATORS
from var_deploy.export.graphs.builder import IR_VERSION, OPSET
from var_deploy.export.lint.tensorrt import REFUSED, lint, lint_file
from var_deploy.export.verify.bundle import verify_model
from var_deploy.manifest import FileInfo, file_sha256, read_manifest
from var_deploy.spec import ModelSpec

SYMBOLS = ("L", "P", "N", "p", "q")
SCALE_1 = names.scale_graph(1)
PRECISIONS: tuple[Any, ...] = ("fp32", "fp16")
OPTIONS = ("batch", "guidance", "more_smooth")


def graphs_of(spec: ModelSpec, precision: Any, **options: Any) -> dict[str, onnx.ModelProto]:
    options = {"guidance": spec.transformer.conditional, **options}
    built = build_graphs(spec, precision, ExportOptions(**options))
    return {b.name: b.model(lambda name: (names.WEIGHTS, 0, 1)) for b in built}


def problems(model: onnx.ModelProto, precision: str = "fp16") -> list[str]:
    step = model.graph.name == names.STEP
    return lint(model, precision, SYMBOLS if step else ())


# --- what is right


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_graph_of_every_preset_passes(preset: str, precision: str) -> None:
    for name, model in graphs_of(PRESETS[preset].spec, precision).items():
        assert not problems(model, precision), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 3},
        {"guidance": False},
        {"more_smooth": True, "batch": 2},
        {"more_smooth": True, "codebook_per_scale": True},
        {"shared_adaln": True, "qk_l2_norm": False},
        {"vocab_size": 50, "shared_phi": 0},
        {"shared_phi": 1, "codebook_per_scale": True},
        {"phi_ratio": 0.0},
        {"family": "gpt2", "classes": 0, "qk_l2_norm": False, "codebook_per_scale": True},
    ],
    ids=str,
)
def test_every_form_of_a_graph_passes(
    changes: dict[str, Any], precision: str, family_member: Callable[..., ModelSpec]
) -> None:
    options = {k: changes.pop(k) for k in OPTIONS if k in changes}
    for name, model in graphs_of(family_member(**changes), precision, **options).items():
        assert not problems(model, precision), name


def test_the_list_is_what_the_interpreter_computes() -> None:
    assert set(OPERATORS) == FLOAT_OPERATORS
    assert not FLOAT_OPERATORS & set(REFUSED)


# --- what is wrong, planted in a graph that is right

Graphs = dict[str, onnx.ModelProto]


@pytest.fixture(scope="module")
def half(family_member: Callable[..., ModelSpec]) -> Graphs:
    return graphs_of(family_member(vocab_size=50), "fp16")


def node_of(model: onnx.ModelProto, op: str, scope: str = "") -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op and n.name.startswith(scope))


def dimension(model: onnx.ModelProto, name: str, axis: int = 0) -> Any:
    values = (*model.graph.input, *model.graph.output)
    return next(v for v in values if v.name == name).type.tensor_type.shape.dim[axis]


def attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def constant(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def insert(model: onnx.ModelProto, before: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes in front of the one that makes the value `before`."""
    position = next(i for i, n in enumerate(model.graph.node) if before in n.output)
    for node in reversed(nodes):
        model.graph.node.insert(position, node)


def cast(source: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [name], f"planted/{name}", to=to)


def new_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def new_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def other_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def local_function(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", OPSET)]
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [node], opsets))


def input_as_output(model: onnx.ModelProto) -> None:
    given = next(v for v in model.graph.input if v.name == names.F_HAT)
    model.graph.output.append(given)


def constant_as_output(model: onnx.ModelProto) -> None:
    name = constant(model, "planted", np.zeros(3, np.float32))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]))


def empty_input(model: onnx.ModelProto) -> None:
    dimension(model, names.past_key(0)).dim_value = 0


def empty_constant(model: onnx.ModelProto) -> None:
    constant(model, "nothing", np.zeros((0, 3), np.float32))


def empty_value(model: onnx.ModelProto) -> None:
    node = node_of(model, "Slice")
    node.input[2] = node.input[1]


def open_size(model: onnx.ModelProto) -> None:
    dimension(model, names.UNIFORMS, 1).dim_param = "L"


def unknown_size(model: onnx.ModelProto) -> None:
    dimension(model, names.NEW_F_HAT).Clear()


def unknown_inside(model: onnx.ModelProto) -> None:
    node = node_of(model, "Reshape", "blocks.0.attn")
    flat = [names.KEEP_TOKENS, constant(model, "flat", np.array([-1]))]
    insert(model, node.output[0], helper.make_node("Reshape", flat, ["computed"], "planted"))
    node.input[1] = "computed"


def double_input(model: onnx.ModelProto) -> None:
    given = next(v for v in model.graph.input if v.name == names.TOP_P)
    given.type.tensor_type.elem_type = TensorProto.DOUBLE


def byte_inside(model: onnx.ModelProto) -> None:
    insert(model, names.LOGITS, cast(names.KEEP_MASK, "bytes", TensorProto.UINT8))


def cum_sum(model: onnx.ModelProto) -> None:
    axis = constant(model, "axis", np.int64(1))
    node = helper.make_node("CumSum", [names.UNIFORMS, axis], ["sums"], "sampler/CumSum_9")
    insert(model, names.TOKENS, node)


def top_k(model: onnx.ModelProto) -> None:
    k = constant(model, "k", np.array([4000], np.int64))
    insert(model, names.TOKENS, helper.make_node("TopK", [names.LOGITS, k], ["v", "i"], "TopK_9"))


def operator(op: str) -> Callable[[onnx.ModelProto], None]:
    def plant(model: onnx.ModelProto) -> None:
        node = helper.make_node(op, [names.LOGITS], ["planted"], f"here/{op}_9")
        insert(model, names.TOKENS, node)

    return plant


def reduce_axes(model: onnx.ModelProto) -> None:
    node = node_of(model, "ReduceL2")
    insert(model, node.output[0], cast(names.TOP_K, "axis", TensorProto.INT64))
    node.input[1] = "axis"


def pad_axes(model: onnx.ModelProto) -> None:
    node_of(model, "Pad").input.append(constant(model, "axes", np.arange(3)))


def pad_mode(model: onnx.ModelProto) -> None:
    attribute(node_of(model, "Pad"), "mode", "wrap")


def resize_cubic(model: onnx.ModelProto) -> None:
    attribute(node_of(model, "Resize"), "mode", "cubic")


def resize_antialias(model: onnx.ModelProto) -> None:
    attribute(node_of(model, "Resize"), "antialias", 1)


def computed_kernel(model: onnx.ModelProto) -> None:
    node = node_of(model, "Conv", "quantize")
    kept = [a for a in node.attribute if a.name != "kernel_shape"]
    del node.attribute[:]
    node.attribute.extend(kept)


def mixed_types(model: onnx.ModelProto) -> None:
    node = node_of(model, "Div", "sampler")
    node.input[1] = names.TOP_K


def half_softmax(model: onnx.ModelProto) -> None:
    """The cast in front of it goes: fp16 in, fp16 out."""
    node = node_of(model, "Softmax")
    casted = next(n for n in model.graph.node if node.input[0] in n.output)
    node.input[0] = casted.input[0]


def half_stream(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name.startswith("blocks.1.ffn/Add"))
    add = [n for n in model.graph.node if n.name.startswith("blocks.0.ffn/Add")][-1]
    insert(
        model,
        node.output[0],
        cast(add.input[0], "left", TensorProto.FLOAT16),
        cast(add.input[1], "right", TensorProto.FLOAT16),
        helper.make_node("Add", ["left", "right"], ["sum"], "blocks.0.ffn/Add_9"),
    )


def half_in(scope: str) -> Callable[[onnx.ModelProto], None]:
    def plant(model: onnx.ModelProto) -> None:
        node = next(n for n in reversed(model.graph.node) if n.name.startswith(scope))
        value = helper.make_node(
            "Cast", [node.output[0]], ["halved"], f"{scope}/Cast_9", to=TensorProto.FLOAT16
        )
        insert(model, names.NEW_F_HAT if scope != "next_input" else names.NEXT_INPUT, value)

    return plant


def full_product(model: onnx.ModelProto) -> None:
    weight = constant(model, "weight", np.zeros((64, 4), np.float32))
    source = node_of(model, "LayerNormalization").output[0]
    node = helper.make_node("MatMul", [source, weight], ["wide"], "blocks.1.attn/MatMul_9")
    insert(model, names.LOGITS, node)


def full_cache(model: onnx.ModelProto) -> None:
    given = next(v for v in model.graph.input if v.name == names.past_value(1))
    given.type.tensor_type.elem_type = TensorProto.FLOAT
    node = next(n for n in model.graph.node if names.past_value(1) in n.input)
    insert(model, node.output[0], cast(names.past_value(1), "narrow", TensorProto.FLOAT16))
    node.input[0] = "narrow"


PLANTED: list[tuple[str, Callable[[onnx.ModelProto], None], str]] = [
    (SCALE_1, new_ir, "IR version 11, 10.3 reads up to 10"),
    (SCALE_1, new_opset, "opset 21, 10.3 parses 9 to 20"),
    (SCALE_1, other_domain, "operators of the domain 'com.microsoft'"),
    (SCALE_1, local_function, "functions"),
    (SCALE_1, input_as_output, "f_hat: is an input and an output"),
    (SCALE_1, constant_as_output, "planted: is a constant and an output"),
    (SCALE_1, empty_input, f"input {names.past_key(0)}: has a size of 0"),
    (SCALE_1, empty_constant, "nothing: is empty"),
    (SCALE_1, empty_value, "is empty"),
    (SCALE_1, open_size, "input uniforms: has the open size 'L'"),
    (SCALE_1, unknown_size, "output new_f_hat: has the open size 'unknown'"),
    (SCALE_1, unknown_inside, "is not known before it is run"),
    (SCALE_1, double_input, "input top_p: type double is not supported"),
    (SCALE_1, byte_inside, "planted/bytes: bytes is uint8, which is not supported"),
    (SCALE_1, cum_sum, "sampler/CumSum_9: operator CumSum: it becomes a loop before 10.8"),
    (SCALE_1, top_k, "TopK_9: operator TopK: it takes k up to 3840"),
    (SCALE_1, operator("Multinomial"), "here/Multinomial_9: operator Multinomial: it is not"),
    (SCALE_1, operator("NonZero"), "here/NonZero_9: operator NonZero: the shape of its result"),
    (SCALE_1, operator("Erf"), "here/Erf_9: operator Erf: it is not on the list"),
    (SCALE_1, reduce_axes, "ReduceL2: input axis must be a constant"),
    (SCALE_1, pad_axes, "Pad with axes is parsed from 10.4 on"),
    (SCALE_1, pad_mode, "Pad with mode wrap is not parsed"),
    (names.DECODER, resize_cubic, "Resize with mode cubic is not parsed"),
    (names.DECODER, resize_antialias, "Resize with antialias 1 is not parsed"),
    (names.STEP, computed_kernel, "Conv with a computed weight must state its kernel_shape"),
    (SCALE_1, mixed_types, "logits is fp32 and top_k is int64"),
    (SCALE_1, half_softmax, "Softmax runs in fp16, it must run in fp32"),
    (SCALE_1, half_stream, "blocks.0.ffn/Add_9: Add of two computed values runs in fp16"),
    (SCALE_1, half_in("sampler"), "sampler/Cast_9: halved is fp16; in sampler everything"),
    (SCALE_1, half_in("quantize"), "quantize/Cast_9: halved is fp16; in quantize everything"),
    (SCALE_1, half_in("next_input"), "next_input/Cast_9: halved is fp16; in next_input"),
    (SCALE_1, half_in("head"), "head/Cast_9: halved is fp16; in head everything"),
    (SCALE_1, full_product, "blocks.1.attn/MatMul_9: MatMul runs in fp32, in an fp16 graph"),
    (SCALE_1, full_cache, f"{names.past_value(1)}: is fp32, expected fp16"),
]


@pytest.mark.parametrize(
    ("graph", "plant", "message"),
    PLANTED,
    ids=[f"{i}-{message.partition(':')[0]}" for i, (_, _, message) in enumerate(PLANTED)],
)
def test_a_planted_violation_is_found(
    graph: str, plant: Callable[[onnx.ModelProto], None], message: str, half: Graphs
) -> None:
    model = copy.deepcopy(half[graph])
    plant(model)
    found = problems(model)
    assert any(message in problem for problem in found), found
    assert all("\n" not in problem for problem in found)
    # the node is named, or the value where there is no node
    assert len(found) < 12, "one fault, hundreds of lines"


def test_only_step_may_leave_sizes_open(half: Graphs) -> None:
    found = lint(half[names.STEP], "fp16")
    assert any("has the open size 'L'" in problem for problem in found)
    assert any("has the open size 'P'" in problem for problem in found)


def test_an_fp32_graph_holds_no_fp16(half: Graphs) -> None:
    found = problems(half[names.DECODER], "fp32")
    assert any("decoder.conv_in.weight: is fp16 in an fp32 graph" in problem for problem in found)


def test_a_loop_is_refused(half: Graphs) -> None:
    body = helper.make_graph([], "body", [], [])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", ""], ["y"], "Loop_1", body=body)],
        "loop",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    assert lint(model, "fp32") == ["Loop_1: operator Loop: it holds a graph of its own"]


# --- as part of verify


@pytest.fixture
def bundle(small_model: Callable[..., LoadedModel], tmp_path: Path) -> tuple[Path, LoadedModel]:
    model = small_model()
    export_bundle(model, tmp_path / "bundle", ExportOptions(layout="shared"))
    return tmp_path / "bundle", model


def spoil(bundle: Path, graph: str, plant: Callable[[onnx.ModelProto], object]) -> None:
    file = f"fp32/{names.graph_file(graph)}"
    model = onnx.load(str(bundle / file), load_external_data=False)
    plant(model)
    (bundle / file).write_bytes(model.SerializeToString())
    manifest = read_manifest(bundle)
    info = FileInfo(size=(bundle / file).stat().st_size, sha256=file_sha256(bundle / file))
    dataclasses.replace(manifest, files={**manifest.files, file: info}).save(bundle)


def test_verify_fails_a_graph_that_computes_right_and_cannot_be_built(
    bundle: tuple[Path, LoadedModel],
) -> None:
    folder, model = bundle
    assert not lint_file(
        folder / f"fp32/{names.STEP}.onnx",
        graph_ref(read_manifest(folder).model, "fp32", names.STEP),
    )
    assert verify_model(folder, model).passed
    kept = Path(shutil.copytree(folder, folder.with_name("kept")))
    spoil(folder, names.STEP, byte_inside)
    report = verify_model(folder, model)
    failed = [check for check in report.checks if not check.passed]
    assert [check.graph for check in failed] == [f"{names.STEP} @ 0"]
    assert failed[0].error > 0, "the numbers were compared all the same"
    assert report.failure == (
        "fp32/step @ 0: not for TensorRT 10.3: planted/bytes: bytes is uint8, which is not "
        "supported"
    )
    # the refusal stands where the file cannot be run at all, too
    spoil(kept, names.STEP, lambda step: [byte_inside(step), unconnected(step)])
    failed = [check for check in verify_model(kept, model).checks if not check.passed]
    assert [check.graph for check in failed] == [names.STEP, "loop shared"]
    assert failed[0].detail.startswith("not for TensorRT 10.3: planted/bytes")


def unconnected(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "nowhere"

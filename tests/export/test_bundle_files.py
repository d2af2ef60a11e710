"""What lies in a bundle: portable graphs, named after the model, over one copy of weights."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from var_deploy import names
from var_deploy.export.bundle import ExportOptions, build_graphs, cached_reader
from var_deploy.export.checkpoint.assemble import empty_modules
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.export.graphs.weights_bin import PAGE, plan_layout
from var_deploy.manifest import check_files, read_manifest

ROOT = Path(__file__).parents[2]
CASES = ("seeded-adaln", "seeded-shared-aln")
# what TensorRT 10.3 parses and keeps on the device; above all no TopK, CumSum, Multinomial,
# GroupNormalization, NonZero, and no control flow
PORTABLE = """
Add And ArgMin Cast Clip Concat Conv Div Equal Exp Expand Gather Gelu Greater GreaterOrEqual
Identity InstanceNormalization LayerNormalization LessOrEqual MatMul Max Min Mul Or Pad ReduceL2
ReduceMax ReduceMin ReduceSum ReduceSumSquare Reshape Resize Shape Sigmoid Slice Softmax Split
Sub Transpose Unsqueeze Where
"""
OPERATORS = frozenset(PORTABLE.split())
# weights that are made of several tensors of the checkpoint, or of one by a formula
DERIVED = (
    r"first_position|blocks\.\d+\.attn\.(qkv_bias|query_scale)"
    r"|decoder\.up\.\d+\.upsample\.conv\.weight\.phase_[01]{2}"
)
# whatever rounds badly in fp16 takes fp32
FP32_OPERATORS = (
    "Softmax",
    "LayerNormalization",
    "InstanceNormalization",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceSum",
    "ReduceMax",
    "Exp",
    "Div",
)


class Graph(NamedTuple):
    """A graph of a golden bundle, loaded without its weights."""

    precision: str
    path: Path
    proto: onnx.ModelProto

    @property
    def external(self) -> dict[str, tuple[str, int, int]]:
        """(file, offset, length) by initializer."""
        found = {}
        for tensor in self.proto.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                place = entry["location"], int(entry["offset"]), int(entry["length"])
                found[tensor.name] = place
        return found

    def types(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Inferred type and shape of every value."""
        inferred = onnx.shape_inference.infer_shapes(self.proto, strict_mode=True, data_prop=True)
        graph = inferred.graph
        values = {
            v.name: v.type.tensor_type for v in [*graph.input, *graph.output, *graph.value_info]
        }
        for tensor in graph.initializer:
            values[tensor.name] = onnx.helper.make_tensor_type_proto(
                tensor.data_type, tensor.dims
            ).tensor_type
        return values


@pytest.fixture(params=CASES)
def graphs(request: pytest.FixtureRequest, golden_bundle: Callable[[str], Path]) -> list[Graph]:
    folder = golden_bundle(request.param)
    paths = sorted(folder.glob("*/*.onnx"))
    assert len(paths) >= 14
    return [Graph(p.parent.name, p, onnx.load(str(p), load_external_data=False)) for p in paths]


def test_graphs_pass_the_full_check(graphs: list[Graph]) -> None:
    for graph in graphs:
        onnx.checker.check_model(str(graph.path), full_check=True)


def test_operators_are_the_portable_ones(graphs: list[Graph]) -> None:
    for graph in graphs:
        assert [(o.domain, o.version) for o in graph.proto.opset_import] == [("", 20)]
        assert not graph.proto.functions
        for node in graph.proto.graph.node:
            assert node.domain == ""
            assert node.op_type in OPERATORS, f"{graph.path.name}: {node.name}"
            assert not any(a.g.node or a.graphs for a in node.attribute), node.name


def test_operators_of_the_released_sizes_are_the_portable_ones() -> None:
    for preset in ("var-d16", "var-d36"):
        for graph in build_graphs(PRESETS[preset].spec, "fp16", ExportOptions()):
            used = {node.op_type for node in graph._nodes}
            assert used <= OPERATORS, f"{preset} {graph.name}"


def test_graphs_are_named_and_nodes_tell_their_layer(graphs: list[Graph]) -> None:
    for graph in graphs:
        nodes = [node.name for node in graph.proto.graph.node]
        assert graph.proto.graph.name == graph.path.stem
        assert all(nodes) and len(set(nodes)) == len(nodes)
        if graph.path.stem.startswith(("scale_", names.STEP)):
            for scope in ("blocks.1.attn/", "blocks.1.ffn/", "head/", "sampler/", "quantize/"):
                assert any(name.startswith(scope) for name in nodes), scope


def test_static_graphs_are_static_and_nothing_is_empty(graphs: list[Graph]) -> None:
    for graph in graphs:
        values = graph.types()
        made = {name for node in graph.proto.graph.node for name in node.output}
        assert made <= values.keys()
        for name, kind in values.items():
            where = f"{graph.path.name}: {name}"
            for dim in kind.shape.dim:
                assert not (dim.HasField("dim_value") and dim.dim_value < 1), where
                if graph.path.stem != names.STEP:
                    assert dim.dim_value > 0 and not dim.dim_param, where
    assert any(graph.path.stem == names.STEP for graph in graphs)


def test_manifest_lists_the_inputs_and_outputs_of_every_graph(graphs: list[Graph]) -> None:
    folder = graphs[0].path.parents[1]
    manifest = read_manifest(folder)
    for graph in graphs:
        info = manifest.graph(graph.precision, graph.path.stem)
        assert info.file == graph.path.relative_to(folder).as_posix()
        for tensors, values in (
            (info.inputs, graph.proto.graph.input),
            (info.outputs, graph.proto.graph.output),
        ):
            assert [t.name for t in tensors] == [v.name for v in values]
            for tensor, value in zip(tensors, values, strict=True):
                kind = value.type.tensor_type
                assert tensor.shape == tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
                assert np.dtype(tensor.dtype) == onnx.helper.tensor_dtype_to_np_dtype(
                    kind.elem_type
                )
    listed = {g.file for by_name in manifest.graphs.values() for g in by_name.values()}
    weights = {f"{precision}/{names.WEIGHTS}" for precision in manifest.graphs}
    assert manifest.files.keys() == listed | weights
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == manifest.files.keys() | {names.MANIFEST}
    check_files(folder, manifest)


def test_nothing_tells_of_the_machine(graphs: list[Graph], tmp_path: Path) -> None:
    folder = graphs[0].path.parents[1]
    paths = {Path.cwd(), Path.home(), ROOT, tmp_path.parent, folder, Path(sys.prefix)}
    telling = [str(p).encode() for p in paths if len(p.parts) > 1]
    telling += [b".py", os.fsencode(os.environ.get("USER", "/")) + b"/"]
    for graph in graphs:
        content = graph.path.read_bytes()
        assert not [t for t in telling if t in content], graph.path.name
        parts = (graph.proto, graph.proto.graph, *graph.proto.graph.node)
        assert not any(part.doc_string for part in parts)
        assert not graph.proto.metadata_props
    manifest = (folder / names.MANIFEST).read_bytes()
    assert not [t for t in telling if t in manifest]


def test_initializers_carry_the_parameters_names(graphs: list[Graph]) -> None:
    modules = empty_modules(read_manifest(graphs[0].path.parents[1]).model)
    from_checkpoint = {key for module in modules for key, _ in module.named_parameters()}
    used = set()
    for graph in graphs:
        external = graph.external
        for tensor in graph.proto.graph.initializer:
            if tensor.name.startswith("constant."):
                assert tensor.name not in external
            else:
                known = tensor.name in from_checkpoint or re.fullmatch(DERIVED, tensor.name)
                assert known, f"{graph.path.name}: {tensor.name}"
                assert tensor.name in external
                used.add(tensor.name)
    # and nothing of the checkpoint is left out but what the derived ones are made of
    merged = r"pos_start|blocks\.\d+\.attn\.(q_bias|v_bias|scale_mul_1H11)"
    left_out = from_checkpoint - used
    assert all(re.fullmatch(merged, key) for key in left_out), left_out


def test_graphs_of_a_precision_share_one_file_of_weights(graphs: list[Graph]) -> None:
    folder = graphs[0].path.parents[1]
    manifest = read_manifest(folder)
    for precision in ("fp32", "fp16"):
        places: dict[str, tuple[int, int]] = {}
        for graph in (g for g in graphs if g.precision == precision):
            sizes = {t.name: (t.data_type, list(t.dims)) for t in graph.proto.graph.initializer}
            for name, (location, offset, length) in graph.external.items():
                kind, dims = sizes[name]
                item = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
                assert location == names.WEIGHTS
                assert length == np.prod(dims) * item
                assert places.setdefault(name, (offset, length)) == (offset, length), name
            total = sum(length for _, _, length in graph.external.values())
            assert manifest.graph(precision, graph.path.stem).weight_bytes == total
        size = (folder / precision / names.WEIGHTS).stat().st_size
        end = 0
        for offset, length in sorted(places.values()):
            assert offset >= end
            assert offset % (PAGE if length >= PAGE else 64) == 0
            end = offset + length
        assert end == size
        wasted = size - sum(length for _, length in places.values())
        assert wasted <= PAGE * len(places)


def test_weights_are_the_checkpoints(
    seeded_golden: Any, golden_bundle: Callable[[str], Path]
) -> None:
    folder = golden_bundle(seeded_golden.name) / "fp32"
    proto = onnx.load(str(folder / names.graph_file(names.scale_graph(1))))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    read = cached_reader(seeded_golden.model)
    for key in ("blocks.1.ffn.fc1.weight", "head.weight"):
        np.testing.assert_array_equal(tensors[key], read(key).T)
    np.testing.assert_array_equal(tensors["blocks.1.ffn.fc1.bias"], read("blocks.1.ffn.fc1.bias"))
    q, v = read("blocks.0.attn.q_bias"), read("blocks.0.attn.v_bias")
    np.testing.assert_array_equal(tensors["blocks.0.attn.qkv_bias"], np.concatenate([q, 0 * q, v]))


def test_fp16_graphs_keep_islands_of_fp32(graphs: list[Graph]) -> None:
    halves = 0
    for graph in (g for g in graphs if g.precision == "fp16"):
        types = {name: kind.elem_type for name, kind in graph.types().items()}
        for node in graph.proto.graph.node:
            where = f"{graph.path.name}: {node.name}"
            kinds = [types[name] for name in [*node.input, *node.output] if name]
            if node.op_type in FP32_OPERATORS or node.name.startswith(
                ("sampler/", "quantize/", "next_input/", "head/")
            ):
                assert TensorProto.FLOAT16 not in kinds, where
            product = node.op_type in ("MatMul", "Conv")
            if product and node.name.startswith(("blocks.", "decoder.", "encoder.")):
                assert set(kinds) == {TensorProto.FLOAT16}, where
                halves += 1
        for name, kind in types.items():
            if name in (names.LOGITS, names.F_HAT, names.NEW_F_HAT, names.MODULATION, names.IMAGE):
                assert kind == TensorProto.FLOAT
            if name.startswith(("past_key_values.", "new_key_values.")):
                assert kind == TensorProto.FLOAT16
    assert halves > 100


def test_fp32_graphs_hold_no_fp16(graphs: list[Graph]) -> None:
    for graph in (g for g in graphs if g.precision == "fp32"):
        kinds = {kind.elem_type for kind in graph.types().values()}
        assert TensorProto.FLOAT in kinds
        assert TensorProto.FLOAT16 not in kinds


def test_var_d16_holds_its_weights_once() -> None:
    spec = PRESETS["var-d16"].spec
    modules = empty_modules(spec)
    parameters = sum(4 * p.numel() for module in modules for p in module.parameters())
    built = build_graphs(spec, "fp32", ExportOptions())
    layout = plan_layout(built)
    # up-sampling in four phases has 16 taps where the checkpoint has 9
    ups = sum(p.numel() for key, p in modules[0].named_parameters() if "upsample.conv.w" in key)
    assert 4 * ups * 7 / 9 < 0.02 * parameters
    assert 0.99 * parameters <= layout.size - 4 * ups * 7 / 9 <= 1.01 * parameters
    places = {name: layout.locate(name) for name in layout.weights}
    files = sum(len(g.model(places.__getitem__).SerializeToString()) for g in built)
    assert files < 0.01 * parameters
    assert {g.name for g in built} == {
        names.CONDITION,
        names.STEP,
        *(names.scale_graph(k) for k in range(10)),
        names.DECODER,
        names.ENCODER,
        names.ACCUMULATE,
    }
    half = plan_layout(build_graphs(spec, "fp16", ExportOptions())).size
    assert half < 0.54 * layout.size

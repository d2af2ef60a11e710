"""Runs one graph on arrays, with interior values brought out for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from var_deploy import names
from var_deploy.machine import usable_cores
from var_deploy.manifest import GraphInfo, Manifest, TensorInfo
from var_deploy.runtime.buffers import step_geometry, step_shapes

# where an in-memory model finds its weights
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


class GraphRunner:
    """A graph in ONNX Runtime on the CPU.

    Args:
        interior: values inside the graph to add to the outputs, all fp32.

    Attributes:
        mismatch: how the file's inputs and outputs differ from the manifest's, "" if they agree.
    """

    def __init__(self, path: Path, info: GraphInfo, interior: Sequence[str] = ()) -> None:
        model = onnx.load(str(path), load_external_data=False)
        self.mismatch = _mismatch(model, info)
        self._inputs = {t.name: t for t in info.inputs}
        for name in interior:
            model.graph.output.append(
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = usable_cores() or 0
        options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent))
        # with open sizes, planning which buffer may serve again takes longer than all the rest
        options.enable_mem_reuse = path.stem != names.STEP
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name; inputs that the graph does not take are ignored."""
        feed = {
            name: np.asarray(inputs[name], dtype=tensor.dtype, order="C")
            for name, tensor in self._inputs.items()
        }
        outputs = [output.name for output in self._session.get_outputs()]
        return dict(zip(outputs, self._session.run(outputs, feed), strict=True))


def complete_step(
    manifest: Manifest, precision: str, scale: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Add what `step` takes and a static graph does not: geometry, placeholders at scale 0."""
    shapes = step_shapes(manifest, precision, scale)
    empty = {name: np.zeros(shape) for name, shape in shapes.items() if name not in given}
    return {**empty, **step_geometry(manifest.model, scale), **given}


def _mismatch(model: onnx.ModelProto, info: GraphInfo) -> str:
    """Names and shapes before values: the first difference, in words."""
    for kind, listed, actual in (
        ("input", info.inputs, model.graph.input),
        ("output", info.outputs, model.graph.output),
    ):
        found = {value.name: _describe(value) for value in actual}
        for tensor in listed:
            if tensor.name not in found:
                return f"{kind} {tensor.name} is missing"
            if found.pop(tensor.name) != tensor:
                return f"{kind} {tensor.name} has another type or shape than the manifest says"
        if found:
            return f"{kind} {next(iter(found))} is not in the manifest"
    return ""


def _describe(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    return TensorInfo(
        name=value.name,
        dtype=np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name,
        shape=tuple(d.dim_param or d.dim_value for d in kind.shape.dim),
    )

"""Runs one graph on arrays, with interior values brought out for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from var_deploy.bundle_files import GraphFile
from var_deploy.errors import BackendError, one_line
from var_deploy.machine import usable_cores
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.runtime.buffers import step_geometry, step_shapes
from var_deploy.runtime.ort_session import open_session, quiet


class GraphRunner:
    """A graph in ONNX Runtime on the CPU.

    Args:
        interior: values inside the graph to add to the outputs, all fp32.
    """

    def __init__(self, graph: GraphFile, info: GraphInfo, interior: Sequence[str] = ()) -> None:
        """Raises BundleError where the graph cannot be trusted, BackendError where ONNX Runtime
        refuses it."""
        model = onnx.ModelProto.FromString(graph.read())
        self._inputs = {t.name: t for t in info.inputs}
        for name in interior:
            model.graph.output.append(
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
        quiet(onnxruntime)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores() or 0
        # with open sizes, planning which buffer may serve again takes longer than all the rest
        options.enable_mem_reuse = graph.ref.kind != "step"
        self._name = graph.ref.name
        self._session = open_session(
            onnxruntime,
            graph,
            options,
            data=model.SerializeToString(),
            providers=["CPUExecutionProvider"],
        )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name; inputs that the graph does not take are ignored.

        Raises BackendError where ONNX Runtime fails.
        """
        feed = {
            name: np.asarray(inputs[name], dtype=tensor.dtype, order="C")
            for name, tensor in self._inputs.items()
        }
        outputs = [output.name for output in self._session.get_outputs()]
        try:
            found = self._session.run(outputs, feed)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            words = one_line(error)
            raise BackendError(f"ONNX Runtime failed in {self._name}: {words}") from error
        return dict(zip(outputs, found, strict=True))


def complete_step(
    manifest: Manifest, precision: str, scale: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Add what `step` takes and a static graph does not: geometry, placeholders at scale 0."""
    shapes = step_shapes(manifest, precision, scale)
    empty = {name: np.zeros(shape) for name, shape in shapes.items() if name not in given}
    return {**empty, **step_geometry(manifest.model, scale), **given}

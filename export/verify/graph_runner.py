"""Runs one graph on arrays in ONNX Runtime, with interior values as additional outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from var_deploy.bundle.files import GraphFile
from var_deploy.errors import BackendError, one_line
from var_deploy.host.machine import usable_cores
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.runtime.backends.ort_session import SILENT, open_session, quiet
from var_deploy.runtime.buffers import step_geometry, step_shapes


class GraphRunner:
    """A graph in ONNX Runtime on the CPU.

    Args:
        interior: values inside the graph to add to the outputs.

    Raises BundleError where the graph cannot be trusted, BackendError where ONNX Runtime refuses
    it.
    """

    def __init__(self, graph: GraphFile, info: GraphInfo, interior: Sequence[str] = ()) -> None:
        model = onnx.ModelProto.FromString(graph.read())
        add_outputs(model, interior)
        self._inputs = {t.name: t for t in info.inputs}
        self._name = graph.ref.name
        self._session = open_session(
            onnxruntime,
            graph,
            session_options(model),
            data=model.SerializeToString(),
            providers=["CPUExecutionProvider"],
        )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs by name; inputs that the graph does not take are ignored.

        Raises BackendError where ONNX Runtime fails.
        """
        feed = {
            name: np.asarray(inputs[name], dtype=tensor.dtype, order="C")
            for name, tensor in self._inputs.items()
        }
        outputs = [output.name for output in self._session.get_outputs()]
        return run_session(self._session, self._name, feed, outputs)


def add_outputs(model: onnx.ModelProto, values: Sequence[str]) -> None:
    """Make values inside a graph outputs of it; ONNX Runtime infers their types."""
    known = {value.name for value in model.graph.output}
    added = (name for name in values if name not in known)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)


def session_options(model: onnx.ModelProto) -> Any:
    """Return SessionOptions for one run of a graph on all cores."""
    quiet(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = usable_cores() or 0
    # with open sizes, planning which buffer may serve again takes longer than all the rest
    options.enable_mem_reuse = not any(
        dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim
    )
    return options


def run_session(
    session: Any, graph: str, feed: Mapping[str, NDArray[Any]], wanted: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Return the outputs `wanted`, by name. Raises BackendError where ONNX Runtime fails."""
    try:
        found = session.run(list(wanted), dict(feed))
    except Exception as error:  # ONNX Runtime raises types of its own, all Exception
        raise BackendError(f"ONNX Runtime failed in {graph}: {one_line(error)}") from error
    return dict(zip(wanted, found, strict=True))


def complete_step(
    manifest: Manifest, precision: str, scale: int, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Add the inputs that `step` has and a static graph lacks: geometry, placeholders at scale
    0."""
    shapes = step_shapes(manifest, precision, scale)
    empty = {name: np.zeros(shape) for name, shape in shapes.items() if name not in inputs}
    return {**empty, **step_geometry(manifest.model, scale), **inputs}

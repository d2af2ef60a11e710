"""Runs a graph on any backend and returns interior values, for `verify --bisect`."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.files import by_descriptor
from var_deploy.config import TENSORRT, TENSORRT_RTX
from var_deploy.errors import BackendError, UsageError, one_line
from var_deploy.export.debug.interpreter import TorchGraph
from var_deploy.export.verify.graph_runner import add_outputs, run_session, session_options
from var_deploy.files.held_files import HeldFile
from var_deploy.host.installation import pip_command
from var_deploy.runtime.backends.ort_session import EXTERNAL_FOLDER
from var_deploy.runtime.tensorrt.library import load_library

Values = Mapping[str, NDArray[Any]]
# (graph file, inputs, names of the values wanted) → those of them that the backend has
Runner = Callable[[Path, Values, Sequence[str]], Values]


def run_onnxruntime(path: Path, inputs: Values, wanted: Sequence[str]) -> Values:
    """Run on the CPU, optimised as far as the interior values to be returned allow."""
    model = onnx.load(str(path), load_external_data=False)
    add_outputs(model, wanted)
    options = session_options(model)
    try:
        weights = HeldFile(path.with_name(names.WEIGHTS))
        data = model.SerializeToString()
        data, folder = by_descriptor(data, weights) or (data, str(path.parent))
        options.add_session_config_entry(EXTERNAL_FOLDER, folder)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        weights.close()
    except Exception as error:  # ONNX Runtime raises types of its own, all Exception
        raise BackendError(f"ONNX Runtime failed in {path.stem}: {one_line(error)}") from error
    return run_session(session, path.stem, inputs, wanted)


def run_pytorch(path: Path, inputs: Values, wanted: Sequence[str]) -> Values:
    found = TorchGraph(path).run(inputs, also=wanted)
    return {name: found[name] for name in wanted}


def run_tensorrt(
    library: str, path: Path, inputs: Values, wanted: Sequence[str], polygraphy: Any = None
) -> Values:
    """Build and run an engine for these shapes alone, through Polygraphy.

    A value that is returned cannot be fused away, so a fault that only a fusion has does not show.

    Args:
        library: "tensorrt" or "tensorrt_rtx".
        polygraphy: stands for the module polygraphy.backend.trt.
    """
    complaints = _Complaints()
    trt = polygraphy or _polygraphy(library, complaints)
    try:
        parsed = trt.network_from_onnx_path(str(path), strongly_typed=True)
        network = parsed[1]
        outputs = (layer.get_output(i) for layer in network for i in range(layer.num_outputs))
        known = {tensor.name for tensor in outputs if tensor is not None}
        marked = [name for name in wanted if name in known]
        if not marked:
            return {}
        parsed = trt.modify_network_outputs(parsed, outputs=marked)
        profile = trt.Profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            if -1 in tuple(tensor.shape):
                shape = inputs[tensor.name].shape
                profile.add(tensor.name, min=shape, opt=shape, max=shape)
        # TF32 stays off, which is Polygraphy's default: fp32 islands are meant to be fp32
        engine = trt.engine_from_network(parsed, config=trt.CreateConfig(profiles=[profile]))
        with trt.TrtRunner(engine) as runner:
            taken = {name: inputs[name] for name in runner.get_input_metadata()}
            found = runner.infer(taken)
            return {name: np.array(found[name]) for name in marked}
    except Exception as error:  # Polygraphy raises types of its own, all Exception
        words = complaints.text() or one_line(error)
        raise BackendError(f"{library} failed in {path.stem}: {words}") from error


class _Complaints(logging.Handler):
    """Collector of TensorRT's messages; Polygraphy's exceptions do not contain them."""

    SHOWN = 3
    CHARACTERS = 700

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: dict[str, None] = {}  # in order, without repeats

    def emit(self, record: logging.LogRecord) -> None:
        self._lines[" ".join(record.getMessage().split())] = None

    def text(self) -> str:
        return "; ".join(list(self._lines)[: self.SHOWN])[: self.CHARACTERS]


def _polygraphy(library: str, complaints: logging.Handler) -> Any:
    """Import polygraphy.backend.trt for `library`, which Polygraphy reads when it is imported."""
    load_library(library)  # says what to install
    rtx = library == TENSORRT_RTX
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if rtx else "0"
    try:
        config = importlib.import_module("polygraphy.config")
        logger = importlib.import_module("polygraphy.logger").G_LOGGER
        backend = importlib.import_module("polygraphy.backend.trt")
    except ModuleNotFoundError:
        raise BackendError(
            f"{library} is compared through Polygraphy, which is not installed; run "
            f"{pip_command('polygraphy>=0.53')}"
        ) from None
    if rtx != config.USE_TENSORRT_RTX:
        raise UsageError("tensorrt and tensorrt_rtx cannot be compared in one process")
    logger.use_python_logging_system = True
    logger.colors = logger.letter = False  # Polygraphy would print to stdout that it has no colours
    log = logging.getLogger("Polygraphy")
    log.handlers, log.propagate = [complaints], False
    return backend


RUNNERS: dict[str, Runner] = {
    "onnxruntime": run_onnxruntime,
    "pytorch": run_pytorch,
    TENSORRT: partial(run_tensorrt, TENSORRT),
    TENSORRT_RTX: partial(run_tensorrt, TENSORRT_RTX),
}

"""Makes sessions of ONNX Runtime out of the graphs of a bundle, on any of its providers."""

from __future__ import annotations

from typing import Any

from var_deploy.bundle.files import GraphFile
from var_deploy.errors import BackendError, one_line
from var_deploy.files.paths import utf8_path

# a session made of bytes looks for the weights that they name in this folder
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
BYTES_FROM = (1, 21)  # before, a session of bytes does not find weights for all that it optimises
SILENT = 4  # only what ends the process is written to the terminal; errors come as exceptions


def quiet(ort: Any) -> None:
    """Keep ONNX Runtime's own lines, which it writes around Python, off the terminal."""
    ort.set_default_logger_severity(SILENT)


def open_session(
    ort: Any, graph: GraphFile, options: Any, *, data: bytes | None = None, **how: Any
) -> Any:
    """A session of exactly the bytes and weights that were checked.

    Args:
        options: SessionOptions of this session alone; they are added to.
        data: run these bytes instead of the graph's own, over its weights.
        how: for InferenceSession, such as its providers.

    Raises BundleError where the graph cannot be trusted or has changed, BackendError where ONNX
    Runtime refuses it.
    """
    files = graph.files
    options.log_severity_level = SILENT
    checked = graph.read()
    model: bytes | str = checked if data is None else data
    by_path = False
    if files is not None:
        placed = files.by_descriptor(checked if data is None else data)
        by_path = placed is None or _version(ort) < BYTES_FROM
        if placed is not None and not by_path:
            model, folder = placed
            options.add_session_config_entry(EXTERNAL_FOLDER, folder)
        elif data is None:
            model = utf8_path(graph.path, "ONNX Runtime")
        else:
            parent = utf8_path(graph.path.parent, "ONNX Runtime")
            options.add_session_config_entry(EXTERNAL_FOLDER, parent)
    session, problem = None, ""
    for _ in range(1 if files is None else 2):
        try:
            # without fallback: it would tell on the terminal of a second attempt
            session = ort.InferenceSession(model, options, enable_fallback=0, **how)
            problem = ""
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            problem = one_line(error)
        if files is not None and (by_path or problem):
            files.confirm(graph.ref.name)
        if not problem:
            break
        # it looks up where the weights lie, which fails while a bundle is being renamed
    if problem:  # raised here: in the traceback above ONNX Runtime's session would live on
        raise BackendError(f"ONNX Runtime refuses {graph.path.name}: {problem}")
    return session


def _version(ort: Any) -> tuple[int, ...]:
    parts = str(ort.__version__).split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())

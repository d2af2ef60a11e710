"""Creates ONNX Runtime sessions from the graphs of a bundle, for any execution provider."""

from __future__ import annotations

from typing import Any

from var_deploy.bundle.files import GraphFile
from var_deploy.errors import BackendError, one_line
from var_deploy.files.paths import utf8_path

# a session made of bytes looks for the weights that they name in this folder
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
BYTES_FROM = (1, 21)  # older versions do not find all weights of a model that comes as bytes
CUDA_PROVIDER = "CUDAExecutionProvider"
SILENT = 4  # only fatal errors are printed; all others come as exceptions


def quiet(ort: Any) -> None:
    """Stop ONNX Runtime from printing log lines to the terminal."""
    ort.set_default_logger_severity(SILENT)


def open_session(
    ort: Any, graph: GraphFile, options: Any, *, data: bytes | None = None, **how: Any
) -> Any:
    """Create a session from exactly the graph bytes and weights that were checked.

    Args:
        options: SessionOptions of this session; entries are added to them.
        data: bytes of another graph over the same weights, to run instead of the graph.
        how: arguments of InferenceSession, such as `providers`.

    Raises BundleError where the graph is damaged or was replaced, BackendError where ONNX Runtime
    refuses it.
    """
    files = graph.files
    options.log_severity_level = SILENT
    checked = graph.read()
    model: bytes | str = checked if data is None else data
    by_path = False
    if files is not None:
        placed = files.by_descriptor(checked if data is None else data)
        by_path = placed is None or version_of(ort) < BYTES_FROM
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
            # without fallback, which would print a line about a second attempt
            session = ort.InferenceSession(model, options, enable_fallback=0, **how)
            problem = ""
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            problem = one_line(error)
        if files is not None and (by_path or problem):
            files.confirm(graph.ref.name)
        if not problem:
            break
        # try again: ONNX Runtime looks up the weights by path, and the bundle may be in a rename
    if problem:  # raised here: a traceback from the `except` would keep the session alive
        raise BackendError(f"ONNX Runtime refuses {graph.path.name}: {problem}")
    return session


def version_of(ort: Any) -> tuple[int, ...]:
    """(major, minor) of ONNX Runtime."""
    parts = str(ort.__version__).split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())

"""Builds one engine: ONNX file → serialized plan.

Networks are strongly typed, so an engine computes in the types of the graph. Shapes are static: the
minimum, optimum and maximum of a profile are equal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_deploy.errors import BackendError, one_line
from var_deploy.files.paths import utf8_path
from var_deploy.progress import Progress
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.runtime.tensorrt.monitor import build_monitor, held_interrupt
from var_deploy.runtime.tensorrt.target import BuildOptions

Profile = Mapping[str, tuple[int, ...]]

SHOWN_ERRORS = 5
STOP_POLL = 0.2  # seconds; longest delay of Ctrl-C where signals do not wake a waiting thread


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """Result of `build_engine`.

    Attributes:
        plan: the serialized engine, a view of TensorRT's memory, since a copy would double it.
        timing_cache: the given timing cache with the new measurements; b"" where the library has
            none.
        seconds: duration of the build.
        notes: warnings for the user, one line each.
    """

    plan: memoryview
    timing_cache: bytes
    seconds: float
    notes: tuple[str, ...] = ()


def build_engine(
    library: Library,
    onnx_path: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    timing_cache: bytes = b"",
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> BuiltEngine:
    """Build the engine of one graph.

    Args:
        profiles: input shapes of each optimisation profile; empty for a static graph.
        timing_cache: timing cache of an earlier build for the same device.
        on_progress: called from any thread with TensorRT's phase and a fraction that never
            decreases.
        cancelled: called after every step; True stops the build.

    Raises BackendError with the graph, the layer where it is known, and TensorRT's errors;
    KeyboardInterrupt where Ctrl-C or `cancelled` stopped the build. If Ctrl-C comes when the engine
    is finished, the engine is returned inside `held_interrupt` and lost otherwise.
    """
    trt, graph, started = library.module, onnx_path.stem, time.monotonic()
    library.logger.clear()
    try:
        builder = trt.Builder(library.logger)
    except Exception as error:  # what pybind11 raises for a null pointer
        raise BackendError(
            f"{library.name} cannot build on this machine: {library.words()} ({one_line(error)})"
        ) from None
    network, parser = _parse(library, builder, onnx_path)
    _check_shapes(graph, network, profiles)
    config = _configure(library, builder, network, graph, profiles, options)
    notes = _use_timing_cache(library, config, timing_cache) if not library.is_rtx else ()
    plan = _run(library, builder, network, config, graph, on_progress, cancelled)
    del parser  # held until here: the network's weights are the parser's memory
    cache = None if library.is_rtx else config.get_timing_cache()
    return BuiltEngine(
        plan=memoryview(plan).cast("B"),  # IHostMemory calls its bytes floats
        timing_cache=bytes(cache.serialize()) if cache is not None else b"",
        seconds=time.monotonic() - started,
        notes=notes,
    )


def _parse(library: Library, builder: Any, path: Path) -> tuple[Any, Any]:
    """Parse an ONNX file: (network, parser). The parser must live as long as the network."""
    trt, graph = library.module, path.stem
    # the flag's bit moved between 10.x and 11.x, where every network is strongly typed
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    if network is None:
        raise BackendError(f"{_name(library)} made no network for {graph}: {library.words()}")
    parser = trt.OnnxParser(network, library.logger)
    # from the file, so that weights.bin is found beside it
    parsed = parser.parse_from_file(utf8_path(Path(path), _name(library)))
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if errors or not parsed:
        told = [_parser_error(error) for error in errors[:SHOWN_ERRORS]]
        if len(errors) > SHOWN_ERRORS:
            told.append(f"and {len(errors) - SHOWN_ERRORS} more")
        raise BackendError(
            f"{_name(library)} refuses {graph}: {'; '.join(told) or library.words()}"
        )
    return network, parser


def _parser_error(error: Any) -> str:
    node, operator = str(error.node_name()), str(error.node_operator())
    words = " ".join(str(error.desc()).split()) or str(error.code())
    return f"layer {node} ({operator}): {words}" if node else words


def _check_shapes(graph: str, network: Any, profiles: Sequence[Profile]) -> None:
    """Raise BackendError where a size is neither static in the graph nor given by a profile."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise BackendError(
                f"{graph}: TensorRT reads the input {tensor.name} as a shape, which would have to "
                "lie on the host; export the bundle again"
            )
    if profiles:
        for number, profile in enumerate(profiles):
            for tensor in inputs:
                _check_profile(graph, number, tensor.name, _shape(tensor), profile)
        return
    for tensor in [*inputs, *(network.get_output(i) for i in range(network.num_outputs))]:
        shape = _shape(tensor)
        if shape is None or min(shape, default=1) < 1:
            raise BackendError(
                f"{graph}: the tensor {tensor.name} has the shape {_show(shape)}, expected is a "
                "static one; export the bundle again"
            )


def _check_profile(
    graph: str, number: int, name: str, shape: tuple[int, ...] | None, profile: Profile
) -> None:
    wanted = profile.get(name)
    fits = (
        wanted is not None
        and shape is not None
        and len(wanted) == len(shape)
        and min(wanted, default=1) > 0
        and all(size in (-1, want) for size, want in zip(shape, wanted, strict=True))
    )
    if not fits:
        raise BackendError(
            f"{graph}: the input {name} has the shape {_show(shape)}, profile {number} gives it "
            f"{_show(wanted)}; export the bundle again"
        )


def _shape(tensor: Any) -> tuple[int, ...] | None:
    """Shape of a tensor; None where its rank is unknown (a Dims of length -1 has no len())."""
    try:
        return tuple(int(size) for size in tensor.shape)
    except ValueError:
        return None


def _show(shape: tuple[int, ...] | None) -> str:
    return "of unknown rank" if shape is None else str(list(shape))


def _configure(
    library: Library,
    builder: Any,
    network: Any,
    graph: str,
    profiles: Sequence[Profile],
    options: BuildOptions,
) -> Any:
    trt, config = library.module, builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    # the sampler's sums and the logits are fp32 because they need all of its digits
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if library.is_rtx:
        _configure_rtx(library, config, options)
    for number, shapes in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            if -1 in tuple(tensor.shape):
                shape = shapes[tensor.name]
                profile.set_shape(tensor.name, shape, shape, shape)
        profile.extra_memory_target = 0.0  # profiles share the weights: no memory for copies
        if config.add_optimization_profile(profile) != number:
            raise BackendError(
                f"{_name(library)} refuses profile {number} of {graph}: {library.words()}"
            )
    return config


def _configure_rtx(library: Library, config: Any, options: BuildOptions) -> None:
    trt, number = library.module, options.compute_capability
    # without it a context may allocate by itself, which cannot be captured in a CUDA graph
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if number is None:
        return
    capability = getattr(trt.ComputeCapability, f"SM{number}", None)
    config.num_compute_capabilities = 1  # before the next call, which otherwise does nothing
    if capability is None or not config.set_compute_capability(capability, 0):
        known = [name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        raise BackendError(
            f"{_name(library)} cannot build for compute capability {number}; it can for "
            f"{', '.join(sorted(known, key=int))}"
        )


def _use_timing_cache(library: Library, config: Any, data: bytes) -> tuple[str, ...]:
    """Attach a timing cache; one that TensorRT refuses is replaced by an empty one. Returns notes.

    Not for tensorrt_rtx, which measures nothing; the call would make it search for a GPU.
    """
    library.logger.clear()
    if data:
        cache = config.create_timing_cache(data)
        taken = cache is not None and config.set_timing_cache(cache, False)
        if taken and not library.logger.errors():
            return ()
    words = library.words()
    library.logger.clear()
    config.set_timing_cache(config.create_timing_cache(b""), False)
    if not data:
        return ()
    return (f"{_name(library)} does not take the timing cache, a new one is begun: {words}",)


def _run(
    library: Library,
    builder: Any,
    network: Any,
    config: Any,
    graph: str,
    on_progress: Progress | None,
    cancelled: Callable[[], bool] | None,
) -> Any:
    """Build the plan and return it as IHostMemory.

    The build runs in a thread of its own. Python runs signal handlers only in the main thread and
    between bytecodes: with TensorRT in the main thread, Ctrl-C would wait for the end of the build,
    or an exception would have to pass through C++.
    """
    results: list[Any] = []
    with held_interrupt() as interrupt:

        def stopped() -> bool:
            return interrupt.pressed or (cancelled is not None and cancelled())

        monitor = build_monitor(library.module, on_progress, stopped)
        config.progress_monitor = monitor

        def work() -> None:
            try:
                results.append(builder.build_serialized_network(network, config))
            except BaseException as error:  # raised again in the caller's thread
                monitor.failures.append(error)

        thread = threading.Thread(target=work, name=f"build {graph}")
        thread.start()
        while thread.is_alive():
            thread.join(STOP_POLL)
    if monitor.failures:
        raise monitor.failures[0]
    if results[0] is None:
        if stopped():
            raise KeyboardInterrupt
        raise BackendError(_failure(library, graph))
    return results[0]


def _failure(library: Library, graph: str) -> str:
    words = library.words()
    plain = words.lower().replace(" ", "")
    hint = ""
    if any(w in plain for w in ("outofmemory", "insufficientmemory", "memoryallocation")):
        hint = "; give it more room with --low-memory, --workspace or a lower --optimization-level"
    return f"{_name(library)} could not build {graph}: {words}{hint}"


def _name(library: Library) -> str:
    return f"{library.name} {library.version}"

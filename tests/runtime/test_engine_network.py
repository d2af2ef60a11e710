"""One engine: what TensorRT is told, what it refuses, how far it is, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import fake_tensorrt
from fake_tensorrt import builder as fake
from var_deploy.errors import BackendError, UsageError
from var_deploy.host.installation import pip_command
from var_deploy.runtime.tensorrt.library import Library, load_library
from var_deploy.runtime.tensorrt.monitor import PhaseTree, held_interrupt
from var_deploy.runtime.tensorrt.network import BuiltEngine, build_engine
from var_deploy.runtime.tensorrt.target import BuildOptions

SHAPES = [{"x": (1, 8), "scale": ()}, {"x": (4, 8), "scale": ()}]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    handler, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    yield
    assert signal.getsignal(signal.SIGINT) is handler
    assert threading.active_count() == threads


@pytest.fixture
def library() -> Library:
    return Library(fake_tensorrt)


@pytest.fixture
def rtx() -> Library:
    return Library(fake.rtx_module(), "tensorrt_rtx")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """An ONNX file: x [L, 8] through one node, with a scalar beside it."""

    def write(
        length: int | str = "L", op: str = "Relu", opset: int = 20, extra: tuple[str, ...] = ()
    ) -> Path:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, (length, 8))]
        inputs.append(helper.make_tensor_value_info("scale", TensorProto.INT64, ()))
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, (length, 8))
        node = helper.make_node(op, ["x", *extra], ["y"], name=f"blocks.1/{op}_7")
        graph = helper.make_graph([node], "toy", inputs, [output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        path = tmp_path / "toy.onnx"
        onnx.save(model, str(path))
        return path

    return write


def build(library: Library, path: Path, profiles: Any = (), **options: Any) -> BuiltEngine:
    rest = {k: options.pop(k) for k in ("timing_cache", "on_progress", "cancelled") if k in options}
    return build_engine(library, path, profiles, BuildOptions(**options), **rest)


def refusal(*arguments: Any, **options: Any) -> str:
    """The one line of a BackendError."""
    with pytest.raises(BackendError) as caught:
        build(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def variant(**changes: Any) -> Library:
    """The library with some of its names replaced."""
    module = types.ModuleType("variant")
    vars(module).update(vars(fake_tensorrt), **changes)
    return Library(module)


# what TensorRT is told


def test_the_configuration_is_as_asked(library: Library, make: Callable[..., Path]) -> None:
    built = build(library, make(), SHAPES, workspace_mb=64, optimization_level=5)
    config = fake.CONFIGS[-1]
    assert not config.get_flag(fake.BuilderFlag.TF32)
    assert config.builder_optimization_level == 5
    assert config.get_memory_pool_limit(fake.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.profiling_verbosity == fake.ProfilingVerbosity.LAYER_NAMES_ONLY
    shapes = [profile.get_shape("x") for profile in config._profiles]
    assert shapes == [[(1, 8)] * 3, [(4, 8)] * 3]
    assert [profile.extra_memory_target for profile in config._profiles] == [0, 0]
    assert isinstance(built.plan, memoryview)
    assert bytes(built.plan).startswith(b"FAKEPLAN")
    assert built.seconds >= 0
    assert built.notes == ()


def test_limits_that_are_not_given_are_left_alone(
    library: Library, make: Callable[..., Path]
) -> None:
    build(library, make(4))
    config = fake.CONFIGS[-1]
    assert config._limits == {}
    assert config.builder_optimization_level == 3
    assert config.num_optimization_profiles == 0


def test_a_library_without_the_flag_is_strongly_typed_anyway(make: Callable[..., Path]) -> None:
    class NoFlags:
        pass

    class AlwaysStrong(fake.Builder):
        def create_network(self, flags: int = 0) -> fake.INetworkDefinition | None:
            assert flags == 0
            return fake.INetworkDefinition(True)

    build(variant(NetworkDefinitionCreationFlag=NoFlags, Builder=AlwaysStrong), make(4))


def test_rtx_builds_ahead_of_time_for_a_capability(rtx: Library, make: Callable[..., Path]) -> None:
    built = build(rtx, make(4), compute_capability=86, timing_cache=b"not for it")
    config = fake.CONFIGS[-1]
    assert config.get_flag(rtx.module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert not config.get_flag(rtx.module.BuilderFlag.TF32)
    assert b'"sm": 86' in bytes(built.plan)
    assert built.timing_cache == b""


def test_rtx_says_which_capabilities_it_knows(rtx: Library, make: Callable[..., Path]) -> None:
    message = refusal(rtx, make(4), compute_capability=87)
    assert "cannot build for compute capability 87; it can for 75, 86, 89, 120" in message


def test_the_timing_cache_goes_in_and_comes_out(
    library: Library, make: Callable[..., Path]
) -> None:
    given = fake.ITimingCache(["decoder"], fake.SM).serialize()
    built = build(library, make(4), timing_cache=bytes(given))
    assert built.timing_cache == bytes(fake.ITimingCache(["decoder", "toy"], fake.SM).serialize())
    assert built.notes == ()


@pytest.mark.parametrize(
    "cache", [b"damaged", bytes(fake.ITimingCache(["decoder"], 72).serialize())]
)
def test_a_timing_cache_that_tensorrt_does_not_take_is_begun_anew(
    library: Library, make: Callable[..., Path], cache: bytes
) -> None:
    built = build(library, make(4), timing_cache=cache)
    assert built.timing_cache == bytes(fake.ITimingCache(["toy"], fake.SM).serialize())
    assert "does not take the timing cache" in built.notes[0]


# what is refused


def test_an_operator_that_tensorrt_lacks_is_named_with_its_layer(
    library: Library, make: Callable[..., Path]
) -> None:
    message = refusal(library, make(4, op="CumSum", extra=("scale",)))
    assert message.startswith("tensorrt 10.3.0 refuses toy: layer blocks.1/CumSum_7 (CumSum): ")
    assert "Plugin not found" in message


def test_every_parser_error_is_told_up_to_a_limit(library: Library, tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], [f"y{i}"], name=f"bad_{i}") for i in range(7)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 8))
    graph = helper.make_graph(nodes, "toy", [x], [])
    onnx.save(helper.make_model(graph), str(tmp_path / "toy.onnx"))
    # the opset comes first, as it does with TensorRT
    assert "opset version" in refusal(library, tmp_path / "toy.onnx")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, str(tmp_path / "toy.onnx"))
    message = refusal(library, tmp_path / "toy.onnx")
    assert all(f"layer bad_{i} (NonZero)" in message for i in range(5))
    assert "bad_5" not in message
    assert message.endswith("; and 2 more")


def test_a_newer_opset_is_refused(library: Library, make: Callable[..., Path]) -> None:
    assert "Unsupported ONNX opset version: 21" in refusal(library, make(4, opset=21))


def test_no_file_is_refused(library: Library, tmp_path: Path) -> None:
    assert "refuses nothing: Failed to parse" in refusal(library, tmp_path / "nothing.onnx")


def test_a_dynamic_shape_in_a_static_graph_is_refused(
    library: Library, make: Callable[..., Path]
) -> None:
    message = refusal(library, make("L"))
    assert message.startswith("toy: the tensor x has the shape [-1, 8], expected is a static one")


def test_an_empty_tensor_is_refused(library: Library, make: Callable[..., Path]) -> None:
    assert "the tensor x has the shape [0, 8]" in refusal(library, make(0))


def test_an_output_of_unknown_rank_is_refused(make: Callable[..., Path]) -> None:
    class NoRank:
        """As TensorRT's Dims of -1 sizes."""

        def __iter__(self) -> Iterator[int]:
            raise ValueError("__len__() should return >= 0")

    class Parser(fake.OnnxParser):
        def parse_from_file(self, model: str) -> bool:
            super().parse_from_file(model)
            self._network._outputs = [types.SimpleNamespace(name="y", shape=NoRank())]
            return True

    message = refusal(variant(OnnxParser=Parser), make(4))
    assert "toy: the tensor y has the shape of unknown rank" in message


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([{"x": (4, 8)}], "the input scale has the shape [], profile 0 gives it of unknown rank"),
        ([SHAPES[0], {"x": (4, 9), "scale": ()}], "shape [-1, 8], profile 1 gives it [4, 9]"),
        ([{"x": (0, 8), "scale": ()}], "profile 0 gives it [0, 8]"),
        ([{"x": (4,), "scale": ()}], "profile 0 gives it [4]"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(
    library: Library, make: Callable[..., Path], profiles: Any, words: str
) -> None:
    assert words in refusal(library, make(), profiles)


def test_an_input_that_is_read_as_a_shape_is_refused(
    library: Library, make: Callable[..., Path]
) -> None:
    message = refusal(library, make(4, op="Expand", extra=("scale",)))
    assert "toy: TensorRT reads the input scale as a shape" in message


def test_a_failed_build_tells_graph_layer_and_words(
    library: Library, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.PLANT, "toy=fail")
    message = refusal(library, make(4))
    assert message.startswith("tensorrt 10.3.0 could not build toy: ")
    assert "any implementation for node {ForeignNode[decoder.mid/Conv_9]}" in message
    assert message.endswith("IBuilder::buildSerializedNetwork: Error Code 4: API Usage")
    monkeypatch.setenv(fake.PLANT, "toy=memory")
    again = refusal(library, make(4))
    assert "ForeignNode" not in again, "words of an earlier build"
    assert again.endswith("--low-memory, --workspace or a lower --optimization-level")


def test_a_builder_that_cannot_be_made_is_one_line(make: Callable[..., Path]) -> None:
    class NoGpu(fake.Builder):
        def __init__(self, logger: fake.ILogger) -> None:
            logger.log(fake.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    message = refusal(variant(Builder=NoGpu), make(4))
    assert "cannot build on this machine: CUDA initialization failure with error: 35" in message


def test_a_network_that_cannot_be_made_is_one_line(make: Callable[..., Path]) -> None:
    class OldFlags:
        STRONGLY_TYPED = 5

    library = variant(NetworkDefinitionCreationFlag=OldFlags)
    library.logger.log(fake.ILogger.ERROR, "of an earlier build")
    message = refusal(library, make(4))
    assert message == "tensorrt 10.3.0 made no network for toy: it gave no reason"


# progress and Ctrl-C


def test_progress_only_grows_and_ends_at_one(library: Library, make: Callable[..., Path]) -> None:
    seen: list[tuple[str, float]] = []
    build(library, make(4), on_progress=lambda phase, done: seen.append((phase, done)))
    fractions = [done for _, done in seen]
    assert {phase for phase, _ in seen} == {"Building Engine", "Timing graph nodes"}
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.2
    assert fractions[-1] == 1


def test_phases_may_overlap_and_come_again() -> None:
    tree = PhaseTree()
    tree.start("engine", None, 2)
    tree.start("left", "engine", 4)
    assert tree.step("left", 1) == 0.25
    tree.start("right", "engine", 2)
    assert tree.step("right", 0) == 0.25
    tree.finish("left")
    tree.finish("right")
    assert tree.step("engine", 0) == 0.5
    tree.start("left", "engine", 0)  # no steps told: counted as one
    assert tree.step("left", 0) == 1
    assert tree.step("never started", 3) == 1


def test_a_callback_that_fails_stops_the_build_and_is_raised_here(
    library: Library, make: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def fails(phase: str, fraction: float) -> None:
        calls.append(phase)
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        build(library, make(4), on_progress=fails)
    assert len(calls) == 1
    assert "Exception caught" not in capfd.readouterr().err, "it went through TensorRT"


def test_cancelling_stops_the_build(library: Library, make: Callable[..., Path]) -> None:
    answers = iter([False, False])
    with pytest.raises(KeyboardInterrupt):
        build(library, make(4), cancelled=lambda: next(answers, True))


def test_ctrl_c_stops_the_build_between_two_steps(
    library: Library, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.PLANT, "toy=interrupt")
    seen: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        build(library, make(4), on_progress=lambda _, done: seen.append(done))
    assert seen[-1] < 1


def test_a_finished_engine_survives_a_late_ctrl_c(
    library: Library, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.PLANT, "toy=late-interrupt")
    kept = []
    with pytest.raises(KeyboardInterrupt), held_interrupt() as interrupt:
        kept.append(build(library, make(4)))
        assert interrupt.pressed
    assert bytes(kept[0].plan).startswith(b"FAKEPLAN")


def test_a_build_in_another_thread_leaves_signals_alone(
    library: Library, make: Callable[..., Path]
) -> None:
    built: list[BuiltEngine] = []
    thread = threading.Thread(target=lambda: built.append(build(library, make(4))))
    thread.start()
    thread.join()
    assert len(built) == 1


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.pressed
    finally:
        signal.signal(signal.SIGINT, before)


# which library


def test_the_first_library_that_is_installed_is_taken(
    rtx: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx.module)
    assert (load_library().name, load_library().version) == ("tensorrt", "10.3.0")
    assert (load_library("tensorrt_rtx").name, load_library("tensorrt_rtx").is_rtx) == (
        "tensorrt_rtx",
        True,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert load_library().name == "tensorrt_rtx"


@pytest.mark.parametrize(
    ("prefer", "words"),
    [
        (None, "neither tensorrt nor tensorrt_rtx is installed: on a Jetson it comes with"),
        ("tensorrt", "tensorrt is not installed: on a Jetson it comes with JetPack"),
        ("tensorrt_rtx", f"tensorrt_rtx is not installed: run {pip_command('tensorrt_rtx')}"),
    ],
)
def test_a_missing_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, prefer: str | None, words: str
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError) as caught:
        load_library(prefer)
    assert words in str(caught.value)


def test_an_unknown_library_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="found 'openvino'"):
        load_library("openvino")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise OSError('libnvinfer.so.10: cannot open')", "does not load (libnvinfer.so.10: "),
        ("import tensorrt_libs_that_is_missing", "does not load (No module named"),
        ("", "is not NVIDIA's"),
        ("class Builder: pass\n__version__ = '8.6.1'\nfrom fake_tensorrt import ILogger", "8.6.1"),
    ],
)
def test_a_library_that_is_broken_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, words: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    try:
        with pytest.raises(BackendError) as caught:
            load_library()
    finally:
        sys.modules.pop("tensorrt", None)
    assert words in str(caught.value)
    assert "JetPack" in str(caught.value)


def test_long_words_are_cut_in_the_middle_and_at_the_end(library: Library) -> None:
    library.logger.clear()
    assert library.words() == "it gave no reason"
    for n in range(5):
        library.logger.log(fake.ILogger.ERROR, f"line\n {n}")
        library.logger.log(fake.ILogger.WARNING, "a warning")
    assert library.logger.errors()[0] == "line 0"
    assert library.words() == "line 0; line 1; line 4"
    library.logger.log(fake.ILogger.INTERNAL_ERROR, "x" * 2000)
    assert len(library.words()) == 700
    library.logger.clear()
    assert library.logger.errors() == []


def test_one_logger_serves_a_module(library: Library) -> None:
    assert Library(fake_tensorrt).logger is library.logger

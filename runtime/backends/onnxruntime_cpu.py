"""The backend for ONNX Runtime on a CPU."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import BoundedSemaphore, Lock
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from var_deploy import names
from var_deploy.bundle.files import GraphFile
from var_deploy.config import CPU
from var_deploy.errors import BackendError, one_line
from var_deploy.host.installation import pip_install
from var_deploy.host.machine import (
    Machine,
    check_threads,
    is_crowded,
    running_elsewhere,
    usable_cores,
)
from var_deploy.runtime.backends.host_memory import HostMemory, aligned_bytes, return_freed
from var_deploy.runtime.backends.ort_session import SILENT, open_session, quiet, version_of
from var_deploy.runtime.backends.protocol import Array, Arrays, Launch

# Microseconds that a thread without work spins before it sleeps. By default it spins for
# milliseconds (16 on a Zen at 4 GHz), which another program's thread could use: a thread that spins
# counts as running and uses up its share, so it waits for a processor when it has work again.
# Between two operators that several threads share lie some ten microseconds, so on a quiet machine
# threads still spin from one to the next. Where other programs run already, no thread spins: waking
# one costs a few percent, waiting for one that lost its processor far more.
SPIN = 100
SPIN_FROM = (1, 26)  # older versions ignore the entry and spin as they always do
# The arena of all sessions. Only the first piece stays when memory is given back, so it is small.
# All others are large: pieces that double from 2 MB on are each left with a rest that fits nothing,
# where one piece is used again from end to end. What is not written to takes no memory.
ARENA = {
    "initial_chunk_size_bytes": 1 << 20,
    "initial_growth_chunk_size_bytes": 1 << 28,
    "max_dead_bytes_per_chunk": 1 << 20,  # the rest of a reused piece is split off from here on
}
AT_ONCE = 2  # sessions that are created side by side: each packs on one core


class OrtSession:
    """One graph, loaded or still being loaded; its weights are mapped from weights.bin and packed
    once.

    Attributes:
        loading: the session, which equal graphs of a process share; None once closed.
    """

    def __init__(self, loading: Future[Any], graph: str, options: Any = None) -> None:
        self.loading: Future[Any] | None = loading
        self._graph, self._options = graph, options

    def bind(self, inputs: Arrays, outputs: Arrays) -> OrtLaunch:
        """Bind buffers once the session is there; raises BackendError where it cannot be made."""
        if self.loading is None:
            raise BackendError(f"{self._graph} was closed")
        session = self.loading.result()
        outputs = {**outputs, **_unread(session, inputs, outputs)}
        try:
            binding = session.io_binding()
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.address)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.address)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            words = one_line(error)
            raise BackendError(f"ONNX Runtime refuses buffers of {self._graph}: {words}") from error
        keep = (inputs, outputs, self.loading)
        return OrtLaunch(session, binding, keep, self._graph, self._options)

    def close(self) -> None:
        if self.loading is not None:
            wait([self.loading])  # it reads from files that are closed next
            self.loading = None


def _unread(session: Any, inputs: Arrays, outputs: Arrays) -> Arrays:
    """Buffers for the keys and values that `step` makes at the last scale, where none are stored.

    ONNX Runtime keeps every output of a graph until the run ends, whether it is bound or not: here
    64 MiB of a d16. A block reads its own keys and values before the input of the next block is
    known, so all blocks write to the same place.
    """
    made: dict[str, Array] = {}
    unbound = {output.name for output in session.get_outputs()} - set(outputs)
    for name in (names.new_key, names.new_value):
        left = [name(layer) for layer in range(len(unbound)) if name(layer) in unbound]
        if left:
            past = inputs[names.past_key(0)]
            shape = (inputs[names.INPUT].shape[1], *past.shape[1:])
            block = aligned_bytes(math.prod(shape) * past.dtype.itemsize)
            place = Array(int(block.ctypes.data), shape, past.dtype, block)
            made.update(dict.fromkeys(left, place))
    return made


class OrtLaunch:
    """A session with all buffers bound."""

    def __init__(
        self, session: Any, binding: Any, keep: object, graph: str, options: Any
    ) -> None:
        self._session, self._binding, self._graph = session, binding, graph
        self._options = options
        # the binding holds bare pointers into these arrays, and the session is shared
        self._keep = keep

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime raises types of its own, all Exception
            words = one_line(error)
            raise BackendError(f"ONNX Runtime failed in {self._graph}: {words}") from error


class OrtCpuBackend(HostMemory):
    """Opens graphs with ONNX Runtime on the CPU.

    Loops of one process share a session, and with it the packed weights, where graph, weights and
    number of threads are equal; runs of a session may overlap. All sessions take their scratch
    memory from one arena, which stays with the process for the next loop.

    Threads that wait for work spin, or sleep at once where the machine is crowded when the first
    graph is loaded (see `is_crowded`). That changes times and no bit of a result.

    Args:
        threads: number of threads per graph; None takes the cores that the process may use, see
            `usable_cores`. ONNX Runtime always gets a number: without one it would start a thread
            for every core of the machine and pin it.

    Raises BackendError where onnxruntime is not installed, UsageError for threads out of range.
    """

    name = CPU

    def __init__(self, threads: int | None = None) -> None:
        threads = check_threads(threads, machine=Machine())
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                f"onnxruntime is not installed; run {pip_install('cpu', 'onnxruntime')}"
            ) from None
        quiet(onnxruntime)
        self._ort, self._threads = onnxruntime, threads or usable_cores()
        self._elsewhere, self._spinning = running_elsewhere(Machine()), ""
        self._crowded: bool | None = None  # until the first graph is loaded

    @property
    def version(self) -> str:
        """Version of ONNX Runtime."""
        return str(self._ort.__version__)

    def open(self, graph: GraphFile) -> OrtSession:
        graph.read()  # raises for a damaged file before a session is looked up
        with _opening:
            key = (graph.key(), self._threads)
            loading = _sessions.get(key)
            if loading is None or (loading.done() and loading.exception() is not None):
                spinning = self._spinning_as_text()
                loading = _sessions[key] = self._begin_load(graph)
                _spinning[loading] = spinning
            self._spinning = _spinning[loading]
        options = self._ort.RunOptions()
        options.log_severity_level = SILENT
        if graph.ref.kind == "decoder":
            # the last launch of a generation gives the arena's memory back: between images a
            # pipeline holds its weights and little else
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return OrtSession(loading, graph.ref.name, options)

    def _begin_load(self, graph: GraphFile) -> Future[Any]:
        """Create the session in a thread of its own: ONNX Runtime packs weights on one core.

        With one thread to use it is created at once.
        """
        if self._threads == 1:
            loaded = Future[Any]()
            loaded.set_result(self._load(graph))
            return loaded

        def load() -> Any:
            with _slots:
                return self._load(graph)

        thread = ThreadPoolExecutor(1, thread_name_prefix="var-deploy-load")
        loading = thread.submit(load)
        thread.shutdown(wait=False)
        return loading

    def _load(self, graph: GraphFile) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        if self._is_crowded():
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        else:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN))
        kind, text = graph.ref.kind, graph.files is not None and graph.files.takes_text
        if kind == "text_encoder":
            # released between prompts: all of its memory has to go with the session, and what lies
            # in the arena of all sessions does not
            options.enable_cpu_mem_arena = False
        elif _share_arena(self._ort):
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            # one arena per session adds up, and none of them returns memory
            options.enable_cpu_mem_arena = False
        # A memory pattern is one block for a whole run, laid out as in the first run: in the
        # decoder of a d16 it takes 100 MB more than the arena takes tensor by tensor.
        options.enable_mem_pattern = False
        if kind == "step" or (kind == "decoder" and (text or graph.ref.precision == "int8")):
            # Planning which freed buffer may serve again compares every two open shapes: 0.45 s of
            # the 0.55 s that opening pocket's `step` took. The arena reuses buffers at run time
            # too. In the int8 decoder of a d16 the arena also does better: 240 MiB against 290 MiB
            # with planning (in fp32 it is the other way round, 256 MiB and 245 MiB). In that of a
            # text-to-image model at 256 × 256 in fp32: 241 MiB, with planning 305 MiB, since a
            # buffer that may serve again is not freed.
            options.enable_mem_reuse = False
        elif kind == "scale":
            # K sessions would hold K packed copies of the same weights; without packing they share
            # the weights mapped from weights.bin, and take 1.2 to 1.6 times as long
            options.add_session_config_entry("session.disable_prepacking", "1")
        return open_session(self._ort, graph, options, providers=["CPUExecutionProvider"])

    def prepare(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        return_freed()  # what loading took besides
        return launches

    def close(self) -> None:
        """Does nothing: sessions and memory are freed with the loop."""

    def describe(self) -> dict[str, str]:
        threads = str(self._threads) if self._threads else "all cores"
        about = {"backend": self.name, "onnxruntime": self.version, "threads": threads}
        return {**about, **({"spinning": self._spinning} if self._spinning else {})}

    def _is_crowded(self) -> bool:
        """Whether other programs need the processors that this backend's threads would spin on.

        Decided once, from two moments: a thread that ran in only one of them is not counted.
        """
        if self._crowded is None:
            machine = Machine()
            elsewhere = min(self._elsewhere, running_elsewhere(machine))
            self._crowded = is_crowded(machine, self._threads or 1, elsewhere)
        return self._crowded

    def _spinning_as_text(self) -> str:
        if self._threads == 1:
            return ""  # a single thread waits for no other
        if self._is_crowded():
            return "off, since other programs were running"
        return f"{SPIN} µs" if version_of(self._ort) >= SPIN_FROM else "ONNX Runtime's default"


_sessions: WeakValueDictionary[tuple[Hashable, ...], Future[Any]] = WeakValueDictionary()
_spinning: WeakKeyDictionary[Future[Any], str] = WeakKeyDictionary()  # as a person is told
_opening = Lock()
_slots = BoundedSemaphore(AT_ONCE)


@cache
def _share_arena(ort: Any) -> bool:
    """Register one arena for all sessions of the process.

    Returns False where the program that uses this package has registered an allocator of its own.
    """
    try:
        where = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        ort.create_and_register_allocator(where, ort.OrtArenaCfg(ARENA))
    except Exception:  # of ONNX Runtime's own types
        return False
    return True

"""Predicts the memory of a generation from the sizes of the model.

Cache and buffers are exact: they are the allocations of `var_deploy.runtime`. The weights of the
graphs are exact too. The additional memory of a library, and its scratch memory, are estimates,
fitted to ONNX Runtime 1.31 on a CPU (within a third, `tests/runtime/test_plan_against_cpu.py`) and
to engines that TensorRT-RTX builds without a GPU. The estimates for TensorRT are not confirmed on a
board yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from var_deploy import names
from var_deploy.bundle.graph_refs import generation_graphs, tokenizer_graphs
from var_deploy.config import Layout, Precision
from var_deploy.families import family_of
from var_deploy.planning import text_memory
from var_deploy.planning.autoencoder import decoder_layers, encoder_layers
from var_deploy.planning.costs import bundle_weights, graph_weights
from var_deploy.planning.workload import FULL, Workload
from var_deploy.spec import TextModelSpec

Library = Literal["tensorrt", "onnxruntime-cpu"]

ALIGNMENT = 256  # every buffer of the runtime starts on a multiple of it

# TensorRT. An engine consists of weights and kernels. The kernels' share, and the memory of a build
# on the host, are those of TensorRT-RTX 1.7 for SM89 on a machine without a GPU, for pocket and a
# d16 in fp16. The CUDA context and the libraries: 0.6 GB, as NVIDIA's forum reports it.
SCALE_KERNELS = 6_100_000  # of a scale graph besides its blocks, per profile
STATIC_BLOCK_KERNELS = 280_000  # a transformer block, where the shapes are known
STEP_BLOCK_KERNELS = 470_000  # a block and profile of `step`
OTHER_KERNELS = 4_500_000  # of the other graphs
BUILD_COPIES = 3.35  # of an engine on the host, while it is built
BUILD_RUNTIME = 200_000_000
TENSORRT_RUNTIME = 600_000_000
# ONNX Runtime on a CPU: Python with its imports, the addition of the first session, and the memory
# of each session besides weights
CPU_IMPORTS = 40_000_000
CPU_RUNTIME = CPU_IMPORTS + 8_000_000
CPU_SESSION = 4_000_000
MIX_COPIES = 2  # of the logits, for the weights of codes (not fitted)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of memory of one layout while it generates.

    Attributes:
        weights: weights as the library holds them, with the copies of sessions or engines.
        cache: keys and values.
        buffers: inputs and outputs of all launches.
        scratch: intermediate results of the largest launch (an estimate).
        runtime: memory without a model: interpreter, libraries, CUDA context.
        loading: memory that is used only while weights are read.
    """

    layout: Layout
    weights: int
    cache: int
    buffers: int
    scratch: int
    runtime: int
    loading: int

    @property
    def peak(self) -> int:
        """The most bytes at one time; `scratch` and `loading` are not used at the same time."""
        held = self.weights + self.cache + self.buffers + self.runtime
        return held + max(self.scratch, self.loading)


def layout_graphs(workload: Workload, layout: Layout) -> tuple[str, ...]:
    """Names of the graphs that a generation opens, in order."""
    found = generation_graphs(workload.model, layout, guidance=workload.guidance)
    return tuple(graph.name for graph in found)


def footprint(
    workload: Workload, layout: Layout, library: Library, *, one_memory: bool = False
) -> Footprint:
    """Predict the memory of the device during a generation (of the whole process on a CPU).

    `one_memory`: CPU and GPU share their memory, as on a Jetson, so an engine's file contents and
    its weights are in memory at the same time while it is read.
    """
    graphs = layout_graphs(workload, layout)
    scratch = max(scratch_bytes(workload, graph, library) for graph in graphs)
    if library == "tensorrt":
        plans = {graph: plan_bytes(workload, graph) for graph in graphs}
        weights, runtime = sum(plans.values()), TENSORRT_RUNTIME
        loading = max(plans.values()) if one_memory else 0
    else:
        # packed once in `step`, or mapped once and read by all static graphs
        once = layout_graphs(workload, "shared")
        weights = sum(graph_weights(workload, graph).nbytes(workload.itemsize) for graph in once)
        loading = 0
        if workload.precision == "fp16":
            # computed in fp32: every session converts its weights, in addition to the mapped file
            weights += sum(graph_weights(workload, graph).nbytes(FULL) for graph in graphs)
            # the decoder's weights are converted, then reordered
            loading = graph_weights(workload, names.DECODER).nbytes(FULL)
        runtime = CPU_RUNTIME + CPU_SESSION * len(graphs)
    return Footprint(
        layout=layout,
        weights=weights,
        cache=cache_bytes(workload),
        buffers=buffer_bytes(workload),
        scratch=scratch,
        runtime=runtime,
        loading=loading,
    )


# on disk, and while building


def bundle_bytes(workload: Workload, precisions: tuple[Precision, ...]) -> int:
    """Estimate the size of a bundle with both layouts: weights once per precision, and graphs."""
    total = 0
    for precision in precisions:
        part = Workload(
            model=workload.model, precision=precision, guidance=workload.guidance
        )
        nodes = 20_000 * (workload.model.scales + 1) * workload.model.transformer.depth
        total += bundle_weights(part) + nodes
    return total


def plan_bytes(workload: Workload, graph: str) -> int:
    """Estimate the size of an engine: weights and kernels, which `step` has per profile."""
    weights = graph_weights(workload, graph).nbytes(workload.itemsize)
    depth = workload.model.transformer.depth
    if graph == names.STEP:
        profile = SCALE_KERNELS + depth * STEP_BLOCK_KERNELS
        return weights + workload.model.scales * profile
    if graph in workload.scale_graphs:
        return weights + SCALE_KERNELS + depth * STATIC_BLOCK_KERNELS
    return weights + OTHER_KERNELS


def engine_bytes(workload: Workload, layout: Layout) -> int:
    """Estimate the disk space of the engines of a layout, `encoder` and `accumulate` included."""
    graphs = (*layout_graphs(workload, layout), *(graph.name for graph in tokenizer_graphs()))
    return sum(plan_bytes(workload, graph) for graph in graphs)


@dataclass(frozen=True, kw_only=True)
class BuildMemory:
    """Bytes of memory to build the largest engine, one at a time in a process of its own."""

    host: int
    device: int
    graph: str

    @property
    def total(self) -> int:
        """Bytes needed on a board whose CPU and GPU share their memory."""
        return self.host + self.device


def build_memory(workload: Workload, layout: Layout) -> BuildMemory:
    """Estimate the memory to build the engines of a layout, one at a time.

    The host holds more than three copies of the engine, of which TensorRT's developer guide
    explains two (weights as parsed and as serialized). The device holds one copy while kernels are
    timed, scratch memory and the CUDA context.
    """

    def of(graph: str) -> BuildMemory:
        plan = plan_bytes(workload, graph)
        device = plan + scratch_bytes(workload, graph, "tensorrt") + TENSORRT_RUNTIME
        return BuildMemory(
            host=int(BUILD_COPIES * plan) + BUILD_RUNTIME, device=device, graph=graph
        )

    graphs = (*layout_graphs(workload, layout), names.ENCODER)
    return max((of(graph) for graph in graphs), key=lambda memory: memory.total)


# a generation


def cache_bytes(workload: Workload) -> int:
    """Bytes of the key-value cache: P_{K-1} rows of G·C numbers for the keys and for the values of
    each block, and one row that is the past of scale 0."""
    t = workload.model.transformer
    row = workload.rows * t.width * workload.cache_itemsize
    return _padded(row) + 2 * t.depth * _padded(workload.model.prefix_lengths[-2] * row)


def upload_bytes(workload: Workload) -> int:
    """Bytes that are copied from the host before a generation, each tensor padded to 256 bytes.

    With `more_smooth` nearly all of them are noise.
    """
    if isinstance(workload.model, TextModelSpec):
        return sum(_padded(size) for size in text_memory.upload_sizes(workload))
    model, batch = workload.codes, workload.batch
    sizes = [8 * workload.rows]  # labels
    for length in model.scale_lengths:
        # cfg, temperature, top_k, top_p; uniforms, keep_mask, keep_tokens
        sizes += [FULL, FULL, 8, FULL, *(batch * length * size for size in (FULL, 1, 8))]
        if workload.more_smooth:
            sizes.append(batch * length * model.tokenizer.vocab_size * FULL)
    return sum(_padded(size) for size in sizes)


def buffer_bytes(workload: Workload) -> int:
    """Inputs and outputs of all launches besides the cache, each padded to 256 bytes."""
    if isinstance(workload.model, TextModelSpec):
        others = sum(_padded(size) for size in text_memory.other_sizes(workload))
        return upload_bytes(workload) + others
    model, batch, rows = workload.codes, workload.batch, workload.rows
    t, tok, side = model.transformer, model.tokenizer, model.tokenizer.latent_side
    sizes = [rows * t.width * FULL, (6 * t.depth + 2) * rows * t.width * FULL]
    sizes += 3 * [batch * tok.code_width * side**2 * FULL]  # f_hat
    sizes.append(batch * tok.image_side**2 * tok.image_channels * FULL)
    for scale, length in enumerate(model.scale_lengths):
        here = model.patch_nums[scale]
        following = model.patch_nums[scale + 1] if scale + 1 < model.scales else 1
        source = family_of(t).next_source_side(model, scale)
        # tokens; the input; scale and its two matrices
        sizes += [8 * batch * length, batch * length * model.input_width * FULL]
        sizes += [8, side * here * FULL, following * source * FULL]
    return upload_bytes(workload) + sum(_padded(size) for size in sizes)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# scratch: number of copies of its largest tensors that a launch holds at once. For a CPU the counts
# were measured; TensorRT is assumed to fuse as much, in half the bytes.


def scratch_bytes(workload: Workload, graph: str, library: Library) -> int:
    """Estimate the bytes of a launch's intermediates; for `step`, those of the last scale."""
    if graph in (names.CONDITION, names.UNCONDITIONAL):
        if isinstance(workload.model, TextModelSpec):
            return text_memory.condition_scratch(workload)
        t = workload.model.transformer
        return 2 * (6 * t.depth + 2) * workload.rows * t.width * FULL
    if graph in (names.DECODER, names.ENCODER):
        layers = (decoder_layers if graph == names.DECODER else encoder_layers)(
            workload.model.tokenizer
        )
        rounded = workload.precision == "int8" and any(layer.rounded for layer in layers)
        copies = 4 if library == "tensorrt" else 7 if rounded else 6
        largest = max(
            max(layer.before, layer.after) * math.prod(layer.grid) for layer in layers
        )
        return copies * workload.batch * largest * FULL
    gpu = library == "tensorrt"
    if graph == names.STEP:
        # ONNX Runtime writes the softmax over its input where the shapes are known, and only there
        return _scale_scratch(workload, workload.model.scales - 1, gpu, 2 if gpu else 3)
    return _scale_scratch(workload, workload.scale_graphs.index(graph), gpu, 2)


def _scale_scratch(workload: Workload, scale: int, gpu: bool, score_copies: int) -> int:
    """The largest of attention, feed-forward and sampling, which run one after the other."""
    if isinstance(workload.model, TextModelSpec):
        return text_memory.scale_scratch(workload, scale, gpu, score_copies)
    model, t = workload.codes, workload.codes.transformer
    size = workload.cache_itemsize if gpu else FULL
    length = model.scale_lengths[scale]
    attended = model.prefix_lengths[scale] + length
    tokens, hidden = length * workload.rows, length * workload.rows * t.width
    scores = workload.rows * t.heads * length * attended
    attention = (FULL + size) * hidden + 2 * size * attended * workload.rows * t.width
    attention += score_copies * FULL * scores
    feed_forward = (FULL + size) * hidden + (2 if gpu else 4) * size * tokens * t.ffn_width
    vocab = model.tokenizer.vocab_size
    logits = 2 * FULL * tokens * vocab
    copies = (6 if gpu else 8) + (MIX_COPIES if workload.more_smooth else 0)
    sampling = copies * FULL * workload.batch * length * vocab
    return max(attention, feed_forward, logits, sampling)

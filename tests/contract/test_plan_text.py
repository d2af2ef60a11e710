"""`plan` of text-to-image models: bytes and operations against the graphs and the released files,
and how the text encoder counts."""

from __future__ import annotations

import dataclasses
import json
from math import prod
from typing import Any, get_args

import numpy as np
import pytest
from graph_operations import count_operations

from fake_machine import FakeMachine, meminfo
from var_deploy import names
from var_deploy.bundle.interfaces import launch_batch
from var_deploy.config import GraphForm, Precision
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.planning.costs import bundle_weights, graph_weights, launches
from var_deploy.planning.devices import DEVICES, cpu_device
from var_deploy.planning.kubernetes import manifest as kubernetes
from var_deploy.planning.memory import buffer_bytes, cache_bytes, footprint, upload_bytes
from var_deploy.planning.plan import Plan, TextEncoderWorkload, make_plan
from var_deploy.planning.text_costs import text_encoder_weights, text_encoder_work
from var_deploy.planning.text_memory import (
    HEADROOM,
    keeps_text_encoder,
    score_bytes,
    text_encoder_memory,
    text_encoder_precision,
)
from var_deploy.planning.workload import Workload, workload_of
from var_deploy.runtime.backends.host_memory import HostMemory
from var_deploy.runtime.buffers import CacheArena, LoopBuffers
from var_deploy.sampling import BitSampling
from var_deploy.scale_lists import scale_list, with_scales
from var_deploy.spec import TextEncoderSpec, TextModelSpec

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
T5 = TextEncoderSpec(
    width=2048, depth=24, heads=32, head_width=64, ffn_width=5120, vocab_size=32128, length=128
)


def preset(name: str, resolution: str = "0.06M", aspect: str = "1:1") -> TextModelSpec:
    pytest.importorskip("torch")
    from var_deploy.export.checkpoint.presets import TEXT_PRESETS

    return with_scales(TEXT_PRESETS[name].spec, scale_list(resolution, aspect), 100)


@pytest.mark.parametrize(
    ("name", "precision"),
    [*(("infinity-125m", precision) for precision in PRECISIONS), ("infinity-8b", "fp16")],
)
def test_weights_and_operations_are_those_of_the_graphs(name: str, precision: Precision) -> None:
    """Weights to the byte; products to the last one, sums and comparisons on top."""
    from var_deploy.export.bundle import ExportOptions, build_graphs
    from var_deploy.export.int8.decoder_ranges import rounded_convs
    from var_deploy.export.int8.operators import ConvRanges, Range

    small = dataclasses.replace(preset(name, aspect="4:3"))
    transformer = dataclasses.replace(small.transformer, depth=2)
    model = dataclasses.replace(small, transformer=transformer)
    batch = launch_batch(model, precision, 2, guidance=True)
    w = Workload(model=model, batch=batch, precision=precision)
    options = ExportOptions(precisions=(precision,), batch=2)
    some = Range(low=-1.0, high=1.0)
    rounded = rounded_convs(model.tokenizer) if precision == "int8" else ()
    ranges = {key: ConvRanges(input=some, output=some) for key in rounded}
    graphs = {graph.name: graph for graph in build_graphs(model, precision, options, ranges)}
    found = {name: graph_weights(w, name).nbytes(w.itemsize) for name in graphs}
    assert found == {
        name: sum(weight.nbytes for weight in graph.weights.values())
        for name, graph in graphs.items()
    }
    once = {key: x.nbytes for graph in graphs.values() for key, x in graph.weights.items()}
    assert bundle_weights(w) == sum(once.values())
    others = (names.STEP, names.ENCODER, names.ACCUMULATE)
    assert [work.name for work in launches(w)] == [g for g in graphs if g not in others]
    for work in launches(w):
        reduced, full = count_operations(graphs[work.name])
        if precision == "fp32":
            full, reduced = full - work.compute_operations, work.compute_operations
        assert work.compute_operations == reduced, work.name
        assert full <= work.full_operations <= 1.005 * full + 1e5, work.name


def test_without_guidance_there_is_no_unconditional_half() -> None:
    guided = Workload(model=preset("infinity-125m"))
    alone = dataclasses.replace(guided, guidance=False)
    assert names.UNCONDITIONAL not in [work.name for work in launches(alone)]
    kept = 2 * (2 * 12 * 768 * 100) + 4 * 100 * (2048 + 16)
    assert bundle_weights(guided) - bundle_weights(alone) == kept


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_and_operations_of_the_text_encoder(precision: Precision) -> None:
    pytest.importorskip("torch")
    from var_deploy.export.graphs.text_encoder import build_text_encoder

    spec = dataclasses.replace(T5, depth=2)
    graph = build_text_encoder(spec, GraphForm(precision=precision))
    size = {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    weights = text_encoder_weights(spec, precision).nbytes(size)
    assert weights == sum(weight.nbytes for weight in graph.weights.values())
    work = text_encoder_work(spec, precision)
    reduced, full = count_operations(graph)
    assert work.compute_operations + work.full_operations == reduced + full
    assert precision == "fp32" or work.compute_operations == reduced


@pytest.mark.parametrize("name", ["infinity-125m", "infinity-1b", "infinity-2b", "infinity-8b"])
def test_weights_are_those_of_the_released_files(name: str) -> None:
    """The released tensors but for those that the graphs do without, and what is added: sums of
    biases, queries and keys of the pool in one matrix, half a head."""
    pytest.importorskip("torch")
    from golden_infinity import MODELS, official

    model = preset(name)
    t, bits = model.transformer, model.tokenizer.token_bits
    shapes = official(MODELS[name][0])
    released = sum(prod(shape) for key, shape in shapes.items() if "zero_k_bias" not in key)
    c, pool = t.width, t.text_width * t.pool_heads
    released -= 512 * t.text_width  # "no prompt": a table of `unconditional`
    released += pool - c - c * t.text_width
    released += (model.scales - t.levels) * c - c  # levels in use, with the bias of the embedding
    released -= bits * (c + 1)
    released += 2 * t.depth * c  # biases of keys, zero
    w = Workload(model=model, precision="fp32")
    tables = 2 * t.depth * c * t.text_length + t.text_length * (t.text_width + t.pool_heads)
    autoencoder = sum(
        graph_weights(w, graph).nbytes(1) for graph in (names.DECODER, names.ENCODER)
    )
    own = graph_weights(w, names.CONDITION) + graph_weights(w, names.STEP)
    assert own.compute + own.full == released
    assert bundle_weights(w) // 4 == released + tables + (
        graph_weights(w, names.DECODER).compute
        + graph_weights(w, names.DECODER).full
        + graph_weights(w, names.ENCODER).compute
        + graph_weights(w, names.ENCODER).full
    )
    half = Workload(model=model, precision="fp16")  # which has no phases of up-sampling
    found = sum(graph_weights(half, g).nbytes(2) for g in (names.DECODER, names.ENCODER))
    norms = sum(graph_weights(half, g).full for g in (names.DECODER, names.ENCODER))
    assert autoencoder > 0
    codec = official(MODELS[name][1])
    parts = [prod(shape) for key, shape in codec.items() if key.startswith(("decoder", "encoder"))]
    assert (found - 4 * norms) // 2 + norms == sum(parts)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", ["infinity-125m", "infinity-8b"])
def test_cache_and_buffers_are_exact(name: str, guidance: bool) -> None:
    small = preset(name, aspect="4:3")
    transformer = dataclasses.replace(small.transformer, depth=2)
    model = dataclasses.replace(small, transformer=transformer)
    manifest = Manifest(
        model=model,
        preset="",
        batch=3,
        guidance=guidance,
        graphs={},
        files={},
        checkpoint={},
        tools={},
        defaults=BitSampling(),
    )
    for precision, dtype in (("fp16", np.float16), ("int8", np.float32)):
        w = workload_of(manifest, precision)  # type: ignore[arg-type]
        assert CacheArena(manifest, dtype, HostMemory()).nbytes == cache_bytes(w)
        buffers = LoopBuffers(manifest, dtype, HostMemory())
        assert buffers.nbytes == cache_bytes(w) + buffer_bytes(w)
        assert buffers.inputs.nbytes == upload_bytes(w)


def test_attention_is_cut_as_in_the_graphs() -> None:
    """Scores of at most 256 MiB, or of one head of one row."""
    assert score_bytes(2, 16, 256, 521) == 4 * 2 * 16 * 256 * 521
    assert score_bytes(2, 16, 4096, 10521) == 4 * 2 * 4096 * 10521 * 0 + 4 * 4096 * 10521
    assert score_bytes(2, 16, 1024, 2521) == 4 * 2 * 12 * 1024 * 2521 < 256 << 20
    one = Workload(model=preset("infinity-2b", "1M"))
    assert footprint(one, "shared", "tensorrt").cache > 2 * 1.5e9  # INFINITY: 1.57 GiB a row


# the text encoder


def test_it_stays_where_both_leave_a_tenth_free() -> None:
    assert keeps_text_encoder(5, 4, 10) == (True, keeps_text_encoder(5, 4, 10)[1])
    assert not keeps_text_encoder(5, 5, 10)[0] and HEADROOM == 0.9
    assert keeps_text_encoder(5, 5, 10, keep=True) == (True, "as asked for")
    assert keeps_text_encoder(5, 5, None)[0]


def test_its_precision() -> None:
    assert text_encoder_precision(("fp32", "fp16"), "fp16", gpu=True) == "fp16"
    assert text_encoder_precision(("fp32",), "fp16", gpu=True) == "fp32"
    assert text_encoder_precision(("fp32", "int8"), "fp16", gpu=False) == "int8"


def test_its_memory() -> None:
    """Measured (ONNX Runtime 1.31, one thread, a T5 of 8 blocks of width 512): MB at the peak."""
    spec = TextEncoderSpec(
        width=512, depth=8, heads=8, head_width=64, ffn_width=1280, vocab_size=32128, length=128
    )
    for precision, measured in (("fp32", 114), ("fp16", 122), ("int8", 60)):
        found = text_encoder_memory(spec, precision, gpu=False).peak  # type: ignore[arg-type]
        assert found / 1e6 == pytest.approx(measured, rel=0.25), precision
    weights = text_encoder_weights(T5, "fp16").nbytes(2)
    assert weights < text_encoder_memory(T5, "fp16", gpu=True).weights < weights + 5e6


def planned(device: str = "agx-orin-64gb", **changes: Any) -> Plan:
    workload = Workload(model=preset("infinity-2b", "0.25M"))
    encoder = TextEncoderWorkload(name="flan-t5-xl", spec=T5, precision="fp16")
    found = DEVICES[device]
    memory = changes.pop("memory", found.memory)
    found = dataclasses.replace(found, memory=memory)
    return make_plan(workload, found, name="2b", text_encoder=encoder, **changes)


def test_a_plan_counts_both_or_the_larger() -> None:
    roomy = planned()
    text = roomy.text_encoder
    assert text is not None and text.kept
    scales = roomy.layouts[roomy.layout].footprint.peak
    assert roomy.peak == scales + text.memory.peak
    data = json.loads(json.dumps(roomy.to_json()))["text_encoder"]
    assert (data["model"], data["kept"], data["bundle_measured"]) == ("flan-t5-xl", True, False)
    assert data["memory"]["peak"] == text.memory.peak
    assert data["launch"]["seconds"] == text.launch.seconds > 0
    assert roomy.stored == roomy.bundle + text.bundle + roomy.layouts[roomy.layout].engines

    shared = roomy.layouts["shared"].footprint.peak
    tight = planned(memory=int(shared + 1.6e9), layout="shared")
    assert tight.fits and tight.text_encoder is not None and not tight.text_encoder.kept
    assert tight.peak == shared
    least = planned(memory=int(text.memory.peak + 1.5e9) - 10, layout="shared")
    assert not least.fits


def test_a_device_that_holds_the_scales_must_hold_the_text_encoder_too() -> None:
    workload = Workload(model=preset("infinity-125m"))
    encoder = TextEncoderWorkload(name="flan-t5-xl", spec=T5, precision="fp16")
    small = dataclasses.replace(DEVICES["orin-nano-4gb"], memory=int(1.5e9 + 2.5e9))
    assert make_plan(workload, small, name="125m").fits
    assert not make_plan(workload, small, name="125m", text_encoder=encoder).fits


def test_a_pod_has_room_for_both() -> None:
    device = cpu_device(FakeMachine(files={"/proc/meminfo": meminfo(64000, 60000)}))
    workload = Workload(model=preset("infinity-125m"), precision="fp32")
    encoder = TextEncoderWorkload(name="flan-t5-xl", spec=T5, precision="fp32")
    alone = make_plan(workload, device, name="125m")
    both = make_plan(workload, device, name="125m", text_encoder=encoder)
    assert both.peak - alone.peak == text_encoder_memory(T5, "fp32", gpu=False).peak
    assert f"the predicted peak of {both.peak / 1e9:.2f} GB" in kubernetes(both, cpus=2)
    with pytest.raises(UsageError, match="int8 is for"):
        make_plan(dataclasses.replace(workload, precision="int8"), DEVICES["h200"], name="x")

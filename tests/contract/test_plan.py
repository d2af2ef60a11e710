"""`plan`: its bytes and operations against the graphs, its devices, and what it concludes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
from graph_operations import count_operations

from fake_machine import H100_GPU, NVRM, ORIN_GPU, ORIN_NANO, FakeMachine, jetson, meminfo
from var_deploy import names
from var_deploy.bundle.interfaces import launch_batch
from var_deploy.config import LAYOUTS, Layout, Precision
from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.host.machine import Driver
from var_deploy.manifest import FileInfo, GraphInfo, Manifest, read_manifest
from var_deploy.planning.costs import bundle_weights, graph_weights, launches
from var_deploy.planning.devices import DEVICES, Device, find_device
from var_deploy.planning.memory import (
    BUILD_COPIES,
    BUILD_RUNTIME,
    build_memory,
    bundle_bytes,
    cache_bytes,
    engine_bytes,
    footprint,
    plan_bytes,
    scratch_bytes,
)
from var_deploy.planning.plan import make_plan
from var_deploy.planning.precisions import cpu_precision, gpu_precision
from var_deploy.planning.selection import choose_layout
from var_deploy.planning.workload import Workload
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

Family = Callable[..., ModelSpec]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRESETS = ("pocket", "var-d16", "var-d36")
GOLDEN = ("seeded-adaln", "seeded-shared-aln", "tiny-adaln", "tiny-shared-aln")
GPT2 = {"family": "gpt2", "classes": 0, "qk_l2_norm": False}
MEMBERS = (
    {},
    {"shared_adaln": True, "heads": 4},
    {"qk_l2_norm": False, "shared_phi": 1},
    {"phi_ratio": 0.0},
    {"shared_phi": 0, "width_multipliers": (1, 1, 2)},
    {"patch_nums": (1, 2, 3, 5), "res_blocks": 2, "width_multipliers": (2,)},
    {"patch_nums": (1,), "image_channels": 1},
    {**GPT2, "codebook_per_scale": True, "phi_ratio": 0.0},
    {**GPT2, "image_channels": 1},
)


def preset(name: str) -> ModelSpec:
    from var_deploy.export.checkpoint.presets import PRESETS as KNOWN

    return KNOWN[name].spec


def build(workload: Workload, layout: str = "both") -> dict[str, Any]:
    """The graphs themselves, by name."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from var_deploy.export.bundle import ExportOptions, build_graphs
    from var_deploy.export.int8.decoder_ranges import rounded_convs
    from var_deploy.export.int8.operators import ConvRanges, Range

    some = Range(low=-1.0, high=1.0)
    rounded = rounded_convs(workload.model.tokenizer) if workload.precision == "int8" else ()
    ranges = {key: ConvRanges(input=some, output=some) for key in rounded}
    options = ExportOptions(
        precisions=(workload.precision,),
        batch=workload.batch,
        guidance=workload.guidance,
        layout=layout,  # type: ignore[arg-type]
    )
    return {g.name: g for g in build_graphs(workload.model, workload.precision, options, ranges)}


def assert_weights(workload: Workload) -> None:
    """Every graph's weights, and those of all graphs together, to the byte."""
    graphs = build(workload)
    found = {name: graph_weights(workload, name).nbytes(workload.itemsize) for name in graphs}
    assert found == {
        name: sum(weight.nbytes for weight in graph.weights.values())
        for name, graph in graphs.items()
    }
    once = {key: w.nbytes for graph in graphs.values() for key, w in graph.weights.items()}
    assert bundle_weights(workload) == sum(once.values())


# weights


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_every_preset(name: str, precision: Precision) -> None:
    assert_weights(Workload(model=preset(name), precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_weights_of_the_family(
    family_member: Family, member: dict[str, Any], precision: Precision
) -> None:
    model = family_member(**member)
    guidance = model.transformer.conditional
    assert_weights(Workload(model=model, batch=3, guidance=guidance, precision=precision))


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_of_the_golden_cases(load_case: Callable[[str], Any], name: str) -> None:
    pytest.importorskip("torch")
    for precision in PRECISIONS:
        assert_weights(Workload(model=load_case(name).spec, precision=precision))


def test_bytes_of_a_bundle(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch")
    folder = request.getfixturevalue("golden_bundle")("seeded-shared-aln")
    manifest = read_manifest(folder)
    held: tuple[Precision, ...] = ("fp32", "fp16")
    for precision in held:
        workload = Workload(model=manifest.model, precision=precision)
        for name, graph in manifest.graphs[precision].items():
            predicted = graph_weights(workload, name).nbytes(workload.itemsize)
            assert predicted == graph.weight_bytes, (precision, name)
        size = manifest.files[f"{precision}/{names.WEIGHTS}"].size
        # tensors start on pages, 4 KiB each at most
        assert 0 <= size - bundle_weights(workload) < 4096 * 200
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert bundle_bytes(workload, held) == pytest.approx(on_disk, rel=0.15)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("var-d16", 310), ("var-d20", 600), ("var-d24", 1033), ("var-d30", 2010), ("var-d36", 2353)],
)
def test_parameters_are_those_that_were_published(name: str, millions: int) -> None:
    """arXiv 2404.02905, table 1, which rounds to two digits."""
    workload = Workload(model=preset(name), precision="fp32")
    once = [graph_weights(workload, graph) for graph in (names.CONDITION, names.STEP)]
    assert sum(w.compute + w.full for w in once) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "precision", "megabytes"),
    [("var-d16", "fp32", 1695.5), ("var-d16", "int8", 598.2), ("var-d36", "fp16", 4966.9)],
)
def test_bundles_that_were_measured(name: str, precision: Precision, megabytes: float) -> None:
    """On disk: d16 in the shared layout; d36 as docs/BENCHMARKS.md has it."""
    found = bundle_bytes(Workload(model=preset(name)), (precision,))
    assert found == pytest.approx(megabytes * 1e6, rel=0.006)


# operations


@pytest.mark.parametrize(
    ("name", "guidance", "precision"),
    [
        ("pocket", True, "fp16"),
        ("pocket", True, "fp32"),
        ("pocket", True, "int8"),
        ("var-d16", True, "int8"),
        ("var-d16", False, "fp16"),
    ],
)
def test_operations_are_those_of_the_graphs(
    name: str, guidance: bool, precision: Precision
) -> None:
    """Products to half a percent (the formulas count biases too, but in int8); in fp32 the sampler,
    which has few products, comes on top."""
    model = preset(name)
    batch = launch_batch(model, precision, 2, guidance=guidance)
    workload = Workload(model=model, batch=batch, guidance=guidance, precision=precision)
    graphs = build(workload, "per-scale")
    others = (names.ENCODER, names.ACCUMULATE)  # no part of a generation
    assert [work.name for work in launches(workload)] == [g for g in graphs if g not in others]
    for work in launches(workload):
        reduced, full = count_operations(graphs[work.name])
        if precision == "fp32":
            assert not reduced
            operations = work.compute_operations + work.full_operations
            assert full <= operations <= 1.04 * full, work.name
        else:
            most = 1.006 * reduced if precision == "fp16" else reduced
            assert reduced <= work.compute_operations <= most, work.name
            assert full <= work.full_operations <= 1.5 * full, work.name
        if work.name == names.DECODER:
            assert work.compute_operations + work.full_operations == reduced + full


def test_operations_of_one_image() -> None:
    """d16, 256 px, with guidance: 0.39 TFLOP in the decoder's convolutions, and two rows of 680
    tokens through 16 blocks of 12·C² parameters."""
    work = {w.name: w for w in launches(Workload(model=preset("var-d16")))}
    decoder = work.pop(names.DECODER)
    assert decoder.compute_operations == pytest.approx(0.39e12, rel=0.02)
    blocks = 2 * (2 * 680) * 16 * 12 * 1024**2
    scales = sum(w.compute_operations for name, w in work.items() if name != names.CONDITION)
    assert blocks < scales < 1.1 * blocks


def test_up_sampling_on_the_small_grid_saves_operations() -> None:
    """Four of nine products stay in the four convolutions that follow it, and bytes grow."""
    d16 = preset("var-d16")
    half, full, rounded = (
        launches(Workload(model=d16, precision=precision))[-1]
        for precision in ("fp16", "fp32", "int8")
    )
    follow = [160 * 256**2 * 160, 320 * 128**2 * 320, 320 * 64**2 * 320, 640 * 32**2 * 640]
    saved = half.compute_operations - full.compute_operations
    assert saved == 2 * 5 * sum(follow)
    both = rounded.compute_operations + rounded.full_operations
    assert both == full.compute_operations
    assert rounded.compute_operations > 0.98 * both


def test_traffic_counts_what_every_launch_must_move(family_member: Family) -> None:
    model = family_member()
    workload = Workload(model=model, batch=2, precision="fp32")
    work = launches(workload)[-2]
    weights = graph_weights(workload, names.scale_graph(2))
    past = 2 * 2 * (1 + 4) * 4 * 64 * 4  # two blocks, keys and values, 5 rows of G·C fp32 numbers
    f_hats, modulation = 2 * 2 * 8 * 16 * 4, (6 * 2 + 2) * 4 * 64 * 4
    assert work.traffic == weights.read(4) + past + f_hats + modulation
    tables = 48 * 8 + (21 + 3) * 64  # codebook, positions, levels: a launch reads a few rows
    assert weights.nbytes(4) - weights.read(4) == 4 * tables


# memory


def test_a_cache_by_hand() -> None:
    """d16: 424 of 680 rows are kept, for two rows of 1024 numbers, keys and values, 16 blocks."""
    held = cache_bytes(Workload(model=preset("var-d16")))
    assert held - 2 * 1024 * 2 == 424 * 2 * 2 * 1024 * 16 * 2


@pytest.mark.parametrize("one_memory", [True, False])
def test_the_layouts_hold_their_weights(one_memory: bool) -> None:
    workload = Workload(model=preset("var-d16"))
    weights = {
        layout: footprint(workload, layout, "tensorrt", one_memory=one_memory) for layout in LAYOUTS
    }
    step = graph_weights(workload, names.STEP).nbytes(2)
    others = sum(graph_weights(workload, g).nbytes(2) for g in (names.CONDITION, names.DECODER))
    assert 10 * step < weights["per-scale"].weights - others < 10.4 * step
    assert step < weights["shared"].weights - others < 1.4 * step
    loading = weights["shared"].loading
    assert (loading > step) if one_memory else (loading == 0)


def test_the_peak_takes_the_larger_of_scratch_and_loading() -> None:
    held = footprint(Workload(model=preset("var-d36")), "shared", "tensorrt", one_memory=True)
    sums = held.weights + held.cache + held.buffers + held.runtime
    assert held.peak == sums + held.loading > sums + held.scratch
    rather = dataclasses.replace(held, scratch=held.loading + 5)
    assert rather.peak == sums + held.loading + 5


def test_more_of_anything_needs_more() -> None:
    small = Workload(model=preset("var-d16"))
    for changes in ({"batch": 2}, {"precision": "fp32"}, {"model": preset("var-d20")}):
        large = dataclasses.replace(small, **changes)  # type: ignore[arg-type]
        for layout in LAYOUTS:
            for library in ("tensorrt", "onnxruntime-cpu"):
                if library == "onnxruntime-cpu" and "precision" in changes:
                    continue  # which computes fp16 in fp32
                less, more = (footprint(w, layout, library) for w in (small, large))  # type: ignore[arg-type]
                assert more.peak > less.peak
                assert more.cache > less.cache
    unguided = dataclasses.replace(small, guidance=False)
    assert cache_bytes(unguided) * 2 == pytest.approx(cache_bytes(small), rel=1e-6)
    assert launches(unguided)[-1] == launches(small)[-1], "one image either way"


def test_d16_on_a_cpu_as_measured() -> None:
    """docs/BENCHMARKS.md: 1908 MiB at the peak of a d16 fp32 generation, shared layout."""
    held = footprint(
        Workload(model=preset("var-d16"), precision="fp32"), "shared", "onnxruntime-cpu"
    )
    assert held.peak == pytest.approx(1908 * 2**20, rel=0.1)


@pytest.mark.parametrize(
    ("name", "graph", "megabytes", "host"),
    [
        ("pocket", names.STEP, 48.2, 334),
        ("pocket", "scale_04", 12.7, 223),
        ("pocket", names.DECODER, 5.7, 176),
        ("var-d16", names.STEP, 558.9, 2132),
        ("var-d16", "scale_09", 433.8, 1619),
        ("var-d16", names.DECODER, 134.2, 587),
    ],
)
def test_engines_that_were_built(name: str, graph: str, megabytes: float, host: float) -> None:
    """Plans of TensorRT-RTX 1.7.1 for SM89 in fp16, batch 1 with guidance, and the resident memory
    of the process that built them above its imports."""
    plan = plan_bytes(Workload(model=preset(name)), graph)
    assert plan == pytest.approx(megabytes * 1e6, rel=0.05)
    assert BUILD_COPIES * plan + BUILD_RUNTIME == pytest.approx(host * 1e6, rel=0.25)


def test_building_needs_more_than_running() -> None:
    workload = Workload(model=preset("var-d16"))
    build = build_memory(workload, "shared")
    assert build.graph == names.STEP
    step = plan_bytes(workload, names.STEP)
    assert build.host == int(BUILD_COPIES * step) + BUILD_RUNTIME
    assert build.device > step + scratch_bytes(workload, names.STEP, "tensorrt")
    assert build.total == build.host + build.device
    assert build_memory(workload, "per-scale").graph.startswith("scale_")
    assert engine_bytes(workload, "per-scale") > 4 * engine_bytes(workload, "shared")


# which layout


def manifest_of(model: ModelSpec, *graphs: str) -> Manifest:
    graph = GraphInfo(file="fp16/x.onnx", inputs=(), outputs=(), weight_bytes=1)
    return Manifest(
        model=model,
        preset="",
        batch=1,
        guidance=True,
        graphs={"fp16": {name: graph for name in (*graphs, names.DECODER)}},
        files={"fp16/x.onnx": FileInfo(size=1000, sha256="")},
        checkpoint={},
        tools={},
        defaults=Sampling(),
    )


@pytest.mark.parametrize(
    ("room", "layout", "said"),
    [(1.12, "per-scale", "it fits"), (1.05, "shared", "a tenth"), (0.1, "shared", "neither fits")],
)
def test_the_layout_that_fits(room: float, layout: Layout, said: str) -> None:
    """`room` in what the per-scale layout needs: a tenth must stay free."""
    workload = Workload(model=preset("var-d16"))
    memory = int(room * footprint(workload, "per-scale", "tensorrt").peak)
    chosen, reason = choose_layout(workload, memory)
    assert chosen == layout
    assert said in reason and f"{memory / 1e9:.1f} GB are free" in reason
    both = manifest_of(workload.model, names.STEP, names.scale_graph(0))
    assert choose_layout(both, memory) == (chosen, reason)


def test_a_bundle_with_one_layout() -> None:
    model = preset("var-d16")
    for held, layout in ((names.STEP, "shared"), (names.scale_graph(0), "per-scale")):
        chosen, reason = choose_layout(manifest_of(model, held), 10**12)
        assert (chosen, reason) == (layout, "the bundle holds no other layout")


def test_a_cpu_takes_the_shared_layout() -> None:
    workload = Workload(model=preset("pocket"))
    chosen, reason = choose_layout(workload, 10**12, library="onnxruntime-cpu")
    assert chosen == "shared" and "session" in reason


def test_a_bundle_without_the_precision() -> None:
    with pytest.raises(BundleError, match="has no fp32 graphs"):
        choose_layout(manifest_of(preset("pocket"), names.STEP), 10**9, precision="fp32")


# devices


@pytest.mark.parametrize(
    ("name", "sparse_int8"),
    [
        ("orin-nano-4gb", 20),
        ("orin-nano-8gb", 40),
        ("orin-nano-4gb-super", 34),
        ("orin-nano-8gb-super", 67),
        ("agx-orin-64gb", 170),
    ],
)
def test_derived_rates_fit_what_is_published(name: str, sparse_int8: float) -> None:
    """The GPU's sparse INT8 TOPS of the data sheets are four times dense fp16."""
    device = DEVICES[name]
    assert 4 * device.compute_rate == pytest.approx(sparse_int8 * 1e12, rel=0.03)
    assert device.derived and device.one_memory and device.sm == 87


def test_every_device_is_complete() -> None:
    for name, device in DEVICES.items():
        assert name == device.name
        assert device.source.startswith("NVIDIA")
        assert device.sm is not None
        assert 1e9 < device.available < device.memory < 200e9
        assert 30e9 < device.bandwidth < 5e12
        assert 3 < device.compute_rate / device.full_rate < 64
        assert device.one_memory == ("orin" in name or name == "thor")


def test_an_unknown_device() -> None:
    with pytest.raises(
        UsageError, match=r"unknown device 'orin-nano-8g'; did you mean orin-nano-8"
    ):
        find_device("orin-nano-8g")


@pytest.mark.parametrize(
    ("model", "memory", "nearest"),
    [
        (f"{ORIN_NANO} Super", 7620, "orin-nano-8gb-super"),
        (ORIN_NANO, 7620, "orin-nano-8gb"),
        ("NVIDIA Orin Nano Developer Kit", 3428, "orin-nano-4gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15656, "orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30536, "agx-orin-32gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 62841, "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 125772, "thor"),
    ],
)
def test_this_board(model: str, memory: int, nearest: str) -> None:
    known = DEVICES[nearest]
    found = find_device("this", jetson(model, memory, free=memory - 1000))
    assert (found.name, found.bandwidth, found.compute_rate) == (
        "this",
        known.bandwidth,
        known.compute_rate,
    )
    assert known.title in found.title and model in found.title
    assert (found.memory, found.available) == (memory << 20, (memory - 1000) << 20)
    assert found.memory == pytest.approx(known.memory, rel=0.15)


def test_this_gpu() -> None:
    """What the driver reports of an H100 comes to the published numbers."""
    machine = FakeMachine(cuda=Driver(cuda="12.8", gpus=(H100_GPU,)))
    found, known = find_device("this", machine), DEVICES["h100"]
    assert (found.title, found.sm, found.one_memory) == (H100_GPU.name, 90, False)
    for number in ("bandwidth", "compute_rate", "full_rate"):
        assert getattr(found, number) == pytest.approx(getattr(known, number), rel=0.1), number
    assert found.available == H100_GPU.memory - 500_000_000


def test_a_gpu_that_shares_its_memory() -> None:
    gpu = dataclasses.replace(ORIN_GPU, name="GB10", sm=121)
    files = {"/proc/meminfo": meminfo(120_000, 110_000)}
    found = find_device("this", FakeMachine(files=files, cuda=Driver(gpus=(gpu,))))
    assert (found.one_memory, found.available) == (True, 110_000 << 20)


CPUINFO = "".join(
    f"processor\t: {n}\nmodel name\t: AMD EPYC 9354\ncpu MHz\t\t: {mhz}\nphysical id\t: 0\n"
    f"core id\t\t: {n // 2}\nflags\t\t: fpu sse2 avx2 avx512f avx512bw avx512_vnni\n\n"
    for n, mhz in enumerate((3600.5, 2400.0, 2400.0, 2400.0))
)


def test_this_processor() -> None:
    files = {"/proc/cpuinfo": CPUINFO, "/proc/meminfo": meminfo(32_000, 30_000)}
    machine = FakeMachine(files=files, processors=4)
    found = find_device("this", machine)
    assert found == find_device("cpu", machine)
    assert (found.title, found.sm) == ("AMD EPYC 9354", None)
    assert found.full_rate == 2 * 64 * 3600.5e6, "four threads are two cores"
    assert found.compute_rate == 4 * found.full_rate, "in int8"
    assert "assumed" in found.derived
    narrow = dataclasses.replace(machine, processors=1)
    assert find_device("cpu", narrow).full_rate == found.full_rate / 2


def test_a_processor_that_tells_little() -> None:
    files = {"/proc/cpuinfo": "Features\t: fp asimd\n", "/proc/meminfo": "MemTotal: 1000000 kB\n"}
    found = find_device("cpu", FakeMachine(files=files, processors=3))
    assert (found.title, found.full_rate) == ("Linux aarch64", 3 * 16 * 3e9)
    assert found.compute_rate == found.full_rate, "nothing is known of int8 there"
    with pytest.raises(UsageError, match="--device"):
        find_device("this", FakeMachine(files={"/proc/driver/nvidia/version": NVRM}))


# the plan


def device_of(**changes: Any) -> Device:
    return dataclasses.replace(DEVICES["orin-nano-8gb"], **changes)


def test_a_launch_takes_the_longer_of_bytes_and_operations() -> None:
    workload, device = Workload(model=preset("var-d16")), DEVICES["orin-nano-8gb"]
    plan = make_plan(workload, device, name="var-d16")
    first, last = plan.launches[1], plan.launches[-2]
    assert (first.bound, first.seconds) == ("memory", first.work.traffic / 68e9)
    work = last.work
    computing = work.compute_operations / device.compute_rate
    computing += work.full_operations / device.full_rate
    assert (last.bound, last.seconds) == ("compute", computing)
    assert (last.tokens, last.past) == (256, 424)
    assert plan.seconds == pytest.approx(sum(launch.seconds for launch in plan.launches))
    fp32 = make_plan(dataclasses.replace(workload, precision="fp32"), device, name="")
    assert fp32.launches[-1].seconds == pytest.approx(
        fp32.launches[-1].work.compute_operations / device.full_rate
    )
    faster = make_plan(workload, device_of(bandwidth=1e15), name="")
    assert {launch.bound for launch in faster.launches} == {"compute"}
    assert faster.seconds < plan.seconds


def test_what_fits_where() -> None:
    def plan(name: str, device: str, **options: Any) -> Any:
        return make_plan(Workload(model=preset(name)), DEVICES[device], name=name, **options)

    small = plan("var-d16", "orin-nano-8gb")
    assert small.fits and small.bundle > 0 and not small.measured
    assert small.layouts["shared"].build_missing == 0
    large = plan("var-d30", "orin-nano-8gb")
    assert not large.fits and large.layout == "shared" and "neither fits" in large.reason
    lacking = large.layouts["shared"]
    assert lacking.missing == lacking.footprint.peak - DEVICES["orin-nano-8gb"].available
    assert plan("var-d30", "agx-orin-64gb").fits
    asked = plan("var-d30", "agx-orin-64gb", layout="shared")
    assert (asked.layout, asked.reason) == ("shared", "as asked for")
    wide = plan("var-d24", "orin-nano-8gb", layout="per-scale")
    assert not wide.fits and "layout shared fits: give --layout shared" in wide.misfit
    alone = dataclasses.replace(wide, held=("per-scale",))
    assert alone.misfit.endswith("give --layout shared, once exported with --layout both")
    assert small.misfit == "" and large.misfit.endswith("smaller model: no layout fits")


def test_building_on_a_card_leaves_the_hosts_copies_out() -> None:
    """11 GB are enough for the card's share of d36's largest engine, not for the whole."""
    workload = Workload(model=preset("var-d36"))
    build = build_memory(workload, "shared")
    room = build.device + 1_600_000_000
    card = make_plan(workload, device_of(memory=room, one_memory=False), name="")
    board = make_plan(workload, device_of(memory=room), name="")
    assert card.layouts["shared"].build_missing == 0
    assert board.layouts["shared"].build_missing == build.total - (room - 1_500_000_000)


def test_a_cpu_builds_nothing() -> None:
    files = {"/proc/cpuinfo": CPUINFO, "/proc/meminfo": meminfo(32_000, 30_000)}
    device = find_device("cpu", FakeMachine(files=files))
    plans = {
        precision: make_plan(
            Workload(model=preset("pocket"), precision=precision), device, name="pocket"
        )
        for precision in PRECISIONS
    }
    plan = plans["fp16"]
    assert (plan.library, plan.layout, plan.fits) == ("onnxruntime-cpu", "shared", True)
    assert plan.layouts["shared"].build is None and plan.layouts["shared"].engines == 0
    before = [[launch.seconds for launch in plans[p].launches[:-1]] for p in ("fp16", "fp32")]
    assert before[0] == pytest.approx(before[1], rel=0.01), "a CPU computes fp16 graphs in fp32"
    assert plan.launches[-1].seconds > plans["fp32"].launches[-1].seconds, "2.25 × up-sampling"
    peaks = {p: plans[p].layouts["shared"].footprint.peak for p in PRECISIONS}
    assert peaks["fp16"] > peaks["fp32"] > peaks["int8"]


def test_int8_has_a_rate_of_its_own_on_a_cpu() -> None:
    """Products of rounded numbers at the one rate, attention, head and sampling at the other."""
    device = device_of(sm=None, bandwidth=1e15, compute_rate=1.2e12, full_rate=4e11)
    workload = Workload(model=preset("var-d16"), precision="int8")
    for launch in make_plan(workload, device, name="").launches:
        work = launch.work
        seconds = work.compute_operations / 1.2e12 + work.full_operations / 4e11
        assert (launch.bound, launch.seconds) == ("compute", seconds)
    for precision in ("fp32", "fp16"):
        assert device.rate(precision) == 4e11
    assert (device.rate("int8"), DEVICES["thor"].rate("fp16")) == (1.2e12, 2070e12 / 8)


def test_int8_is_refused_on_a_gpu() -> None:
    workload = Workload(model=preset("pocket"), precision="int8")
    with pytest.raises(UsageError, match=r"onnxruntime-cpu, not for TensorRT on Jetson Thor"):
        make_plan(workload, DEVICES["thor"], name="")


def test_what_is_taken_of_a_bundle() -> None:
    every = ("int8", "fp32", "fp16")
    assert (cpu_precision(every), gpu_precision(every, "")) == ("int8", "fp16")
    assert (cpu_precision(every[1:]), gpu_precision(every[:2], "")) == ("fp32", "fp32")
    assert cpu_precision(("fp16",)) == "fp16"
    with pytest.raises(BackendError, match=r"has only int8 graphs.*not for TensorRT; export"):
        gpu_precision(("int8",), "TensorRT")


def test_json_is_plain_and_complete() -> None:
    model = preset("pocket")
    manifest = manifest_of(model, names.STEP)
    plan = make_plan(Workload(model=model), DEVICES["thor"], name="build/pocket", manifest=manifest)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["layout"] == "shared" and data["reason"] == "the bundle holds no other layout"
    assert (data["bundle_bytes"], data["bundle_measured"]) == (1000, True)
    held = data["layouts"]["per-scale"]["footprint"]
    assert held["peak"] == plan.layouts["per-scale"].footprint.peak
    assert data["layouts"]["shared"]["build"]["total"] > 0
    assert data["device"]["available"] == DEVICES["thor"].available
    assert sum(launch["seconds"] for launch in data["launches"]) == pytest.approx(data["seconds"])
    assert any("floor" in text for text in data["assumptions"])

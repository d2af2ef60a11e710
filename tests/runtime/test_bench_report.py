"""What is compared with what, the floors, and the numbers of a report."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fake_machine import FakeMachine, jetson, meminfo, workstation
from var_deploy import names
from var_deploy.bench.figure import draw, figure_title
from var_deploy.bench.power import Energy
from var_deploy.bench.rates import Rates
from var_deploy.bench.report import BenchReport, Result, Run, Surroundings
from var_deploy.bench.rounds import Comparison, Rated, Rounds
from var_deploy.bench.run import (
    PEERS,
    Settings,
    entries,
    evaluate,
    generation_rooflines,
    measured_device,
    weights_used,
)
from var_deploy.bench.worker import About, Sample
from var_deploy.cli.bench import _as_text
from var_deploy.config import RuntimeConfig
from var_deploy.host.installation import pip_install
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.planning.plan import launch_times
from var_deploy.planning.workload import workload_of

RATES = Rates(
    gemm={"fp32": 4e11, "int8": 1.2e12},
    conv={"fp32": 4.5e11, "int8": 1.5e12},
    bandwidth=3e10,
    probes={},
    threads=2,
)
CPUINFO = "processor\t: 0\nmodel name\t: A Fast One\nflags\t\t: fpu avx2 avx512_vnni avx512fish\n"
PC = FakeMachine(
    files={
        "/proc/cpuinfo": CPUINFO,
        "/proc/meminfo": meminfo(16_000, 8_000),
        "/etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n',
    },
    processors=2,
    kind="Linux x86_64",
)
OURS = tuple(RuntimeConfig(precision=precision, threads=3) for precision in ("auto", "fp32"))
ALL = Settings(configs=OURS, against=tuple(PEERS), batches=(4,))


@pytest.fixture
def manifest(export_to: Callable[..., Path]) -> Manifest:
    """Two images a launch, both layouts."""
    return read_manifest(export_to(batch=2, layout="both"))


def result(name: str, seconds: float = 0.1, **changes: Any) -> Result:
    """A worker that took this long, and a tenth longer the next time."""
    launches = {"scale_00": 0.5 * seconds, "decoder": 0.4 * seconds}
    return Result(
        name=name,
        ours=name.startswith("var-deploy"),
        samples=[
            Sample(seconds=seconds, launches=launches),
            Sample(seconds=1.1 * seconds, launches=launches),
        ],
        **changes,
    )


# what runs


def test_everything_is_a_program_of_its_own() -> None:
    everything = dataclasses.replace(PC, modules={"torch": PC, "openvino": PC})
    found = entries(Path("b"), ALL, 4, everything)
    assert [(entry.name, entry.ours, entry.problem) for entry in found] == [
        ("var-deploy", True, ""),
        ("var-deploy fp32", True, ""),
        *((name, False, "") for name in PEERS),
    ]
    common = ["b", "--batch", "4", "--threads", "3"]
    for entry in found:
        bundle = entry.command.index("b")
        assert entry.command[bundle - 1].startswith("var_deploy.")
        assert list(entry.command[bundle : bundle + 5]) == common
    assert found[1].command[-4:] == ["--precision", "fp32", "--backend", "auto"]
    assert found[3].command[-2:] == ["--baseline", "torch-bf16"]
    assert found[-1].command[-2:] == ["--hint", "bf16"]
    free = entries(Path("b"), Settings(), 1, everything)
    bundle = free[0].command.index("b")
    assert list(free[0].command[bundle + 2 : bundle + 5]) == ["1", "--threads", "0"]


def test_the_programs_of_peers_are_there() -> None:
    for peer in PEERS.values():
        assert importlib.util.find_spec(peer.module), peer.module


def test_what_is_not_installed_says_what_to_install() -> None:
    problems = {entry.name: entry.problem for entry in entries(Path("b"), ALL, 4, PC)}
    told = f"torch is not installed; run {pip_install('export', 'torch')}"
    assert problems["torch-compile"] == told
    told = f"openvino is not installed; run {pip_install('openvino')}"
    assert problems["openvino"] == told


def test_the_machine_is_described() -> None:
    here = Surroundings.of(PC)
    assert here == Surroundings(
        cpu="A Fast One",
        processors=2,
        isa=("avx2", "avx512_vnni"),
        memory=16_000 << 20,
        system="Debian GNU/Linux 12, Linux x86_64",
        python="3.10.12",
    )
    assert "Orin Nano" in Surroundings.of(jetson()).cpu
    bare = Surroundings.of(dataclasses.replace(PC, files={}))
    assert (bare.memory, bare.isa) == (0, ())
    assert bare.cpu


# rooflines


def test_rooflines_are_those_of_plan_at_the_measured_rates(manifest: Manifest) -> None:
    device = measured_device(RATES)
    planned = launch_times(workload_of(manifest, "fp32"), device)
    once = generation_rooflines(manifest, "fp32", 2, device)
    expected = [time.seconds for time in planned]
    assert [roofline.seconds for roofline in once] == pytest.approx(expected)
    thrice = generation_rooflines(manifest, "fp32", 5, device)
    for one, three in zip(once, thrice, strict=True):
        assert three.seconds == pytest.approx(3 * one.seconds), "five images are three batches"
        assert (three.operations, three.traffic) == (3 * one.operations, 3 * one.traffic)


def test_int8_products_have_a_rate_of_their_own() -> None:
    device = measured_device(RATES)
    assert (device.rate("int8"), device.rate("fp32"), device.rate("fp16")) == (1.2e12, 4e11, 4e11)
    assert (device.bandwidth, device.sm) == (3e10, None)


def test_weights_are_counted_once(manifest: Manifest) -> None:
    graphs = manifest.graphs["fp32"]
    wanted = [names.CONDITION, names.STEP, names.DECODER]
    assert weights_used(manifest, "fp32") == sum(graphs[name].weight_bytes for name in wanted)
    static = {name: graph for name, graph in graphs.items() if name != names.STEP}
    without = dataclasses.replace(manifest, graphs={"fp32": static})
    assert weights_used(without, "fp32") == weights_used(manifest, "fp32")


def test_each_is_held_against_what_it_ran_on(manifest: Manifest) -> None:
    comparison = Comparison([], [], Rounds(images=2, warm_up=0, repeat=1), lambda *a: None)
    on_cpu = About(settings={}, backend="onnxruntime-cpu", graphs="fp32")
    on_gpu = About(settings={}, backend="tensorrt", graphs="fp32")
    comparison.results = [
        result("var-deploy", about=on_cpu),
        result("var-deploy fp32", about=on_gpu),
        result("openvino", about=About(settings={"precision": "f32"}, graphs="fp32")),
        result("torch-bf16", about=About(settings={"precision": "bf16 by autocast"})),
        Result(name="absent", ours=False, problem="not installed"),
    ]
    comparison.rated = Rated(problem="no probe")
    run = evaluate(comparison, manifest, 2, workstation())
    cpu, gpu, openvino, torch, _ = run.results
    assert (cpu.rooflines, cpu.reached) == ((), None)
    assert cpu.roofline_problem == "the rates of this machine could not be measured: no probe"
    assert gpu.rooflines, "a GPU's rates are published ones"
    assert openvino.weights == cpu.weights == weights_used(manifest, "fp32")
    assert torch.weights is None
    assert (run.rates, run.rates_problem) == (None, "no probe")


# the report


def test_numbers_of_a_result() -> None:
    found = result("var-deploy", peak=300, weights=200)
    assert found.whole.median == pytest.approx(0.105)
    assert found.launches["decoder"].median == pytest.approx(0.04)
    shares = (1 - 0.9, 1 - 0.9 / 1.1)
    assert found.host_share == pytest.approx(sum(shares) / 2)
    assert found.peak_over_weights == 1.5
    found.samples.append(Sample(seconds=0.1))
    assert (found.launches, found.host_share) == ({}, None), "not all could tell"
    assert result("torch", peak=None, weights=200).peak_over_weights is None


def make_report(manifest: Manifest) -> BenchReport:
    ours = result(
        "var-deploy",
        about=About(settings={"precision": "fp32"}, graphs="fp32", reason="no GPU"),
        cold=0.5,
        cold_parts={"imports": 0.2, "checking": 0.05, "opening": 0.1, "first image": 0.15},
        peak=300_000_000,
        weights=200_000_000,
        energy=Energy(by_source={"package-0": 3.0, "dram-0": 0.5}),
    )
    ours.rooflines = [
        roofline
        for roofline in generation_rooflines(manifest, "fp32", 2, measured_device(RATES))
        if roofline.name in ours.launches
    ]
    slow = result("torch", 0.2, peak_problem="no /proc", energy=Energy(problem="no meter"))
    absent = Result(name="openvino", ours=False, problem="not installed")
    return BenchReport(
        name="small",
        manifest=manifest,
        surroundings=Surroundings.of(PC),
        settings=ALL.to_json(),
        date="2026-11-22T10:00:00+00:00",
        runs=[Run(images=2, results=[ours, slow, absent], rates=RATES)],
    )


def test_the_report_as_json(manifest: Manifest) -> None:
    data = json.loads(json.dumps(make_report(manifest).to_json(), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["machine"]["isa"] == ["avx2", "avx512_vnni"]
    assert data["bundle"]["digest"] == manifest.digest()
    assert data["bundle"]["sampling"]["cfg"] == 2.0
    assert data["settings"]["threads"] == 3
    (run,) = data["runs"]
    assert run["rates"]["gemm"] == {"fp32": 4e11, "int8": 1.2e12}
    ours, slow, absent = run["contenders"]
    assert (ours["ratio"], slow["ratio"]) == (1.0, 2.0)
    assert ours["generation"]["median_ms"] == 105.0
    assert ours["images_per_second"] == pytest.approx(2 / 0.105, rel=1e-5)
    assert ours["memory"]["peak_over_weights"] == 1.5
    assert ours["joules"]["an_image"] == 3.5
    assert sum(ours["cold_parts_s"].values()) == pytest.approx(ours["cold_s"])
    assert ours["cold_over_warm"] == pytest.approx(0.5 / 0.105, abs=1e-4)
    assert (slow["cold_parts_s"], slow["cold_over_warm"]) == ({}, None)
    assert data["settings"]["busy"] == 0
    assert ours["floor"]["launches"][-1]["launch"] == "decoder"
    assert ours["floor"]["measured_ms"] == 105.0
    assert slow["memory"]["peak_pss"] is None, "unknown is not 0"
    assert slow["memory"]["problem"] == "no /proc"
    assert (slow["joules"]["an_image"], slow["joules"]["problem"]) == (None, "no meter")
    assert slow["floor"] is None
    assert absent["problem"] == "not installed" and "generation" not in absent


def test_only_our_own_failures_count(manifest: Manifest) -> None:
    report = make_report(manifest)
    assert report.failed == []
    report.runs[0].results[0].problem = "out of memory"
    assert [failed.name for failed in report.failed] == ["var-deploy"]
    first = report.runs[0].first
    assert first is not None and first.name == "torch", "the first that ran"


def test_the_report_as_text(manifest: Manifest) -> None:
    text = _as_text(make_report(manifest))
    cold = text.index("cold start, s")
    row = text[cold:].splitlines()[2].split()
    assert row == ["var-deploy", "0.20", "0.05", "0.10", "0.15", "0.50", "4.76"]
    assert "of other work" not in text
    text = text[:cold] + text[text.index("this machine, measured") :]
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    ours = lines["var-deploy"][1:]
    assert ours[:6] == ["105.0", "101.0", "109.5", "19", "1.00", "14.1%"]
    assert ours[7:] == ["0.50", "300.0", "MB", "1.50", "3.5"]
    assert lines["torch"][5] == "2.00"
    assert lines["torch"][-4:] == ["–", "unknown", "–", "unknown"]
    assert lines["openvino"][1:] == ["–"] * 11
    assert lines["decoder"][1] == "40.00"
    for part in (
        "A Fast One, 2 processors, 16.78 GB; avx2 avx512_vnni",
        "products 400 GFLOP/s in fp32, 1200 GOP/s in int8",
        "openvino: not run: not installed",
        "memory is unknown: no /proc",
        "joules: no meter",
        "cfg 2, top-k 0, top-p 0.95",
        "threads: 3",
    ):
        assert part in text.replace("\n  ", " ")
    assert max(map(len, text.splitlines())) <= 100


def test_other_work_is_named(manifest: Manifest) -> None:
    report = make_report(manifest)
    for busy, words in ((1, "1 process of other work"), (3, "3 processes of other work")):
        settings = dataclasses.replace(ALL, busy=busy).to_json()
        beside = dataclasses.replace(report, settings=settings)
        assert beside.to_json()["settings"]["busy"] == busy
        assert f"busy      {words} beside everything" in _as_text(beside)
        assert f"beside {words}" in figure_title(beside)
    assert "other work" not in figure_title(report)


def test_the_report_as_a_figure(manifest: Manifest, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = make_report(manifest)
    silent = result("torch")
    silent.samples = [Sample(seconds=0.1)]
    nobody = Run(images=1, results=[], rates=None, rates_problem="no probe")
    runs = [*report.runs, Run(images=1, results=[silent], rates=RATES), nobody]
    sizes = []
    for number, chosen in enumerate((runs[:1], runs)):
        path = tmp_path / f"{number}.png"
        draw(dataclasses.replace(report, runs=chosen), path)
        with Image.open(path) as image:
            sizes.append(image.size)
            assert len(set(image.convert("L").resize((50, 50)).tobytes())) > 5, "something on it"
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 2 * sizes[0][1]

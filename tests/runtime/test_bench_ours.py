"""Our own worker, and the process that measures the machine."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_tensorrt import cudart
from var_deploy import __version__
from var_deploy.bench import rates
from var_deploy.bench.ours import Ours
from var_deploy.bench.rates import RateProbes, amounts
from var_deploy.config import RuntimeConfig
from var_deploy.errors import BackendError, BundleError
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.cuda import Cuda, CudaClock, CudaMemory
from var_deploy.runtime.measure import add_launches

ExportTo = Callable[..., Path]
CPU: dict[str, Any] = {"precision": "fp32", "backend": "onnxruntime-cpu", "threads": 1}
LAUNCHES = ["condition", "scale_00", "scale_01", "scale_02", "decoder"]


@pytest.fixture
def bundle(export_to: ExportTo) -> Path:
    """Two images a launch."""
    return export_to(batch=2)


@pytest.fixture
def worker(bundle: Path) -> Iterator[Ours]:
    """Five images a generation: three batches, the last one filled up."""
    opened = Ours(bundle, 5, RuntimeConfig(**CPU))
    yield opened
    opened.close()


def test_it_makes_what_a_pipeline_makes(
    worker: Ours, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    generate = Pipeline.generate
    monkeypatch.setattr(
        Pipeline, "generate", lambda *a, **k: made.append(generate(*a, **k)) or made[-1]
    )
    worker.generate()
    with Pipeline.load(bundle, **CPU) as pipe:
        np.testing.assert_array_equal(made[0], generate(pipe, [0, 2, 4, 1, 3]))
        described = pipe.describe()
    assert worker.describe().settings == {
        "var-deploy": __version__,
        **dataclasses.replace(described, reason="").to_json(),
        "images a launch": "2",
        "clock": "wall clock",
    }
    loading = worker.describe().loading
    assert list(loading) == ["checking", "opening"] and min(loading.values()) > 0


def test_launches_of_all_batches_are_added_up(worker: Ours) -> None:
    for _ in range(2):
        sample = worker.generate()
        assert list(sample.launches) == LAUNCHES
        assert 0 < sum(sample.launches.values()) < sample.seconds
        assert min(sample.launches.values()) > 0


def test_launches_that_do_not_fit_are_left_out() -> None:
    laps = [1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 8.0]  # every second one lies between two launches
    assert add_launches(laps, ["first", "last"]) == {"first": 5.0, "last": 10.0}
    assert add_launches(laps, ["first", "last", "one more"]) == {}
    assert add_launches([], ["first"]) == {}


def test_a_bundle_is_checked_as_ever(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = copy / "fp32" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="does not match its hash"):
        Ours(copy, 1, RuntimeConfig(**CPU))
    with pytest.raises(BundleError, match="no int8 graphs"):
        Ours(bundle, 1, RuntimeConfig(**{**CPU, "precision": "int8"}))


def test_a_gpu_is_clocked_by_its_own_events() -> None:
    cudart.reset()
    cuda = Cuda(cudart)
    assert isinstance(CudaMemory(cuda).clock(), CudaClock)
    cuda.close()


# the machine


def test_every_probe_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "COPIED", 1 << 20)
    monkeypatch.setattr(rates, "REPEATS", 1)
    probes = RateProbes(1)
    try:
        assert probes.describe().threads == 1
        sample = probes.generate()
    finally:
        probes.close()
    assert sample.launches.keys() == amounts(1).keys()
    assert 0 < min(sample.launches.values()) < sum(sample.launches.values()) < sample.seconds


def test_amounts() -> None:
    found = amounts(2)
    assert found["gemm_fp32 512"] == found["gemm_int8 512"] == 2 * 512 * 1024 * 4096
    assert found["conv_int8"] == 2 * 9 * 160 * 160 * 128 * 128
    assert found["copy"] == 2 * 2 * (64 << 20)
    assert amounts(256)["copy"] == 2 * (2 << 30), "two arrays of 2 GiB are enough for anyone"


def test_rates_need_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="onnxruntime is not installed"):
        RateProbes(1)

"""The ONNX Runtime CUDA backend on a real GPU, against the same graphs on the CPU."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.conftest import COMMAND

from var_deploy.device_check.agreement import (
    Outcome,
    Reference,
    compare,
    evaluate,
    make_cases,
    observe,
)
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.backends.onnxruntime_cuda import OrtCudaBackend
from var_deploy.runtime.loop import Layout, ScaleLoop
from var_deploy.sampling import Sampling, uniforms

IMAGES = 4
GROWTH = 1 << 21  # CUDA hands out memory in pieces of 2 MiB
PATIENCE = 120.0  # seconds
CLIENTS = 50

Open = Callable[..., OrtCudaBackend]


@pytest.fixture(scope="module")
def manifest(pocket: Path) -> Manifest:
    return read_manifest(pocket)


@pytest.fixture(scope="module")
def reference(pocket: Path, manifest: Manifest) -> Reference:
    def loop() -> ScaleLoop:
        return ScaleLoop(pocket, manifest, OrtCpuBackend(), "fp32", "shared")

    return Reference(loop, make_cases(manifest, IMAGES))


def outcome(
    pocket: Path, backend: OrtCudaBackend, reference: Reference, precision: str, layout: Layout
) -> Outcome:
    loop = ScaleLoop(pocket, read_manifest(pocket), backend, precision, layout)
    try:
        return observe(loop, reference, precision)
    finally:
        loop.close()


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tokens_and_images_are_those_of_the_cpu(
    pocket: Path, reference: Reference, open_backend: Open, precision: str, layout: Layout
) -> None:
    plain = outcome(pocket, open_backend(cuda_graph=False), reference, precision, layout)
    _, problems = evaluate(plain, reference)
    assert not problems
    assert plain.repeats
    recorded = outcome(pocket, open_backend(), reference, precision, layout)
    assert recorded.repeats
    result, problems = compare(recorded, plain)
    assert not problems
    assert result["equal"], "a CUDA graph changes what it records"


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_a_recording_follows_every_setting(
    pocket: Path, manifest: Manifest, open_backend: Open, layout: Layout
) -> None:
    """Nothing of what a scale is told may be worked out by the host while it is recorded."""
    settings = [
        Sampling(),
        Sampling(cfg=0.0, top_k=1),
        Sampling(cfg=5.0, top_k=3, top_p=0.5),
        Sampling(top_k=900, top_p=0.96, temperature=0.7),
        Sampling(cfg=(0.0, 1.0, 4.0, 1.0, 2.0), top_k=0, top_p=0.3, temperature=1.5),
    ]
    draws = np.stack([uniforms(7, n, manifest.model.total_tokens) for n in range(manifest.batch)])
    found = []
    for recorded in (True, False):
        backend = open_backend(cuda_graph=recorded)
        loop = ScaleLoop(pocket, manifest, backend, "fp16", layout)
        tokens = []
        for number, chosen in enumerate(settings):
            loop.run([number] * manifest.batch, draws, chosen)
            tokens.append(np.concatenate([scale.ravel() for scale in loop.tokens()]))
        loop.close()
        found.append(tokens)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({tokens.tobytes() for tokens in found[0]}) == len(settings)


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_every_launch_is_recorded(pocket: Path, open_backend: Open, layout: Layout) -> None:
    with Pipeline.load(pocket, backend="onnxruntime-cuda", layout=layout) as pipe:
        assert pipe.describe().settings["cuda_graph"] == "on"


def test_auto_takes_the_gpu(pocket: Path, open_backend: Open) -> None:
    with Pipeline.load(pocket) as pipe:
        how = pipe.describe()
    assert (how.backend, how.precision) == ("onnxruntime-cuda", "fp16")


def test_five_hundred_images_take_no_more_memory_than_ten(
    pocket: Path, open_backend: Open, cuda: Cuda
) -> None:
    with Pipeline.load(pocket, backend="onnxruntime-cuda") as pipe:
        pipe.generate([0] * 10)
        before = cuda.free_memory()[0]
        pipe.generate([1] * 490)
        assert before - cuda.free_memory()[0] <= GROWTH


def test_memory_comes_back_when_a_pipeline_is_closed(
    pocket: Path, open_backend: Open, cuda: Cuda
) -> None:
    def once() -> int:
        with Pipeline.load(pocket, backend="onnxruntime-cuda") as pipe:
            pipe.generate([0])
        return cuda.free_memory()[0]

    once()  # libraries keep what they load
    first = once()
    assert first - min(once() for _ in range(2)) <= GROWTH


def started(*arguments: str | Path, **how: Any) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes, **how)


def test_ctrl_c_in_the_middle_ends_it_and_gives_the_memory_back(
    pocket: Path, open_backend: Open, cuda: Cuda, tmp_path: Path
) -> None:
    free = cuda.free_memory()[0]
    out = tmp_path / "many"
    many = ("--backend", "onnxruntime-cuda", "--per-class", "500", "--shard-size", "8")
    with started("sample", pocket, *many, "--out", out) as process:
        ended = time.monotonic() + PATIENCE
        while not list(out.glob("*.tar")) and process.poll() is None:
            assert time.monotonic() < ended, "nothing was made"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert free - cuda.free_memory()[0] <= GROWTH


def test_two_processes_share_a_gpu(pocket: Path, open_backend: Open, tmp_path: Path) -> None:
    def generate(*names: str) -> list[bytes]:
        processes = [
            started(
                *("generate", pocket, "--backend", "onnxruntime-cuda", "--quiet"),
                *("--count", "64", "--seed", "3", "--out", tmp_path / name),
            )
            for name in names
        ]
        for process in processes:
            _, told = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, told
        return [(tmp_path / name).read_bytes() for name in names]

    [alone] = generate("alone.png")
    assert generate("one.png", "other.png") == [alone, alone]


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address + "/v1/images", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def pictures(answer: Any) -> list[bytes]:
    return [base64.b64decode(image["png"]) for image in answer["images"]]


def test_fifty_clients_are_served_what_each_would_get_alone(
    pocket: Path, open_backend: Open
) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    serve = ("serve", pocket, "--backend", "onnxruntime-cuda", "--port", "0", "--queue", "400")
    with started(*serve, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line

            def ask(client: int) -> Sequence[list[bytes]]:
                bodies = [{"labels": [client % 10], "seed": 4 * client + n} for n in range(4)]
                return [pictures(post(found[0], body)) for body in bodies]

            with ThreadPoolExecutor(CLIENTS) as clients:
                together = list(clients.map(ask, range(CLIENTS)))
            assert [ask(client) for client in range(3)] == together[:3]
            assert len({png for client in together for [png] in client}) == 4 * CLIENTS
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def off_by_more_than_one(found: Any, expected: Any) -> float:
    """The share of 8-bit values that differ by more than 1."""
    return float((np.abs(np.asarray(found).astype(int) - np.asarray(expected)) > 1).mean())


def test_pixels_differ_little_from_the_cpus(pocket: Path, open_backend: Open) -> None:
    found = {}
    for backend in ("onnxruntime-cuda", "onnxruntime-cpu"):
        with Pipeline.load(pocket, backend=backend, precision="fp32") as pipe:
            found[backend] = pipe.generate([0, 5], seed=1)
    assert off_by_more_than_one(*found.values()) < 0.01


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_sentences_are_drawn_as_on_the_cpu(
    pocket_text: Path, open_backend: Open, layout: Layout
) -> None:
    prompts = ["a purple fish under a full moon", "a small red boat"]
    with Pipeline.load(pocket_text, backend="onnxruntime-cpu", precision="fp32") as pipe:
        expected = pipe.generate(prompts=prompts, negative="blue", seed=1)
    how: Any = {"backend": "onnxruntime-cuda", "layout": layout}
    with Pipeline.load(pocket_text, precision="fp32", **how) as pipe:
        assert pipe.describe().settings["cuda_graph"] == "on"
        assert (
            off_by_more_than_one(pipe.generate(prompts=prompts, negative="blue", seed=1), expected)
            < 0.01
        )
        # without a negative prompt another graph makes the condition of the unguided rows
        first, again = (pipe.generate(prompts=prompts, seed=2) for _ in range(2))
        np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    with Pipeline.load(pocket_text, precision="fp16", **how) as pipe:
        assert pipe.describe().settings["cuda_graph"] == "on"
        pipe.generate(prompts=prompts, seed=1)

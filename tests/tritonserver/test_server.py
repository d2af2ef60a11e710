"""NVIDIA's server draws what `Pipeline` draws, asked over HTTP and gRPC.

The tests follow one server through its life, in this order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tritonserver.server import MODEL, PATIENCE, PYTHON, Triton

from cli_steps import done
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.triton.config import version_of

SEED = 2**64 - 1
RAMP = [0.1, 1.7, 2.3]  # none of which is a number of fp32


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_images_are_the_pipelines(
    triton: Triton, pipe: Pipeline, tmp_path: Path, protocol: str
) -> None:
    labels = [2, 0, 4, 2]
    answers = triton.ask(
        protocol,
        tmp_path,
        {"LABEL": [[3]], "SEED": [[SEED]]},
        {"LABEL": [[n] for n in labels], "SEED": [[7], [8], [9], [10]], "NUMBER": [[0]] * 4},
        {
            "LABEL": [[1]],
            "SEED": [[5]],
            "CFG": [RAMP],
            "TOP_K": [[20]],
            "TOP_P": [[0.96]],
            "TEMPERATURE": [[0.9]],
        },
        {"LABEL": [[-1]], "SEED": [[5]]},
    )
    assert set(answers) == {"0", "1", "2", "3"}
    np.testing.assert_array_equal(answers["0"], pipe.generate([3], SEED))
    np.testing.assert_array_equal(answers["1"], pipe.generate(labels, 7))
    settings = {"cfg": RAMP, "top_k": 20, "top_p": 0.96, "temperature": 0.9}
    np.testing.assert_array_equal(answers["2"], pipe.generate([1], 5, **settings))
    np.testing.assert_array_equal(answers["3"], pipe.generate(None, 5))


def test_requests_share_batches(triton: Triton, pipe: Pipeline, tmp_path: Path) -> None:
    """Also those with other settings, which are drawn one group after the other."""
    before = triton.batches()
    questions = [{"LABEL": [[n % 5]], "SEED": [[n]], "CFG": [[float(n % 2)]]} for n in range(8)]
    answers = triton.ask("grpc", tmp_path, *questions)
    for n in range(8):
        np.testing.assert_array_equal(answers[str(n)], pipe.generate([n % 5], n, cfg=n % 2))
    images, executions = (now - then for now, then in zip(triton.batches(), before, strict=True))
    assert images == 8
    assert executions < images


def test_what_is_wrong_is_told_to_the_one_who_asked(
    triton: Triton, pipe: Pipeline, tmp_path: Path
) -> None:
    answers = triton.ask(
        "grpc",
        tmp_path,
        {"LABEL": [[5]], "SEED": [[1]]},
        {"LABEL": [[4]], "SEED": [[1]]},
        {"LABEL": [[4]], "SEED": [[1]], "TEMPERATURE": [[0.0]]},
        {"LABEL": [[4]], "SEED": [[1]], "NUMBER": [[-1]]},
    )
    assert set(answers) == {"error 0", "1", "error 2", "error 3"}
    assert "label 5 is out of range" in str(answers["error 0"])
    assert "temperature must lie between" in str(answers["error 2"])
    assert "NUMBER must be 0 or more, found -1" in str(answers["error 3"])
    assert not any("\n" in str(answers[f"error {n}"]) for n in (0, 2, 3))
    np.testing.assert_array_equal(answers["1"], pipe.generate([4], 1))


def test_a_request_that_waited_too_long(triton: Triton) -> None:
    """It waits for company for half a second, and said that a millisecond is too much."""
    one = {"shape": [1, 1], "data": [1]}
    question = {
        "parameters": {"timeout": 1000},
        "inputs": [
            {"name": "LABEL", "datatype": "INT64", **one},
            {"name": "SEED", "datatype": "UINT64", **one},
        ],
    }
    status, said = triton.get(f"/v2/models/{MODEL}/infer", "POST", json.dumps(question))
    assert status == 503
    assert b"timeout expired" in said


def test_the_documented_client(triton: Triton, pipe: Pipeline, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "TRITON.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    script = example.replace("127.0.0.1:8000", f"127.0.0.1:{triton.http}").replace("pocket", MODEL)
    script += f"np.save({str(tmp_path / 'images.npy')!r}, images)\n"
    subprocess.run([PYTHON, "-c", script], check=True, timeout=PATIENCE)
    found = np.load(tmp_path / "images.npy")
    np.testing.assert_array_equal(found, pipe.generate([3], 7, cfg=2.5))

    (ask,) = re.findall(r"^curl .*?\]\}'$", text, re.M | re.S)
    ask = ask.replace(":8000", f":{triton.http}").replace("pocket", MODEL)
    subprocess.run(["bash", "-c", ask], check=True, timeout=PATIENCE, cwd=tmp_path)
    found = np.frombuffer((tmp_path / "answer").read_bytes()[-8 * 8 * 3 :], np.uint8)
    np.testing.assert_array_equal(found.reshape(8, 8, 3), pipe.generate([3], 7)[0])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_prompts(
    triton: Triton,
    repository: Path,
    text_repository: Path,
    text_bundle: Path,
    tmp_path: Path,
    protocol: str,
) -> None:
    """A second model of the same server, loaded with the first of the protocols."""
    tokenizers = [PYTHON, "-c", "import tokenizers"]
    if subprocess.run(tokenizers, capture_output=True, check=False).returncode:
        pytest.skip("tokenizers is not installed in .venv/triton: make test installs it")
    if not (repository / "text").exists():
        shutil.copytree(text_repository / "text", repository / "text")
        status, said = triton.get("/v2/repository/models/text/load", "POST")
        assert status == 200, said
    prompts = ["a red fox", "狐狸 at sea"]
    answers = triton.ask(
        protocol,
        tmp_path,
        {"PROMPT": [[prompts[0]]], "SEED": [[SEED]]},
        {"PROMPT": [[one] for one in prompts], "SEED": [[7], [8]], "NEGATIVE": [["fog"], [""]]},
        {"PROMPT": [[""]], "SEED": [[5]], "CFG": [RAMP], "TOP_P": [[0.6]], "TEMPERATURE": [[0.9]]},
        {"PROMPT": [["a\0b"]], "SEED": [[5]]},
        model="text",
    )
    assert set(answers) == {"0", "1", "2", "error 3"}
    assert "character 1 of PROMPT is the control character" in str(answers["error 3"])
    with Pipeline.load(text_bundle, threads=1) as pipe:
        np.testing.assert_array_equal(answers["0"], pipe.generate(prompts=prompts[0], seed=SEED))
        for n, negative in enumerate(("fog", "")):
            image = pipe.generate(prompts=prompts[n], negative=negative, seed=7 + n)
            np.testing.assert_array_equal(answers["1"][n], image[0])
        settings = {"cfg": RAMP, "top_p": 0.6, "temperature": 0.9}
        np.testing.assert_array_equal(answers["2"], pipe.generate(prompts="", seed=5, **settings))
    url = f"http://127.0.0.1:{triton.http}/v2/models/text"
    options = ("--concurrency", "2", "--repeat", 1, "--warm-up", 0, "--json", "-")
    (found,) = json.loads(done("bench", url, *options).stdout)["services"]
    assert (found["kind"], found["levels"][0]["images"]) == ("triton", 8)


def test_another_bundle_takes_over(
    triton: Triton, other: Path, repository: Path, tmp_path: Path
) -> None:
    """As docs/TRITON.md describes it; a version that cannot be loaded changes nothing."""
    done("triton", other, "--out", tmp_path / "new", "--name", MODEL, "--threads", 1)
    model, new = repository / MODEL, tmp_path / "new" / MODEL
    version = str(version_of(read_manifest(other).digest()))
    (old,) = json.loads(triton.get(f"/v2/models/{MODEL}")[1])["versions"]
    question = {"LABEL": [[1]], "SEED": [[3]]}
    before = triton.ask("http", tmp_path, question)["0"]

    shutil.copytree(model / old, model / version)  # the wrong bundle
    shutil.copyfile(new / "config.pbtxt", model / "config.pbtxt")
    status, said = triton.get(f"/v2/repository/models/{MODEL}/load", "POST")
    assert status != 200
    assert b"another bundle lies there" in said
    np.testing.assert_array_equal(triton.ask("http", tmp_path, question)["0"], before)

    shutil.rmtree(model / version)
    os.rename(new / version, model / version)
    status, said = triton.get(f"/v2/repository/models/{MODEL}/load", "POST")
    assert status == 200, said
    with Pipeline.load(other, threads=1) as pipe:
        expected = pipe.generate([1], 3)
    np.testing.assert_array_equal(triton.ask("http", tmp_path, question)["0"], expected)
    assert not np.array_equal(expected, before)
    assert json.loads(triton.get(f"/v2/models/{MODEL}")[1])["versions"] == [version]


def test_its_speed_is_measured(triton: Triton) -> None:
    url = f"http://127.0.0.1:{triton.http}/v2/models/{MODEL}"
    before = triton.batches()[0]
    options = ("--concurrency", "4", "--repeat", 1, "--warm-up", 0, "--json", "-")
    (found,) = json.loads(done("bench", url, *options).stdout)["services"]
    assert found["kind"] == "triton"
    assert (found["about"]["batch"], found["about"]["threads"]) == ("4", "1")
    (level,) = found["levels"]
    assert level["images"] == triton.batches()[0] - before == 16

"""A bundle that takes prompts on Ray: the text encoder goes where the bundle goes."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving.client import Client

from cli_steps import done, refused, tree
from var_deploy.config import RuntimeConfig
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline

pytest.importorskip("ray", reason="the extra ray is not installed")

DEER, SEA = "a red deer", "the sea at dawn"


@pytest.fixture
def apart(text_bundle: Path, tmp_path: Path) -> tuple[Any, ...]:
    """A bundle without its text encoder, and the option that says where that is."""
    alone = shutil.copytree(text_bundle, tmp_path / "alone")
    return alone, "--text-encoder", text_bundle.parent / "t5"


def test_a_set_is_that_of_one_process(apart: tuple[Any, ...], nodes: Any, tmp_path: Path) -> None:
    sample = ["sample", *apart, "--prompt", DEER, "--prompt", SEA, "--per-prompt", 2]
    sample += ["--shard-size", 2, "--threads", 1]
    done(*sample, "--out", tmp_path / "one")
    ray = ("--ray", nodes.address, "--workers", 1)
    report = json.loads(done(*sample, "--out", tmp_path / "set", *ray, "--json").stdout)
    assert (report["made"], report["ray"]["workers"]) == ([0, 1], 1)
    assert report["runtime"]["text encoder"] == "fp32, onnxruntime-cpu"
    assert tree(tmp_path / "set") == tree(tmp_path / "one")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules
def test_the_service_answers_as_one_process_does(
    apart: tuple[Any, ...], text_bundle: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process and on the cluster that is there, since starting either takes a while."""
    from var_deploy.cluster import service

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    replies = []

    def ask(handle: object) -> None:
        body = {"prompts": [DEER, SEA, DEER], "negative": "fog", "seed": 3}
        replies.append(Client(port).post("/v1/images", body))

    monkeypatch.setattr(service, "until_stopped", ask)
    monkeypatch.setattr(service, "SIGNALS", ())
    done("serve", *apart, "--ray", nodes.address, "--port", port, "--threads", 1)
    with Pipeline.load(text_bundle, threads=1) as pipe:
        expected = pipe.generate(prompts=[DEER, SEA, DEER], negative="fog", seed=3)
    np.testing.assert_array_equal(replies[0].images(), expected)


def test_without_a_text_encoder_nothing_starts(
    apart: tuple[Any, ...], nodes: Any, tmp_path: Path
) -> None:
    parts = ("a text encoder t5", "--text-encoder")
    given = ("--ray", nodes.address)
    refused(2, "serve", apart[0], *given, parts=parts)
    out = ("--out", tmp_path / "set")
    refused(2, "sample", apart[0], "--prompt", DEER, *out, *given, parts=parts)


def test_a_worker_asks_for_the_memory_of_both(
    text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from var_deploy.cluster.devices import WORKER, device_of
    from var_deploy.cluster.place import text_encoder_of
    from var_deploy.planning.text_memory import text_encoder_memory

    monkeypatch.setattr(ray, "cluster_resources", lambda: {})
    manifest = read_manifest(text_bundle)
    encoder = text_encoder_of(text_bundle, manifest)
    device = device_of(manifest, RuntimeConfig(), images=2, text_encoder=encoder)
    alone = device_of(manifest, RuntimeConfig(), images=2)
    weights = [
        (folder / "fp32" / "weights.bin").stat().st_size
        for folder in (text_bundle, text_bundle.parent / "t5")
    ]
    assert alone.memory - WORKER > weights[0]
    expected = text_encoder_memory(encoder.model, "fp32", gpu=False).peak
    assert device.memory - alone.memory == expected > weights[1]

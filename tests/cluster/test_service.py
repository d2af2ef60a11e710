"""`var-deploy serve --ray local`, from its first line to its end: answers of the local service."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster.conftest import command_line, end, processes
from serving.client import PATIENCE, Client, Reply, picture, running

from cli_steps import ONE_THREAD
from var_deploy.pipeline import Pipeline

pytest.importorskip("ray", reason="the extra ray is not installed")

QUEUE = 40
ROUTE, STREAM = "/v1/images", "/v1/images/stream"
PHOTO = picture(np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8))
EDIT = {"image": PHOTO, "box": [0, 0, 32, 64], "seed": 4, "count": 3, "keep_pixels": True}
LONG = {"labels": [1], "count": 16}


@dataclass
class Served:
    process: subprocess.Popen[str]
    client: Client

    def family(self) -> dict[int, str]:
        """Its processes and theirs."""
        found = processes()
        family = {self.process.pid: found[self.process.pid][1]}
        while new := {p: words for p, (of, words) in found.items() if of in family} - family.keys():
            family |= {pid: found[pid][1] for pid in new}
        return family


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pocket with two images a batch."""
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.assemble import load_model

    out = tmp_path_factory.mktemp("pairs") / "bundle"
    export_bundle(load_model("pocket"), out, ExportOptions(batch=2))
    return out


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "var_deploy.cli", "serve", str(bundle), "--ray", "local"]
    with subprocess.Popen(
        [*command, "--port", "0", "--queue", str(QUEUE), "--replicas", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(
            rf"serving {bundle} on http://127\.0\.0\.1:(\d+) \(Ctrl-C stops\)\n", line
        )
        assert found, line + process.stderr.read()
        yield Served(process, Client(int(found[1])))
        process.kill()


@pytest.fixture(scope="module")
def local(bundle: Path) -> Iterator[Client]:
    """The service of one process."""
    from var_deploy.serving.app import create_app
    from var_deploy.serving.settings import Settings

    with ExitStack() as stack:
        pipe = stack.enter_context(Pipeline.load(bundle, threads=1))
        yield stack.enter_context(running(create_app(pipe, Settings(queue=QUEUE))))


def said(reply: Reply) -> Any:
    """All of an answer but how long it took."""
    data = reply.data
    if reply.headers["content-type"] == "application/json":
        body = reply.json
        body.pop("seconds", None)
        data = json.dumps(body).encode()
    names = ("content-type", "content-security-policy", "x-seed", "x-scales-done")
    return reply.status, {name: reply.headers.get(name) for name in names}, data


def crowd(client: Client, bodies: list[dict[str, Any]]) -> list[Reply]:
    together = threading.Barrier(len(bodies))

    def ask(body: dict[str, Any]) -> Reply:
        together.wait()
        return client.post(ROUTE, body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(ask, bodies))


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/v1/model", "/health", "/page/app.js", "/page/no", "/nothing"],
)
def test_pages_are_those_of_the_local_service(served: Served, local: Client, path: str) -> None:
    assert said(served.client.get(path)) == said(local.get(path))


def test_what_the_application_checks_is_checked_here_too(served: Served) -> None:
    client = served.client
    foreign = client.ask("GET", "/health", None, {"Host": "evil.example"})
    assert foreign.status == 403 and "--allowed-host" in foreign.error
    assert client.ask("GET", "/health", None, {"Host": "localhost:8000"}).status == 200
    head = client.ask("HEAD", "/v1/model", None, {})
    assert head.status == 200 and head.data == b""
    large = client.ask("POST", ROUTE, b'{"labels": [' + b"null, " * 20_000 + b"null]}")
    assert large.status == 413 and "65536" in large.error
    assert client.ask("POST", ROUTE, b'{"seed": 1, "seed": 2}').status == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (ROUTE, {"labels": ["star", 3, "boat"], "seed": 7}),
        (ROUTE, {"count": 2, "seed": [4, 9], "cfg": [0, 1, 2, 3, 4], "top_k": 9}),
        (ROUTE, {"labels": [1], "seed": 2, "format": "png"}),
        (ROUTE, {"labels": [1, 2, 3], "deadline": 600}),
        ("/v1/edit", EDIT),
        (ROUTE, {"labels": ["stra"]}),
        (ROUTE, {"count": 17}),
        (ROUTE, {"colour": "red"}),
        ("/v1/edit", {"image": "?", "box": [0, 0, 1, 1]}),
        (STREAM, {"labels": [99]}),
    ],
)
def test_answers_are_those_of_the_local_service(
    served: Served, local: Client, path: str, body: dict[str, Any]
) -> None:
    assert said(served.client.post(path, body)) == said(local.post(path, body))


@pytest.mark.parametrize(
    ("path", "body"), [(STREAM, {"labels": [1, 2, 3], "seed": 5}), ("/v1/edit/stream", EDIT)]
)
def test_events_are_those_of_the_local_service(
    served: Served, local: Client, path: str, body: dict[str, Any]
) -> None:
    told = []
    for client in (served.client, local):
        with client.stream(path, body) as events:
            told.append(list(events))
        assert told[-1][-1][1].pop("seconds") > 0
        for name, data in told[-1]:
            if name == "queued":  # how long a batch takes, as each has measured it
                data.pop("seconds", None)
    assert told[0] == told[1]


def test_forty_at_once_get_what_they_get_alone(served: Served, local: Client) -> None:
    settings: list[dict[str, Any]] = [{}, {"cfg": 1.0}, {"top_k": 5}, {"temperature": 2.0}]
    bodies = [{"labels": [n % 10], "seed": n, **settings[n // 3 % 4]} for n in range(40)]
    before = served.client.metrics()
    replies = crowd(served.client, bodies)
    after = served.client.metrics()
    assert [said(reply) for reply in replies] == [said(local.post(ROUTE, b)) for b in bodies]
    images, batches = (
        after[f"var_deploy_batch_images_{name}"] - before[f"var_deploy_batch_images_{name}"]
        for name in ("sum", "count")
    )
    assert images == 40 and batches < 40, "nobody shared a batch"
    assert after["var_deploy_queue_depth"] == 0


def test_who_finds_the_queue_full_is_told_so(served: Served, local: Client) -> None:
    """Of a crowd that is far too large, each is drawn or sent away: none waits for ever."""
    bodies = [{"labels": [n % 10], "seed": n, "count": 3} for n in range(2 * QUEUE)]
    replies = crowd(served.client, bodies)
    refused = [reply for reply in replies if reply.status != 200]
    assert 0 < len(refused) < len(replies)
    for reply in refused:
        assert reply.status == 429 and "the queue is full with" in reply.error
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert served.client.metrics()['var_deploy_rejected_total{reason="busy"}'] == len(refused)
    body, drawn = next(pair for pair in zip(bodies, replies, strict=True) if pair[1].status == 200)
    assert said(drawn) == said(local.post(ROUTE, body))


def test_who_hangs_up_gives_the_place_back(served: Served, local: Client) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(served.client.stream(STREAM, LONG)) for _ in range(9)]
        assert [next(events)[0] for events in streams] == ["queued"] * 9
    served.client.wait_for("var_deploy_queue_depth", 0)
    assert said(served.client.post(ROUTE, LONG)) == said(local.post(ROUTE, LONG))


def test_what_a_lost_replica_drew_is_drawn_again(served: Served, local: Client) -> None:
    with served.client.stream(STREAM, LONG) as events:
        assert [next(events)[0] for _ in range(2)] == ["queued", "scale"]
        replicas = [
            pid for pid, words in served.family().items() if ":Replica" in words.partition("(")[0]
        ]
        assert len(replicas) == 1
        end(replicas)
        name, done = list(events)[-1]
    assert (name, done["images"]) == ("done", local.post(ROUTE, LONG).json["images"])
    assert said(served.client.post(ROUTE, LONG)) == said(local.post(ROUTE, LONG))


def test_what_was_taken_is_finished_and_nothing_stays(served: Served, local: Client) -> None:
    expected = local.post(ROUTE, LONG).json["images"]
    family = served.family()
    with ExitStack() as stack:
        streams = [stack.enter_context(served.client.stream(STREAM, LONG)) for _ in range(4)]
        assert [next(events)[0] for events in streams] == ["queued"] * 4
        served.process.send_signal(signal.SIGTERM)
        for events in streams:
            name, done = list(events)[-1]
            assert (name, done["images"]) == ("done", expected)
    out, err = served.process.communicate(timeout=PATIENCE)
    assert (served.process.returncode, out, err) == (0, "", "")
    assert not {pid: words for pid in family if (words := command_line(pid))}

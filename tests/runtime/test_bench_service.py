"""Load on services, against one whose answers a test decides."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from var_deploy.bench.load import EACH, LoadSettings, load_services
from var_deploy.bench.service import find_service
from var_deploy.errors import BackendError, UsageError

MODEL = {"digest": "ab" * 32, "precision": "fp32", "backend": "onnxruntime-cpu", "batch": 1}
CONFIG = {
    "max_batch_size": 4,
    "instance_group": [{"count": 2}],
    "parameters": {"digest": {"string_value": "cd" * 32}, "threads": {"string_value": "1"}},
}


@dataclass
class Fake:
    """What a service was asked, and what it answers."""

    url: str = ""
    seeds: list[int] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    most: int = 0  # questions at the same time
    now: int = 0
    prompts: list[str] = field(default_factory=list)
    takes: str = "labels"
    broken_from: int = 10**9  # number of the first question that it refuses
    meeting: threading.Barrier | None = None  # where as many as it takes wait for each other
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: bytes, headers: Any) -> tuple[int, bytes]:
        if path == "/v1/model":
            return 200, json.dumps({**MODEL, "takes": self.takes}).encode()
        if path == "/v2/models/pocket/config":
            first = "PROMPT" if self.takes == "prompts" else "LABEL"
            return 200, json.dumps({**CONFIG, "input": [{"name": first}]}).encode()
        if path == "/v1/images":
            asked = json.loads(body)
            if self.takes == "prompts":
                (prompt,) = asked.pop("prompts")
                self.prompts.append(prompt)
                asked["labels"] = [0]
            assert asked == {"labels": [0], "seed": asked["seed"], "format": "png"}
            return self.drawn(asked["seed"])
        if path == "/v2/models/pocket/infer":
            length = int(headers["Inference-Header-Content-Length"])
            what, (seed,) = self.inputs_of(json.loads(body[:length]), body[length:])
            if self.takes == "prompts":
                assert struct.unpack_from("<I", what) == (len(what) - 4,)
                self.prompts.append(what[4:].decode())
            else:
                assert struct.unpack("<q", what) == (0,)
            return self.drawn(seed)
        return 404, b"<p>nothing here</p>"

    def inputs_of(self, head: Any, data: bytes) -> tuple[bytes, tuple[int]]:
        first, second = head["inputs"]
        expected = ("PROMPT", "BYTES") if self.takes == "prompts" else ("LABEL", "INT64")
        assert (first["name"], first["datatype"]) == expected
        assert (second["name"], second["datatype"]) == ("SEED", "UINT64")
        assert first["shape"] == second["shape"] == [1, 1]
        size = first["parameters"]["binary_data_size"]
        assert len(data) == size + second["parameters"]["binary_data_size"]
        return data[:size], struct.unpack("<Q", data[size:])

    def drawn(self, seed: int) -> tuple[int, bytes]:
        with self.lock:
            self.seeds.append(seed)
            self.now += 1
            self.most = max(self.most, self.now)
            refused = len(self.seeds) > self.broken_from
        if self.meeting is not None:
            self.meeting.wait(60)
        with self.lock:
            self.now -= 1
        return (429, b'{"error": "the queue\\nis full"}') if refused else (200, b"an image")


@contextmanager
def running() -> Iterator[Fake]:
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(b"")

        def do_POST(self) -> None:
            fake.connections.add(self.client_address)
            self.reply(self.rfile.read(int(self.headers["Content-Length"])))

        def reply(self, body: bytes) -> None:
            status, data = fake.answer(self.path, body, self.headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with running() as one:
        yield one


@pytest.mark.parametrize("path", ["", "/v2/models/pocket"])
def test_every_image_has_a_seed_of_its_own(fake: Fake, path: str) -> None:
    service = find_service(fake.url + path)
    settings = LoadSettings(concurrency=(1, 3), repeat=2, warm_up=1)
    told: list[tuple[str, float]] = []
    report = load_services([service], settings, lambda *step: told.append(step))
    assert sorted(fake.seeds) == list(range(EACH * (1 + 3) * 3))
    (result,) = report.results
    one, three = result.levels
    assert (one.latency.count, three.latency.count) == (EACH * 2, EACH * 3 * 2), "no warming up"
    assert len(one.rates) == len(three.rates) == 2
    assert 0 < one.latency.median <= one.latency.p95
    assert len(fake.connections) == (1 + 3) * 3, "a connection serves a client for a round"
    assert told[0][0].startswith("warming up: 1 at http://") and told[-1][0].startswith("round 2")


@pytest.mark.parametrize("path", ["", "/v2/models/pocket"])
def test_every_image_of_a_service_that_takes_prompts_has_one_of_its_own(
    fake: Fake, path: str
) -> None:
    fake.takes = "prompts"
    service = find_service(fake.url + path)
    load_services([service], LoadSettings(concurrency=(2,), repeat=1, warm_up=0))
    assert len(set(fake.prompts)) == len(fake.seeds) == EACH * 2


def test_clients_ask_at_the_same_time(fake: Fake) -> None:
    fake.meeting = threading.Barrier(4)  # nobody is answered before four have asked
    load_services([find_service(fake.url)], LoadSettings(concurrency=(4,), repeat=1, warm_up=0))
    assert fake.most == 4


def test_services_take_turns(fake: Fake) -> None:
    with running() as second:
        services = [find_service(fake.url), find_service(f"{second.url}/v2/models/pocket/")]
        report = load_services(services, LoadSettings(concurrency=(1, 2), repeat=1, warm_up=0))
    assert len(fake.seeds) == len(second.seeds) == EACH * 3
    assert not set(fake.seeds) & set(second.seeds)
    data = report.to_json()
    assert [service["kind"] for service in data["services"]] == ["var-deploy", "triton"]
    about = {"digest": "cd" * 32, "threads": "1", "batch": "4", "instances": "2"}
    assert data["services"][1]["about"] == about
    level = data["services"][0]["levels"][1]
    assert (level["concurrency"], level["images"]) == (2, EACH * 2)
    assert level["latency"]["count"] == EACH * 2 and level["images_per_second"] > 0


def test_an_answer_that_is_no_image(fake: Fake) -> None:
    fake.broken_from = 3
    service = find_service(fake.url)
    with pytest.raises(BackendError, match=r"/v1/images answered 429: the queue is full$"):
        load_services([service], LoadSettings(concurrency=(2,), repeat=100, warm_up=0))
    assert len(fake.seeds) <= 2 * EACH, "nobody went on"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v2/models/other", "not a model of var-deploy triton"),
        ("/elsewhere", "is not a service of var-deploy"),
    ],
)
def test_somebody_else(fake: Fake, path: str, part: str) -> None:
    with pytest.raises(BackendError, match=part):
        find_service(fake.url + path)


def test_nobody_answers(fake: Fake) -> None:
    with running() as gone:
        pass
    with pytest.raises(BackendError, match="does not answer"):
        find_service(gone.url)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://host:x", "http://a/?b=1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address; write http://host:port"):
        find_service(url)

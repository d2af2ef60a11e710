"""What the tests of the service share: a server on a free port, and a client that knows nothing."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Headers = Mapping[str, str]

JSON: Headers = {"Content-Type": "application/json"}
PATIENCE = 300  # seconds, for a machine that is busy with something else


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: dict[str, str]  # with names in lower case
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert set(self.json) == {"error"}, self.data
        line: str = self.json["error"]
        assert line and "\n" not in line
        return line

    def images(self) -> NDArray[np.uint8]:
        """[N, H, W, C] of a JSON answer."""
        assert self.status == 200, self.data
        return np.stack([pixels(image["png"]) for image in self.json["images"]])


@dataclass(frozen=True)
class Client:
    """Of the service at 127.0.0.1:port; every request has a connection of its own."""

    port: int

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def post(self, path: str, body: object, **headers: str) -> Reply:
        return self.ask("POST", path, json.dumps(body).encode(), {**JSON, **headers})

    def ask(
        self, method: str, path: str, data: bytes | None = None, headers: Headers = JSON
    ) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, data, headers)
            reply = connection.getresponse()
            names = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(status=reply.status, headers=names, data=reply.read())

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    @contextlib.contextmanager
    def stream(self, path: str, body: object) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events (name, data) of a stream as they come; the end of the block hangs up."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps(body).encode(), JSON)
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            assert reply.getheader("Content-Type", "").startswith("text/event-stream")
            with reply:
                yield events(reply)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").data.decode().splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    def wait_for(self, metric: str, value: float) -> None:
        """Return once a metric has this value."""
        end = time.monotonic() + PATIENCE
        while (found := self.metrics().get(metric, 0)) != value:
            assert time.monotonic() < end, f"{metric} stays at {found}"
            time.sleep(0.01)


def events(lines: Any) -> Iterator[tuple[str, Any]]:
    name = ""
    for raw in lines:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
        else:
            assert not line


@contextlib.contextmanager
def running(app: Any) -> Iterator[Client]:
    """A server in a thread, stopped in order at the end."""
    from var_deploy.serving.server import Server, listen

    server, listening = Server(app), listen("127.0.0.1", 0)
    client = Client(listening.getsockname()[1])
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        assert client.get("/health").status == 200
        yield client
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not stop"


def pixels(text: str) -> NDArray[np.uint8]:
    """[H, W, C] of base64."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)


def picture(image: NDArray[Any], kind: str = "PNG") -> str:
    """An image as base64."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()

"""The end of a service: what was taken is finished, and what is new is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving.client import PATIENCE, Client

from var_deploy.errors import UsageError
from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTE = "/v1/images"
Stage = tuple[Client, Any, threading.Thread]


@pytest.fixture
def stage(pipe: Pipeline) -> Any:
    """A server that the test stops itself."""
    from var_deploy.serving.app import create_app
    from var_deploy.serving.server import Server, listen

    server, listening = Server(create_app(pipe)), listen("127.0.0.1", 0)
    client = Client(listening.getsockname()[1])
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    assert client.get("/health").status == 200
    yield client, server, thread
    server.force_exit = server.should_exit = True
    thread.join(PATIENCE)


def test_what_was_taken_is_finished(stage: Stage, gate: Any, pipe: Pipeline) -> None:
    client, server, thread = stage
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, ROUTE, {"labels": [1], "seed": 3})
        gate.reached()
        second = pool.submit(client.post, ROUTE, {"labels": [2], "seed": 4})
        client.wait_for("var_deploy_queue_depth", 1)
        server.stop()
        while client.get("/health").status == 200:
            pass
        assert client.get("/health").json == {"status": "stopping"}
        refused = client.post(ROUTE, {})
        assert refused.status == 503 and "stopping" in refused.error
        gate.let_go(2)
        np.testing.assert_array_equal(first.result().images(), pipe.generate([1], seed=3))
        np.testing.assert_array_equal(second.result().images(), pipe.generate([2], seed=4))
    thread.join(PATIENCE)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        client.get("/health")


def test_a_second_signal_drops_it(stage: Stage, gate: Any, pipe: Pipeline) -> None:
    client, server, thread = stage
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, ROUTE, {"labels": [1]})
        gate.reached()
        second = pool.submit(client.post, ROUTE, {"labels": [2]})
        client.wait_for("var_deploy_queue_depth", 1)
        server.stop()
        server.stop()
        for asked in (first, second):
            assert asked.result().status == 503 and "stopped" in asked.result().error
        gate.let_go(1)
    thread.join(PATIENCE)
    assert not thread.is_alive() and len(gate.batches) == 1
    assert pipe.generate([1]).shape == (1, 8, 8, 3)  # still usable


def test_an_idle_service_stops(stage: Stage) -> None:
    _, server, thread = stage
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_addresses_that_cannot_be_listened_on() -> None:
    from var_deploy.serving.server import address_of, listen

    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert address_of(listening) == f"http://127.0.0.1:{port}"
        with pytest.raises(UsageError, match=rf"cannot listen on 127.0.0.1 port {port}: .* --port"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1 port 80"):
        listen("192.0.2.1", 80)  # of RFC 5737: nobody's

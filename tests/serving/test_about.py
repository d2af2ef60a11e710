"""What the service says of itself: health, metrics, and its description."""

from __future__ import annotations

import re

import pytest
from serving.client import Client

pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROUTES = {
    ("get", "/v1/model"),
    ("post", "/v1/images"),
    ("post", "/v1/images/stream"),
    ("post", "/v1/edit"),
    ("post", "/v1/edit/stream"),
    ("post", "/v1/vary"),
    ("post", "/v1/vary/stream"),
    ("get", "/health"),
    ("get", "/metrics"),
}


def test_health(service: Client) -> None:
    reply = service.get("/health")
    assert (reply.status, reply.json) == (200, {"status": "ok"})


def test_openapi_lists_every_route_and_its_errors(service: Client) -> None:
    openapi = service.get("/openapi.json").json
    assert {(m, path) for path, methods in openapi["paths"].items() for m in methods} == ROUTES
    post = openapi["paths"]["/v1/images"]["post"]["responses"]
    assert set(post) == {"200", "4XX", "5XX"}
    assert set(post["200"]["content"]) == {"application/json", "image/png"}
    stream = openapi["paths"]["/v1/edit/stream"]["post"]["responses"]
    assert set(stream) == {"200", "4XX", "5XX"}
    assert set(stream["200"]["content"]) == {"text/event-stream"}


def test_the_description_needs_nothing_from_elsewhere(service: Client) -> None:
    reply = service.get("/docs")
    html = reply.data.decode()
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    for _, path in ROUTES:
        assert path in html
    assert not re.findall(r"<script|src=|@import|url\(|href=['\"]?(?:https?:)?//", html)
    for name in re.findall(r"href=#(\w+)", html):
        assert f"id={name}>" in html
    assert "default-src 'self'" in reply.headers["content-security-policy"]


def test_metrics_count_what_happened(start: object) -> None:
    client: Client = start()  # type: ignore[operator]
    client.post("/v1/images", {"labels": [0, 1, 2]})
    client.post("/v1/images", {"labels": ["no such"]})
    client.get("/anything")
    client.get("/anything/else")
    found = client.metrics()
    assert found['var_deploy_requests_total{route="/v1/images",status="200"}'] == 1
    assert found['var_deploy_requests_total{route="/v1/images",status="400"}'] == 1
    assert found['var_deploy_requests_total{route="other",status="404"}'] == 2
    assert found["var_deploy_images_total"] == 3
    assert found["var_deploy_batch_images_count"] == 2  # two images a batch
    assert found["var_deploy_batch_images_sum"] == 3
    assert found["var_deploy_drawing_seconds_count"] == 2
    assert found["var_deploy_waiting_seconds_count"] == 1
    assert found["var_deploy_queue_depth"] == 0

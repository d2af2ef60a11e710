"""A model whose images are not numbers: 500 with the reason, and the service stays up."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_weights import poke
from serving.client import running

from var_deploy.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")


def test_it_says_why_and_goes_on(small_bundle: Path, tmp_path: Path) -> None:
    from var_deploy.serving.app import create_app
    from var_deploy.serving.settings import Settings

    weight = "decoder.conv_out.bias"
    black = poke(small_bundle, tmp_path / "black", "fp32/decoder", weight, float("nan"))
    with (
        Pipeline.load(black, threads=1, check="sizes") as pipe,
        running(create_app(pipe, Settings())) as client,
    ):
        for _ in range(2):
            reply = client.post("/v1/images", {"labels": [0, 1, 2]})
            assert reply.status == 500
            assert "image decoded after scale 2 (graph decoder)" in reply.error
            assert "var-deploy verify" in reply.error
            assert client.get("/health").status == 200

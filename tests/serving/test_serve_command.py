"""`var-deploy serve`: as a process, from its one line to its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.client import PATIENCE, Client

from cli_steps import ONE_THREAD, refused

pytest.importorskip("fastapi", reason="the extra serve is not installed")


@pytest.fixture
def served(small_bundle: Path) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    command = [sys.executable, "-m", "var_deploy.cli", "serve", str(small_bundle)]
    options = ["--port", "0", "--threads", "1", "--max-count", "2", "--queue", "9"]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(
            rf"serving {small_bundle} on http://127\.0\.0\.1:(\d+) \(Ctrl-C stops\)\n", line
        )
        assert found, line
        yield process, Client(int(found[1]))
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_from_the_first_line_to_the_end(
    served: tuple[subprocess.Popen[str], Client], number: signal.Signals
) -> None:
    process, client = served
    assert client.get("/v1/model").json["limits"]["count"] == 2
    assert client.get("/v1/model").json["limits"]["queue"] == 9
    assert client.post("/v1/images", {"labels": ["star", "tree"]}).status == 200
    assert client.post("/v1/images", {"count": 3}).status == 400
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "")
    asked = [re.sub(r"^\S+Z info | [0-9.]+ s [0-9]+ B", "", line) for line in err.splitlines()]
    assert sorted(asked) == [
        "127.0.0.1 GET /v1/model 200",
        "127.0.0.1 GET /v1/model 200",
        "127.0.0.1 POST /v1/images 200 2 images",
        "127.0.0.1 POST /v1/images 400",
    ]


def test_what_is_wrong_is_said_before_anything_is_loaded(
    small_bundle: Path, tmp_path: Path
) -> None:
    refused(1, "serve", tmp_path, parts=("is not a bundle",))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        parts = (f"cannot listen on 127.0.0.1 port {port}", "--port")
        refused(2, "serve", small_bundle, "--port", port, parts=parts)
    refused(2, "serve", small_bundle, "--port", 65536, parts=("--port",))
    refused(2, "serve", small_bundle, "--queue", 0, parts=("--queue",))
    host = ("--allowed-host", "http://a")
    refused(2, "serve", small_bundle, *host, parts=("found 'http://a'",))
    refused(2, "serve", small_bundle, "--root-path", "images", parts=("found 'images'",))
    refused(2, "serve", small_bundle, "--log-level", "loud", parts=("--log-level",))
    encoder = ("--port", 0, "--text-encoder", tmp_path)
    refused(2, "serve", small_bundle, *encoder, parts=("takes no prompts",))


def test_a_bundle_of_prompts_needs_its_text_encoder(text_bundle: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(text_bundle, tmp_path / "alone")
    refused(2, "serve", alone, "--port", 0, parts=("a text encoder t5", "--text-encoder"))

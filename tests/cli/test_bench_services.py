"""`var-deploy bench` of a service that runs, and what it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_steps import done, refused
from var_deploy.pipeline import Pipeline

QUICK = ("--repeat", 1, "--warm-up", 0)


@pytest.fixture(scope="module")
def url(made: Path) -> Iterator[str]:
    """The small model, served."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from var_deploy.serving.app import create_app
    from var_deploy.serving.server import Server, address_of, listen

    with Pipeline.load(made, threads=1) as pipe:
        server, listening = Server(create_app(pipe)), listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield address_of(listening)
        server.stop()
        thread.join()


def test_a_service_is_timed(url: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    text = done("bench", url, "--concurrency", "1,2", *QUICK, "--json", out).stdout
    (service,) = json.loads(out.read_text())["services"]
    assert (service["kind"], service["about"]["batch"]) == ("var-deploy", "2")
    assert [level["concurrency"] for level in service["levels"]] == [1, 2]
    assert text.startswith(f"1 var-deploy  {url}: backend onnxruntime-cpu, precision fp32")
    assert len([line for line in text.splitlines() if " 1 var-deploy " in line]) == 2


def test_json_alone_on_stdout(url: str) -> None:
    options = ("--concurrency", 1, *QUICK, "--json", "-")
    data = json.loads(done("bench", url, *options, "--against", f"{url}/").stdout)
    assert [service["url"] for service in data["services"]] == [url, f"{url}/"]
    assert not done("bench", url, "--concurrency", 1, *QUICK, "--quiet").stdout


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--precision", "fp32"), ("--precision means nothing for the address of a service",)),
        (("--threads", 1), ("--threads means nothing",)),
        (("--plot", "a.png"), ("--plot means nothing",)),
        (("--concurrency", "0"), ("--concurrency takes numbers from 1",)),
        (("--against", "torch"), ("'torch' is not an address",)),
    ],
)
def test_bad_usage(url: str, options: tuple[object, ...], parts: tuple[str, ...]) -> None:
    refused(2, "bench", url, *options, parts=parts)


def test_clients_are_for_services(made: Path) -> None:
    parts = ("--concurrency means nothing for a bundle",)
    refused(2, "bench", made, "--concurrency", 4, parts=parts)


def test_nobody_is_there() -> None:
    refused(1, "bench", "http://127.0.0.1:9", parts=("does not answer",))

"""`var-deploy serve --ray`: what is wrong is said in a line, before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli_steps import refused

pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.mark.parametrize("replicas", ["0", "3:1", "0:2", "1:", ":2", "two", "1:2:3", "-1", ""])
def test_replicas_that_make_no_sense(pocket_bundle: Path, replicas: str) -> None:
    given = ("--ray", "local", "--replicas", replicas)
    refused(2, "serve", pocket_bundle, *given, parts=("--replicas", repr(replicas)))


def test_options_that_do_not_go_together(pocket_bundle: Path) -> None:
    refused(2, "serve", pocket_bundle, "--replicas", 2, parts=("--replicas needs --ray",))
    for option in (("--log-level", "info"), ("--log-format", "json"), ("--max-connections", 9)):
        given = ("--ray", "local", *option)
        refused(2, "serve", pocket_bundle, *given, parts=(f"{option[0]} is of one process",))
    given = ("--ray", "auto", "--port", 0)
    refused(2, "serve", pocket_bundle, *given, parts=("--port 0 needs --ray local",))


def test_a_port_that_is_taken(pocket_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ("--ray", "local", "--port", port)
        refused(2, "serve", pocket_bundle, *given, parts=(f"127.0.0.1 port {port}", "--port"))


def test_an_address_where_no_ray_runs(pocket_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    given = ("--ray", f"127.0.0.1:{port}")
    refused(2, "serve", pocket_bundle, *given, parts=("no Ray runs at", str(port)))


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    refused(1, "serve", tmp_path, "--ray", "local", parts=("is not a bundle",))

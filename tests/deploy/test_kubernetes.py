"""`plan --kubernetes`: a manifest whose numbers are the plan's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from deploy.dockerfile import ROOT, read_stages

from cli_steps import done, refused, run
from fake_machine import FakeMachine, meminfo
from var_deploy.cli import main
from var_deploy.host import machine
from var_deploy.planning import devices
from var_deploy.serving.settings import Settings

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

MIB, GIB = 1 << 20, 1 << 30
SHIPPED = ("var-d16", "--device", "l4")


def documents(*arguments: object) -> dict[str, dict[str, Any]]:
    """The parts of a manifest by kind."""
    text = done("plan", *arguments, "--kubernetes").stdout
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pod(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = documents(*arguments)["Deployment"]["spec"]["template"]["spec"]
    return found


def planned(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("plan", *arguments, "--json").stdout)
    return found


def megabytes(container: Mapping[str, Any]) -> float:
    """The limit of memory, which is also what is asked for."""
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    return int(resources["limits"]["memory"].removesuffix("Mi")) * MIB / 1e6


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    return {
        variable["name"].removeprefix("VAR_DEPLOY_SERVE_").lower(): variable["value"]
        for variable in container["env"]
    }


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has eight processors, 16 GB and no GPU."""
    here = FakeMachine(files={"/proc/meminfo": meminfo(16_000, 15_000)}, processors=8)
    for module in (machine, devices):
        monkeypatch.setattr(module, "Machine", lambda: here)


def test_the_manifest_that_is_shipped_is_what_plan_says() -> None:
    shipped = (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
    assert shipped == done("plan", *SHIPPED, "--kubernetes").stdout


def test_memory_on_a_processor(node: None) -> None:
    (container,) = pod("var-d16")["containers"]
    peak = planned("var-d16")["layouts"]["shared"]["footprint"]["peak"]
    assert megabytes(container) == pytest.approx((peak * 4 / 3 + 400e6) / 1e6, abs=1.1)
    assert container["resources"]["limits"]["cpu"] == "7" == variables(container)["threads"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    text = done("plan", "var-d16", "--kubernetes").stdout
    assert f"peak of {peak / 1e9:.2f} GB" in text and "cpu: 7, the processors" in text


def test_memory_of_a_board_is_one() -> None:
    board = ("var-d16", "--device", "orin-nano-8gb")
    layout = planned(*board)["layouts"]["per-scale"]
    (engines,), (container,) = pod(*board)["initContainers"], pod(*board)["containers"]
    peak, build = layout["footprint"]["peak"], layout["build"]["total"]
    assert megabytes(container) == pytest.approx((peak * 4 / 3 + 400e6) / 1e6, abs=1.1)
    assert megabytes(engines) == pytest.approx((build * 4 / 3 + 400e6) / 1e6, abs=1.1)
    assert container["image"] == engines["image"] == "var-deploy:jetson"


def test_a_card_holds_the_model_itself() -> None:
    layout = planned(*SHIPPED)["layouts"]["per-scale"]
    (engines,), (container,) = pod(*SHIPPED)["initContainers"], pod(*SHIPPED)["containers"]
    assert megabytes(container) < layout["footprint"]["peak"] / 1e6
    build = layout["build"]["host"]
    assert megabytes(engines) == pytest.approx((build * 4 / 3 + 400e6) / 1e6, abs=1.1)
    for each in (container, engines):
        assert each["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert each["image"] == "var-deploy:gpu"
    peak = f"{layout['footprint']['peak'] / 1e9:.2f} GB"
    assert peak in done("plan", *SHIPPED, "--kubernetes").stdout


def test_the_claim_has_room() -> None:
    plan = planned(*SHIPPED)
    stored = plan["bundle_bytes"] + plan["layouts"]["per-scale"]["engines"]
    claim = documents(*SHIPPED)["PersistentVolumeClaim"]["spec"]
    size = int(claim["resources"]["requests"]["storage"].removesuffix("Gi")) * GIB
    assert 1.1 * stored <= size <= 1.1 * stored + GIB


def test_it_runs_what_was_planned() -> None:
    board = ("var-d16", "--device", "agx-orin-64gb", "--layout", "shared", "--precision", "fp32")
    found = pod(*board)
    (engines,), (container,) = found["initContainers"], found["containers"]
    asked = {"backend": "tensorrt", "precision": "fp32", "layout": "shared", "queue": "64"}
    asked["allowed_host"] = "var-d16 *.svc *.svc.cluster.local"
    assert variables(container) == asked
    assert engines["args"] == ["build", "/bundle", "--layout", "shared", "--precision", "fp32"]
    for each, command in ((engines, "build"), (container, "serve")):
        name, *words = each["args"]
        assert name == command
        main.commands[name].make_context(name, [str(word) for word in words])
    options = {p.name: p for p in main.commands["serve"].params}
    assert set(asked) <= set(options)
    assert Settings().queue == 64, "which the grace is for"


def test_a_stop_lasts_as_long_as_a_full_queue() -> None:
    board = ("--device", "orin-nano-8gb")
    grace = pod("var-d24", *board)["terminationGracePeriodSeconds"]
    whole = 5 + 10 + 64 * 3 * planned("var-d24", *board)["seconds"]
    assert 60 < whole <= grace < whole + 1
    assert pod("pocket", *board)["terminationGracePeriodSeconds"] == 60


def test_a_stop_ends_at_some_time(node: None) -> None:
    assert pod("var-d36")["terminationGracePeriodSeconds"] == 600


def test_probes() -> None:
    (container,) = pod(*SHIPPED)["containers"]
    port = read_stages()["runtime"].env()["VAR_DEPLOY_SERVE_PORT"]
    assert container["ports"] == [{"name": "http", "containerPort": int(port)}]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")}
    assert paths == {"startup": "/health", "liveness": "/metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    startup = container["startupProbe"]
    slow_disk = 5.6e9 / 50e6
    assert startup["failureThreshold"] * startup["periodSeconds"] > slow_disk + 60 - 5


def test_nothing_is_allowed_that_is_not_needed() -> None:
    found = pod(*SHIPPED)
    assert found["securityContext"]["runAsNonRoot"] is True
    user = found["securityContext"]["runAsUser"]
    assert f"{user}:{user}" == read_stages()["runtime"].last("USER").text
    assert found["automountServiceAccountToken"] is False
    # VAR_DEPLOY_SERVE_PORT=tcp://… is what a Service of that name would put there
    assert found["enableServiceLinks"] is False
    for each in (*found["containers"], *found["initContainers"]):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    read_only = {m["name"]: m.get("readOnly") for m in found["containers"][0]["volumeMounts"]}
    assert read_only == {"bundle": True, "tmp": None}


def test_parts_find_each_other() -> None:
    parts = documents(*SHIPPED)
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert parts["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert parts["Service"]["spec"]["selector"] == labels
    assert parts["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    claims = pod(*SHIPPED)["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claims == parts["PersistentVolumeClaim"]["metadata"]["name"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("My Model: no. 2\n- x", "my-model-no-2-x"),
        ("16", "model-16"),
        ("…", "model"),
        ("true", "true"),
        ("x" * 39 + "-y", "x" * 39),
    ],
)
def test_any_folder_gives_a_name(
    pocket_bundle: Path, tmp_path: Path, folder: str, name: str
) -> None:
    (tmp_path / folder).symlink_to(pocket_bundle)
    parts = documents(tmp_path / folder, "--device", "l4")
    assert {part["metadata"]["name"] for part in parts.values()} == {name}
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name)


def test_an_image_of_ones_own() -> None:
    image = "registry.example:5000/team/var-deploy@sha256:0af1"
    found = pod(*SHIPPED, "--image", image)
    assert found["containers"][0]["image"] == found["initContainers"][0]["image"] == image


def test_bad_usage() -> None:
    result = run("plan", *SHIPPED, "--kubernetes", "--json")
    assert (result.exit_code, "--json and --kubernetes" in result.stderr) == (2, True)
    refused(2, "plan", *SHIPPED, "--image", "x", parts=("add --kubernetes",))
    for image in ("", "a b", "-x", "x\ny"):
        refused(2, "plan", *SHIPPED, "--kubernetes", "--image", image, parts=("--image must be",))
    refused(
        *(1, "plan", "var-d36", "--device", "orin-nano-4gb", "--kubernetes"),
        parts=("var-d36 does not fit Jetson Orin Nano 4GB", "GB are missing", "no layout fits"),
    )

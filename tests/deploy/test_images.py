"""deploy/Dockerfile and deploy/compose.yaml: what they promise, and that what they name exists."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from typing import Any

import pytest
from deploy.dockerfile import DOCKERFILE, ROOT, Stage, read_stages

from cli_steps import done
from var_deploy import __version__
from var_deploy.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = read_stages()
FINAL = ("build", "runtime")
DEVICES = ("cpu", "gpu", "jetson")
COMPOSE = ROOT / "deploy" / "compose.yaml"


@pytest.fixture
def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


# the images


@pytest.mark.parametrize("name", FINAL)
def test_an_image_runs_as_nobody_in_particular(name: str) -> None:
    stage = STAGES[name]
    assert stage.last("USER").text == "65532:65532", "numbers, which Kubernetes can check"
    assert stage.last("ENTRYPOINT").words() == ["var-deploy"], "exec form, which gets the signals"
    assert stage.last("ENTRYPOINT").text.startswith("[") and stage.last("CMD").text.startswith("[")
    title = "org.opencontainers.image"
    assert stage.labels()[f"{title}.version"] == __version__
    assert stage.labels()[f"{title}.licenses"] == "Apache-2.0"
    assert {f"{title}.title", f"{title}.description"} <= set(stage.labels())


def test_the_runtime_serves_and_looks_after_itself() -> None:
    stage = STAGES["runtime"]
    assert stage.last("CMD").words() == ["serve", "/bundle"]
    options = {f"VAR_DEPLOY_SERVE_{p.name.upper()}" for p in main.commands["serve"].params}
    assert set(stage.env()) <= {"HOME"} | options
    assert stage.env()["VAR_DEPLOY_SERVE_HOST"] == "0.0.0.0"
    assert stage.env()["VAR_DEPLOY_SERVE_PORT"] == stage.last("EXPOSE").text
    program, flag, code = stage.healthcheck()
    assert (program, flag) == ("python3", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "/health" in code and "VAR_DEPLOY_SERVE_PORT" in code


def test_every_device_has_a_stage() -> None:
    assert set(STAGES) == {"wheel", *FINAL, *DEVICES}
    assert STAGES["runtime"].base == "cpu" and list(STAGES)[-1] == "runtime", "the default"
    python = STAGES["wheel"].base
    assert {STAGES[name].base for name in ("build", "cpu", "gpu")} == {python}
    assert STAGES["jetson"].base.startswith("nvcr.io/nvidia/l4t-tensorrt:r10.3")


def installs(stage: Stage) -> str:
    """What pip installs besides the wheel's own needs: extras and packages."""
    (command,) = (step.text for step in stage.of("RUN") if "$1[" in step.text)
    return command


@pytest.mark.parametrize("name", ["build", *DEVICES])
def test_pip_installs_what_there_is(name: str) -> None:
    command = installs(STAGES[name])
    (asked,) = re.findall(r"\$1\[([\w,]+)\]", command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(asked.split(",")) <= set(project["optional-dependencies"])
    assert ("torch" in command) == (name == "build") == ("export" in asked)
    assert "-c /constraints.txt" in command or "-c /tmp/constraints.txt" in command
    assert "--no-cache-dir" in command


def test_a_board_keeps_its_own_tensorrt_and_cuda() -> None:
    """As docs/JETSON.md says for JetPack 6."""
    command = installs(STAGES["jetson"])
    assert "tensorrt" not in re.findall(r"\$1\[([\w,]+)\]", command)[0].split(",")
    (cuda,) = re.findall(r'"(cuda-python[^"]*)"', command)
    jetson = (ROOT / "docs" / "JETSON.md").read_text(encoding="utf-8")
    assert f'"{cuda}"' in jetson and 'grep -v "^cuda-"' in command


def test_what_is_copied_is_let_in() -> None:
    rules = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*", "nothing but what is named"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = {w for step in STAGES["wheel"].of("COPY") for w in step.words()[:-1]}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__"]


def test_no_secret_and_no_shell_that_fetches() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8").lower()
    words = ("password", "token", "secret", "api_key", "curl ", "wget ", "sudo ", "trusted-host")
    assert [word for word in words if word in text] == []


# compose


def test_services_are_locked(services: dict[str, Any]) -> None:
    assert set(services) == {"export", "serve", "engines", "serve-gpu"}
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"], "Python as process 1 hears no signal before it asks for it"
        assert service["tmpfs"] == ["/tmp"] and "mem_limit" in service, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "for this machine alone"


def test_services_name_stages_and_options(services: dict[str, Any]) -> None:
    for name, service in services.items():
        build, tag = service["build"], service["image"].partition(":")[2]
        assert (COMPOSE.parent / build["context"]).resolve() == ROOT
        assert ROOT / build["dockerfile"] == DOCKERFILE
        assert build.get("target", build.get("args", {}).get("DEVICE")) == tag
        assert tag in STAGES
        command, *words = service["command"]
        assert main.commands[command].make_context(command, list(words)).params
        for variable in service.get("environment", {}):
            option = variable.removeprefix("VAR_DEPLOY_SERVE_").lower()
            assert option in {p.name for p in main.commands["serve"].params}, name


def test_a_service_reads_and_a_job_writes(services: dict[str, Any]) -> None:
    mounts = {name: service["volumes"] for name, service in services.items()}
    assert mounts["export"] == mounts["engines"] == ["bundles:/bundles"]
    assert mounts["serve"] == mounts["serve-gpu"] == ["bundles:/bundles:ro"]
    bundle = services["export"]["command"]
    assert f"/bundles/{bundle[bundle.index('--out') + 1]}" == services["serve"]["command"][1]
    assert STAGES["build"].last("WORKDIR").text == "/bundles", "whose owner a new volume gets"


SIZES = {"m": 1 << 20, "g": 1 << 30}


def test_limits_have_room_for_what_plan_says(services: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    limits = {k: int(s["mem_limit"][:-1]) * SIZES[s["mem_limit"][-1]] for k, s in services.items()}
    for device, container in (("cpu", "serve"), ("l4", "serve-gpu"), ("l4", "engines")):
        text = done("plan", "pocket", "--device", device, "--kubernetes").stdout
        pod = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]
        kind = "initContainers" if container == "engines" else "containers"
        planned = pod[kind][0]["resources"]["limits"]["memory"]
        assert limits[container] >= int(planned.removesuffix("Mi")) << 20, container
    assert services["serve"]["environment"]["VAR_DEPLOY_SERVE_THREADS"] == str(
        services["serve"]["cpus"]
    )


def test_gpu_services_wait_to_be_asked_for(services: dict[str, Any]) -> None:
    asked = {name for name, service in services.items() if service.get("profiles") == ["gpu"]}
    assert asked == {name for name, s in services.items() if s.get("gpus") == "all"}
    assert asked == {"engines", "serve-gpu"}


def test_the_wheel_takes_the_licence_and_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {project["readme"], *project["license-files"], "pyproject.toml"}
    sources = {w for step in STAGES["wheel"].of("COPY") for w in step.words()[:-1]}
    assert all(any(fnmatch(name, source) for source in sources) for name in needed)

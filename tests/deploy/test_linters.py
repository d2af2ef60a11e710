"""deploy/ before the judges that need no container engine and no cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy.dockerfile import DOCKERFILE, ROOT

from cli_steps import done

COMPOSE = ROOT / "deploy" / "compose.yaml"
OLDEST = "1.25"  # Kubernetes, of the schemas that the validator brings


def judge(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that stands beside this Python, or is skipped."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which(program, path=beside) or pytest.skip(f"{program} is not installed")
    command = [found, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_hadolint_finds_nothing() -> None:
    result = judge("hadolint", "--no-color", "--failure-threshold", "style", DOCKERFILE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN sudo pip install numpy\nCMD python\n")
    result = judge("hadolint", "--no-color", wrong)
    assert result.returncode == 1
    assert all(rule in result.stdout for rule in ("DL3004", "DL3006", "DL3025"))


def test_compose_takes_the_file() -> None:
    result = judge("docker-compose", "-f", COMPOSE, "--profile", "gpu", "config", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("read_only: true", "readonly: true"), ("{condition: service_completed", "{condition: done")],
)
def test_compose_refuses_what_is_wrong(tmp_path: Path, right: str, wrong: str) -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    assert right in text
    changed = tmp_path / "compose.yaml"
    changed.write_text(text.replace(right, wrong))
    assert judge("docker-compose", "-f", changed, "config", "--quiet").returncode != 0


def documents(*arguments: object) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    text = done("plan", *arguments, "--kubernetes").stdout
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize(
    "plan", [("var-d16", "--device", "l4"), ("pocket", "--device", "thor"), ("var-d30",)], ids=str
)
def test_kubernetes_knows_every_field(plan: tuple[str, ...]) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for document in documents(*plan):
        for version in (OLDEST, validator.latest_version()):
            validator.validate(document, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_seen() -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    deployment = documents("pocket", "--device", "l4")[1]
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessprobe"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(deployment, validator.latest_version(), strict=True)

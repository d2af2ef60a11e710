"""docs/CONTAINERS.md: what it tells people to type exists, and its numbers are the plan's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from deploy.dockerfile import ROOT, read_stages

from cli_steps import done
from var_deploy.cli import main

TEXT = (ROOT / "docs" / "CONTAINERS.md").read_text(encoding="utf-8")
STAGES = read_stages()
TAKES_VALUE = ("--user", "--tmpfs", "--cap-drop", "-p", "-v", "-e", "--runtime", "--group-add")
TAKES_VALUE += ("--gpus",)


def lines() -> Iterator[list[str]]:
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield shlex.split(line.removeprefix("$ "))


def those(*start: str) -> list[list[str]]:
    found = [words for words in lines() if words[: len(start)] == list(start)]
    assert found, start
    return found


def value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def parse(words: list[str]) -> None:
    parent = click.Context(main, info_name="var-deploy", **main.context_settings)
    main.commands[words[0]].make_context(words[0], words[1:], parent=parent)


def test_every_line_is_looked_at() -> None:
    known = {"docker build", "docker run", "docker compose", "kubectl apply", "var-deploy plan"}
    assert {" ".join(words[:2]) for words in lines()} == known | {"kubectl port-forward"}


@pytest.mark.parametrize("words", those("docker", "build"), ids=" ".join)
def test_builds(words: list[str]) -> None:
    assert value(words, "-f") == "deploy/Dockerfile" and words[-1] == "."
    tag = (value(words, "-t") or "").partition(":")[2]
    device = (value(words, "--build-arg") or "DEVICE=cpu").removeprefix("DEVICE=")
    assert tag == (value(words, "--target") or device) in STAGES


@pytest.mark.parametrize("words", those("docker", "run"), ids=" ".join)
def test_runs(words: list[str]) -> None:
    rest = words[2:]
    while rest[0].startswith("-"):
        if rest[0] == "-e":
            option = rest[1].removeprefix("VAR_DEPLOY_SERVE_").partition("=")[0].lower()
            assert option in {p.name for p in main.commands["serve"].params}
        if rest[0] == "-v":
            assert rest[1].removesuffix(":ro").endswith((":/bundle", ":/bundles"))
        rest = rest[2 if rest[0] in TAKES_VALUE else 1 :]
    image, *command = rest
    assert image.removeprefix("var-deploy:") in STAGES
    parse(command or STAGES["runtime"].last("CMD").words())


@pytest.mark.parametrize("words", those("docker", "compose"), ids=" ".join)
def test_compose(words: list[str]) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    file = value(words, "-f")
    assert file
    services = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["services"]
    assert services[words[-1]].get("profiles", [None]) == [value(words, "--profile")]


def test_the_manifest_is_the_one_that_is_applied() -> None:
    (words,) = those("var-deploy", "plan")
    arrow = words.index(">")
    parse(words[1:arrow])
    shipped = (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
    assert done(*words[1:arrow]).stdout == shipped
    (apply,), (forward,) = those("kubectl", "apply"), those("kubectl", "port-forward")
    assert value(apply, "-f") == words[arrow + 1]
    assert f"name: {forward[2].removeprefix('service/')}\n" in shipped
    assert f"port: {forward[3].partition(':')[2]}\n" in shipped


def test_the_limit_of_pocket() -> None:
    (limit,) = re.findall(r"limit is therefore (\d+) MiB", TEXT)
    text = done("plan", "pocket", "--device", "cpu", "--kubernetes").stdout
    assert set(re.findall(r"memory: (\d+)Mi", text)) == {limit}


def test_the_table_of_images() -> None:
    rows = re.findall(r"^\| `var-deploy:(\w+)` \|[^|]*\| ([^|]*) \| ([^|]*) \|", TEXT, re.M)
    assert [name for name, _, _ in rows] == ["build", "cpu", "gpu", "jetson"]
    for name, base, extras in rows:
        stage = STAGES[name]
        assert base == "the same" or stage.base.rpartition("/")[2] == base
        (command,) = (step.text for step in stage.of("RUN") if "$1[" in step.text)
        assert f"$1[{extras.replace(', ', ',')}]" in command

"""docs/JETSON.md: its tables are what `plan` says, and what it tells people to type exists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from cli_steps import run
from var_deploy import __version__
from var_deploy.cli import main
from var_deploy.device_check.agreement import FORCED_PSNR, MARGIN, SAME_PSNR
from var_deploy.device_check.command import argument_parser
from var_deploy.planning.devices import DEVICES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "JETSON.md").read_text(encoding="utf-8")
MODELS = ("pocket", "var-d16", "var-d20", "var-d24", "var-d30", "var-d36")
BOARDS = ("orin-nano-4gb", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb", "thor")
CHECK = "python -m var_deploy.device_check"


def known_options() -> set[str]:
    """Every option of device_check, as its usage line shows them."""
    return set(re.findall(r"--[a-z-]+|-h", argument_parser().format_usage()))


@cache
def planned(model: str, board: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(run("plan", model, "--device", board, "--json").stdout)
    return found


def memory(model: str, board: str) -> str:
    plan = planned(model, board)
    if not plan["fits"]:
        return "–"
    layout = plan["layouts"][plan["layout"]]
    star = " *" if layout["build_missing"] else ""
    return f"{plan['layout']} {layout['footprint']['peak'] / 1e9:.1f}{star}"


def milliseconds(model: str, board: str) -> str:
    plan = planned(model, board)
    if not plan["fits"]:
        return "–"
    time = plan["seconds"] * 1e3
    return f"{time:.0f}" if time >= 10 else f"{time:.2g}"


CELLS = {"memory": memory, "time": milliseconds}


def table(kind: str) -> str:
    """As it has to stand in the document, below its comment."""
    rows = [("", *BOARDS), *((model, *(CELLS[kind](model, b) for b in BOARDS)) for model in MODELS)]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([lines[0], "|" + "---|" * (len(BOARDS) + 1), *lines[1:]])


@pytest.mark.parametrize("kind", list(CELLS))
def test_the_tables_are_what_plan_says(kind: str) -> None:
    after = re.split(rf"<!-- {kind}: .*-->\n+", TEXT)[1]
    found = after.partition("\n\n")[0]
    assert found == table(kind), f"put this into docs/JETSON.md:\n{table(kind)}"


def test_the_tables_would_show_a_change() -> None:
    cells = {memory(model, board) for model in MODELS for board in BOARDS}
    assert any(cell.startswith("per-scale") for cell in cells)
    assert any(cell.startswith("shared") for cell in cells)
    assert {"–"} < cells
    assert set(BOARDS) <= set(DEVICES)


# what people type


def typed() -> Iterator[list[str]]:
    """Every command of the console blocks and of `code` in the text, in words; without
    output and comments."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.S)
    lines = [
        line.removeprefix("$ ")
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    lines += re.findall(r"`((?:var-deploy|make|python -m) [^`]+)`", prose)
    for line in lines:
        for part in line.split("&&"):
            yield shlex.split(part, comments=True)


def unknown(words: list[str]) -> list[str]:
    """What of a var-deploy command does not exist; [] for commands of others."""
    line = " ".join(words)
    if line.startswith(CHECK):
        known = known_options()
        return [word for word in words[3:] if word.startswith("-") and word not in known]
    if words[:1] == ["make"]:
        rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return [word for word in words[1:] if word not in rules]
    if words[:1] != ["var-deploy"]:
        return []
    command = main.commands.get(words[1])
    if command is None:
        return [words[1]]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    wrong = [word for word in words[2:] if word.startswith("-") and word not in options]
    for parameter in command.params:
        if not isinstance(parameter.type, click.Choice):
            continue
        for option in parameter.opts:
            if option in words[:-1]:
                value = words[words.index(option) + 1]
                wrong += [] if value in parameter.type.choices else [f"{option} {value}"]
    if "--device" in words:
        device = words[words.index("--device") + 1]
        wrong += [] if device in (*DEVICES, "this", "cpu", "BOARD") else [device]
    return wrong


def test_every_command_and_option_exists() -> None:
    commands = list(typed())
    ours = [words for words in commands if words[0] == "var-deploy"]
    assert {words[1] for words in ours} >= {
        *("doctor", "plan", "export", "verify", "build", "generate")
    }
    assert any(" ".join(words).startswith(CHECK) for words in commands)
    assert ["make", "wheel"] in commands and ["make", "device-check"] in commands
    assert {" ".join(words): wrong for words in commands if (wrong := unknown(words))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "var-deploy paint d16",
        "var-deploy build d16 --fast",
        "var-deploy build d16 --layout quick",
        "var-deploy plan var-d16 --device orin",
        "make board",
        f"{CHECK} d16 --fast",
    ],
)
def test_what_does_not_exist_is_seen(line: str) -> None:
    assert unknown(shlex.split(line))


def test_options_in_the_text_belong_to_some_command() -> None:
    parameters = [p for command in main.commands.values() for p in command.params]
    known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    known |= known_options()
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    named = set(re.findall(r"`(--[a-z-]+)", prose))
    assert len(named) >= 8
    assert named <= known


# what it says


def test_messages_are_those_of_the_program() -> None:
    part = TEXT.partition("## What messages mean")[2]
    fragments = re.findall(r"^\| `([^`]+)` \|", part, re.M)
    assert len(fragments) > 10
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("var_deploy", "runtime")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert [fragment for fragment in fragments if fragment not in sources] == []


def test_the_wheel_has_this_name() -> None:
    assert set(re.findall(r"var_deploy-([\d.]+)-py3", TEXT)) == {__version__}


def test_the_bounds_are_those_of_the_check() -> None:
    forced = f"at least {FORCED_PSNR['fp16']:.0f} dB in fp16, {FORCED_PSNR['fp32']:.0f} dB in fp32"
    assert forced in TEXT
    assert f"within {MARGIN['fp16']:g} (fp16; {MARGIN['fp32']:g} in fp32)" in TEXT
    assert f"at least {SAME_PSNR:.0f} dB between" in TEXT


def test_it_says_first_what_has_not_run() -> None:
    start = TEXT.partition("## Versions")[0]
    assert "What has not run on a Jetson" in start
    assert "No board" in start

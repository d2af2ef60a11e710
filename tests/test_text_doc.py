"""docs/TEXT.md: its tables of memory and time are what `plan` says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cli_steps import run
from var_deploy.config import Precision
from var_deploy.host.machine import Machine
from var_deploy.planning.devices import DEVICES, Device, cpu_device
from var_deploy.planning.plan import Plan, TextEncoderWorkload, make_plan
from var_deploy.planning.workload import Workload
from var_deploy.scale_lists import scale_list, with_scales

DOCUMENT = Path(__file__).parents[1] / "docs" / "TEXT.md"
MODELS = ("infinity-125m", "infinity-1b", "infinity-2b", "infinity-8b")
RESOLUTIONS = ("0.06M", "0.25M", "1M")
BOARDS = ("orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb", "thor", "rtx-4090", "h200")


@cache
def planned(model: str, resolution: str, precision: Precision, board: str) -> Plan:
    """A plan as `var-deploy plan` makes it."""
    from var_deploy.export.checkpoint.presets import PROMPT_LENGTH, TEXT_ENCODERS, TEXT_PRESETS

    spec = with_scales(TEXT_PRESETS[model].spec, scale_list(resolution), PROMPT_LENGTH)
    encoder = TextEncoderWorkload(
        name="flan-t5-xl", spec=TEXT_ENCODERS["flan-t5-xl"], precision=precision
    )
    device = processor() if board == "cpu" else DEVICES[board]
    workload = Workload(model=spec, precision=precision)
    return make_plan(workload, device, name=model, text_encoder=encoder)


def processor() -> Device:
    """One with memory for everything: the table says what is needed, not what is here."""
    return dataclasses.replace(cpu_device(Machine()), memory=10**12, reserved=0)


def memory(plan: Plan) -> str:
    text = plan.text_encoder
    if not plan.fits or text is None:
        return "–"
    layout = plan.layouts[plan.layout]
    marks = ("" if text.kept else " †") + (" *" if layout.build_missing else "")
    return f"{plan.layout} {plan.peak / 1e9:.1f}{marks}"


def seconds(plan: Plan) -> str:
    text = plan.text_encoder
    if not plan.fits or text is None:
        return "–"
    return f"{duration(plan.seconds)} + {duration(text.launch.seconds)}"


def duration(time: float) -> str:
    return f"{time:.2g} s" if time >= 1 else f"{time * 1e3:.0f} ms"


def parts(plan: Plan) -> str:
    text = plan.text_encoder
    assert text is not None
    scales = plan.layouts[plan.layout].footprint.peak
    return f"{scales / 1e9:.1f} + {text.memory.peak / 1e9:.1f}"


def rows(
    cell: Callable[[Plan], str], columns: tuple[tuple[Precision, str], ...]
) -> Iterator[tuple[str, ...]]:
    for model in MODELS:
        for resolution in RESOLUTIONS:
            cells = (cell(planned(model, resolution, *column)) for column in columns)
            yield (model, resolution, *cells)


def table(kind: str) -> str:
    """A table as it has to stand in the document, below its comment."""
    head, columns, cell = {
        "memory in fp16": (BOARDS, tuple(("fp16", board) for board in BOARDS), memory),
        "memory in fp32": (BOARDS, tuple(("fp32", board) for board in BOARDS), memory),
        "time in fp16": (BOARDS, tuple(("fp16", board) for board in BOARDS), seconds),
        "memory on a CPU": (("int8", "fp32"), (("int8", "cpu"), ("fp32", "cpu")), parts),
    }[kind]
    listed = [("model", "pixels", *head), *rows(cell, columns)]  # type: ignore[arg-type]
    lines = [f"| {' | '.join(row)} |" for row in listed]
    return "\n".join([lines[0], "|" + "---|" * (len(head) + 2), *lines[1:]])


KINDS = ("memory in fp16", "memory in fp32", "time in fp16", "memory on a CPU")


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_are_what_plan_says(kind: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    after = re.split(rf"<!-- {kind}: .*-->\n+", text)[1]
    found = after.partition("\n\n")[0]
    assert found == table(kind), f"put this into docs/TEXT.md:\n{table(kind)}"


def test_the_plans_are_those_of_the_command() -> None:
    words = ("infinity-2b", "--resolution", "0.25M", "--device", "agx-orin-64gb", "--json")
    assert json.loads(run("plan", *words).stdout) == json.loads(
        json.dumps(planned("infinity-2b", "0.25M", "fp16", "agx-orin-64gb").to_json())
    )


def test_the_tables_would_show_a_change() -> None:
    cells = " ".join(table("memory in fp16").split())
    for part in ("per-scale", "shared", "†", "–"):
        assert part in cells, part

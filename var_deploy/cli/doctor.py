"""`var-deploy doctor`: what this machine can do, and what it lacks."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from var_deploy.cli.console import ProgressBar, echo, facts, paint, table
from var_deploy.cli.options import verbose_option

if TYPE_CHECKING:
    from var_deploy.host.doctor import DoctorReport


@click.command()
@verbose_option()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON on stdout.")
def doctor(as_json: bool) -> None:
    """Show what this machine can do, what it lacks, and how to get that.

    Ends with 1 only where nothing here can generate images.

    \b
    Example:
      var-deploy doctor
    """
    from var_deploy.host.doctor import examine
    from var_deploy.host.machine import Machine

    with ProgressBar() as progress:
        progress.update("looking", 0.0)
        report = examine(Machine())
    echo(json.dumps(_as_json(report), indent=1) if as_json else _as_text(report))
    if not report.generates:
        raise click.exceptions.Exit(1)


def _as_json(report: DoctorReport) -> dict[str, object]:
    return {
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "abilities": [
            {"name": ability.name, "here": ability.here, "lacks": ability.lacks}
            for ability in report.abilities
        ],
        "generates": report.generates,
    }


def _as_text(report: DoctorReport) -> str:
    marks = {"ok": "", "missing": paint("missing", "yellow"), "problem": paint("!", "red")}
    rows = [("", "found", "for")]
    steps = []
    for finding in report.findings:
        found = " ".join(filter(None, (marks[finding.state], finding.found)))
        rows.append((finding.name, found, finding.purpose))
        if finding.remedy:
            steps.append((finding.name, finding.remedy))
    lines = [table(rows, optional=(2,)), ""]
    answers = []
    for ability in report.abilities:
        answer = paint("yes", "green") if ability.here else f"no: {', '.join(ability.lacks)}"
        answers.append((ability.name, answer))
    lines.append(facts(answers))
    if steps:
        width = max(len(name) for name, _ in steps)
        lines += ["", "What would change it:"]  # commands stay on one line, to be copied
        lines += [f"  {name.ljust(width)}  {remedy}" for name, remedy in steps]
    return "\n".join(lines)

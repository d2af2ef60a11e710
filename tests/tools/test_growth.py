"""The series of docs/BENCHMARKS.md, on models small enough for a test."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools import growth
from var_deploy.spec import ModelSpec


@pytest.fixture(scope="module")
def rows(
    family_member: Callable[..., ModelSpec], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, object]]:
    cases = [
        growth.Case(series="depth", value=depth, spec=family_member(depth=depth))
        for depth in (1, 2)
    ]
    folder = tmp_path_factory.mktemp("growth")
    found = list(growth.measure(cases, folder, repeat=1, warm_up=0))
    assert not list(folder.iterdir()), "an export was left behind"
    return found


def test_a_row_a_case_and_precision(rows: list[dict[str, object]]) -> None:
    found = [(row["series"], row["value"], row["precision"]) for row in rows]
    assert found == [("depth", d, p) for d in (1, 2) for p in ("fp32", "int8")]
    by_place = {(row["value"], row["precision"]): row for row in rows}
    for row in rows:
        assert 0 < float(str(row["floor_ms"])) < float(str(row["ms"]))
    for depth in (1, 2):
        assert by_place[depth, "int8"]["weights"] < by_place[depth, "fp32"]["weights"]  # type: ignore[operator]
    assert by_place[1, "fp32"]["weights"] < by_place[2, "fp32"]["weights"]  # type: ignore[operator]


def test_the_table_and_the_figure_show_every_row(
    rows: list[dict[str, object]], tmp_path: Path
) -> None:
    broken = {"series": "side", "value": 512, "precision": "fp32", "problem": "no memory"}
    lines = growth.table([*rows, broken])
    assert len(lines) == 2 + len(rows) + 1
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "no memory" in lines[-1]
    pytest.importorskip("matplotlib", reason="matplotlib draws the figure")
    growth.draw([*rows, broken], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_series_cover_what_the_document_shows() -> None:
    values: dict[str, list[int]] = {}
    for case in growth.all_cases():
        values.setdefault(case.series, []).append(case.value)
    assert values == {
        "depth": [16, 20, 24],
        "batch": [1, 2, 4, 8],
        "threads": [1, 2],
        "side": [256, 512],
    }


def test_a_wrong_series_is_bad_usage(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    result = CliRunner().invoke(growth.main, ["--json", str(out), "--only", "width"])
    assert result.exit_code == 2 and "depth, batch, threads, side" in result.output


def test_rows_are_written_as_they_come(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    monkeypatch.setattr(growth, "measure", lambda *args, **named: iter(rows))
    out = tmp_path / "growth.json"
    result = CliRunner().invoke(growth.main, ["--json", str(out), "--only", "threads"])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text()) == rows
    assert "| depth 1 | int8 |" in result.output

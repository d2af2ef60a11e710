"""`var-deploy labels`, --label beside --labels, class names at export, completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.shell_completion import ShellComplete

from cli_steps import done, pixels, refused
from var_deploy.cli import main
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest


def completed(*words: object) -> list[str]:
    """What a shell offers for the last of some words."""
    *typed, last = map(str, words)
    shell = ShellComplete(main, {}, "var-deploy", "_VAR_DEPLOY_COMPLETE")
    return [item.value for item in shell.get_completions(typed, last)]


def test_labels_lists_and_searches(named: Path) -> None:
    lines = done("labels", named).stdout.splitlines()
    assert lines[0].split() == ["label", "name"] and lines[2].split() == ["0", "star"]
    assert len(lines) == 2 + 10
    assert done("labels", named, "moo").stdout.splitlines()[2:] == ["    7  moon"]
    found: list[dict[str, Any]] = json.loads(done("labels", named, "moon", "--json").stdout)
    assert found == [{"number": 7, "name": "moon", "synonyms": []}]
    refused(2, "labels", named, "mon", parts=("no class is called 'mon'", "did you mean", "moon"))


def test_labels_of_a_model_without_names(made: Path) -> None:
    assert "labels are the numbers 0 to 4" in done("labels", made).stdout
    assert done("labels", made, "3").stdout.splitlines()[-1].split() == ["3"]


@pytest.mark.parametrize("option", ["--label", "--labels"])
def test_label_and_labels_are_one_option(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    out, changed = tmp_path / "x.png", tmp_path / "y.png"
    done("generate", named, option, "star,3", "--out", out)
    assert read_settings(out)["labels"] == "0 star, 3 tree"
    one = tmp_path / "one.png"
    done("generate", named, option, "star", "--out", one)
    done("edit", named, one, "--box", "0,0,40,40", option, "moon", "--out", changed)
    assert read_settings(changed)["labels"] == "7 moon"
    said = "--labels and --label are one option, found 2: give it once, with commas"
    refused(2, "generate", named, "--labels", 1, option, 2, "--out", out, parts=(said,))
    said = "--label and --labels are one option, found 2"
    words = (one, "--box", "0,0,9,9", "--labels", 1, option, 2)
    refused(2, "edit", named, *words, "--out", out, parts=(said,))
    monkeypatch.setenv("VAR_DEPLOY_GENERATE_LABELS", "star, boat")  # with a space
    done("generate", named, "--out", out)
    assert read_settings(out)["labels"] == "0 star, 9 boat"


def test_no_label_is_dropped_silently(named: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    said = "2 labels for 1 image: give a count of 2 or more, or fewer labels"
    words = ("--labels", "star,boat", "--count", 1, "--out", out)
    refused(2, "generate", named, *words, parts=(said,))
    assert not out.exists()
    done("generate", named, "--count", 2, "--out", out)
    assert read_settings(out)["labels"] == "0 star, 1 heart", "these were not asked for by name"


def test_a_tile_of_a_grid_can_be_made_again(named: Path, tmp_path: Path) -> None:
    folder, alone = tmp_path / "many", tmp_path / "alone.png"
    done("generate", named, "--labels", "star,boat,3", "--count", 5, "--seed", 7, "--out", folder)
    for n, tile in enumerate(sorted(folder.iterdir())):
        told = read_settings(tile)
        assert told["seed"] == str(7 + n)
        label = told["labels"].split()[0]
        done("generate", named, "--labels", label, "--seed", 7 + n, "--out", alone)
        assert np.abs(pixels(alone).astype(int) - pixels(tile)).max() <= 1
    grid = tmp_path / "grid.png"
    done("generate", named, "--labels", "star,boat,3", "--count", 5, "--seed", 7, "--out", grid)
    assert read_settings(grid)["seed"] == "7,8,9,10,11"


def test_export_writes_class_names(named: Path, tmp_path: Path) -> None:
    names, out = tmp_path / "names.json", tmp_path / "b"
    names.write_text(json.dumps([f"thing {n}" for n in range(10)]))
    options = ("--random-weights", 0, "--layout", "shared", "--class-names", names)
    done("export", "pocket", "--out", out, *options)
    assert read_manifest(out).labels[3] == "thing 3"
    assert completed("generate", out, "--labels", "thing_") == [f"thing_{n}" for n in range(10)]
    names.write_text("cat\ndog\n")
    said = "labels must have a name for each of the 10 classes, found 2"
    refused(2, "export", "pocket", "--out", tmp_path / "c", *options, parts=(said,))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("words", [("generate", "--labels"), ("edit", "--label"), ("verify", "-x")])
def test_a_shell_completes_labels(named: Path, tmp_path: Path, words: tuple[str, str]) -> None:
    command, option = words[0], words[1] if words[1] != "-x" else "--label"
    assert completed(command, named, option, "mo") == ["moon"]
    assert completed(command, named, option, "star,m") == ["star,moon", "star,mushroom"]
    assert completed(command, tmp_path / "nothing", option, "mo") == []

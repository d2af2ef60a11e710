"""The command line: bad usage ends in one line, good usage passes on what was said.

The halves behind the commands are replaced by small fakes here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from cli_steps import assert_one_line, run
from var_deploy import __version__
from var_deploy.cli import main
from var_deploy.cli.console import ProgressBar, human_bytes, table
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.errors import BundleError
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.sampling import Sampling


class FakePipeline:
    """Draws every image in one colour, its label; remembers what it was asked."""

    calls: list[dict[str, Any]]
    failure: BaseException | None = None

    @classmethod
    def open(cls, bundle: Path, config: RuntimeConfig, **options: Any) -> FakePipeline:
        cls.calls.append({"bundle": bundle, **vars(config), **options})
        return cls()

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def describe(self) -> Loaded:
        return Loaded(precision="fp32", backend="fake", layout="shared")

    def generate(
        self, labels: Sequence[int], on_progress: Callable[[int, int], None], **settings: Any
    ) -> np.ndarray:
        self.calls.append({"labels": labels, **settings})
        on_progress(1, 2)
        if self.failure:
            raise self.failure
        on_progress(2, 2)
        return np.stack([np.full((4, 4, 3), label * 50, np.uint8) for label in labels])


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    class Fresh(FakePipeline):
        calls: list[dict[str, Any]] = []  # noqa: RUF012 - one list a test

    module = ModuleType("var_deploy.pipeline")
    module.Pipeline = Fresh  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "var_deploy.pipeline", module)
    return Fresh


def test_version_and_help() -> None:
    assert run("--version").output == f"var-deploy, version {__version__}\n"
    for command in main.commands:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"Example:\n    var-deploy {command}" in result.output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["exprot"], "exprot"),
        (["--nonsense"], "--nonsense"),
        (["generate"], "BUNDLE"),
        (["generate", "b"], "--out"),
        (["generate", "b", "--out", "x.png", "--count", "0"], "--count"),
        (["generate", "b", "--out", "x.png", "--count", "many"], "many"),
        (["generate", "b", "--out", "x.png", "--sed", "1"], "--seed"),
        (["generate", "b", "--out", "x.png", "--precision", "int3"], "int3"),
        (["export", "pocket"], "--out"),
        (["export", "pocket", "--out", "o", "--batch", "0"], "--batch"),
        (["export", "pocket", "--out", "o", "--precision", "fp8"], "fp8"),
        (["export", "pocket", "--out", "o", "--layout", "none"], "none"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], part: str) -> None:
    assert_one_line(run(*arguments), 2, part)


def test_no_command_shows_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.output


@pytest.mark.parametrize("command", [("generate", "--out", "x.png"), ("inspect",)])
def test_a_folder_that_is_no_bundle(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert_one_line(run(command[0], tmp_path, *command[1:]), 1, "is not a bundle")
    assert_one_line(run(command[0], tmp_path / "none", *command[1:]), 1, "none does not exist")


# generate


def test_a_grid_with_its_settings(bundle: Path, pipeline: type[FakePipeline]) -> None:
    out = bundle.parent / "deep" / "grid.png"
    result = run(
        *("generate", bundle, "--labels", "Heart,0", "--count", 4, "--seed", 7, "--out", out),
        *("--top-p", 0.5, "--threads", 1),
    )
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    assert result.stderr == "", "no progress off a terminal"
    load, generate = pipeline.calls
    assert load == {
        "bundle": bundle,
        "backend": "auto",
        "cuda_graph": True,
        "precision": "auto",
        "layout": "auto",
        "threads": 1,
        "check": "changed",
        "digest": read_manifest(bundle).digest(),
        "text_encoder": None,
        "text_config": None,
        "keep_text_encoder": False,
    }
    assert generate == {
        "labels": [1, 0, 1, 0],
        "seed": [7, 8, 9, 10],
        "sampling": Sampling(cfg=2.0, top_k=3, top_p=0.5, temperature=1.0),
    }
    with Image.open(out) as image:
        assert image.size == (10, 10), "two labels, four images: two columns of two"
    settings = read_settings(out)
    assert settings["labels"] == "1 heart, 0 star, 1 heart, 0 star"
    assert settings["seed"] == "7,8,9,10"
    assert settings["top_p"] == "0.5"
    assert settings["precision"] == "fp32"
    assert len(settings["bundle"]) == 64
    assert settings["Software"] == f"var-deploy {__version__}"


def test_one_image_and_all_classes(bundle: Path, pipeline: type[FakePipeline]) -> None:
    out = bundle.parent / "one.png"
    assert run("generate", bundle, "--labels", 2, "--out", out, "--quiet").output == ""
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), np.full((4, 4, 3), 100))
    assert run("generate", bundle, "--out", out).exit_code == 0
    assert pipeline.calls[-1]["labels"] == [0, 1, 2], "without labels: every class once"


@pytest.mark.parametrize("name", ["many/", "many", "there"])
def test_a_folder_of_single_images(bundle: Path, pipeline: type[FakePipeline], name: str) -> None:
    (bundle.parent / "there").mkdir()
    folder = bundle.parent / name
    out = f"{bundle.parent}/{name}"
    assert run("generate", bundle, "--labels", "star,2", "--count", 3, "--out", out).exit_code == 0
    files = ["000_star.png", "001_house-hut.png", "002_star.png"]
    assert sorted(p.name for p in folder.iterdir()) == files
    settings = read_settings(folder / files[1])
    assert settings["labels"] == "2 house/hut"
    assert settings["seed"] == "1", "that of this image alone"


def test_json_says_what_was_done(bundle: Path, pipeline: type[FakePipeline]) -> None:
    out = bundle.parent / "x.png"
    done = json.loads(run("generate", bundle, "--out", out, "--json").stdout)
    assert done["out"] == str(out)
    assert done["count"] == 3
    assert done["runtime"]["backend"] == "fake"
    assert done["settings"]["cfg"] == 2


def test_a_model_without_classes(
    tmp_path: Path, pipeline: type[FakePipeline], make_bundle: Callable[..., Path]
) -> None:
    bundle = make_bundle(tmp_path / "gpt2", family="gpt2")
    assert run("generate", bundle, "--count", 2, "--out", f"{tmp_path}/many/").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["000.png", "001.png"]
    result = run("generate", bundle, "--labels", 0, "--out", tmp_path / "x.png")
    assert_one_line(result, 2, "no classes")


def test_many_classes_need_labels(
    tmp_path: Path, pipeline: type[FakePipeline], make_bundle: Callable[..., Path]
) -> None:
    bundle = make_bundle(tmp_path / "many", names=["name"] * 1000)
    result = run("generate", bundle, "--out", tmp_path / "x.png")
    assert_one_line(result, 2, "1000 classes", "--labels")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--labels", "stra"], "did you mean star"),
        (["--labels", "3"], "0 to 2"),
        (["--labels", ","], "no label"),
        (["--cfg", "nan"], "cfg"),
        (["--top-k", "-1"], "top_k"),
        (["--top-p", "1.5"], "top_p"),
        (["--temperature", "0"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--seed", "-1"], "seed"),
        (["--seed", "1,x"], "seed '1,x'"),
        (["--seed", "1,2"], "2 seeds for 3 images"),
        (["--cfg", "1,2,3"], "cfg has 3 values, but the model has 2 scales"),
        (["--top-k", "0:9"], "top_k '0:9': 0 keeps every code"),
        (["--out", "x.bmp"], ".png, .jpg, .jpeg or .webp"),
        (["--out", "/proc/self/x.png"], "/proc/self/x.png"),
    ],
)
def test_bad_options_stop_before_loading(
    bundle: Path, pipeline: type[FakePipeline], options: list[str], part: str
) -> None:
    out = bundle.parent / "x.png"
    assert_one_line(run("generate", bundle, "--out", out, *options), 2, part)
    assert not pipeline.calls
    assert not out.exists()


def test_settings_of_each_scale(bundle: Path, pipeline: type[FakePipeline]) -> None:
    out = bundle.parent / "x.png"
    options = ("--cfg", "1:4", "--top-k", "9,0", "--top-p", "0.5,0.25", "--temperature", "2")
    assert run("generate", bundle, "--labels", "star", *options, "--out", out).exit_code == 0
    _, asked = pipeline.calls
    assert asked == {
        "labels": [0],
        "seed": [0],
        "sampling": Sampling(
            cfg=(1.0, 4.0), top_k=(9, 0), top_p=(0.5, 0.25), temperature=2.0
        ),
    }
    settings = read_settings(out)
    assert {name: settings[name] for name in ("cfg", "top_k", "top_p", "temperature")} == {
        "cfg": "1,4",
        "top_k": "9,0",
        "top_p": "0.5,0.25",
        "temperature": "2",
    }


def test_one_seed_an_image(bundle: Path, pipeline: type[FakePipeline]) -> None:
    out = bundle.parent / "many"
    result = run("generate", bundle, "--labels", "heart", "--seed", "5,9,5", "--out", out)
    assert result.exit_code == 0, result.output
    _, asked = pipeline.calls
    assert (asked["labels"], asked["seed"]) == ([1, 1, 1], [5, 9, 5])
    texts = [read_settings(path) for path in sorted(out.iterdir())]
    assert [text["seed"] for text in texts] == ["5", "9", "5"]
    grid = bundle.parent / "grid.png"
    run("generate", bundle, "--labels", "0,1", "--seed", "1,2", "--out", grid)
    assert read_settings(grid)["seed"] == "1,2"


def test_the_help_gives_the_formula_of_the_ramp() -> None:
    text = run("generate", "--help").output
    assert "the published ramp: 4·k/(K-1) at scale k = 0 … K-1" in text
    assert "1 + (4 - 1)·k/(K-1)" in text


def test_a_failure_leaves_the_old_image(bundle: Path, pipeline: type[FakePipeline]) -> None:
    out = bundle.parent / "x.png"
    out.write_bytes(b"old")
    pipeline.failure = BundleError("weights.bin is truncated")
    assert_one_line(run("generate", bundle, "--out", out), 1, "weights.bin is truncated")
    pipeline.failure = KeyboardInterrupt()
    result = run("generate", bundle, "--out", out)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    pipeline.failure = RuntimeError("two\nlines")
    assert_one_line(run("generate", bundle, "--out", out), 1, "RuntimeError: two lines")
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "x.png"]


def test_a_traceback_on_request(
    bundle: Path, pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAR_DEPLOY_TRACEBACK", "1")
    pipeline.failure = BundleError("broken")
    result = run("generate", bundle, "--out", bundle.parent / "x.png")
    assert result.exception is pipeline.failure


# the console


def test_a_table_lines_up() -> None:
    assert table([("a", "size"), ("graph", "7")], right=(1,)) == (
        "a      size\n-----  ----\ngraph     7"
    )


def test_sizes_for_people() -> None:
    sizes = [human_bytes(n) for n in (7, 1500, 2_500_000, 3_210_000_000)]
    assert sizes == ["7 B", "1.5 kB", "2.5 MB", "3.21 GB"]


def test_progress_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar() as progress:
        progress.update("step 1", 0.5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click.utils, "should_strip_ansi", lambda *_: False)
    with ProgressBar() as progress:
        progress.update("step 1", 0.5)
    drawn = capsys.readouterr().err
    assert "50% step 1" in drawn
    assert drawn.endswith("\r\x1b[K"), "the bar is wiped at the end"
    with ProgressBar(quiet=True) as progress:
        progress.update("step 1", 0.5)
    assert capsys.readouterr().err == ""

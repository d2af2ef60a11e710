"""Prompts on the command line, on a small text-to-image bundle with a real tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from text_case import HEIGHT, SCALES, TEXT_LENGTH, WIDTH

from cli_steps import done, pixels, refused, run
from var_deploy.bench.run import Settings, entries
from var_deploy.cli.export import _check_text
from var_deploy.device_check.command import main as check_device
from var_deploy.errors import UsageError
from var_deploy.host.machine import Machine
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends import onnxruntime_cpu
from var_deploy.text.manifest import read_text_encoder

DEER = "a red deer in the snow"


@pytest.fixture
def bundle(text_bundle: Path) -> Path:
    """Not to be changed."""
    return text_bundle


def test_an_image_of_a_prompt_and_what_its_file_says(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "deer.png"
    done("generate", bundle, "--prompt", DEER, "--negative", "fog", "--seed", 5, "--out", out)
    assert pixels(out).shape == (HEIGHT, WIDTH, 3)
    text = read_settings(out)
    assert (text["prompt"], text["negative"], text["seed"]) == (DEER, "fog", "5")
    assert not {"labels", "top_k"} & text.keys()
    with Pipeline.load(bundle) as pipe:
        images = pipe.generate(prompts=[DEER], negative="fog", seed=5)
        other = pipe.generate(prompts=[DEER], seed=5)
    np.testing.assert_array_equal(images[0], pixels(out))
    assert (other[0] != images[0]).any(), "the negative prompt matters"


def test_a_series_and_its_tiles(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{DEER}\n\na boat\n", encoding="utf-8")
    printed = done(
        "generate", bundle, "--prompts", file, "--count", 4, "--seed", 3, "--cfg", "1:4",
        "--out", tmp_path / "all", "--json",
    )
    settings = json.loads(printed.stdout)["settings"]
    assert settings["prompt"] == [DEER, "a boat"] * 2
    assert settings["seed"] == [3, 4, 5, 6]
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names[1] == "001_a-boat.png"
    done(
        "generate", bundle, "--prompt", "a boat", "--seed", 6, "--cfg", "1:4",
        "--out", tmp_path / "one.png",
    )
    np.testing.assert_array_equal(
        pixels(tmp_path / "one.png"), pixels(tmp_path / "all" / names[3])
    )


def test_previews_and_deadlines(bundle: Path, tmp_path: Path) -> None:
    strip = tmp_path / "strip.png"
    done(
        "generate", bundle, "--prompt", DEER, "--preview", strip, "--deadline", 600,
        "--out", tmp_path / "x.png",
    )
    with Image.open(strip) as image:
        assert image.size == (3 * WIDTH + 4, HEIGHT)


def test_a_long_prompt_is_cut_off_and_said_so(bundle: Path, tmp_path: Path) -> None:
    long = "a very long story of a fox and a boat " * 270
    assert len(long) > 10_000
    result = run("generate", bundle, "--prompt", long, "--out", tmp_path / "x.png")
    assert result.exit_code == 0
    assert f"takes {TEXT_LENGTH}" in result.stderr


def test_words_that_the_text_encoder_lacks_are_told(bundle: Path, tmp_path: Path) -> None:
    """The golden tokenizer has no piece for an x."""
    words = ("--prompt", "a red fox", "--negative", "a box", "--out", tmp_path / "x.png")
    told = "the text encoder does not know: fox, box"
    result = run("generate", bundle, *words)
    assert result.exit_code == 0 and told in result.stderr
    result = run("generate", bundle, *words, "--json")
    assert json.loads(result.stdout)["remarks"] == [told] and not result.stderr
    many = " ".join(f"{n}x" for n in range(12))
    assert "8x, 9x and 3 more" in run("generate", bundle, "--prompt", many, *words[2:]).stderr


@pytest.mark.parametrize(
    "prompt",
    [
        *("", "\u0442\u0438\u0433\u0440 \u6771\u4eac \u0645\u0631 \U0001f309"),
        *("</s><extra_id_3>", "a\tb\x07\x1b[31mc"),
    ],
)
def test_odd_prompts_are_drawn(bundle: Path, tmp_path: Path, prompt: str) -> None:
    result = run("generate", bundle, "--prompt", prompt, "--out", tmp_path / "x.png")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("\n") == ("not know" in result.stderr), "one line at most"


def test_edit_and_reconstruct(bundle: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / "picture.png", tmp_path / "edit.png"
    done("generate", bundle, "--prompt", DEER, "--out", picture)
    box = f"0,0,{WIDTH // 2},{HEIGHT}"
    done(
        "edit", bundle, picture, "--box", box, "--prompt", "a boat", "--keep-pixels", "--seed", 9,
        "--out", out,
    )
    before, after = pixels(picture), pixels(out)
    np.testing.assert_array_equal(after[:, WIDTH // 2 :], before[:, WIDTH // 2 :])
    assert (after[:, : WIDTH // 2] != before[:, : WIDTH // 2]).any()
    assert read_settings(out)["prompt"] == "a boat"
    tokens = tmp_path / "picture.npz"
    done("encode", bundle, picture, "--out", tokens)
    done("reconstruct", bundle, tokens, "--out", tmp_path / "again.png")
    done("reconstruct", bundle, picture, "--out", tmp_path / "direct.png")
    np.testing.assert_array_equal(
        pixels(tmp_path / "again.png"), pixels(tmp_path / "direct.png")
    )


def test_the_wrong_condition(bundle: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    refused(2, "generate", bundle, "--labels", "1", "--out", out, parts=("prompts, not labels",))
    refused(2, "generate", bundle, "--out", out, parts=('--prompt "…"',))
    refused(2, "generate", made, "--prompt", DEER, "--out", out, parts=("takes labels",))
    refused(
        2, "generate", bundle, "--prompt", DEER, "--top-k", "5", "--out", out, parts=("top_p",)
    )
    refused(
        2, "generate", bundle, "--prompt", DEER, "--prompt", "boat", "--count", 1, "--out", out,
        parts=("2 prompts for 1 image",),
    )
    refused(2, "generate", bundle, "--prompts", tmp_path / "no", "--out", out, parts=("--prompts",))


def test_a_text_encoder_that_is_not_there_or_another(bundle: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(bundle, tmp_path / "alone"))
    out = tmp_path / "x.png"
    refused(2, "generate", alone, "--prompt", DEER, "--out", out, parts=("--text-encoder",))
    place = bundle.parent / "t5"
    done("generate", alone, "--prompt", DEER, "--text-encoder", place, "--out", out)
    other = Path(shutil.copytree(place, tmp_path / "other"))
    (other / "tokenizer.json").write_bytes((place / "tokenizer.json").read_bytes() + b" ")
    refused(1, "generate", alone, "--prompt", DEER, "--text-encoder", other, "--out", out)


def test_a_text_encoder_of_another_width_or_length(bundle: Path, tmp_path: Path) -> None:
    """As a folder of the Hub and as a bundle; told before anything is written."""
    out = tmp_path / "out"
    export = ("export", "infinity-125m", "--random-weights", 0, "--resolution", "0.06M")
    for place in ("hub", "t5"):
        refused(
            2, *export, "--text-encoder", bundle.parent / place, "--out", out,
            parts=("features of width 64, the model takes 2048",),
        )
    assert not list(tmp_path.iterdir())
    refused(2, *export, "--aspect", "9:1", "--out", out, parts=("no scale list has aspect 9:1",))
    model = read_manifest(bundle).model.transformer
    t5 = read_text_encoder(bundle.parent / "t5").model
    short = dataclasses.replace(t5, length=TEXT_LENGTH - 1)
    with pytest.raises(UsageError, match="takes 23 tokens, --text-length asks for 24"):
        _check_text(model, short, Path("t5"))


def test_inspect_names_what_it_takes(bundle: Path) -> None:
    shown = done("inspect", bundle).stdout
    assert f"prompts of up to {TEXT_LENGTH} tokens" in shown
    assert f"{WIDTH} × {HEIGHT} pixels" in shown
    assert "t5 (digest" in shown


def test_bench_times_images_and_text_apart(bundle: Path, tmp_path: Path) -> None:
    """Three images in batches of two, without and with the text encoder."""
    report, copy = tmp_path / "report.json", Path(shutil.copytree(bundle, tmp_path / "alone"))
    options = ("--repeat", 1, "--warm-up", 0, "--threads", 1, "--precision", "fp32")
    text = done(
        "bench", bundle, *options, "--batch", 3, "--layout", "shared", "--json", report
    ).stdout
    (found,) = json.loads(report.read_text())["runs"]
    ours, encoder = found["contenders"]
    launches = [
        "condition", "unconditional", *(f"scale_{k:02d}" for k in range(SCALES)), "decoder"
    ]
    assert (ours["name"], list(ours["launches"])) == ("var-deploy fp32 shared", launches)
    assert [row["launch"] for row in ours["floor"]["launches"]] == launches
    assert 0 < ours["floor"]["reached"] < 1 < ours["memory"]["peak_over_weights"]
    assert (encoder["name"], encoder["launches"]) == ("text encoder fp32", {})
    assert encoder["runs_on"]["layout"] == "single graph"
    assert list(encoder["cold_parts_s"]) == ["imports", "opening", "first image"]
    assert 0 < encoder["floor"]["reached"] < 1
    weights = encoder["memory"]["weights"], ours["memory"]["weights"]
    folders = bundle.parent / "t5", bundle
    sizes = [(folder / "fp32" / "weights.bin").stat().st_size for folder in folders]
    assert weights[0] < sizes[0] and weights[1] < sizes[1], "padding, and an encoder for pictures"
    assert "text encoder fp32" in text
    names = [
        entry.name
        for entry in entries(copy, Settings(), 1, Machine(), read_manifest(copy))
    ]
    assert names == ["var-deploy"], "its text encoder is not beside it"


def test_the_device_check_refuses_it_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert check_device([str(bundle), "--out", str(out), "--no-peers"]) == 1
    failed = [step for step in json.loads(out.read_text())["steps"] if step["state"] == "failed"]
    assert [step["reason"] for step in failed] == [
        "device_check does not know text-to-image bundles yet"
    ]


def test_the_decoder_frees_its_maps_as_soon_as_it_can(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned reuse keeps them: 305 MiB instead of 241 at 256 × 256."""
    planned: dict[str, bool] = {}
    opened = onnxruntime_cpu.open_session

    def noted(ort: Any, graph: Any, options: Any, **how: Any) -> Any:
        planned[graph.ref.kind] = options.enable_mem_reuse
        return opened(ort, graph, options, **how)

    monkeypatch.setattr(onnxruntime_cpu, "open_session", noted)
    Pipeline.load(bundle, threads=1).close()
    assert planned == {"condition": True, "unconditional": True, "step": False, "decoder": False}

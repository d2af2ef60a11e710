"""Prompts on the command line, on a small text-to-image bundle with a real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from text_case import HEIGHT, TEXT_LENGTH, WIDTH, export_text_bundle

from cli_steps import done, pixels, refused, run
from var_deploy.image.images import read_settings
from var_deploy.pipeline import Pipeline

FOX = "a red fox in the snow"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_text_bundle(tmp_path_factory.mktemp("text"))


def test_an_image_of_a_prompt_and_what_its_file_says(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox.png"
    done("generate", bundle, "--prompt", FOX, "--negative", "fog", "--seed", 5, "--out", out)
    assert pixels(out).shape == (HEIGHT, WIDTH, 3)
    text = read_settings(out)
    assert (text["prompt"], text["negative"], text["seed"]) == (FOX, "fog", "5")
    assert not {"labels", "top_k"} & text.keys()
    with Pipeline.load(bundle) as pipe:
        images = pipe.generate(prompts=[FOX], negative="fog", seed=5)
        other = pipe.generate(prompts=[FOX], seed=5)
    np.testing.assert_array_equal(images[0], pixels(out))
    assert (other[0] != images[0]).any(), "the negative prompt matters"


def test_a_series_and_its_tiles(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{FOX}\n\na boat\n", encoding="utf-8")
    printed = done(
        "generate", bundle, "--prompts", file, "--count", 4, "--seed", 3, "--cfg", "1:4",
        "--out", tmp_path / "all", "--json",
    )
    settings = json.loads(printed.stdout)["settings"]
    assert settings["prompt"] == [FOX, "a boat"] * 2
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
        "generate", bundle, "--prompt", FOX, "--preview", strip, "--deadline", 600,
        "--out", tmp_path / "x.png",
    )
    with Image.open(strip) as image:
        assert image.size == (3 * WIDTH + 4, HEIGHT)


def test_a_long_prompt_is_cut_off_and_said_so(bundle: Path, tmp_path: Path) -> None:
    long = "a very long story of a fox and a boat " * 20
    result = run("generate", bundle, "--prompt", long, "--out", tmp_path / "x.png")
    assert result.exit_code == 0
    assert f"takes {TEXT_LENGTH}" in result.stderr


@pytest.mark.parametrize(
    "prompt", ["", "\u0442\u0438\u0433\u0440", "</s><extra_id_3>", "a\tb\x07c"]
)
def test_odd_prompts_are_drawn(bundle: Path, tmp_path: Path, prompt: str) -> None:
    done("generate", bundle, "--prompt", prompt, "--out", tmp_path / "x.png")


def test_edit_and_reconstruct(bundle: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / "picture.png", tmp_path / "edit.png"
    done("generate", bundle, "--prompt", FOX, "--out", picture)
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
    refused(2, "generate", made, "--prompt", FOX, "--out", out, parts=("takes labels",))
    refused(
        2, "generate", bundle, "--prompt", FOX, "--top-k", "5", "--out", out, parts=("top_p",)
    )
    refused(
        2, "generate", bundle, "--prompt", FOX, "--prompt", "boat", "--count", 1, "--out", out,
        parts=("2 prompts for 1 image",),
    )
    refused(2, "generate", bundle, "--prompts", tmp_path / "no", "--out", out, parts=("--prompts",))


def test_a_text_encoder_that_is_not_there_or_another(bundle: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(bundle, tmp_path / "alone"))
    out = tmp_path / "x.png"
    refused(2, "generate", alone, "--prompt", FOX, "--out", out, parts=("--text-encoder",))
    place = bundle.parent / "t5"
    done("generate", alone, "--prompt", FOX, "--text-encoder", place, "--out", out)
    other = Path(shutil.copytree(place, tmp_path / "other"))
    (other / "tokenizer.json").write_bytes((place / "tokenizer.json").read_bytes() + b" ")
    refused(1, "generate", alone, "--prompt", FOX, "--text-encoder", other, "--out", out)


def test_inspect_names_what_it_takes(bundle: Path) -> None:
    shown = done("inspect", bundle).stdout
    assert f"prompts of up to {TEXT_LENGTH} tokens" in shown
    assert f"{WIDTH} × {HEIGHT} pixels" in shown
    assert "t5 (digest" in shown


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "--per-class", "1", "--out", "set"),
        ("triton", "--out", "repository"),
        ("bench",),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_do_not_know_it_say_so(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(2, command[0], bundle, *command[1:])
    assert "text-to-image bundles yet" in line

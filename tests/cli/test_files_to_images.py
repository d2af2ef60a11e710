"""The command line over real models: from files on disk to images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_steps import ONE_THREAD, SIDE, done, edit, export, pixels, process, refused, run, tree
from var_deploy.cli import outputs
from var_deploy.image import images
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline

pytest.importorskip("torch")


# the whole path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_files_to_verified_images(
    files: Path, made: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / "deep" / "bundle"
    assert export(files, out, "--batch", 2, suffix=suffix).exit_code == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["bundle"]
    assert read_manifest(out).digest() == read_manifest(made).digest(), "the same graphs"
    if suffix == ".pth":
        assert tree(out) == tree(made), "the same input gives the same bytes"

    assert "not verified yet" in done("inspect", out).stdout
    weights = ("--checkpoint", files / f"var{suffix}", "--tokenizer", files / f"vae{suffix}")
    verified = done("verify", out, *weights)
    for part in ("fp32/condition", "fp32/scale_02", "fp32/step @ 1", "fp32/loop shared", "ok"):
        assert part in verified.stdout
    report = json.loads(done("verify", out, *weights, "--json").stdout)
    assert report["passed"] is True
    assert report["checks"]

    text = done("inspect", out).stdout
    for part in ("equal the PyTorch model's", "all intact", "8 × 8 pixels", "batch", "step"):
        assert part in text
    data = json.loads(done("inspect", out, "--json").stdout)
    assert (data["intact"], data["damage"], data["batch"]) == (True, [], 2)
    assert data["digest"] == read_manifest(out).digest(), "a report does not change it"
    assert report.pop("unstored") == ""
    assert data["parity"] == report

    done("generate", out, "--labels", 1, "--out", tmp_path / "one.png")
    assert pixels(tmp_path / "one.png").shape == (SIDE, SIDE, 3)


def test_a_machine_path_is_in_no_file(files: Path, made: Path) -> None:
    for name, content in tree(made).items():
        for path in (str(files), str(made.parent), str(Path(__file__).parents[1])):
            assert content is None or path.encode() not in content, name


def test_a_grid_a_folder_and_single_images_agree(made: Path, tmp_path: Path) -> None:
    request = ("--labels", "4,2", "--count", 5, "--seed", 11)
    done("generate", made, *request, "--out", f"{tmp_path}/many/")
    singles = sorted((tmp_path / "many").iterdir())
    assert [p.name for p in singles] == [
        f"{n:03d}_{label}.png" for n, label in enumerate((4, 2, 4, 2, 4))
    ]
    result = done("generate", made, *request, "--out", tmp_path / "grid.png")
    assert re.fullmatch(
        rf"wrote {tmp_path}/grid\.png \(5 images of 8 × 8, [\d.]+ s\)\n", result.stdout
    )
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (2 * SIDE + 2, 3 * SIDE + 4, 3)
    for n, path in enumerate(singles):
        top, left = n // 3 * (SIDE + 2), n % 3 * (SIDE + 2)
        np.testing.assert_array_equal(
            sheet[top : top + SIDE, left : left + SIDE], pixels(path), err_msg=path.name
        )
    assert pixels(singles[0]).std() > 10


def test_an_image_with_a_seed_of_its_own_is_the_one_made_alone(made: Path, tmp_path: Path) -> None:
    done("generate", made, "--labels", "3", "--seed", "5,9,5", "--out", tmp_path / "many")
    paths = sorted((tmp_path / "many").iterdir())
    assert len(paths) == 3
    for path in paths:
        text = read_settings(path)
        again = ("--labels", text["labels"], "--seed", text["seed"], "--out", tmp_path / "one.png")
        done("generate", made, *again)
        np.testing.assert_array_equal(pixels(path), pixels(tmp_path / "one.png"))
    assert [read_settings(path)["seed"] for path in paths] == ["5", "9", "5"]
    assert (pixels(paths[0]) != pixels(paths[1])).any()


def options_of(text: dict[str, str]) -> list[str]:
    """The options that a picture's text tells."""
    keys = ("seed", "labels", "cfg", "top_k", "top_p", "temperature", "precision")
    return [part for key in keys for part in ("--" + key.replace("_", "-"), text[key])]


def test_a_picture_can_be_made_again_from_its_text(made: Path, tmp_path: Path) -> None:
    odd = ("--cfg", 1.23456789, "--top-p", 0.8765432101, "--temperature", 1.0000001, "--top-k", 40)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    done("generate", made, "--labels", "3,0", "--seed", 2**64 - 2, *odd, "--out", first)
    text = read_settings(first)
    assert text["bundle"] == read_manifest(made).digest()
    done("generate", made, *options_of(text), "--out", again)
    np.testing.assert_array_equal(pixels(again), pixels(first))
    assert read_settings(again) == text
    assert float(text["cfg"]) == 1.23456789

    scales = ("--cfg", "0.1:3.3", "--top-k", "0,5,48", "--top-p", "0.7:1", "--temperature", 0.3)
    done("generate", made, "--labels", "3,0", *scales, "--out", first)
    text = read_settings(first)
    done("generate", made, *options_of(text), "--out", again)
    np.testing.assert_array_equal(pixels(again), pixels(first))
    assert read_settings(again) == text
    assert text["cfg"].startswith("0.1,1.7") and text["cfg"].count(",") == 2

    done("generate", made, "--labels", "3,0", "--count", 3, "--out", tmp_path / "many")
    text = read_settings(tmp_path / "many" / "002_3.png")
    assert text["seed"] == "2"
    # an image depends on its seed and label alone: it can be made again without the others
    alone = ("--labels", text["labels"], "--seed", text["seed"], "--out", tmp_path / "re.png")
    done("generate", made, *alone)
    np.testing.assert_array_equal(
        pixels(tmp_path / "re.png"), pixels(tmp_path / "many" / "002_3.png")
    )


def test_labels_by_name(named: Path, tmp_path: Path) -> None:
    classes = read_manifest(named).labels
    for out, labels in (("names", f"{classes[3]}, {classes[0].upper()}"), ("numbers", "3,0")):
        done("generate", named, "--labels", labels, "--out", tmp_path / f"{out}.png")
    np.testing.assert_array_equal(pixels(tmp_path / "names.png"), pixels(tmp_path / "numbers.png"))
    text = read_settings(tmp_path / "numbers.png")
    assert text["labels"] == f"3 {classes[3]}, 0 {classes[0]}"
    assert text["model"] == "pocket"


def test_images_without_a_class_among_others(named: Path, tmp_path: Path) -> None:
    name, out = read_manifest(named).labels[3], tmp_path / "many"
    done("generate", named, "--labels", "3,none", "--count", 4, "--seed", 2, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == [
        f"000_{name}.png",
        "001.png",
        f"002_{name}.png",
        "003.png",
    ]
    text = read_settings(out / "001.png")
    assert (text["labels"], text["seed"]) == ("none", "3")
    with Pipeline.load(named) as pipe:
        mixed = pipe.generate([3, None, name, None], seed=2)
        np.testing.assert_array_equal(pipe.generate(None, seed=[2])[0], pipe.generate([None], 2)[0])
    for n, path in enumerate(sorted(out.iterdir())):
        np.testing.assert_array_equal(pixels(path), mixed[n])
    assert (mixed[1] != mixed[0]).any()
    done("generate", named, "--labels", "none", "--seed", 2, "--out", tmp_path / "one.png")
    assert read_settings(tmp_path / "one.png")["labels"] == "none"


def test_random_weights_are_verified_without_files(named: Path) -> None:
    done("verify", named, "--precision", "fp32")


def test_without_guidance(files: Path, tmp_path: Path) -> None:
    assert export(files, tmp_path / "b", "--no-guidance").exit_code == 0
    done("generate", tmp_path / "b", "--labels", 0, "--out", tmp_path / "x.png")
    assert read_settings(tmp_path / "x.png")["cfg"] == "0"
    refused(
        *(2, "generate", tmp_path / "b", "--labels", 0, "--cfg", 1, "--out", tmp_path / "y.png"),
        parts=("--no-guidance", "cfg must be 0"),
    )
    assert not (tmp_path / "y.png").exists()


def test_real_processes(named: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    made = process("generate", named, "--labels", "0", "--out", out, "--threads", 1, "--json")
    assert (made.returncode, made.stderr) == (0, "")
    report = json.loads(made.stdout)
    assert report["runtime"]["threads"] == 1
    assert report["settings"]["labels"] == [0] and report["settings"]["seed"] == 0
    assert report["settings"]["label_names"] == [read_manifest(named).labels[0]]
    text = read_settings(out)
    assert [str(report["settings"][k]) for k in ("precision", "top_k", "bundle")] == [
        text[k] for k in ("precision", "top_k", "bundle")
    ]
    failed = process("generate", named, "--labels", "0", "--out", out / "y.png")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == f"error: {out}/y.png cannot be written: {out} is not a folder\n"
    missing = process("inspect", tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == (
        f"error: {tmp_path}/none does not exist; give the folder of a bundle, which var-deploy "
        "export writes\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_over_scales_and_batches_on_a_terminal(made: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "var_deploy.cli", "generate", str(made), "--labels", "0,1,2"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "x.png")],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env=ONE_THREAD,
    ) as child:
        os.close(theirs)
        seen = b""
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:  # how Linux tells that the other side has closed
            pass
        os.close(ours)
        assert child.wait(60) == 0
    told = re.findall(rb"(image \d) of 3, [\d.]+(?:/s| s each), \d+ s left", seen)
    assert list(dict.fromkeys(told)) == [b"image 1", b"image 2", b"image 3"]
    assert seen.endswith(b"\r\x1b[K"), "the bar is wiped at the end"


# what may be replaced


def test_force(files: Path, bundle: Path) -> None:
    before = tree(bundle)
    (bundle / "int8").mkdir()
    (bundle / "int8" / "old.onnx").write_text("old")
    edit(bundle, lambda data: data["files"].update({"int8/old.onnx": {"size": 3, "sha256": ""}}))
    assert export(files, bundle, "--batch", 2).exit_code == 2
    assert (bundle / "int8").exists()
    assert export(files, bundle, "--batch", 2, "--force").exit_code == 0
    assert tree(bundle) == before, "what the old manifest named is gone as a whole"
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_force_follows_a_link(files: Path, bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    assert export(files, link, "--force").exit_code == 0
    assert link.is_symlink()
    assert read_manifest(bundle).batch == 1
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "link"]


def test_an_empty_folder_is_filled_and_any_other_kept(files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(files, tmp_path / "empty").exit_code == 0
    done("inspect", tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    result = export(files, tmp_path / "other", "--force")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "holds no bundle" in result.stderr
    assert tree(tmp_path / "other") == {"thesis.tex": b"x"}


# more than fits into memory


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images of the small model are kept in memory together."""
    monkeypatch.setattr(outputs, "MAX_PIXELS", 4 * SIDE**2)


@pytest.mark.parametrize("seeds", ["7", "7,8,9,1,2,3,4"])
def test_a_folder_of_more_than_memory_holds(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: str
) -> None:
    """The same files as at once; not more than a batch is drawn before it is written."""
    request = ("generate", made, "--labels", "1,none,3", "--count", 7, "--seed", seeds)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done(*request, "--out", whole)
    monkeypatch.setattr(outputs, "MAX_PIXELS", 4 * SIDE**2)
    events: list[str] = []
    draw, write = Pipeline.draw, images.write_png

    def drawn(self: Pipeline, *arguments: Any) -> Any:
        events.append("draw")
        return draw(self, *arguments)

    def written(*arguments: Any, **options: Any) -> None:
        events.append("write")
        write(*arguments, **options)

    monkeypatch.setattr(Pipeline, "draw", drawn)
    monkeypatch.setattr(images, "write_png", written)
    said = done(*request, "--out", parts).stdout
    assert said.startswith(f"wrote {parts} (7 images of 8 × 8, ")
    assert tree(parts) == tree(whole)
    assert events == ["draw", "write", "write"] * 3 + ["draw", "write"]


def test_a_stopped_folder_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_memory: None
) -> None:
    draw, calls = Pipeline.draw, [0]

    def interrupted(self: Pipeline, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    result = run("generate", made, "--labels", 1, "--count", 9, "--out", tmp_path / "many")
    assert (result.exit_code, tree(tmp_path)) == (130, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--count", 10**12, "--out", "x.png"), "1,000,000,000,000 images of 8 × 8 are too many"),
        (("--count", 5, "--out", "x.png"), "4 images: ask for fewer, or name a folder"),
        (("--count", 10**12, "--out", "many"), "at most 100,000 images, found 1,000,000,000,000"),
        (("--count", 5, "--out", "many", "--deadline", 9), "is for at most 4 images, found 5"),
    ],
)
def test_more_images_than_can_be_had(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    little_memory: None,
    options: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(2, "generate", made, "--labels", "1", *options, parts=(words,))
    assert not tree(tmp_path)


def test_more_edits_and_scales_than_can_be_had(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_memory: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (SIDE, SIDE)).save("p.png")
    edit = ("edit", made, "p.png", "--box", "0,0,4,4", "--out", "many")
    refused(2, *edit, "--count", 10**12, parts=("1,000,000,000,000 images of 8 × 8 are too",))
    scales = ("reconstruct", made, "p.png", "--out", "s.png", "--scales", "1..K,1..K")
    refused(2, *scales, parts=("6 images of 8 × 8 are too many for one grid",))

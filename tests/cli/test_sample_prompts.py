"""`sample` of a bundle that takes prompts: the same rules as for classes, with a text beside each
image."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_case import TEXT_LENGTH

from cli_steps import refused, run, tree
from var_deploy.datasets import spec as spec_module
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.formats import read_images
from var_deploy.datasets.shards import draw_shard
from var_deploy.errors import UsageError
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Request
from var_deploy.sampling import numbered

FOX, SEA, OTHER = "a red fox", "the sea at dawn", "狐狸 \t🦊"
UNKNOWN = "the text encoder does not know: fox, 狐狸, 🦊"
PROMPTS = [FOX, SEA, OTHER]


def sampled(*words: object) -> Any:
    """Run a command on prompts of which the golden text encoder does not know all words."""
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr in ("", UNKNOWN + "\n")
    return result


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The options of a set of six images in two shards; the last prompt is typed, and comes first
    there as in `generate`."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(f"{SEA}\r\n\n{OTHER}\n", encoding="utf-8")
    options = ("--prompt", FOX, "--prompts", file, "--per-prompt", 2, "--negative", "fog")
    return (*options, "--shard-size", 4, "--seed", 7, "--cfg", "1:3", "--threads", 1)


@pytest.fixture(scope="module")
def made_set(
    text_bundle: Path, given: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A complete set. Not to be changed."""
    out = tmp_path_factory.mktemp("sets") / "set"
    printed = sampled("sample", text_bundle, *given, "--out", out).stdout.splitlines()
    assert printed[1] == f"{out} is complete: 6 images in 2 shards"
    return out


def member(shard: Path, name: str) -> str:
    with tarfile.open(shard) as tar:
        found = tar.extractfile(name)
        assert found is not None
        return found.read().decode()


def test_image_n_has_prompt_n_and_says_so(text_bundle: Path, made_set: Path) -> None:
    with Pipeline.load(text_bundle, threads=1) as pipe:
        settings = pipe.manifest.sampling(cfg=(1.0, 2.0, 3.0))
        texts = PROMPTS * 2
        request = Request(
            labels=[0] * 6,
            rng_keys=numbered(7, 0, 6),
            sampling=settings,
            prompts=pipe.features(texts, ["fog"] * 6),
        )
        expected = pipe.draw(request)
        alone = pipe.generate(prompts=FOX, negative="fog", seed=7, sampling=settings)
        spec = SetFolder(path=made_set).read()
        assert spec is not None
        assert draw_shard(pipe, spec, 1) == (made_set / "000001.tar").read_bytes()
    np.testing.assert_array_equal(expected[:1], alone)
    found = [image for n in range(2) for image in read_images(made_set / f"00000{n}.tar")]
    np.testing.assert_array_equal(found, expected)
    with tarfile.open(made_set / "000001.tar") as tar:
        names = [f"00000000{n}.{suffix}" for n in (4, 5) for suffix in ("png", "txt", "json")]
        assert tar.getnames() == names
    assert member(made_set / "000001.tar", "000000005.txt") == OTHER
    about = json.loads(member(made_set / "000001.tar", "000000005.json"))
    assert about == {"seed": 7, "number": 5, "prompt": OTHER}


def test_what_the_set_says_of_itself(text_bundle: Path, made_set: Path) -> None:
    data = json.loads((made_set / "set.json").read_text())
    settings = data["settings"]
    assert (data["schema_version"], data["complete"], settings["per_prompt"]) == (2, True, 2)
    assert not {"classes", "per_class"} & settings.keys()
    prompts = settings["prompts"]
    assert (prompts["texts"], prompts["count"], prompts["negative"]) == (PROMPTS, 3, "fog")
    encoder = json.loads((text_bundle / "manifest.json").read_text())["text_encoder"]
    assert prompts["text_encoder"] == encoder["digest"]
    assert (prompts["precision"], prompts["backend"]) == ("fp32", "onnxruntime-cpu")


def test_in_parts_and_resumed(
    text_bundle: Path, given: tuple[Any, ...], made_set: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    for share in ("2/2", "1/2"):
        sampled("sample", text_bundle, *given, "--out", parts, "--shards", share)
    assert tree(parts) == tree(made_set)
    (parts / "000001.tar").unlink()
    report = json.loads(sampled("sample", text_bundle, *given, "--out", parts, "--json").stdout)
    assert (report["made"], report["complete"], report["remarks"]) == ([1], True, [UNKNOWN])
    assert report["runtime"]["text encoder"] == "fp32, onnxruntime-cpu"
    assert tree(parts) == tree(made_set)
    sampled("sample", text_bundle, *given, "--out", parts, "--check")
    (parts / "000000.tar").write_bytes(b"dust")
    line = ("sample", text_bundle, *given, "--out", parts, "--check")
    refused(1, *line, parts=("000000.tar does not match its hash",))


def test_as_parquet(
    text_bundle: Path, given: tuple[Any, ...], made_set: Path, tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "tables"
    sampled("sample", text_bundle, *given, "--out", out, "--format", "parquet")
    table = pq.read_table(sorted(out.glob("*.parquet")))
    assert table.column_names == ["image", "prompt", "seed", "number"]
    assert table["prompt"].to_pylist() == PROMPTS * 2
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["prompt"] == {"dtype": "string", "_type": "Value"}
    np.testing.assert_array_equal(
        list(read_images(out / "000000.parquet")), list(read_images(made_set / "000000.tar"))
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--prompt", "a boat"), "prompts is 3 with the hash "),
        (("--negative", "rain"), "negative is 'fog' and not 'rain'"),
        (("--per-prompt", 3), "per prompt is 2 and not 3"),
        (("--temperature", "0.9"), "temperature is 0.5 and not 0.9"),
    ],
)
def test_another_set_is_refused(
    text_bundle: Path, given: tuple[Any, ...], made_set: Path, more: tuple[Any, ...], words: str
) -> None:
    refused(2, "sample", text_bundle, *given, *more, "--out", made_set, parts=(words,))


def test_many_prompts_are_known_by_their_hash(
    text_bundle: Path,
    given: tuple[Any, ...],
    made_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spec_module, "MOST_LISTED", 10)
    out = tmp_path / "set"
    sampled("sample", text_bundle, *given, "--out", out, "--shards", "1/2")
    spec = SetFolder(path=out).read()
    assert spec is not None and spec.prompts is not None and spec.prompts.texts == ()
    with pytest.raises(UsageError, match="only their hash: give them again"):
        spec.prompt(0)
    sampled("sample", text_bundle, *given, "--out", out)
    assert (out / "000001.tar").read_bytes() == (made_set / "000001.tar").read_bytes()
    more = ("--prompt", "a boat")
    refused(2, "sample", text_bundle, *given, *more, "--out", out, parts=("prompts is 3 with",))


def test_long_prompts_are_cut_off_and_said_so(text_bundle: Path, tmp_path: Path) -> None:
    long = "a very long story of a fox and a boat " * 20
    options = ("--prompt", long, "--prompt", FOX, "--prompt", f"{long} again", "--threads", 1)
    result = run("sample", text_bundle, *options, "--out", tmp_path / "set")
    assert result.exit_code == 0
    assert f"this bundle takes {TEXT_LENGTH}: it ends at" in result.stderr
    *cut, unknown = result.stderr.splitlines()
    assert len(cut) == 2 and unknown == "the text encoder does not know: fox"


def test_another_text_encoder_is_refused(
    text_bundle: Path, given: tuple[Any, ...], tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(text_bundle, tmp_path / "alone"))
    command = ("sample", alone, *given, "--out", tmp_path / "set")
    refused(2, *command, parts=("a text encoder t5", "--text-encoder"))
    other = Path(shutil.copytree(text_bundle.parent / "t5", tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(1, *command, "--text-encoder", other, parts=("has the digest",))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "this bundle takes prompts: give --prompts FILE"),
        (("--per-class", 1), "takes prompts, not classes: give --per-prompt N"),
        (("--prompt", FOX, "--per-class", 1), "takes prompts, not classes: give --per-prompt N"),
        (("--prompt", FOX, "--recipe", "fid"), "--recipe fid is one of classes"),
        (("--prompt", FOX, "--top-k", 9), "top_p"),
        (("--prompt", FOX, "--prompt", "x" * 20_001), "prompt 2: the prompt has 20001 characters"),
        (("--prompt", FOX, "--per-prompt", 10**9 + 1), "ask for fewer images"),
        (("--prompt", FOX, "--prompts", "no.txt"), "--prompts: no.txt cannot be read"),
    ],
)
def test_bad_usage(
    text_bundle: Path, tmp_path: Path, options: tuple[Any, ...], words: str
) -> None:
    refused(2, "sample", text_bundle, *options, "--out", tmp_path / "set", parts=(words,))
    assert not (tmp_path / "set").exists()


def test_a_bundle_of_classes_takes_no_prompts(made: Path, tmp_path: Path) -> None:
    command = ("sample", made, "--out", tmp_path / "set")
    for options in (("--prompt", FOX), ("--negative", FOX, "--per-class", 1)):
        refused(2, *command, *options, parts=("takes labels and no prompts",))
    refused(2, *command, "--per-prompt", 2, parts=("no prompts: give --per-class N",))
    assert not (tmp_path / "set").exists()

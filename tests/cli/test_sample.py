"""`sample` on the command line: sets in shards, resumed, shared, checked and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_steps import ONE_THREAD, done, refused, run, tree
from cli_steps import edit as edit_manifest
from var_deploy.cli.options import load_pipeline
from var_deploy.config import RuntimeConfig
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.formats import read_images
from var_deploy.datasets.shards import draw_shard
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Request
from var_deploy.sampling import numbered

THREAD = ("--threads", 1)
KILLED = Path(__file__).with_name("killed_sample.py")
# ten images of five classes in four shards
ARGUMENTS = ("--per-class", 2, "--shard-size", 3, "--seed", 7, *THREAD)


@pytest.fixture(scope="module")
def made_set(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete set. Not to be changed."""
    out = tmp_path_factory.mktemp("sets") / "set"
    result = done("sample", made, *ARGUMENTS, "--out", out)
    first, second = result.stdout.splitlines()
    assert first.startswith("made 4 shards with 10 images in ")
    assert second == f"{out} is complete: 10 images in 4 shards"
    return out


@pytest.fixture
def some(made_set: Path, tmp_path: Path) -> Path:
    """A copy of it in which shard 2 is missing."""
    out = tmp_path / "some"
    out.mkdir()
    for path in made_set.iterdir():
        if "000002" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that would load a bundle fails."""

    def load(bundle: Path, manifest: Manifest, config: RuntimeConfig, *more: object) -> Pipeline:
        raise AssertionError("it loads weights")

    monkeypatch.setattr(sys.modules["var_deploy.cli.sample"], "load_pipeline", load)


def test_image_n_has_the_number_n_of_the_one_seed(made: Path, made_set: Path) -> None:
    """Not seed + n, as in a call: sets of neighbouring seeds have nothing in common."""
    with Pipeline.load(made, threads=1) as pipe:
        labels, streams = [n % 5 for n in range(10)], numbered(7, 0, 10)
        settings = pipe.manifest.defaults
        expected = pipe.draw(Request(labels=labels, rng_keys=streams, sampling=settings))
        assert np.array_equal(expected[0], pipe.generate([0], seed=7)[0])
        assert not np.array_equal(expected[1], pipe.generate([1], seed=8)[0])
    found = [image for n in range(4) for image in read_images(made_set / f"00000{n}.tar")]
    np.testing.assert_array_equal(found, expected)


def test_one_shard_by_itself(made: Path, made_set: Path) -> None:
    spec = SetFolder(path=made_set).read()
    assert spec is not None
    with Pipeline.load(made, threads=1, precision=spec.precision, layout=spec.layout) as pipe:
        assert draw_shard(pipe, spec, 3) == (made_set / "000003.tar").read_bytes()


def test_two_processes_at_once(made: Path, made_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "-m", "var_deploy.cli", "sample", made, *ARGUMENTS, "--out", out]
    started = [
        subprocess.Popen(
            [*map(str, command), "--shards", share],
            env=ONE_THREAD,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in ("1/2", "2/2")
    ]
    for process in started:
        printed, complaints = process.communicate(timeout=300)
        assert (process.returncode, complaints) == (0, "")
        assert printed.startswith("made 2 shards with ")
    assert tree(out) == tree(made_set)


def test_killed_in_the_middle(made: Path, made_set: Path, tmp_path: Path) -> None:
    """SIGKILL while a shard is drawn, and while one is written: nothing can be tidied up."""
    out = tmp_path / "set"
    for moment in ("drawn", "written"):
        killed = subprocess.run(
            [sys.executable, KILLED, moment, "sample", *map(str, (made, *ARGUMENTS, "--out", out))],
            env=ONE_THREAD,
            capture_output=True,
            timeout=300,
        )
        assert killed.returncode == -signal.SIGKILL
        there = {p.name for p in out.iterdir() if not p.name.startswith(".")}
        whole = [n for n in range(4) if f"00000{n}.tar" in there]
        assert whole == ([0] if moment == "drawn" else [0, 1])
        for n in whole:
            assert (out / f"00000{n}.tar").read_bytes() == (made_set / f"00000{n}.tar").read_bytes()
    done("sample", made, *ARGUMENTS, "--out", out)
    left = {name: data for name, data in tree(out).items() if not name.endswith(".tmp")}
    assert left == tree(made_set)


def test_as_parquet(made: Path, made_set: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "set"
    arguments = ("sample", made, *ARGUMENTS, "--out", out)
    done(*arguments, "--format", "parquet")
    files = sorted(out.glob("*.parquet"))
    assert [path.name for path in files] == [f"00000{n}.parquet" for n in range(4)]
    assert pq.read_table(files)["label"].to_pylist() == [*range(5)] * 2
    for path in files:
        expected = list(read_images(made_set / f"{path.stem}.tar"))
        np.testing.assert_array_equal(list(read_images(path)), expected)
    refused(2, *arguments, parts=("format is parquet and not tar",))


def test_parquet_without_its_library(
    made: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    arguments = ("sample", made, *ARGUMENTS, "--out", tmp_path / "set", "--format", "parquet")
    refused(1, *arguments, parts=("needs pyarrow", 'pip install "pyarrow>='))


def test_what_is_missing_is_made(made: Path, some: Path, made_set: Path) -> None:
    report = json.loads(done("sample", made, *ARGUMENTS, "--out", some, "--json").stdout)
    assert (report["made"], report["shards_there"], report["complete"]) == ([2], 4, True)
    assert report["runtime"]["backend"] == "onnxruntime-cpu"
    assert tree(some) == tree(made_set)


def test_nothing_to_do_loads_nothing(made: Path, made_set: Path, no_weights: None) -> None:
    before = tree(made_set)
    assert done("sample", made, *ARGUMENTS, "--out", made_set, "--quiet").stdout == ""
    report = json.loads(done("sample", made, *ARGUMENTS, "--out", made_set, "--json").stdout)
    assert (report["made"], report["complete"], report["npz"]) == ([], True, None)
    assert tree(made_set) == before


def test_the_recipe(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "fid"
    arguments = ("sample", made, "--recipe", "fid", "--per-class", 1, "--out", out, *THREAD)
    report = json.loads(done(*arguments, "--top-p", "0.9", "--json").stdout)
    assert report["settings"]["sampling"] == {
        "cfg": 1.5,
        "top_k": 900,
        "top_p": 0.9,  # what is typed goes before the recipe
        "temperature": 1.0,
    }
    assert report["npz"] == str(out / "images.npz")
    with np.load(out / "images.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], list(read_images(out / "000000.tar")))
    refused(2, *arguments, parts=("top p is 0.9 and not 0.96",))


def test_the_recipe_is_the_published_one(made: Path, tmp_path: Path) -> None:
    """As far as it can be seen without drawing: another set is in the way."""
    out = tmp_path / "set"
    done("sample", made, "--per-class", 1, "--cfg", 0, "--top-k", 1, "--out", out, *THREAD)
    parts = ("cfg is 0 and not 1.5", "top k is 1 and not 900", "top p is 0.95 and not 0.96")
    refused(2, "sample", made, "--recipe", "fid", "--out", out, parts=(*parts, "1 and not 50"))


def test_an_array_of_any_set(made: Path, some: Path) -> None:
    arguments = ("sample", made, *ARGUMENTS, "--npz", "--out", some)
    incomplete = done(*arguments, "--shards", "1/2").stdout  # shards 0 and 2
    assert incomplete.endswith(f"{some} is complete: 10 images in 4 shards and images.npz\n")
    (some / "000003.tar").unlink()
    (some / "images.npz").unlink()
    later = done(*arguments, "--shards", "1/2").stdout.splitlines()[1]
    assert later == f"{some} has 3 of 4 shards; the run that completes it writes images.npz"
    assert not (some / "images.npz").exists()


def test_a_set_decides_what_was_left_open(
    made: Path, some: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RuntimeConfig] = []

    def watched(
        bundle: Path, manifest: Manifest, config: RuntimeConfig, *text: Any
    ) -> Pipeline:
        seen.append(config)
        return load_pipeline(bundle, manifest, config, *text)

    monkeypatch.setattr(sys.modules["var_deploy.cli.sample"], "load_pipeline", watched)
    done("sample", made, *ARGUMENTS, "--out", some)
    (options,) = seen
    assert (options.precision, options.backend, options.layout) == (
        "fp32",
        "onnxruntime-cpu",
        "shared",
    )


# --check


def test_check_of_a_whole_set(made: Path, made_set: Path, no_weights: None) -> None:
    found = done("sample", made, *ARGUMENTS, "--out", made_set, "--check").stdout
    assert found == f"{made_set} is complete: 10 images in 4 shards\n"


def test_check_of_a_part(made: Path, some: Path, no_weights: None) -> None:
    arguments = ("sample", made, *ARGUMENTS, "--out", some, "--check")
    refused(1, *arguments, parts=("has 3 of 4 shards, none of them damaged; run",))


def test_damage_is_mended(made: Path, some: Path, made_set: Path) -> None:
    arguments = ("sample", made, *ARGUMENTS, "--out", some)
    for shard in ("000001.tar", "000003.tar"):
        (some / shard).write_bytes(b"dust")
    line = refused(1, *arguments, "--check", parts=("000001.tar does not match its hash",))
    assert "(and 1 shard more)" in line
    result = run(*arguments, "--check", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["damaged"], report["missing"]) == ([1, 3], [2])
    for shard in ("000001.tar", "000003.tar"):
        (some / shard).unlink()
    done(*arguments)
    assert tree(some) == tree(made_set)


# what is refused, before any weights are loaded


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--per-class", 1, "--shard-size", 0), ("--shard-size", "0 is not in the range")),
        (("--per-class", 0), ("--per-class", "0 is not in the range")),
        ((), ("how many images? give --per-class N, or --recipe fid",)),
        (("--per-class", 1, "--shards", "3/2"), ("'3/2' is no share",)),
        (("--per-class", 1, "--shards", "0/2"), ("'0/2' is no share",)),
        (("--per-class", 1, "--shards", "two"), ("'two' is no share",)),
        (("--per-class", 1, "--seed", -1), ("seed must lie between",)),
        (("--per-class", 10**9), ("ask for fewer images or larger shards",)),
        (("--per-class", 1, "--check"), ("holds no set: there is nothing to check",)),
    ],
)
def test_bad_usage(
    made: Path, tmp_path: Path, no_weights: None, options: tuple[Any, ...], parts: tuple[str, ...]
) -> None:
    refused(2, "sample", made, "--out", tmp_path / "set", *options, parts=parts)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", 8), "holds another set: seed is 7 and not 8; choose another --out"),
        (("--shard-size", 4), "shard size is 3 and not 4"),
        (("--cfg", 1), "cfg is "),
        (("--precision", "int8"), "precision is fp32 and not int8"),
        (("--backend", "onnxruntime-cuda"), "backend is onnxruntime-cpu and not onnxruntime-cuda"),
        (("--layout", "per-scale"), "layout is shared and not per-scale"),
    ],
)
def test_other_settings(
    made: Path,
    some: Path,
    unchanged: Callable[[], None],
    no_weights: None,
    options: tuple[Any, ...],
    words: str,
) -> None:
    unchanged()
    refused(2, "sample", made, *ARGUMENTS, *options, "--out", some, parts=(words,))


def test_a_set_of_another_bundle(
    bundle: Path, some: Path, unchanged: Callable[[], None], no_weights: None
) -> None:
    weights = "fp32/weights.bin"
    edit_manifest(bundle, lambda data: data["files"][weights].update(sha256="0" * 64))
    unchanged()
    refused(2, "sample", bundle, *ARGUMENTS, "--out", some, parts=("another set: its bundle is ",))


def test_places_where_no_set_can_be(
    made: Path, tmp_path: Path, unchanged: Callable[[], None], no_weights: None
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").touch()
    unchanged()
    for name, words in (("file", "is a file"), ("foreign", "mine.txt is there, set.json is not")):
        refused(2, "sample", made, "--per-class", 1, "--out", tmp_path / name, parts=(words,))


def test_a_shard_that_memory_cannot_hold(
    made: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ("sample", made, "--out", tmp_path / "set", "--shard-size", 10**9)
    refused(2, *request, "--per-class", 10**8, parts=("at most 400 million pixels, 6,250,000 im",))
    refused(2, *request, "--per-class", 10**12, parts=("a set has at most 1,000,000,000 images",))
    assert not (tmp_path / "set").exists()


def test_a_bundle_that_cannot_be_loaded_leaves_no_folder(bundle: Path, tmp_path: Path) -> None:
    (bundle / "fp32" / "weights.bin").write_bytes(b"")
    out = tmp_path / "set"
    refused(1, "sample", bundle, *ARGUMENTS, "--out", out, parts=("weights.bin has 0 bytes",))
    assert not out.exists()


def test_interrupted(
    made: Path, made_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls, out = Pipeline.draw, [0], tmp_path / "set"

    def interrupted(self: Pipeline, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:  # in the second shard
            raise KeyboardInterrupt
        return draw(self, *arguments)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    result = run("sample", made, *ARGUMENTS, "--out", out)
    assert (result.exit_code, result.stderr) == (
        130,
        f"{out} keeps 1 of 4 shards; the same command goes on from there\ninterrupted\n",
    )
    assert set(os.listdir(out)) == {
        ".huggingface.yaml",
        "set.json",
        "000000.tar",
        ".000000.tar.sha256",
    }
    done("sample", made, *ARGUMENTS, "--out", out)
    assert tree(out) == tree(made_set)


def test_a_recipe_that_the_bundle_cannot_follow(
    bundle: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("sample", bundle, "--recipe", "fid", "--out", tmp_path / "set")
    manifest = read_manifest(bundle)

    def having(**changes: bool) -> None:
        changed = dataclasses.replace(manifest, **changes)
        monkeypatch.setattr("var_deploy.cli.sample.read_manifest", lambda bundle: changed)

    having(guidance=False)
    refused(2, *arguments, parts=("exported with --no-guidance: cfg must be 0",))
    having(more_smooth=True)
    refused(2, *arguments, parts=("draws without more_smooth",))

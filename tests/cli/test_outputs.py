"""Where results go: what is settled before any work, and what stays when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cli_steps import ONE_THREAD, SIDE, done, export, pixels, refused, run, tree
from var_deploy import files as module
from var_deploy import names
from var_deploy.bench.rounds import Comparison
from var_deploy.cli import main
from var_deploy.cli.outputs import file_target
from var_deploy.errors import BundleError, UsageError
from var_deploy.image.images import read_settings
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.runtime.tensorrt import engine_files
from var_deploy.runtime.tensorrt.engine_files import EngineRecord
from var_deploy.runtime.tensorrt.target import BuildOptions, Target

pytest.importorskip("torch")

ORIN = Target(library="tensorrt", version="10.3.0", device="Orin", sm=87, precision="fp32")
MADE_FROM = ("--checkpoint", "{files}/var.pth", "--tokenizer", "{files}/vae.pth")


# names that are no names


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("export", "pocket"), "--out"),
        (("encode", "{made}", "x.png"), "--out"),
        (("sample", "{made}", "--per-class", "1"), "--out"),
        (("triton", "{made}"), "--out"),
        (("generate", "{made}", "--labels", "0", "--out", "x.png"), "--preview"),
        (("generate", "{made}", "--labels", "0", "--out", "x.png"), "--gif"),
        (("bench", "{made}"), "--plot"),
    ],
)
def test_no_name_and_standard_output(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    option: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.format(made=made) for word in command]
    refused(2, *words, option, "", parts=("the name is empty; name a file",))
    refused(2, *words, option, "-", parts=('"-" is standard output', "one PNG and nothing else"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("generate", "--labels", "0"), ("reconstruct", "x.png")])
def test_an_empty_name_of_an_image(made: Path, command: tuple[str, ...]) -> None:
    refused(2, command[0], made, *command[1:], "--out", "", parts=("the name is empty",))


@pytest.mark.parametrize("command", ["export", "sample", "triton", "encode"])
def test_a_name_that_is_too_long(made: Path, tmp_path: Path, command: str) -> None:
    rest = {
        "export": ("pocket",),
        "sample": (made, "--per-class", 1),
        "triton": (made,),
        "encode": (made, "x.png"),
    }[command]
    suffix = ".npz" if command == "encode" else ""
    parts = ("a name in it has ", "choose a shorter one")
    refused(2, command, *rest, "--out", tmp_path / ("x" * 256 + suffix), parts=parts)
    assert not list(tmp_path.iterdir())


# one PNG on standard output


def test_one_png_on_standard_output(made: Path, tmp_path: Path) -> None:
    arguments = ("generate", made, "--labels", "0,1", "--seed", 3)
    done(*arguments, "--out", tmp_path / "x.png")
    for options in ((), ("--json",), ("--quiet",)):
        result = run(*arguments, "--out", "-", *options)
        assert result.exit_code == 0, result.stderr
        assert result.stdout_bytes == (tmp_path / "x.png").read_bytes()
        if options == ("--json",):
            assert json.loads(result.stderr)["out"] == "-"
        else:
            told = "" if options else "wrote standard output (2 images of 8 × 8, "
            assert result.stderr.startswith(told) and bool(result.stderr) is not bool(options)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_have_the_same_settings(made: Path, tmp_path: Path, suffix: str) -> None:
    picture, row = tmp_path / "x.png", tmp_path / f"row.{suffix}"
    for form in ("png", suffix):
        out = tmp_path / f"x.{form}"
        done("generate", made, "--labels", "0,1", "-o", out, "--preview", tmp_path / f"p.{form}")
        done("edit", made, picture, "--box", "6,0,12,8", "-n", 2, "-o", tmp_path / f"e.{form}")
        done("reconstruct", made, picture, "-o", tmp_path / f"r.{form}", "-q")
    for name in ("x", "p", "e", "r"):
        same, other = tmp_path / f"{name}.png", tmp_path / f"{name}.{suffix}"
        assert read_settings(other) == read_settings(same)
        assert pixels(other).shape == pixels(same).shape
        if suffix == "webp":
            np.testing.assert_array_equal(pixels(other), pixels(same))
    done("reconstruct", made, tmp_path / f"x.{suffix}", "--scales", "K", "-o", row)


def test_a_grid_too_large_for_its_format(made: Path, tmp_path: Path) -> None:
    out = ("--labels", 0, "-o")
    many = ("generate", made, "--labels", 0, "-n", 5000, "-o")
    refused(2, *many, tmp_path / "x.jpg", parts=("a JPEG file holds", "name x.png instead"))
    row = ("reconstruct", made, tmp_path / "none.png", *out)
    assert "No such option" in run(*row, "x.webp").stderr
    wide = file_target(str(tmp_path / "x.webp"))
    with pytest.raises(UsageError, match=r"at most 16383 pixels a side.*19998 × 8: name x\.png"):
        wide.check_sheet(read_manifest(made), 2000, 2000)
    wide.check_sheet(read_manifest(made), 2000)
    file_target(str(tmp_path / "x.png")).check_sheet(read_manifest(made), 2000, 2000)


def test_a_suffix_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    known = "images are written as .png, .jpg, .jpeg or .webp, found x.gif"
    for words in (("generate", "none"), ("edit", "none", "p"), ("reconstruct", "none", "p")):
        refused(2, *words, "--out", tmp_path / "x.gif", parts=(known,))


def test_edits_and_reconstructions_on_standard_output(made: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    done("generate", made, "--labels", 0, "--out", picture)
    commands = (("edit", made, picture, "--box", "0,0,4,8"), ("reconstruct", made, picture))
    for number, command in enumerate(commands):
        out = tmp_path / f"{number}.png"
        done(*command, "--out", out)
        result = run(*command, "--out", "-")
        assert result.exit_code == 0, result.stderr
        assert result.stdout_bytes == out.read_bytes()
        assert result.stderr.startswith("wrote standard output (")
    assert pixels(tmp_path / "0.png").shape == (SIDE, SIDE, 3)


@pytest.mark.skipif(os.name != "posix", reason="opens a terminal")
def test_no_png_on_a_terminal(made: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "var_deploy.cli", "generate", str(made), "--labels", "0"]
    child = subprocess.run(
        [*command, "--out", "-"], stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(ours)
    os.close(theirs)
    assert child.returncode == 2
    assert child.stderr.startswith("error: --out - writes a PNG to standard output, which is a")
    assert child.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
def test_a_reader_that_leaves(made: Path) -> None:
    command = [sys.executable, "-m", "var_deploy.cli", "generate", str(made), "--labels", "0"]
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [*command, "--out", "-"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert child.returncode == 1
    assert child.stderr == "error: standard output cannot be written: Broken pipe\n"


# export and what is the user's


def add_engine(bundle: Path) -> None:
    manifest, plan = read_manifest(bundle), b"plan"
    key = engine_files.engine_key(manifest, names.STEP, "fp32", BuildOptions(), ORIN)
    record = EngineRecord(
        **{"graph": names.STEP, "file": "step.plan", "size": 4, "key": key, "profiles": 3},
        **{"sha256": engine_files.plan_sha256(plan), "seconds": 1.5},
    )
    engine_files.add_engine(engine_files.new_folder(bundle, ORIN), plan, record)


def test_engines_outlive_an_export_and_are_stale(files: Path, bundle: Path) -> None:
    add_engine(bundle)
    assert "ready" in done("inspect", bundle).stdout
    assert export(files, bundle, "--batch", 1, "--force").exit_code == 0
    text = done("inspect", bundle).stdout
    assert "stale: the bundle has changed since; run var-deploy build" in text
    assert read_manifest(bundle).batch == 1
    assert export(files, bundle, "--batch", 2, "--force").exit_code == 0
    assert "ready" in done("inspect", bundle).stdout, "the same graphs are there again"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("notes.txt", ("holds notes.txt, which is not part of the bundle there",)),
        ("fp32/picture.png", ("holds fp32/picture.png, which is not",)),
    ],
)
def test_a_foreign_file_stops_an_export_before_its_work(
    bundle: Path, unchanged: Callable[[], None], no_export: None, name: str, parts: tuple[str, ...]
) -> None:
    (bundle / name).write_text("mine")
    unchanged()
    refused(2, "export", "pocket", "--out", bundle, "--force", parts=parts)


def test_another_programs_manifest(
    tmp_path: Path, unchanged: Callable[[], None], no_export: None
) -> None:
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    (tmp_path / "extension" / "background.js").write_text("mine")
    unchanged()
    for options in ((), ("--force",)):
        refused(
            *(2, "export", "pocket", "--out", tmp_path / "extension", *options),
            parts=("is not a var-deploy manifest",),
        )


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("it had begun")

    monkeypatch.setattr("var_deploy.export.checkpoint.assemble.load_model", never)


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_files_that_appear_during_an_export_stay(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    from var_deploy.export import bundle as exporter

    out, write = tmp_path / "out", exporter._write

    def slow(*arguments: Any) -> Any:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return write(*arguments)

    monkeypatch.setattr(exporter, "_write", slow)
    result = export(files, out, *options)
    assert result.exit_code == 2
    assert "is not empty and holds no bundle (notes.txt is there)" in result.stderr
    assert tree(tmp_path) == {"out": None, "out/notes.txt": b"mine"}


def test_export_into_the_current_folder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path().stat().st_ino
    for options in ((), ("--batch", 2, "--force")):
        assert export(files, Path(), *options).exit_code == 0
        assert Path().stat().st_ino == inode
        done("inspect", ".")
    assert read_manifest(Path()).batch == 2
    assert sorted(os.listdir()) == ["fp32", "manifest.json"]
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.skipif(os.name != "posix", reason="mounts a folder")
def test_a_volume(files: Path, made: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    if subprocess.run(["mount", "--bind", volume, volume], capture_output=True).returncode:
        pytest.skip("mount --bind needs root")
    try:
        (volume / "lost+found").mkdir()
        assert export(files, volume).exit_code == 0
        assert export(files, volume, "--batch", 2, "--force").exit_code == 0
        done("inspect", volume)
        shutil.rmtree(volume / "fp32")
        (volume / "manifest.json").unlink()
        done("generate", made, "--labels", "0,1", "--out", volume)
        assert len(list(volume.glob("*.png"))) == 2
        for path in volume.glob("*.png"):
            path.unlink()
        done("triton", made, "--out", volume, "--name", "small")
        assert sorted(os.listdir(volume)) == ["lost+found", "small"]
    finally:
        subprocess.run(["umount", volume], check=True)


@pytest.mark.parametrize("command", ["export", "sample", "triton"])
def test_what_a_file_manager_leaves_is_nothing(
    files: Path, made: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("view")
    if command == "export":
        assert export(files, tmp_path / "out").exit_code == 0
    else:
        options = ("--per-class", 1, "--shard-size", 5) if command == "sample" else ()
        done(command, made, *options, "--out", tmp_path / "out")
    assert (tmp_path / "out" / ".DS_Store").read_text() == "view"
    assert os.listdir(tmp_path) == ["out"]


# verify


def test_verify_of_a_bundle_that_cannot_be_written(
    files: Path, bundle: Path, unchanged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Manifest, folder: Path) -> None:
        raise BundleError(f"{folder / names.MANIFEST} cannot be written: Read-only file system")

    unchanged()
    monkeypatch.setattr(Manifest, "save", refuse)
    options = [word.format(files=files) for word in MADE_FROM]
    result = run("verify", bundle, *options)
    assert result.exit_code == 0, "the verdict counts"
    assert "the deployed graphs are the model" in result.stdout
    assert result.stderr == (
        f"warning: the report could not be stored: {bundle / names.MANIFEST} cannot be written: "
        "Read-only file system\n"
    )


def test_verify_of_a_bundle_that_is_replaced_meanwhile(
    files: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old report must not bring the old manifest back."""
    from var_deploy.export.verify import bundle as verify

    real = verify.reference_of

    def slow(*arguments: Any, **options: Any) -> Any:
        if not replaced:  # it is called for each image
            assert export(files, bundle, "--layout", "shared", "--force").exit_code == 0
            shutil.copytree(bundle, bundle.parent / "new")
            replaced.append(None)
        return real(*arguments, **options)

    replaced: list[None] = []
    monkeypatch.setattr(verify, "reference_of", slow)
    monkeypatch.setattr(verify.GraphVerifier, "graph", lambda self, name: [])
    monkeypatch.setattr(verify.GraphVerifier, "loops", lambda self: [])
    options = [word.format(files=files) for word in MADE_FROM]
    refused(1, "verify", bundle, *options, parts=("changed while it was verified",))
    assert replaced
    assert tree(bundle) == tree(bundle.parent / "new")
    done("inspect", bundle)


def test_two_verifications_at_once(files: Path, bundle: Path) -> None:
    command = [sys.executable, "-m", "var_deploy.cli", "verify", str(bundle)]
    options = [word.format(files=files) for word in MADE_FROM]
    before = set(tree(bundle))
    children = [
        subprocess.Popen([*command, *options, "--quiet"], env=ONE_THREAD) for _ in range(2)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    assert set(tree(bundle)) == before
    assert read_manifest(bundle).parity_is_current()


# reports and sets that are cut short


@pytest.mark.parametrize("old", [True, False])
def test_bench_leaves_no_half_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    def full(stream: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(self: Comparison) -> None:
        self.results[0].problem = "killed"

    monkeypatch.setattr(Comparison, "run", fail)
    monkeypatch.setattr(module, "sync", full)
    if old:
        (tmp_path / "report.json").write_text("old")
    before = tree(tmp_path)
    result = run("bench", made, "--json", tmp_path / "report.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "No space left on device" in result.stderr
    assert "1 image a generation" in result.stdout, "what took minutes is told all the same"
    assert tree(tmp_path) == before


SLOW_SAMPLE = """
import sys, time
from var_deploy.cli import main
from var_deploy.pipeline import Pipeline

real, count = Pipeline.draw, 0

def draw(self, *arguments, **options):
    global count
    count += 1
    if count == 3:
        print("in the second shard", flush=True)
        time.sleep(300)
    return real(self, *arguments, **options)

Pipeline.draw = draw
main(sys.argv[1:], prog_name="var-deploy")
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process")
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_an_interrupted_set_says_what_it_keeps(
    made: Path, tmp_path: Path, number: signal.Signals, code: int, told: str
) -> None:
    out = tmp_path / "set"
    arguments = ["sample", made, "--per-class", 2, "--shard-size", 4, "--threads", 1, "--out", out]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_SAMPLE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the second shard\n"
        child.send_signal(number)
        _, stderr = child.communicate(timeout=60)
    assert child.returncode == code
    assert stderr == (
        f"{out} keeps 1 of 3 shards; the same command goes on from there\n{told}\n"
    )
    assert (out / "000000.tar").exists()
    assert "made 2 shards" in done(*arguments).stdout


@pytest.mark.skipif(os.name != "posix", reason="has signals")
def test_signals_are_as_before_after_a_command(made: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    CliRunner().invoke(main, ["inspect", str(made), "--quiet"])
    assert [signal.getsignal(number) for number in numbers] == before

"""The command line over real models: from files on disk to images, and every way it can go wrong.

A failure is one line on stderr, exit code 1 or 2 (130 for Ctrl-C), and leaves the disk as it was.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from var_deploy.cli import main
from var_deploy.images import read_settings
from var_deploy.manifest import read_manifest
from var_deploy.spec import ModelSpec

pytest.importorskip("torch")
SIDE = 8  # of an image of the small model
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result


def refused(code: int, *arguments: object, parts: tuple[str, ...] = ()) -> str:
    """The one line that a command fails with."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "(unexpected;" not in result.stderr, "an error that nobody thought of"
    for part in parts:
        assert part in result.stderr, result.stderr
    return result.stderr


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "var_deploy.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ONE_THREAD, timeout=120, **options
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, family_member: Callable[..., ModelSpec]
) -> Path:
    """Checkpoint files of a small model: vae and var, each .pth and .safetensors; other.pth is a
    transformer of the same sizes with other weights."""
    import torch
    from safetensors.torch import save_file

    from var_deploy.export.checkpoint import empty_modules
    from var_deploy.export.random_weights import RandomWeights

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("files")
    for name, seed, part in (("vae", 0, 0), ("var", 0, 1), ("other", 1, 1)):
        module = empty_modules(family_member())[part]
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
        drawn = RandomWeights(shapes, seed)
        state = {key: torch.from_numpy(drawn.read(key)) for key in shapes}
        sides = torch.tensor(family_member().patch_nums)
        if part:
            state["lvl_1L"] = torch.repeat_interleave(torch.arange(len(sides)), sides**2)[None]
        torch.save(state, folder / f"{name}.pth")
        save_file(state, folder / f"{name}.safetensors")
    return folder


def export(files: Path, out: Path, *options: object, suffix: str = ".pth") -> Result:
    """`export` of the small model."""
    weights = ("--checkpoint", files / f"var{suffix}", "--tokenizer", files / f"vae{suffix}")
    return run("export", *weights, "--out", out, *options)


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the small model, two images a launch. Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "bundle"
    result = export(files, out, "--batch", 2)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the same bundle, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose classes have names: pocket with random weights."""
    out = tmp_path_factory.mktemp("named") / "pocket"
    options = ("--random-weights", 0, "--layout", "shared")
    result = done("export", "pocket", "--out", out, *options)
    assert re.fullmatch(rf"wrote {out} \(\d+ files, [\d.]+ MB\)\n", result.stdout)
    return out


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Call it once the stage is set: after the test, nothing below tmp_path may have changed."""
    before: dict[str, bytes | None] = {}

    def note() -> None:
        before.update(tree(tmp_path))
        before["noted"] = None

    yield note
    assert before.pop("noted", 0) is None, "the test never called it"
    assert tree(tmp_path) == before


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
    for part in ("agrees with the PyTorch model", "all intact", "8 × 8 pixels", "batch", "step"):
        assert part in text
    data = json.loads(done("inspect", out, "--json").stdout)
    assert (data["intact"], data["damage"], data["batch"]) == (True, [], 2)
    assert data["digest"] == read_manifest(out).digest(), "a report does not change it"
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


def test_a_picture_can_be_made_again_from_its_text(made: Path, tmp_path: Path) -> None:
    odd = ("--cfg", 1.23456789, "--top-p", 0.8765432101, "--temperature", 1.0000001, "--top-k", 40)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    done("generate", made, "--labels", "3,0", "--seed", 2**64 - 1, *odd, "--out", first)
    text = read_settings(first)
    assert text["bundle"] == read_manifest(made).digest()
    options = [
        argument
        for key in ("seed", "labels", "cfg", "top_k", "top_p", "temperature", "precision")
        for argument in ("--" + key.replace("_", "-"), text[key])
    ]
    done("generate", made, *options, "--out", again)
    np.testing.assert_array_equal(pixels(again), pixels(first))
    assert read_settings(again) == text
    assert float(text["cfg"]) == 1.23456789

    done("generate", made, "--labels", "3,0", "--count", 3, "--out", tmp_path / "many")
    text = read_settings(tmp_path / "many" / "002_3.png")
    number = int(text["image"].split()[0])
    assert number == 2
    # image n depends on n, its label and the seed alone: the others may be of any class
    labels = f"1,1,{text['labels']}"
    done("generate", made, "--labels", labels, "--seed", text["seed"], "--out", tmp_path / "re")
    np.testing.assert_array_equal(
        pixels(tmp_path / "re" / "002_3.png"), pixels(tmp_path / "many" / "002_3.png")
    )


def test_labels_by_name(named: Path, tmp_path: Path) -> None:
    classes = read_manifest(named).labels
    for out, labels in (("names", f"{classes[3]}, {classes[0].upper()}"), ("numbers", "3,0")):
        done("generate", named, "--labels", labels, "--out", tmp_path / f"{out}.png")
    np.testing.assert_array_equal(pixels(tmp_path / "names.png"), pixels(tmp_path / "numbers.png"))
    text = read_settings(tmp_path / "numbers.png")
    assert text["labels"] == f"3 {classes[3]}, 0 {classes[0]}"
    assert text["model"] == "pocket"


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
    assert json.loads(made.stdout)["runtime"]["threads"] == "1"
    assert json.loads(made.stdout)["settings"] == read_settings(out)
    failed = process("generate", named, "--labels", "0", "--out", out / "y.png")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == f"error: {out}/y.png cannot be written: {out} is not a folder\n"
    missing = process("inspect", tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == f"error: {tmp_path}/none is no bundle: it has no manifest.json\n"


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
    steps = re.findall(rb"step (\d+) of (\d+)", seen)
    assert steps == [(b"%d" % n, b"8") for n in range(1, 9)], "two batches of 3 scales, a decoder"
    assert seen.endswith(b"\r\x1b[K"), "the bar is wiped at the end"


# what may be replaced


def test_force(files: Path, bundle: Path) -> None:
    before = tree(bundle)
    (bundle / "engines").mkdir()
    assert export(files, bundle, "--batch", 2).exit_code == 2
    assert (bundle / "engines").exists()
    assert export(files, bundle, "--batch", 2, "--force").exit_code == 0
    assert tree(bundle) == before, "the old bundle is gone as a whole"
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


# bad checkpoints


def _garbage(path: Path, good: bytes) -> None:
    path.write_bytes(b"this is a letter, not a checkpoint\n" * 99)


def _truncated(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) * 2 // 3])


def _evil(path: Path, good: bytes) -> None:
    path.write_bytes(pickle.dumps({"a": os.getcwd}))


def _unrelated(path: Path, good: bytes) -> None:
    import torch

    torch.save({"weight": torch.zeros(3)}, path)


def _missing_key(path: Path, good: bytes) -> None:
    import torch

    state = torch.load(path, weights_only=True)
    del state["blocks.1.ffn.fc2.weight"]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_garbage, ("var.pth is no checkpoint",)),
        (_truncated, ("var.pth is truncated or damaged", "download it again")),
        (_evil, ("var.pth is refused", "state_dict()")),
        (_unrelated, ("var.pth holds no VAR transformer",)),
        (_missing_key, ("blocks.1.ffn.fc2.weight is missing",)),
        (lambda path, good: path.write_bytes(b""), ("var.pth is empty",)),
        (lambda path, good: path.unlink(), ("var.pth does not exist",)),
    ],
    ids=["garbage", "truncated", "evil", "unrelated", "missing-key", "empty", "missing"],
)
def test_bad_checkpoints(
    files: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    damage: Callable[[Path, bytes], None],
    parts: tuple[str, ...],
) -> None:
    bad = Path(shutil.copy(files / "var.pth", tmp_path))
    damage(bad, bad.read_bytes())
    unchanged()
    options = ("--checkpoint", bad, "--tokenizer", files / "vae.pth")
    refused(1, "export", *options, "--out", tmp_path / "b", parts=parts)


def test_a_truncated_safetensors(
    files: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    bad = Path(shutil.copy(files / "var.safetensors", tmp_path))
    _truncated(bad, bad.read_bytes())
    unchanged()
    options = ("--checkpoint", bad, "--tokenizer", files / "vae.pth")
    refused(
        1, "export", *options, "--out", tmp_path / "b", parts=("truncated", "download it again")
    )


GIVEN = ("--checkpoint", "{files}/var.pth", "--tokenizer", "{files}/vae.pth")
FIT = ("vae.pth does not fit preset var-d16", "[32, 3, 3, 3], expected [160, 3, 3, 3]")


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("var_d16",), 2, ("unknown preset 'var_d16'", "did you mean var-d16?")),
        (("zzz",), 2, ("unknown preset 'zzz'", "known are pocket, var-d16")),
        ((), 2, ("--checkpoint", "--tokenizer")),
        (("--checkpoint", "{files}/var.pth"), 2, ("--tokenizer is missing",)),
        (("--random-weights", "1"), 2, ("--random-weights needs a preset",)),
        (("pocket", "--random-weights", "-1"), 2, ("--random-weights",)),
        (("pocket", "--random-weights", "1", "--checkpoint", "{files}/var.pth"), 2, ("exclude",)),
        (("--checkpoint", "{files}/vae.pth", "--tokenizer", "{files}/var.pth"), 1, ("swapped?",)),
        (("--checkpoint", "{files}", "--tokenizer", "{files}/vae.pth"), 2, ("--checkpoint",)),
        (("var-d16", *GIVEN), 1, FIT),
        (("pocket", "--batch", "0"), 2, ("--batch", "0")),
        (("pocket", "--batch", "two"), 2, ("--batch", "two")),
        (("pocket", "--precision", "fp8"), 2, ("--precision", "fp8")),
    ],
)
def test_export_that_cannot_be(
    files: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    arguments: tuple[str, ...],
    code: int,
    parts: tuple[str, ...],
) -> None:
    unchanged()
    filled = [argument.format(files=files) for argument in arguments]
    refused(code, "export", *filled, "--out", tmp_path / "b", parts=parts)


@pytest.mark.parametrize("place", ["{tmp}/file/b", "{tmp}/file", "/proc/self/b", "/dev/null/b"])
def test_export_to_where_nothing_can_be_written(
    files: Path, tmp_path: Path, unchanged: Callable[[], None], place: str
) -> None:
    (tmp_path / "file").write_text("x")
    unchanged()
    out = place.format(tmp=tmp_path)
    weights = ("--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth")
    refused(2, "export", *weights, "--out", out, parts=(out,))


# export that is cut short


def test_a_disk_that_is_too_small(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unchanged()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    result = export(files, bundle, "--force")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error: the disk has 0 MB free, the bundle needs \d+ MB.*\n", result.stderr
    )


class FullDisk:
    """A file on a disk that has room for its first kilobyte."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._size = stream, 0

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def write(self, data: Any) -> int:
        self._size += len(data)
        if self._size > 1000:
            self._stream.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._stream.write(data))


@pytest.mark.parametrize("victim", ["weights.bin", "scale_01.onnx", "manifest.json.tmp"])
def test_a_disk_that_fills_up_under_way(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
) -> None:
    unchanged()
    real_open, hit = Path.open, []

    def limited(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        stream = real_open(path, mode, *arguments, **options)
        if path.name != victim or "w" not in mode:
            return stream
        hit.append(path)
        return FullDisk(stream)

    monkeypatch.setattr(Path, "open", limited)
    result = export(files, bundle, "--force")
    monkeypatch.undo()
    assert hit, "the planted failure was never met"
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert re.search("disk is full|No space left", result.stderr)
    done("inspect", bundle)


@pytest.mark.parametrize(("old", "call"), [(True, 1), (True, 2), (False, 1)])
def test_ctrl_c_while_the_bundle_is_put_in_place(
    files: Path,
    made: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    old: bool,
    call: int,
) -> None:
    if old:
        shutil.copytree(made, tmp_path / "bundle")
    unchanged()
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(target)
        if "bundle" in target.name and len(calls) == call:
            if old and call == 1:
                real(path, target)  # the old one is aside, and the interrupt comes right after
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    result = export(files, tmp_path / "bundle", "--force")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


HALF_WAY = """
import sys, time
import torch; torch.set_num_threads(1)
from var_deploy.cli import main
from var_deploy.export import weights_file

real, written = weights_file._cast, []

def slow(weight, value):
    written.append(weight.name)
    if len(written) == 20:  # some weights lie on the disk, more are to come
        print("half-way", flush=True)
        time.sleep(300)
    return real(weight, value)

weights_file._cast = slow
main(sys.argv[1:], prog_name="var-deploy")
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_ctrl_c_half_way_through_an_export(files: Path, bundle: Path) -> None:
    before = tree(bundle.parent)
    arguments = [
        *("export", "--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth"),
        *("--out", bundle, "--force"),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "half-way\n", child.stderr.read()
        partial = [p for p in bundle.parent.iterdir() if p != bundle]
        assert len(partial) == 1, "it writes beside the bundle"
        assert partial[0].name.startswith(".bundle.partial-")
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert tree(bundle.parent) == before
    done("generate", bundle, "--labels", 0, "--out", bundle.parent / "x.png")


# bad bundles


def _truncate_weights(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)


def _escape(bundle: Path) -> None:
    (bundle.parent / "weights.bin").write_bytes((bundle / "fp32" / "weights.bin").read_bytes())

    def change(data: dict[str, Any]) -> None:
        data["files"]["fp32/../../weights.bin"] = data["files"].pop("fp32/weights.bin")

    edit(bundle, change)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate_weights, ("weights.bin has", "bytes, expected", "export the bundle again")),
        (_flip_a_bit, ("weights.bin does not match its hash", "export the bundle again")),
        (_escape, ("'fp32/../../weights.bin', which leaves the bundle",)),
        (lambda b: (b / "fp32" / "decoder.onnx").unlink(), ("decoder.onnx is missing",)),
        (lambda b: (b / "manifest.json").unlink(), ("is no bundle",)),
        (lambda b: (b / "manifest.json").write_text("{"), ("manifest.json cannot be read",)),
        (
            lambda b: edit(b, lambda data: data.update(schema_version=99)),
            ("schema version 99", "upgrade var-deploy"),
        ),
        (lambda b: edit(b, lambda data: data.pop("labels")), ("manifest.json is damaged",)),
    ],
    ids=["truncated", "bit", "escape", "missing", "no-manifest", "not-json", "newer", "field"],
)
@pytest.mark.parametrize("command", ["generate", "inspect", "verify"])
def test_bad_bundles(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    command: str,
    damage: Callable[[Path], object],
    parts: tuple[str, ...],
) -> None:
    damage(bundle)
    unchanged()
    options: dict[str, tuple[object, ...]] = {
        "generate": ("--labels", 0, "--out", bundle.parent / "x.png"),
        "inspect": (),
        "verify": ("--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth"),
    }
    refused(1, command, bundle, *options[command], parts=parts)


def test_verify_with_other_weights(files: Path, bundle: Path) -> None:
    digest = read_manifest(bundle).digest()
    options = ("--checkpoint", files / "other.pth", "--tokenizer", files / "vae.pth")
    result = run("verify", bundle, *options)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert result.stderr.startswith("error: fp32/condition: ")
    assert result.stderr.count("\n") == 1
    inspected = done("inspect", bundle).stdout
    assert "verify failed: fp32/condition" in inspected
    assert read_manifest(bundle).digest() == digest


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        ((), 2, ("--checkpoint", "--tokenizer")),
        (("--checkpoint", "{files}/none.pth", "--tokenizer", "{files}/vae.pth"), 1, ("not exist",)),
        ((*GIVEN, "--precision", "fp16"), 1, ("no fp16 graphs (it has fp32)", "--precision fp16")),
    ],
)
def test_verify_that_cannot_be(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    options: tuple[str, ...],
    code: int,
    parts: tuple[str, ...],
) -> None:
    unchanged()
    refused(code, "verify", bundle, *(o.format(files=files) for o in options), parts=parts)


# bad requests


@pytest.mark.parametrize(
    ("options", "part"),
    [
        *[
            ((option, value), option.strip("-").replace("-", "_"))
            for option, values in {
                "--cfg": ("nan", "inf", "-inf", "-0.1", "1001"),
                "--top-p": ("nan", "inf", "-0.1", "1.1"),
                "--temperature": ("nan", "inf", "0", "-1", "1e9"),
                "--top-k": ("-1", "99999999999999999999"),
                "--seed": ("-1", str(2**64)),
            }.items()
            for value in values
        ],
        (("--cfg", "strong"), "--cfg"),
        (("--top-k", "2.5"), "--top-k"),
        (("--seed", "nan"), "--seed"),
        (("--count", "0"), "--count"),
        (("--count", "-3"), "--count"),
        (("--threads", "0"), "--threads"),
        (("--labels", ""), "no label"),
        (("--labels", "10"), "0 to 9"),
        (("--labels", "-1"), "0 to 9"),
        (("--precision", "int3"), "int3"),
    ],
)
def test_requests_out_of_range(
    named: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    options: tuple[str, str],
    part: str,
) -> None:
    unchanged()
    asked = ("--labels", "0", *options)
    refused(2, "generate", named, *asked, "--out", tmp_path / "x.png", parts=(part,))


def test_a_label_that_is_nearly_right(
    named: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    wanted = read_manifest(named).labels[2]
    wrong = wanted[:-1] + "x"
    options = ("--labels", f"0,{wrong}", "--out", tmp_path / "x.png")
    refused(2, "generate", named, *options, parts=(repr(wrong), f"did you mean {wanted}"))


def test_a_precision_that_the_bundle_lacks(
    made: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    options = ("--labels", 0, "--precision", "fp16", "--out", tmp_path / "x.png")
    refused(1, "generate", made, *options, parts=("no fp16 graphs", "--precision fp16"))


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("{tmp}/file/x.png", "is not a folder"),
        ("{tmp}/file/", "is a file"),
        ("{tmp}/file", "is a file"),
        ("/proc/self/x.png", "cannot be written"),
        ("/dev/null/x.png", "cannot be written"),
        ("{tmp}/x.jpg", "written as .png"),
    ],
)
def test_generate_to_where_nothing_can_be_written(
    made: Path, tmp_path: Path, unchanged: Callable[[], None], out: str, part: str
) -> None:
    (tmp_path / "file").write_text("x")
    unchanged()
    refused(2, "generate", made, "--labels", 0, "--out", out.format(tmp=tmp_path), parts=(part,))


def test_a_name_that_the_disk_refuses(
    made: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    out = tmp_path / ("x" * 300 + ".png")
    refused(1, "generate", made, "--labels", 0, "--out", out, parts=(f"{out}: ", "too long"))


def test_a_failed_generation_keeps_the_old_picture(
    made: Path, tmp_path: Path, unchanged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.png"
    done("generate", made, "--labels", 0, "--out", out)
    unchanged()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    request = ("--labels", "0,1", "--seed", 5)
    for target in (out, tmp_path / "many"):
        parts = (f"{target} cannot be written: No space left",)
        refused(1, "generate", made, *request, "--out", target, parts=parts)

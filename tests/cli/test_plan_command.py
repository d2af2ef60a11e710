"""`var-deploy plan` on presets, bundles and devices."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_steps import done, process, refused, run, tree
from fake_machine import FakeMachine, jetson
from var_deploy.manifest import read_manifest
from var_deploy.planning import devices


def plan(*arguments: object) -> Any:
    return json.loads(done("plan", *arguments, "--json").stdout)


def test_a_preset_on_a_board() -> None:
    text = done("plan", "var-d16", "--device", "orin-nano-8gb").stdout
    for part in ("Jetson Orin Nano 8GB", "one memory for CPU and GPU", "68 GB/s", "fp16, TensorRT"):
        assert part in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for row in ("weights", "cache", "peak", "generates", "engines on disk", "builds", "scale_09"):
        assert row in lines, row
    assert "one image: at least " in text and "A floor, not a promise" in text
    assert "a quarter of 41 sparse INT8 TOPS" in text.replace("\n  ", " ")
    assert max(map(len, text.splitlines())) <= 100


def test_options_change_the_prediction() -> None:
    board = ("--device", "agx-orin-64gb")
    first = plan("var-d16", *board)
    assert (first["batch"], first["guidance"], first["precision"]) == (1, True, "fp16")
    cache = first["layouts"]["shared"]["footprint"]["cache"]
    eight = plan("var-d16", *board, "--batch", 8)
    assert eight["layouts"]["shared"]["footprint"]["cache"] == pytest.approx(8 * cache, rel=1e-3)
    single = plan("var-d16", *board, "--no-guidance")
    assert single["layouts"]["shared"]["footprint"]["cache"] == pytest.approx(cache / 2, rel=1e-3)
    full = plan("var-d16", *board, "--precision", "fp32")
    assert full["seconds"] > first["seconds"]
    assert (first["layout"], plan("var-d16", *board, "--layout", "shared")["layout"]) == (
        "per-scale",
        "shared",
    )
    assert "8 images: at least" in done("plan", "var-d16", *board, "--batch", 8).stdout


def test_int8_is_for_processors() -> None:
    full, rounded = (
        plan("var-d16", "--device", "cpu", "--precision", p) for p in ("fp32", "int8")
    )
    assert rounded["precision"] == "int8"
    assert rounded["bundle_bytes"] < 0.4 * full["bundle_bytes"]
    weights = [p["layouts"]["shared"]["footprint"]["weights"] for p in (full, rounded)]
    assert weights[1] < 0.3 * weights[0]
    assert plan("var-d16", "--device", "cpu")["precision"] == "fp32", "where nobody asked for it"
    text = done("plan", "var-d16", "--device", "cpu", "--precision", "int8").stdout
    assert "TOPS int8" in text and ", int8, ONNX Runtime" in text
    refused(
        *(2, "plan", "var-d16", "--device", "thor", "--precision", "int8"),
        parts=("int8 is for onnxruntime-cpu", "not for TensorRT on Jetson Thor"),
    )


def test_what_does_not_fit_ends_with_1_and_has_no_times() -> None:
    words = ("plan", "var-d36", "--device", "orin-nano-4gb")
    said = refused(1, *words, parts=("does not fit Jetson Orin Nano 4GB", "larger device"))
    assert "no layout fits" in said and "--layout" not in said and "--batch" not in said
    text = run(*words).stdout
    assert "no, lacks" in text and "neither fits" in text
    assert "at least" not in text and " ms" not in text and "A floor" not in text
    result = run(*words, "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["fits"], report["seconds"]) == (1, False, None)
    assert json.loads(result.stderr)["error"] == said.removeprefix("error: ").rstrip()
    refused(1, *words, "--batch", 2, parts=("a smaller --batch",))


def test_a_layout_is_advised_where_it_fits() -> None:
    words = ("plan", "var-d24", "--device", "orin-nano-8gb")
    refused(1, *words, "--layout", "per-scale", parts=("layout shared fits: give --layout shared",))
    assert "no, lacks" in done(*words).stdout, "shared is taken"


def test_a_bundle_settles_its_options(made: Path) -> None:
    before = tree(made)
    found = plan(made, "--device", "thor")
    manifest = json.loads((made / "manifest.json").read_text())
    assert (found["batch"], found["precision"]) == (2, "fp32"), "what the bundle holds"
    assert found["bundle_measured"] is True
    assert found["bundle_bytes"] == sum(f["size"] for f in manifest["files"].values())
    assert tree(made) == before
    same = plan(made, "--device", "thor", "--batch", 2, "--guidance", "--precision", "fp32")
    assert same == found


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--batch", 3), ("exported for 2 images", "--batch 3")),
        (("--no-guidance",), ("exported with guidance", "--no-guidance")),
        (("--precision", "fp16"), ("no fp16 graphs (it has fp32)", "--precision fp16")),
    ],
)
def test_a_bundle_contradicts(
    made: Path, options: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    refused(2, "plan", made, "--device", "thor", *options, parts=parts)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "Machine", lambda: jetson(free=6000))
    found = plan("pocket")
    assert found["device"]["available"] == 6000 << 20
    assert found["library"] == "tensorrt"
    files = jetson().files
    monkeypatch.setattr(
        devices, "Machine", lambda: FakeMachine(files={"/proc/meminfo": files["/proc/meminfo"]})
    )
    bare = plan("pocket")
    assert (bare["library"], bare["precision"]) == ("onnxruntime-cpu", "fp32")
    text = done("plan", "pocket").stdout
    assert "engines" not in text and "TensorRT" not in text and "ONNX Runtime" in text


def test_bad_usage(tmp_path: Path) -> None:
    refused(2, "plan", parts=("preset", "bundle", "--checkpoint"))
    refused(2, "plan", "var-d63", parts=("neither the folder of a bundle", "did you mean var-d36?"))
    refused(2, "plan", "pocket", "--device", "orin", parts=("unknown device 'orin'", "thor"))
    refused(2, "plan", "pocket", "--batch", 0, parts=("--batch",))
    refused(1, "plan", tmp_path, parts=("is not a bundle",))
    (tmp_path / "file").write_text("x")
    refused(1, "plan", tmp_path / "file", parts=("is not a bundle",))


def test_of_a_bundle_it_is_what_generate_takes(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(made)
    graphs = manifest.graphs["fp32"]

    def holding(*precisions: str) -> None:
        held = dataclasses.replace(manifest, graphs=dict.fromkeys(precisions, graphs))
        monkeypatch.setattr("var_deploy.manifest.read_manifest", lambda bundle: held)

    for held, cpu, gpu in (
        (("fp16",), "fp16", "fp16"),
        (("fp32", "fp16"), "fp32", "fp16"),
        (("fp32", "int8"), "int8", "fp32"),
    ):
        holding(*held)
        found = [plan(made, "--device", d)["precision"] for d in ("cpu", "thor")]
        assert found == [cpu, gpu]
    holding("int8")
    alone = "has only int8 graphs, which are for onnxruntime-cpu"
    refused(1, "plan", made, "--device", "thor", parts=(alone, "--precision fp16"))


def test_a_model_without_classes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No preset is one, so the manifest of a bundle says it is."""
    manifest = read_manifest(made)
    form = {"family": "gpt2", "classes": 0, "qk_l2_norm": False}
    transformer = dataclasses.replace(manifest.model.transformer, **form)
    model = dataclasses.replace(manifest.model, transformer=transformer)
    unconditional = dataclasses.replace(manifest, model=model, guidance=False)
    monkeypatch.setattr("var_deploy.manifest.read_manifest", lambda bundle: unconditional)
    assert plan(made, "--device", "thor")["launches"][0]["work"]["name"] == "scale_00"
    refused(2, "plan", made, "--device", "thor", "--guidance", parts=("unconditional",))


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from var_deploy.cli import main; main(sys.argv[1:])"
    )
    for model in ("var-d16", "pocket"):
        result = subprocess.run(
            [sys.executable, "-c", code, "plan", model, "--device", "h200"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert "4800 GB/s" in result.stdout


def test_the_command_as_a_program() -> None:
    result = process("plan", "pocket", "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    assert "at least" in result.stdout


# text to image


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from text_case import export_text_bundle

    return export_text_bundle(tmp_path_factory.mktemp("text"))


def test_a_preset_of_text() -> None:
    words = ("infinity-2b", "--resolution", "0.25M", "--aspect", "4:3")
    text = done("plan", *words, "--device", "agx-orin-64gb").stdout
    for part in (
        "576 × 432 pixels, 10 scales, 2657 tokens",
        "flan-t5-xl, 128 tokens, fp16, ONNX Runtime, about 2.95 GB",
        "text encoder: stays in memory",
        "more for a new prompt",
    ):
        assert part in " ".join(text.split()), part
    names = [line.split()[0] for line in text.splitlines() if line]
    assert {"text_encoder", "condition", "unconditional", "scale_09", "decoder"} <= set(names)
    found = plan(*words, "--device", "agx-orin-64gb", "--text-length", 300, "--batch", 2)
    assert found["text_encoder"]["text_length"] == 300 and found["batch"] == 2
    assert "text_encoder" not in plan("pocket", "--device", "thor")
    sized = plan("infinity-8b-512", "--resolution", "500x510", "--device", "h200")
    assert sized["launches"][-2]["tokens"] == 1024
    small = refused(
        1, "plan", *words, "--device", "orin-nano-8gb", parts=("does not fit", "larger device")
    )
    assert "no layout fits" in small
    pod = done("plan", *words, "--device", "cpu", "--precision", "int8", "--kubernetes").stdout
    assert "kind: Deployment" in pod and "infinity-2b" in pod


def test_a_bundle_of_text_settles_its_options(of_text: Path, tmp_path: Path) -> None:
    found = plan(of_text, "--device", "cpu")
    encoder = found["text_encoder"]
    folder = of_text.parent / "t5"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert encoder["bundle_bytes"] == sum(f["size"] for f in manifest["files"].values())
    assert (encoder["model"], encoder["precision"], encoder["kept"]) == ("t5", "fp32", True)
    assert found["batch"] == 2 and found["bundle_measured"]
    given = plan(of_text, "--device", "cpu", "--text-encoder", folder)["text_encoder"]
    assert given | {"reason": ""} == encoder | {"reason": ""}, "the free memory may have changed"
    alone = Path(shutil.copytree(of_text, tmp_path / "alone"))
    assert "not counted: none was found" in done("plan", alone, "--device", "cpu").stdout
    assert "text_encoder" not in plan(alone, "--device", "cpu")


def test_options_of_text_belong_to_models_of_text(of_text: Path, made: Path) -> None:
    device = ("--device", "thor")
    for words, parts in (
        ((of_text, "--resolution", "1M"), ("settles its scales", "--resolution")),
        ((of_text, "--text-length", 8), ("--text-length",)),
        ((made, "--text-encoder", of_text.parent / "t5"), ("no prompts", "--text-encoder")),
        (("pocket", "--aspect", "1:1"), ("not a text-to-image model", "--aspect")),
        (("infinity-2b", "--resolution", "2M"), ("0.06M, 0.25M, 0.60M, 1M",)),
        (("infinity-2b", "--text-encoder", of_text.parent / "t5"), ("width 64", "2048")),
        (("infinity-3b",), ("did you mean infinity-",)),
    ):
        refused(2, "plan", *words, *device, parts=parts)

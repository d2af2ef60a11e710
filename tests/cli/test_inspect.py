"""`var-deploy inspect`: a bundle as a table, one graph's tensors, engines and their age."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_steps import done, edit, refused, run, tree
from var_deploy import names
from var_deploy.cli.tensors import role
from var_deploy.manifest import FileInfo, read_manifest
from var_deploy.runtime.tensorrt import engine_files
from var_deploy.runtime.tensorrt.target import BuildOptions, Target

TARGET = Target(library="tensorrt", version="10.3.0", device="Orin", sm=87, precision="fp32")


def row(text: str, name: str) -> str:
    """What stands behind a name at the start of a line."""
    found = re.search(rf"^{re.escape(name)} +(.*)$", text, re.M)
    assert found, f"{name} is not in\n{text}"
    return found[1]


def test_an_intact_bundle(made: Path) -> None:
    before = tree(made)
    text = done("inspect", made).stdout
    assert row(text, "image") == "8 × 8 pixels"
    assert row(text, "scales") == "3: 1 2 4 (21 tokens)"
    assert row(text, "batch") == "2, guidance on"
    assert row(text, "files") == "all intact"
    assert row(text, "engines") == "none built"
    assert row(text, "parity").startswith("not verified yet")
    assert re.match(r"fp32/decoder\.onnx +[\d.]+ kB +[\d.]+ MB", row(text, "decoder"))
    assert max(map(len, text.splitlines())) <= 100
    data = json.loads(done("inspect", made, "--json").stdout)
    assert (data["intact"], data["damage"], data["engines"]) == (True, [], [])
    assert data["digest"] == read_manifest(made).digest()
    assert data["model"]["transformer"]["depth"] == 2
    assert done("inspect", made, "--quiet").output == ""
    assert tree(made) == before


def test_all_damage_is_listed(bundle: Path) -> None:
    (bundle / "fp32" / "weights.bin").write_bytes(b"w")
    (bundle / "fp32" / "decoder.onnx").unlink()
    refused(1, "inspect", bundle, parts=("(and 1 more)",))
    text = run("inspect", bundle).stdout
    assert "weights.bin has 1 bytes, expected" in text
    assert "decoder.onnx is missing" in text
    assert row(text, "files").startswith("2 of ")
    data = json.loads(run("inspect", bundle, "--json").stdout)
    assert data["intact"] is False
    assert len(data["damage"]) == 2
    refused(1, "inspect", bundle, "--quiet")
    assert not run("inspect", bundle, "--quiet").stdout


def test_the_report_of_verify(bundle: Path) -> None:
    check: dict[str, Any] = {
        **{"precision": "fp32", "graph": "scale_02", "tensor": names.NEW_F_HAT, "relative": 3e-6},
        **{"bound": 2e-4, "tokens": "31/32", "passed": True},
    }
    lost = {**check, "graph": "decoder", "relative": None, "tokens": "", "passed": False}
    report = {"passed": False, "failure": "fp32/decoder: not finite", "checks": [check, lost]}
    report["digest"] = read_manifest(bundle).digest()
    edit(bundle, lambda data: data.update(parity=report))
    text = done("inspect", bundle).stdout
    assert row(text, "parity") == "verify failed: fp32/decoder: not finite"
    assert row(text, "fp32/scale_02").split() == ["new_f_hat", "3.0e-06", "2e-04", "31/32", "ok"]
    assert row(text, "fp32/decoder").split() == ["new_f_hat", "∞", "2e-04", "FAIL"]


def test_a_report_belongs_to_the_files_it_was_made_for(bundle: Path) -> None:
    def told(**report: Any) -> tuple[str, bool | None]:
        edit(bundle, lambda data: data.update(parity={"passed": True, "checks": [], **report}))
        data = json.loads(done("inspect", bundle, "--json").stdout)
        return row(done("inspect", bundle).stdout, "parity"), data["parity_is_current"]

    digest = read_manifest(bundle).digest()
    assert told(digest=digest) == ("verified: agrees with the PyTorch model", True)
    old, current = told()
    assert old.startswith("verified, but the report does not say of which files; run")
    assert current is None
    other = (
        "not verified: the stored report is of other files; run var-deploy verify again",
        False,
    )
    assert told(digest="0" * 64) == other
    assert told(digest="0" * 64, passed=False, failure="x") == other

    # a weight is changed, and its hash with it
    assert told(digest=digest)[1]
    data = (bundle / "fp32" / "weights.bin").read_bytes()[::-1]
    (bundle / "fp32" / "weights.bin").write_bytes(data)
    info = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, lambda data: data["files"].update({"fp32/weights.bin": info}))
    assert row(done("inspect", bundle).stdout, "parity") == other[0]


def test_a_damaged_bundle_is_not_called_verified(bundle: Path) -> None:
    report = {"passed": True, "checks": [], "digest": read_manifest(bundle).digest()}
    edit(bundle, lambda data: data.update(parity=report))
    (bundle / "fp32" / "weights.bin").write_bytes(b"x")
    text = run("inspect", bundle).stdout
    assert row(text, "parity") == "verified before the files were damaged"


def test_more_smooth_is_told(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "smooth" not in done("inspect", made).stdout
    smooth = dataclasses.replace(read_manifest(made), more_smooth=True)
    monkeypatch.setattr("var_deploy.cli.inspect.read_manifest", lambda bundle: smooth)
    assert row(done("inspect", made).stdout, "codes") == "mixed, more smooth"
    assert role(names.NOISE)


# one graph


def test_the_tensors_of_a_graph(made: Path) -> None:
    text = done("inspect", made, "--graph", "scale_01").stdout
    assert row(text, "graph") == "scale_01, fp32"
    assert row(text, "in   input").split()[:4] == ["float32", "[2,", "4,", "8]"]
    assert "cache: keys of the scales before" in row(text, "in   past_key_values.*.key × 2")
    assert row(text, "out  tokens").split()[:3] == ["int64", "[2,", "4]"]
    data = json.loads(done("inspect", made, "--graph", "scale_01", "--json").stdout)
    graph = read_manifest(made).graphs["fp32"]["scale_01"]
    assert [tensor["name"] for tensor in data["inputs"]] == [t.name for t in graph.inputs]
    assert len(data["outputs"]) == len(graph.outputs)
    assert data["intact"] is True and data["sha256"] and data["weight_bytes"] > 0


def test_every_tensor_has_a_role(made: Path) -> None:
    for graph in read_manifest(made).graphs["fp32"].values():
        for tensor in (*graph.inputs, *graph.outputs):
            assert role(tensor.name), f"{tensor.name} of {graph.file}"
    assert role("unheard_of") == ""


def test_the_sizes_of_step_are_letters(made: Path) -> None:
    text = done("inspect", made, "--graph", "step").stdout
    assert "[2, L, 8]" in row(text, "in   input")


def test_only_the_graph_itself_is_checked(bundle: Path) -> None:
    (bundle / "fp32" / "weights.bin").write_bytes(b"w")
    done("inspect", bundle, "--graph", "decoder", "--quiet")
    (bundle / "fp32" / "decoder.onnx").write_bytes(b"d")
    refused(1, "inspect", bundle, "--graph", "decoder", parts=("decoder.onnx has 1 bytes",))


def test_graphs_that_are_not_there(made: Path) -> None:
    refused(2, "inspect", made, "--graph", "scale_1", parts=("did you mean scale_01?",))
    refused(2, "inspect", made, "--graph", "x", parts=("it has accumulate, condition, ",))
    asked = ("--graph", "decoder", "--precision", "fp16")
    refused(1, "inspect", made, *asked, parts=("no fp16 graphs", "--precision fp16"))
    refused(2, "inspect", made, "--precision", "fp32", parts=("goes with --graph",))


def test_no_library_of_onnx_is_needed(made: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "sys.modules['onnxruntime'] = None\n"
        "from var_deploy.cli import main; main(sys.argv[1:])"
    )
    for options in ((), ("--graph", "scale_02")):
        command = [sys.executable, "-c", code, "inspect", str(made), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stderr) == (0, "")


# engines


def add_engine(bundle: Path, graph: str, plan: bytes = b"plan") -> Path:
    """An engine of a graph as `build` leaves it; its file."""
    target, manifest = TARGET, read_manifest(bundle)
    record = engine_files.EngineRecord(
        graph=graph,
        file=f"{graph}.plan",
        size=len(plan),
        sha256=engine_files.plan_sha256(plan),
        key=engine_files.engine_key(manifest, graph, "fp32", BuildOptions(), target),
        profiles=1,
        seconds=2.5,
    )
    folder = engine_files.read_engines(bundle, target)
    return engine_files.add_engine(folder, plan, record).path / record.file


@pytest.fixture
def built(bundle: Path) -> Path:
    """The bundle with two engines, on an Orin."""
    add_engine(bundle, names.DECODER)
    add_engine(bundle, names.CONDITION)
    return bundle


def test_engines_are_listed(built: Path) -> None:
    text = done("inspect", built).stdout
    assert row(text, "engines") == TARGET.folder
    assert f"engines for {TARGET.describe()}" in text
    table = text.partition("engines for")[2]
    assert row(table, "decoder").split() == ["4", "B", "1", "2.5", "s", "ready"]
    (found,) = json.loads(done("inspect", built, "--json").stdout)["engines"]
    assert (found["folder"], found["stale"], found["target"]["sm"]) == (TARGET.folder, False, 87)
    assert {e["graph"]: e["state"] for e in found["engines"]} == {
        "decoder": "ready",
        "condition": "ready",
    }


def test_engines_of_other_weights_are_stale(built: Path) -> None:
    path = built / "fp32" / "decoder.onnx"
    path.write_bytes(b"another graph")
    info = FileInfo(size=path.stat().st_size, sha256=engine_files.plan_sha256(b"another graph"))
    edit(built, lambda data: data["files"].update({"fp32/decoder.onnx": vars(info)}))
    text = done("inspect", built).stdout
    table = text.partition("engines for")[2]
    assert row(table, "decoder").endswith("stale") and row(table, "condition").endswith("ready")
    assert f"run var-deploy build {built} --precision fp32" in table


def test_a_graph_that_was_left_out_is_stale(built: Path) -> None:
    edit(built, lambda data: data["graphs"]["fp32"].pop("decoder"))
    assert row(done("inspect", built).stdout.partition("for ")[2], "decoder").endswith("stale")


def test_a_damaged_engine_is_damage(built: Path) -> None:
    add_engine(built, names.DECODER).write_bytes(b"nalp")
    again = f"run var-deploy build {built} --precision fp32"
    refused(1, "inspect", built, parts=("decoder.plan is missing or damaged", again))
    add_engine(built, names.CONDITION).unlink()
    refused(1, "inspect", built, parts=("(and 1 more)",))
    assert row(run("inspect", built).stdout, "files") == "all intact", "those of the export are"


@pytest.mark.parametrize("text", ["{", "[]", '{"target": 3}', '{"target": {"sm": 8}}'])
def test_an_engine_json_that_is_none(built: Path, text: str) -> None:
    path = built / "engines" / TARGET.folder / engine_files.ENGINE_JSON
    path.write_text(text)
    refused(1, "inspect", built, parts=(f"{path} cannot be read", "run var-deploy build"))
    (found,) = json.loads(run("inspect", built, "--json").stdout)["engines"]
    assert (found["target"], found["engines"]) == (None, [])


def test_a_folder_with_anothers_name(built: Path) -> None:
    folder = built / "engines" / TARGET.folder
    shutil.move(folder, folder.with_name("mine"))
    refused(1, "inspect", built, parts=("mine says that it was built for", TARGET.folder))

"""`var-deploy triton`: what it writes, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from text_case import HEIGHT, WIDTH
from tritonserver.server import PYTHON

from cli_steps import done, refused, run, tree
from var_deploy.manifest import read_manifest
from var_deploy.runtime.backends import choice as backends
from var_deploy.runtime.tensorrt import engine_files
from var_deploy.runtime.tensorrt.engine_files import EngineFolder, EngineRecord
from var_deploy.runtime.tensorrt.target import Target

PARSE = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
config = text_format.Parse(sys.stdin.read(), ModelConfig())
print(json_format.MessageToJson(config, preserving_proto_field_name=True))
"""


def test_what_is_written(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "models"
    report = json.loads(done("triton", small, "--out", out, "--json").stdout)
    digest = read_manifest(small).digest()
    assert report["version"] == int(digest[:13], 16)
    assert (report["digest"], report["max_batch_size"]) == (digest, 4)
    assert (report["kind"], report["bytes_copied"]) == ("cpu", 0)
    version = out / "small" / str(report["version"])
    assert sorted(path.name for path in version.iterdir()) == ["bundle", "model.py"]
    assert tree(version / "bundle") == tree(small)
    assert (version / "bundle" / "manifest.json").samefile(small / "manifest.json")
    assert report["bytes"] == sum(len(data) for data in tree(small).values() if data)
    assert sorted(path.name for path in out.parent.iterdir()) == ["models"], "nothing is left"


def test_an_empty_folder_will_do(small: Path, tmp_path: Path) -> None:
    text = done("triton", small, "--out", tmp_path, "--name", "pocket-1.0").stdout
    assert text.startswith(f"wrote {tmp_path / 'pocket-1.0'}: version ")
    assert "up to 4 a batch" in text and "linked" in text
    assert not done("triton", small, "--out", tmp_path / "b", "--quiet").stdout


def test_where_no_links_are_made(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    report = json.loads(done("triton", small, "--out", tmp_path / "a", "--json").stdout)
    assert report["bytes_copied"] == report["bytes"] > 0
    (bundle,) = (tmp_path / "a").glob("small/*/bundle")
    assert tree(bundle) == tree(small)


def test_engines_come_along(small: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    engines = add_engines(bundle)
    (engines.path / "decoder.plan.partial").write_bytes(b"half")
    (engines.path / "notes.txt").write_text("mine")
    report = json.loads(done("triton", bundle, "--out", tmp_path / "a", "--json").stdout)
    assert report["kind"] == "gpu"
    (there,) = (tmp_path / "a").glob("bundle/*/bundle/engines/*")
    assert there.name == engines.path.name
    assert tree(there) == {
        name: data for name, data in tree(engines.path).items() if name in PUBLISHED
    }
    on_cpu = ("--backend", "onnxruntime-cpu", "--json")
    report = json.loads(done("triton", bundle, "--out", tmp_path / "b", *on_cpu).stdout)
    assert report["kind"] == "cpu"


PUBLISHED = ("engine.json", "step.plan", "decoder.plan", "timing.cache")


def add_engines(bundle: Path) -> EngineFolder:
    """Two plans and a timing cache."""
    target = Target(library="tensorrt", version="10.3.0", device="Orin", sm=87, precision="fp16")
    folder = engine_files.new_folder(bundle, target)
    for graph in ("step", "decoder"):
        plan = f"the plan of {graph}".encode()
        record = EngineRecord(
            **{"graph": graph, "file": f"{graph}.plan", "size": len(plan), "key": ""},
            **{"sha256": engine_files.plan_sha256(plan), "seconds": 1.5, "profiles": 1},
        )
        folder = engine_files.add_engine(folder, plan, record)
    return engine_files.add_timing_cache(folder, b"measured")


def test_links_are_followed_for_their_content_alone(small: Path, tmp_path: Path) -> None:
    """A link that leads to other bytes than the records say publishes nothing."""
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    engines = add_engines(bundle)
    secret = tmp_path / "secret"
    for name in ("timing.cache", "decoder.plan"):
        path = engines.path / name
        secret.write_bytes(b"s" * path.stat().st_size)
        path.unlink()
        path.symlink_to(secret)
    moved = engines.path / "moved"
    (engines.path / "step.plan").rename(moved)
    (engines.path / "step.plan").symlink_to("moved")
    done("triton", bundle, "--out", tmp_path / "a")
    (there,) = (tmp_path / "a").glob("bundle/*/bundle/engines/*")
    assert sorted(path.name for path in there.iterdir()) == ["engine.json", "step.plan"]
    (copy,) = engine_files.engine_folders(there.parents[1])
    assert list(copy.engines) == ["step"] and copy.timing_cache is None
    assert copy.intact(copy.record("step"))
    assert secret.read_bytes() not in tree(tmp_path / "a").values()


def test_a_bundle_of_links(small: Path, tmp_path: Path) -> None:
    """As the Hugging Face cache holds one: every file is a link to a blob of another name."""
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    (bundle / "blobs").mkdir()
    listed = [*read_manifest(small).files, "manifest.json"]
    for number, name in enumerate(listed):
        (bundle / name).rename(bundle / "blobs" / str(number))
        (bundle / name).symlink_to(bundle / "blobs" / str(number))
    done("triton", bundle, "--out", tmp_path / "a")
    (there,) = (tmp_path / "a").glob("bundle/*/bundle")
    assert tree(there) == tree(small)
    assert not [path for path in there.rglob("*") if path.is_symlink()]


def parsed(config: Path) -> Any:
    """config.pbtxt as NVIDIA's own protobuf reads it."""
    if not PYTHON.is_file():
        pytest.skip("tritonclient is not installed in .venv/triton")
    done = subprocess.run(
        [PYTHON, "-c", PARSE], input=config.read_text(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_configuration(small: Path, tmp_path: Path) -> None:
    options = ("--instances", 3, "--queue", 9, "--queue-delay", 1.5, "--threads", 2)
    done("triton", small, "--out", tmp_path / "a", *options)
    config = parsed(tmp_path / "a" / "small" / "config.pbtxt")
    digest = read_manifest(small).digest()
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("small", "python", 4)
    assert config["version_policy"] == {"specific": {"versions": [str(int(digest[:13], 16))]}}
    assert config["instance_group"] == [{"count": 3, "kind": "KIND_CPU"}]
    assert config["dynamic_batching"] == {
        "preferred_batch_size": [4],
        "max_queue_delay_microseconds": "1500",
        "default_queue_policy": {
            "default_timeout_microseconds": "3600000000",
            "allow_timeout_override": True,
            "max_queue_size": 9,
        },
    }
    inputs = {tensor["name"]: tensor for tensor in config["input"]}
    assert [name for name, t in inputs.items() if not t.get("optional")] == ["LABEL", "SEED"]
    assert inputs["SEED"]["data_type"] == "TYPE_UINT64" and inputs["SEED"]["dims"] == ["1"]
    assert inputs["CFG"]["data_type"] == "TYPE_FP64" and inputs["CFG"]["dims"] == ["-1"]
    (image,) = config["output"]
    assert (image["data_type"], image["dims"]) == ("TYPE_UINT8", ["8", "8", "3"])
    (warm_up,) = config["model_warmup"]
    assert warm_up["batch_size"] == 4 and set(warm_up["inputs"]) == {"LABEL", "SEED"}
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert parameters["digest"] == digest
    assert (parameters["threads"], parameters["precision"]) == ("2", "auto")


def test_on_a_gpu(small: Path, tmp_path: Path) -> None:
    done("triton", small, "--out", tmp_path / "a", "--backend", "onnxruntime-cuda")
    config = parsed(tmp_path / "a" / "small" / "config.pbtxt")
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "gpus": [0]}]
    assert "default_queue_policy" not in config["dynamic_batching"], "nobody asked for a bound"


def test_a_gpu_without_engines(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pipeline would take ONNX Runtime's CUDA provider, instances belong to the GPU."""
    monkeypatch.setattr(backends, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(backends, "has_gpu", lambda: True)
    for name, options, kind in (
        ("a", (), "gpu"),
        ("b", ("--threads", 1), "cpu"),
        ("c", ("--backend", "onnxruntime-cpu"), "cpu"),
    ):
        written = done("triton", small, "--out", tmp_path / name, *options, "--json")
        assert json.loads(written.stdout)["kind"] == kind


@pytest.mark.parametrize(
    ("code", "options", "parts"),
    [
        (2, ("--name", "a b"), ("'a b' is not a name for a model", "--name")),
        (2, ("--name", "../up"), ("'../up' is not a name",)),
        (2, ("--instances", 0), ("--instances",)),
        (2, ("--queue-delay", -1), ("--queue-delay",)),
        (2, ("--backend", "tensorrt", "--threads", 2), ("threads are for onnxruntime-cpu",)),
        (2, ("--backend", "tensorrt", "--precision", "int8"), ("int8 is for onnxruntime-cpu",)),
        (1, ("--precision", "fp16"), ("has no fp16 graphs", "--precision fp16")),
        (1, ("--layout", "per-scale"), ("has no graph scale_00",)),
    ],
)
def test_bad_usage(
    small: Path, tmp_path: Path, code: int, options: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    refused(code, "triton", small, "--out", tmp_path / "a", *options, parts=parts)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty(small: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model").write_text("somebody's")
    before = tree(tmp_path)
    parts = ("is not empty (model is there)", "choose another --out")
    refused(2, "triton", small, "--out", tmp_path / "a", parts=parts)
    refused(2, "triton", small, "--out", tmp_path / "a" / "model", parts=("is a file",))
    refused(2, "triton", small, "--out", small, parts=("is not empty",))
    refused(1, "triton", tmp_path, "--out", tmp_path / "b", parts=("is not a bundle",))
    assert tree(tmp_path) == before


def test_a_damaged_bundle(small: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    with (bundle / "fp32" / "weights.bin").open("r+b") as stream:
        stream.write(b"\xff\xff")
    refused(1, "triton", bundle, "--out", tmp_path / "a", parts=("does not match its hash",))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    parts = ("cannot be written: No space left on device",)
    refused(1, "triton", small, "--out", tmp_path / "a", parts=parts)
    assert not list(tmp_path.iterdir())


def test_ctrl_c(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupt)
    result = run("triton", small, "--out", tmp_path / "a")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_takes_prompts(text_bundle: Path, tmp_path: Path) -> None:
    encoder = text_bundle.parent / "t5"
    report = json.loads(done("triton", text_bundle, "--out", tmp_path / "a", "--json").stdout)
    version = tmp_path / "a" / "bundle" / str(report["version"])
    assert sorted(p.name for p in version.iterdir()) == ["bundle", "model.py", "text_encoder"]
    assert tree(version / "text_encoder") == tree(encoder)
    assert (version / "text_encoder" / "tokenizer.json").samefile(encoder / "tokenizer.json")
    both = [*tree(text_bundle).values(), *tree(encoder).values()]
    assert (report["bytes"], report["bytes_copied"]) == (sum(len(d) for d in both if d), 0)
    alone = Path(shutil.copytree(text_bundle, tmp_path / "alone"))
    refused(2, "triton", alone, "--out", tmp_path / "b", parts=("a text encoder t5",))
    assert not (tmp_path / "b").exists()
    done("triton", alone, "--out", tmp_path / "b", "--text-encoder", encoder)
    (there,) = (tmp_path / "b").glob("alone/*/text_encoder")
    assert tree(there) == tree(encoder)


def test_the_configuration_for_prompts(text_bundle: Path, tmp_path: Path) -> None:
    done("triton", text_bundle, "--out", tmp_path / "a")
    config = parsed(tmp_path / "a" / "bundle" / "config.pbtxt")
    inputs = {tensor["name"]: tensor for tensor in config["input"]}
    assert [name for name, t in inputs.items() if not t.get("optional")] == ["PROMPT", "SEED"]
    assert list(inputs)[2:] == ["NUMBER", "NEGATIVE", "CFG", "TOP_P", "TEMPERATURE"]
    for name in ("PROMPT", "NEGATIVE"):
        assert (inputs[name]["data_type"], inputs[name]["dims"]) == ("TYPE_STRING", ["1"])
    (image,) = config["output"]
    assert image["dims"] == [str(HEIGHT), str(WIDTH), "3"]
    (warm_up,) = config["model_warmup"]
    assert set(warm_up["inputs"]) == {"PROMPT", "SEED"}
    encoder = json.loads((text_bundle / "manifest.json").read_text())["text_encoder"]
    assert config["parameters"]["text_encoder"]["string_value"] == encoder["digest"]


def test_a_text_encoder_for_a_bundle_of_classes(small: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "a", "--text-encoder", small)
    refused(2, "triton", small, *options, parts=("takes no prompts",))

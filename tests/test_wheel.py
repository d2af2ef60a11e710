"""The wheel: complete, and enough to generate images on a machine without PyTorch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fresh_checkout import copy_checkout, fresh_environment, index_problem
from PIL import Image

from var_deploy import __version__
from var_deploy.image.images import read_settings
from var_deploy.manifest import read_manifest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "var_deploy", "export", "runtime")
PROBES = ("gemm_fp32", "gemm_int8", "conv_fp32", "conv_int8")
PAGE = ROOT / "var_deploy" / "serving" / "page"
PAGE_FILES = (".html", ".css", ".js", ".svg")
WEIGHTS = ("classifier.safetensors", "tokenizer.safetensors", "transformer.safetensors")
TEXT_FILES = (
    *WEIGHTS[1:],
    *("bundle.zip", "text_encoder.zip"),
    *("text/config.json", "text/model.safetensors", "text/tokenizer.json"),
)


def call(*command: object, folder: Path) -> str:
    """Run a program in `folder`, away from the sources; its standard output."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in hidden},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would pack what an earlier build left in build/lib."""
    source = tmp_path_factory.mktemp("source")
    skipped = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, source / name)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".")
    call(*build, folder=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which the lines of docs/INSTALL.md about the wheel were run."""
    if problem := index_problem():
        pytest.skip(problem)
    text = (ROOT / "docs" / "INSTALL.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(\$ make wheel\n.*?)```", text, re.S)
    checkout = copy_checkout(tmp_path_factory.mktemp("wheel") / "var-deploy")
    done = subprocess.run(
        ["bash", "-euc", re.sub(r"^\$ ", "", block, flags=re.M)],
        cwd=checkout,
        # the versions of this environment, whose pictures are compared with those made there
        env=fresh_environment(checkout),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert "wrote there/demo.png" in done.stdout
    assert "wrote there/demo-text.png" in done.stdout
    return checkout


@pytest.fixture(scope="session")
def slim(followed: Path) -> Path:
    """bin/ of an environment that holds the wheel, its extras `cpu` and `text`, and what those
    need."""
    return followed / "there" / "bin"


def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        about = archive.read(metadata).decode()
        licences = [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
        licence = archive.read(licences[0]).decode()
    modules = {
        str(Path(*(() if top == "var_deploy" else ("var_deploy",)), path.relative_to(ROOT)))
        for top in ("var_deploy", "export", "runtime")
        for path in (ROOT / top).rglob("*.py")
    }
    weights = {f"var_deploy/export/pocket/{name}" for name in (*WEIGHTS, "bundle.zip")}
    weights |= {f"var_deploy/export/pocket_text/{name}" for name in TEXT_FILES}
    probes = {f"var_deploy/bench/{name}.onnx" for name in PROBES}
    probes.add("var_deploy/runtime/backends/int8_probe.onnx")
    page = {str(path.relative_to(ROOT)) for path in PAGE.iterdir() if path.suffix in PAGE_FILES}
    assert len(page) > 5
    assert names == modules | weights | probes | page | {"var_deploy/py.typed"}
    assert f"\nVersion: {__version__}\n" in about
    assert "Apache License" in licence


def test_the_weights_that_ship_are_small(wheel: Path) -> None:
    sizes: dict[str, list[int]] = {"pocket": [], "pocket_text": []}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".safetensors"):
                sizes[info.filename.split("/")[2]].append(info.file_size)
    assert [len(found) for found in sizes.values()] == [len(WEIGHTS), 3]
    assert sum(sizes["pocket"]) <= 8_000_000
    assert sum(sizes["pocket_text"]) <= 14_000_000


@pytest.mark.slow
def test_the_demo_needs_neither_torch_nor_onnx(
    followed: Path, pocket_bundle: Path, tmp_path: Path
) -> None:
    """The block made the bundle of an export, and the pictures that bundles give."""
    assert read_manifest(followed / "there" / "pocket").digest() == (
        read_manifest(pocket_bundle).digest()
    )
    options = ("--count", 40, "--seed", 1, "--threads", 1, "--quiet")
    here = (sys.executable, "-m", "var_deploy.cli", "generate", pocket_bundle, *options)
    call(*here, "--out", "here.png", folder=tmp_path)
    there = followed / "there" / "demo.png"
    with Image.open(there) as one, Image.open(tmp_path / "here.png") as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    call(sys.executable, "-m", "var_deploy.cli", "demo", "--out", "here", folder=tmp_path)
    there = followed / "there" / "demo-text.png"
    with Image.open(there) as one, Image.open(tmp_path / "here" / "demo-text.png") as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    (environment,) = (followed / "there" / "lib").glob("python*/site-packages")
    assert not [path for path in environment.iterdir() if path.name in ("torch", "onnx")]


@pytest.mark.slow
def test_it_generates_without_torch_and_onnx(
    slim: Path, pocket_bundle: Path, tmp_path: Path
) -> None:
    there = slim / "python"
    code = "from importlib.util import find_spec; print(find_spec('{}') is not None)"
    present = {
        name: call(there, "-c", code.format(name), folder=tmp_path).strip() == "True"
        for name in ("torch", "onnx", "onnx_ir", "safetensors", "pytest", "numpy", "onnxruntime")
    }
    assert {name for name, found in present.items() if found} == {"numpy", "onnxruntime"}
    where = call(there, "-c", "import var_deploy; print(var_deploy.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(slim.parent), "the wheel runs, not the sources"

    options = ("--labels", "0,1,2", "--count", 3, "--seed", 11, "--threads", 1, "--quiet")
    script = (slim / "var-deploy", "generate", pocket_bundle, *options)
    call(*script, "--out", "there.png", folder=tmp_path)
    here = (sys.executable, "-m", "var_deploy.cli", "generate", pocket_bundle, *options)
    call(*here, "--out", "here.png", folder=tmp_path)
    with Image.open(tmp_path / "there.png") as one, Image.open(tmp_path / "here.png") as other:
        pixels = np.asarray(one)
        np.testing.assert_array_equal(pixels, np.asarray(other))
    assert pixels.std() > 10, "a picture, not one colour"
    assert read_settings(tmp_path / "there.png") == read_settings(tmp_path / "here.png")

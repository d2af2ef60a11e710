"""Image sets in the hands of the libraries that they are made for: `datasets` and `webdataset`."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.formats import read_images
from var_deploy.datasets.npz import write_npz
from var_deploy.datasets.spec import SetSpec
from var_deploy.datasets.work import make_missing

NewSpec = Callable[..., SetSpec]

# in a process of its own: the library keeps threads and caches, and warns of other libraries
LOAD = """
import io, json, sys
import datasets
from PIL import Image

datasets.disable_progress_bars()
found = datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])
rows = []
for row in found["train"]:
    image = row.get("image", row.get("png"))
    about = row.get("json", row)
    rows.append({
        "columns": sorted(key for key in row if not key.startswith("__")),
        "label": row.get("label", row.get("cls", row.get("prompt"))),
        "number": about["number"],
        "seed": about["seed"],
        "first": list(image.getpixel((0, 0))),
    })
print(json.dumps({"splits": list(found), "rows": rows}))
"""


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; it comes with the extra checks")


@pytest.fixture(params=["several shards", "one shard"])
def shard_size(request: pytest.FixtureRequest) -> int:
    return {"several shards": 4, "one shard": 15}[request.param]


@pytest.fixture
def complete(
    folder: SetFolder, new_spec: NewSpec, new_pipe: Callable[..., Any], shard_size: int
) -> Callable[..., SetSpec]:
    """Makes a whole set of a format, with images.npz, in `folder`."""

    def make(form: str, new_spec: NewSpec = new_spec) -> SetSpec:
        spec = new_spec(format=form, shard_size=shard_size)
        folder.begin(spec)
        make_missing(new_pipe(), folder, spec, range(spec.shards), lambda *told: None)
        write_npz(folder, spec)
        return spec

    return make


def first_pixels(folder: SetFolder, spec: SetSpec) -> list[list[int]]:
    paths = [folder.path / spec.shard_file(shard) for shard in range(spec.shards)]
    return [image[0, 0].tolist() for path in paths for image in read_images(path)]


def load(path: Path, cache: Path) -> Any:
    command = [sys.executable, "-c", LOAD, str(path), str(cache)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cache)}
    offline["USE_TORCH"] = "0"  # which it would import to no purpose
    done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_datasets_loads_the_folder(
    folder: SetFolder, complete: Callable[..., SetSpec], form: str, tmp_path: Path
) -> None:
    needs("datasets")
    needs("pyarrow")
    spec = complete(form)
    found = load(folder.path, tmp_path / "cache")
    assert found["splits"] == ["train"]
    own = ["image", "label", "number", "seed"] if form == "parquet" else ["cls", "json", "png"]
    assert found["rows"] == [
        {"columns": own, "label": spec.label(n), "number": n, "seed": spec.seed, "first": pixel}
        for n, pixel in enumerate(first_pixels(folder, spec))
    ]


def test_datasets_loads_what_an_older_version_began(
    folder: SetFolder, complete: Callable[..., SetSpec], tmp_path: Path
) -> None:
    """Its hashes are in visible files; listing the shards says which files are data."""
    needs("datasets")
    spec = complete("tar")
    for path in folder.path.glob(".*.sha256"):
        path.rename(path.with_name(path.name[1:]))
    (folder.path / ".huggingface.yaml").unlink()
    folder.list_shards(spec)
    assert len(load(folder.path, tmp_path / "cache")["rows"]) == spec.images


@pytest.mark.filterwarnings("ignore")  # of the library's own
def test_webdataset_reads_the_shards(folder: SetFolder, complete: Callable[..., SetSpec]) -> None:
    needs("webdataset")
    import webdataset

    spec = complete("tar")
    pattern = f"{folder.path}/{{000000..{spec.shards - 1:06d}}}.tar"
    found = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [int(sample["cls"]) for sample in found] == [spec.label(n) for n in range(spec.images)]
    assert [json.loads(sample["json"])["number"] for sample in found] == list(range(spec.images))
    for sample, pixel in zip(found, first_pixels(folder, spec), strict=True):
        with Image.open(io.BytesIO(sample["png"])) as image:
            assert np.asarray(image)[0, 0].tolist() == pixel


@pytest.mark.parametrize("shard_size", ["one shard"], indirect=True)
def test_datasets_loads_prompts(
    folder: SetFolder,
    complete: Callable[..., SetSpec],
    new_prompt_spec: NewSpec,
    tmp_path: Path,
) -> None:
    needs("datasets")
    needs("pyarrow")
    spec = complete("parquet", new_prompt_spec)
    rows = load(folder.path, tmp_path / "cache")["rows"]
    assert [row["label"] for row in rows] == [spec.prompt(n) for n in range(spec.images)]
    assert rows[0]["columns"] == ["image", "number", "prompt", "seed"]


@pytest.mark.filterwarnings("ignore")  # of the library's own
def test_webdataset_reads_prompts(
    folder: SetFolder, complete: Callable[..., SetSpec], new_prompt_spec: NewSpec
) -> None:
    needs("webdataset")
    import webdataset

    spec = complete("tar", new_prompt_spec)
    pattern = f"{folder.path}/{{000000..{spec.shards - 1:06d}}}.tar"
    reader = webdataset.WebDataset(pattern, shardshuffle=False).decode()
    found = [(sample["txt"], sample["json"]["prompt"]) for sample in reader]
    assert found == [(spec.prompt(n), spec.prompt(n)) for n in range(spec.images)]

"""Shards as Parquet, read back by its own library."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.formats import read_images
from var_deploy.datasets.npz import write_npz
from var_deploy.datasets.shards import draw_shard
from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import UsageError

pq = pytest.importorskip("pyarrow.parquet")

NewSpec = Callable[..., SetSpec]


@pytest.fixture
def spec(new_spec: NewSpec) -> SetSpec:
    return new_spec(format="parquet")


def opened(data: bytes) -> Any:
    return pq.read_table(io.BytesIO(data))


def features(table: Any) -> Any:
    return json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]


def test_one_row_an_image(pipe: Any, spec: SetSpec) -> None:
    table = opened(draw_shard(pipe, spec, 3))
    assert table.column_names == ["image", "label", "seed", "number"]
    assert table["label"].to_pylist() == [2, 3, 4]
    assert table["seed"].to_pylist() == [9, 9, 9]
    assert table["number"].to_pylist() == [12, 13, 14]
    row = table["image"][1].as_py()
    assert row["path"] == "000000013.png"
    with Image.open(io.BytesIO(row["bytes"])) as image:
        image.load()
        assert (image.format, image.size, image.info) == ("PNG", (8, 8), {})


def test_the_largest_seed(pipe: Any, new_spec: NewSpec) -> None:
    table = opened(draw_shard(pipe, new_spec(format="parquet", seed=2**64 - 1), 0))
    assert table["seed"].to_pylist() == [2**64 - 1] * 4


@pytest.mark.parametrize(
    ("names", "feature"),
    [
        ([*"abcde"], {"names": [*"abcde"], "_type": "ClassLabel"}),
        ((), {"dtype": "int64", "_type": "Value"}),
    ],
)
def test_names_of_the_labels(
    pipe: Any, spec: SetSpec, names: Sequence[str], feature: dict[str, Any]
) -> None:
    pipe.manifest.labels = names
    found = features(opened(draw_shard(pipe, spec, 0)))
    assert found["label"] == feature
    assert found["image"] == {"_type": "Image"}
    assert set(found) == {"image", "label", "seed", "number"}


def test_without_classes_there_is_no_label(pipe: Any, new_spec: NewSpec) -> None:
    table = opened(draw_shard(pipe, new_spec(format="parquet", classes=0), 0))
    assert table.column_names == ["image", "seed", "number"] == list(features(table))


def test_both_formats_hold_the_same_images(
    pipe: Any, new_spec: NewSpec, spec: SetSpec, tmp_path: Path
) -> None:
    found = []
    for one in (spec, new_spec()):
        path = tmp_path / one.shard_file(1)
        path.write_bytes(draw_shard(pipe, one, 1))
        found.append(list(read_images(path)))
    np.testing.assert_array_equal(*found)
    assert {path.name for path in tmp_path.iterdir()} == {"000001.parquet", "000001.tar"}


def test_the_batch_does_not_matter(new_pipe: Callable[..., Any], spec: SetSpec) -> None:
    assert len({draw_shard(new_pipe(batch=b), spec, 2) for b in (1, 3, 7)}) == 1


def test_grey_images_as_an_array(
    folder: SetFolder, new_spec: NewSpec, new_pipe: Callable[..., Any]
) -> None:
    spec, pipe = new_spec(format="parquet", classes=0), new_pipe(channels=1)
    folder.begin(spec)
    folder.write(spec, 0, draw_shard(pipe, spec, 0))
    with np.load(write_npz(folder, spec)) as arrays:
        expected = np.concatenate([pipe.draw(request) for request in pipe.requests[:]])
        np.testing.assert_array_equal(arrays["arr_0"], expected)


def test_a_set_has_one_format(folder: SetFolder, spec: SetSpec, new_spec: NewSpec) -> None:
    folder.begin(spec)
    with pytest.raises(UsageError, match="format is parquet and not tar"):
        folder.begin(new_spec())


def test_an_unknown_format(new_spec: NewSpec) -> None:
    with pytest.raises(UsageError, match="format must be one of tar, parquet, found 'zip'"):
        new_spec(format="zip")


def test_a_set_from_before_there_were_formats(new_spec: NewSpec) -> None:
    data = new_spec().to_json()
    del data["format"]
    assert SetSpec.from_json(data) == new_spec()

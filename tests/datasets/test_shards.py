"""One shard: what is asked of the pipeline, and what is in the file."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.datasets.formats import read_images
from var_deploy.datasets.shards import draw_shard
from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import UsageError

NewSpec = Callable[..., SetSpec]


def opened(data: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(data))


def test_an_image_is_asked_for_by_its_number(pipe: Any, spec: SetSpec) -> None:
    draw_shard(pipe, spec, 1)
    assert [r.rng_keys for r in pipe.requests] == [[(9, 4), (9, 5)], [(9, 6), (9, 7)]]
    assert [r.labels for r in pipe.requests] == [[4, 0], [1, 2]]
    assert all(r.sampling == spec.sampling for r in pipe.requests)


def test_three_members_an_image(pipe: Any, spec: SetSpec) -> None:
    data = draw_shard(pipe, spec, 3)
    with opened(data) as tar:
        assert tar.getnames() == [
            f"0000000{n}.{suffix}" for n in (12, 13, 14) for suffix in ("png", "cls", "json")
        ]
        heads = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
        assert heads == {(0, 0, 0, "", "", 0o644)}
        label, origin, png = (
            tar.extractfile(f"000000013.{suffix}").read()  # type: ignore[union-attr]
            for suffix in ("cls", "json", "png")
        )
    assert label == b"3"
    assert json.loads(origin) == {"seed": 9, "number": 13, "label": 3}
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert (image.size, image.info) == ((8, 8), {})


def test_images_come_back(new_pipe: Callable[..., Any], spec: SetSpec, tmp_path: Path) -> None:
    for channels in (1, 3):
        pipe = new_pipe(batch=4, channels=channels)
        path = tmp_path / f"{channels}.tar"
        path.write_bytes(draw_shard(pipe, spec, 0))
        np.testing.assert_array_equal(list(read_images(path)), pipe.draw(pipe.requests[0]))


def test_the_batch_does_not_matter(new_pipe: Callable[..., Any], spec: SetSpec) -> None:
    assert len({draw_shard(new_pipe(batch=b), spec, 2) for b in (1, 3, 7)}) == 1


def test_shards_differ(pipe: Any, spec: SetSpec) -> None:
    assert len({draw_shard(pipe, spec, shard) for shard in range(spec.shards)}) == spec.shards


def test_without_classes_there_is_no_label(pipe: Any, new_spec: NewSpec) -> None:
    with opened(draw_shard(pipe, new_spec(classes=0), 0)) as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "json"}
    assert pipe.requests[0].labels == [0, 0]


def test_progress(pipe: Any, spec: SetSpec) -> None:
    seen: list[int] = []
    draw_shard(pipe, spec, 3, seen.append)
    assert seen == [2, 3]


@pytest.mark.parametrize(
    "changes", [{"precision": "int8"}, {"layout": "per-scale"}, {"bundle": "cd" * 32}]
)
def test_another_pipeline_is_refused(pipe: Any, new_spec: NewSpec, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"pipeline has {next(iter(changes))} .*, the set needs"):
        draw_shard(pipe, new_spec(**changes), 0)
    assert not pipe.requests


def test_prompts_become_features_batch_by_batch(pipe: Any, new_prompt_spec: NewSpec) -> None:
    data = draw_shard(pipe, new_prompt_spec(), 0)
    fox, sea, other = "a red fox", "the sea", "狐狸"
    assert [r.prompts for r in pipe.requests] == [
        ([fox, sea], ["fog", "fog"]),
        ([other, fox], ["fog", "fog"]),
    ]
    with opened(data) as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.txt", "000000000.json"]


def test_another_text_encoder_is_refused(pipe: Any, new_prompt_spec: NewSpec) -> None:
    spec = new_prompt_spec()
    assert spec.prompts is not None
    for change in ({"precision": "fp32"}, {"text_encoder": "cd" * 32}):
        other = dataclasses.replace(spec, prompts=dataclasses.replace(spec.prompts, **change))
        with pytest.raises(UsageError, match=r"pipeline's text encoder has .*, the set needs"):
            draw_shard(pipe, other, 0)
    assert not pipe.requests


def test_the_settings_can_travel(spec: SetSpec) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec

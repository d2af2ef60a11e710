"""Who makes which shard, in which order and how often interrupted: the set is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_steps import tree
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.spec import SetSpec
from var_deploy.datasets.work import make_missing
from var_deploy.errors import BackendError
from var_deploy.progress import span


def silent(message: str, fraction: float) -> None:
    pass


@pytest.fixture
def whole(tmp_path: Path, spec: SetSpec, new_pipe: Callable[..., Any]) -> dict[str, bytes | None]:
    """The files of the set, made in one go."""
    folder = SetFolder(path=tmp_path / "whole")
    folder.begin(spec)
    assert make_missing(new_pipe(), folder, spec, range(4), silent) == [0, 1, 2, 3]
    return tree(folder.path)


def test_in_parts_and_backwards(
    folder: SetFolder,
    spec: SetSpec,
    new_pipe: Callable[..., Any],
    whole: dict[str, bytes | None],
) -> None:
    folder.begin(spec)
    assert make_missing(new_pipe(batch=3), folder, spec, range(3, 0, -2), silent) == [3, 1]
    assert make_missing(new_pipe(batch=5), folder, spec, range(2, -1, -2), silent) == [2, 0]
    assert tree(folder.path) == whole


@pytest.mark.parametrize("kind", [KeyboardInterrupt, BackendError])
def test_cut_short_and_resumed(
    folder: SetFolder,
    spec: SetSpec,
    new_pipe: Callable[..., Any],
    whole: dict[str, bytes | None],
    kind: type[BaseException],
) -> None:
    pipe = new_pipe()

    def cut() -> None:
        if len(pipe.requests) == 3:  # two a shard: in the middle of the second one
            raise kind("cut")

    pipe.before = cut
    folder.begin(spec)
    with pytest.raises(kind):
        make_missing(pipe, folder, spec, range(4), silent)
    assert set(tree(folder.path)) == {
        ".huggingface.yaml",
        "set.json",
        "000000.tar",
        ".000000.tar.sha256",
    }
    listed = json.loads((folder.path / "set.json").read_text())["shards"]
    assert [entry["shard"] for entry in listed] == [0]
    assert make_missing(new_pipe(), folder, spec, range(4), silent) == [1, 2, 3]
    assert tree(folder.path) == whole


def test_what_another_made_meanwhile_is_left_alone(
    folder: SetFolder, spec: SetSpec, pipe: Any, new_pipe: Callable[..., Any]
) -> None:
    def meanwhile() -> None:
        pipe.before = lambda: None
        make_missing(new_pipe(), folder, spec, [1, 2], silent)

    pipe.before = meanwhile
    folder.begin(spec)
    assert make_missing(pipe, folder, spec, range(4), silent) == [0, 3]
    assert folder.list_shards(spec) == [0, 1, 2, 3]


def test_progress_counts_the_images_of_the_share(
    folder: SetFolder, spec: SetSpec, pipe: Any
) -> None:
    folder.begin(spec)
    make_missing(pipe, folder, spec, [0], silent)
    seen: list[tuple[str, float]] = []
    make_missing(pipe, folder, spec, [0, 3], lambda *told: seen.append(told))
    assert [message.partition(",")[0] for message, _ in seen] == ["image 6 of 7", "image 7 of 7"]
    assert [fraction for _, fraction in seen] == [6 / 7, 1]
    assert all("/s, " in message and message.endswith(" left") for message, _ in seen)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5940, "99 min"), (12000, "3 h 20 min")],
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text

"""A set on disk: begun once, whole or absent, and never mixed with another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy.datasets import folder as module
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import UsageError, VarDeployError

NewSpec = Callable[..., SetSpec]
BEGUN = [".huggingface.yaml", "set.json"]


def names(folder: SetFolder) -> list[str]:
    return sorted(p.name for p in folder.path.iterdir())


def saved(folder: SetFolder) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder.path / "set.json").read_text())
    return data


def test_a_set_is_begun_once(folder: SetFolder, spec: SetSpec) -> None:
    assert folder.read() is None
    folder.begin(spec)
    before = (folder.path / "set.json").read_bytes()
    folder.begin(spec)
    assert folder.read() == spec
    assert names(folder) == BEGUN
    assert (folder.path / "set.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 8, "per_class": 2}, "set: seed is 9 and not 8, per class is 3 and not 2;"),
        ({"precision": "int8"}, "set: precision is fp32 and not int8;"),
        ({"shard_size": 5}, "set: shard size is 4 and not 5;"),
        ({"bundle": "cd" * 32, "seed": 8}, f"set: its bundle is {'ab' * 6} and not {'cd' * 6};"),
    ],
)
def test_another_set_is_refused(
    folder: SetFolder, spec: SetSpec, new_spec: NewSpec, changes: dict[str, Any], words: str
) -> None:
    folder.begin(spec)
    with pytest.raises(UsageError) as refused:
        folder.begin(new_spec(**changes))
    assert words in str(refused.value)
    assert folder.read() == spec


@pytest.mark.parametrize("same", [True, False])
def test_two_processes_begin_at_once(
    folder: SetFolder,
    spec: SetSpec,
    new_spec: NewSpec,
    monkeypatch: pytest.MonkeyPatch,
    same: bool,
) -> None:
    other, link = spec if same else new_spec(seed=1), os.link

    def link_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        folder.begin(other)  # the first file of this one is still a temporary one
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    if same:
        folder.begin(spec)
    else:
        with pytest.raises(UsageError, match="seed is 1 and not 9"):
            folder.begin(spec)
    assert folder.read() == other
    assert names(folder) == BEGUN


def test_a_file_system_without_links(
    folder: SetFolder, spec: SetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    folder.begin(spec)
    assert folder.read() == spec
    assert names(folder) == BEGUN


def test_a_foreign_folder_is_left_alone(folder: SetFolder, spec: SetSpec) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"not empty and holds no set \(thesis.tex is there"):
        folder.begin(spec)
    assert names(folder) == ["thesis.tex"]


def test_a_file_is_no_folder(folder: SetFolder, spec: SetSpec) -> None:
    folder.path.write_text("mine")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        folder.begin(spec)
    assert folder.path.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "is damaged"),
        ('{"settings": {"seed": 1}, "shards": []}', "is damaged"),
        ('{"schema_version": 3}', "has schema version 3, this var-deploy reads up to 2; upgrade"),
    ],
)
def test_a_damaged_list(folder: SetFolder, text: str, words: str) -> None:
    folder.path.mkdir()
    (folder.path / "set.json").write_text(text)
    with pytest.raises(VarDeployError, match=words) as refused:
        folder.read()
    assert "\n" not in str(refused.value)


# shards


def test_a_shard_is_listed_with_its_hash(folder: SetFolder, spec: SetSpec) -> None:
    folder.begin(spec)
    folder.write(spec, 2, b"two")
    assert names(folder) == [".000002.tar.sha256", BEGUN[0], "000002.tar", BEGUN[1]]
    assert folder.missing(spec, range(4)) == [0, 1, 3]
    assert folder.list_shards(spec) == [2]
    digest = hashlib.sha256(b"two").hexdigest()
    entry = {"shard": 2, "file": "000002.tar", "images": 4, "sha256": digest}
    assert (saved(folder)["shards"], saved(folder)["complete"]) == ([entry], False)
    assert (folder.path / ".000002.tar.sha256").read_text() == f"{digest}  000002.tar\n"


def test_a_set_is_complete(folder: SetFolder, spec: SetSpec) -> None:
    folder.begin(spec)
    for shard in (3, 1, 0, 2):
        folder.write(spec, shard, b"%d" % shard)
    assert folder.list_shards(spec) == [0, 1, 2, 3]
    assert saved(folder)["complete"]
    assert folder.read() == spec


def visible_hashes(folder: SetFolder) -> None:
    """Leave the set as older versions wrote it."""
    for path in folder.path.glob(".*.sha256"):
        path.rename(path.with_name(path.name[1:]))
    (folder.path / BEGUN[0]).unlink()


def test_a_set_of_an_older_version_goes_on(folder: SetFolder, spec: SetSpec) -> None:
    folder.begin(spec)
    for shard in range(3):
        folder.write(spec, shard, b"%d" % shard)
    listed = folder.list_shards(spec)
    visible_hashes(folder)
    assert folder.missing(spec, range(4)) == [3]
    assert not any(bad for _, bad in folder.damaged(spec))
    folder.whole_shard(spec, 1)
    folder.begin(spec)
    folder.write(spec, 3, b"3")
    assert folder.list_shards(spec) == [*listed, 3]
    assert (folder.path / BEGUN[0]).is_file()
    (folder.path / "000001.tar").write_bytes(b"wrong")
    assert [shard for shard, bad in folder.damaged(spec) if bad] == [1]


def test_a_description_for_datasets_that_is_there_stays(folder: SetFolder, spec: SetSpec) -> None:
    folder.begin(spec)
    (folder.path / BEGUN[0]).write_text("mine")
    folder.begin(spec)
    folder.list_shards(spec)
    assert (folder.path / BEGUN[0]).read_text() == "mine"


@pytest.mark.parametrize("lost", ["000001.tar", ".000001.tar.sha256"])
def test_half_a_shard_is_none(folder: SetFolder, spec: SetSpec, lost: str) -> None:
    folder.begin(spec)
    folder.write(spec, 1, b"one")
    (folder.path / lost).unlink()
    assert folder.missing(spec, [1]) == [1]
    folder.write(spec, 1, b"one")
    assert folder.missing(spec, [1]) == []


def test_who_lists_last_has_seen_all(
    folder: SetFolder, spec: SetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin(spec)
    folder.write(spec, 0, b"zero")
    whole_file = module.whole_file

    def slow(path: Path, **options: Any) -> Any:
        if path.name == "set.json":  # what another process does before this one has written
            monkeypatch.setattr(module, "whole_file", whole_file)
            folder.write(spec, 1, b"one")
        return whole_file(path, **options)

    monkeypatch.setattr(module, "whole_file", slow)
    assert folder.list_shards(spec) == [0, 1]
    assert [entry["shard"] for entry in saved(folder)["shards"]] == [0, 1]


@pytest.mark.parametrize("suffix", [".tar", ".sha256"])
def test_a_full_disk(
    folder: SetFolder, spec: SetSpec, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    folder.begin(spec)
    folder.write(spec, 0, b"zero")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == suffix:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(VarDeployError, match="No space left on device; whole shards are kept: "):
        folder.write(spec, 1, b"one")
    assert folder.missing(spec, range(2)) == [1]
    assert not [name for name in names(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("also_its_hash", [False, True])
def test_damage_is_found(folder: SetFolder, spec: SetSpec, also_its_hash: bool) -> None:
    folder.begin(spec)
    for shard in (0, 1):
        folder.write(spec, shard, b"whole")
    folder.list_shards(spec)
    assert list(folder.damaged(spec)) == [(0, False), (1, False)]
    if also_its_hash:  # then the list knows better
        folder.write(spec, 1, b"wrong")
    else:
        (folder.path / "000001.tar").write_bytes(b"wrong")
    assert list(folder.damaged(spec)) == [(0, False), (1, True)]
    assert folder.whole_shard(spec, 0).name == "000000.tar"
    if not also_its_hash:
        with pytest.raises(VarDeployError, match=r"000001\.tar does not match its hash"):
            folder.whole_shard(spec, 1)
    with pytest.raises(VarDeployError, match=r"000002\.tar is missing"):
        folder.whole_shard(spec, 2)

"""An image set on disk.

    set/
      set.json        what decides the set's bytes, and the shards that are whole
      000000.tar  .000000.tar.sha256  …         or .parquet
      images.npz      where it was asked for
      .huggingface.yaml   which files are data, for `datasets.load_dataset("set/")`

`datasets` of Hugging Face takes every file whose name does not begin with a dot for data, and of a
set with one tar it would read set.json instead. Sets of older versions have their hashes in
000000.tar.sha256, which is read where the other is missing.

A shard is there where both its files are. The hash is written first and each file by rename, so a
shard appears whole or not at all. There are no claims that a dead process could leave behind:
processes share the work by the numbers of the shards, and two that make the same one write the
same bytes. set.json lists the shards for readers; what is there is told by the shards' own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_deploy import __version__
from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.files import check_writable, new_file, whole_file
from var_deploy.files.work_folders import entries_that_count
from var_deploy.manifest import file_sha256

SET_FILE, NPZ_FILE, DATASETS_FILE = "set.json", "images.npz", ".huggingface.yaml"
SCHEMA_VERSION = 2  # that of a set of prompts; a set of classes is what version 1 wrote
LOST = "put it back from a copy, or choose another --out"


@dataclass(frozen=True, kw_only=True)
class SetFolder:
    """An image set in the folder `path`, which may not exist yet."""

    path: Path

    def check_free(self) -> None:
        """Raise UsageError where `path` holds files but no set, so that no set can be made
        there."""
        check_writable(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; name a folder")
        if not self.path.is_dir() or (self.path / SET_FILE).exists():
            return
        # another process may be writing the first file of the same set at this moment
        others = entries_that_count(self.path)
        if others:
            raise UsageError(
                f"{self.path} is not empty and holds no set ({others[0]} is there, "
                f"{SET_FILE} is not); choose another --out"
            )

    def read(self) -> SetSpec | None:
        """Return the settings of the set; None before `begin`.

        Raises VarDeployError where set.json is damaged or of a newer var-deploy.
        """
        data = self._read()
        return None if data is None else data[0]

    def begin(self, spec: SetSpec) -> None:
        """Make the set, or check that the existing one has these settings.

        Raises UsageError for other settings, VarDeployError where the disk refuses.
        """
        if self.read() is None:
            self.check_free()
            self._create(spec)
        self.check_same(spec)
        self._describe_data(spec)

    def check_same(self, spec: SetSpec) -> None:
        """Raise UsageError where a set with other settings is here already."""
        there = self.read()
        if there is None or not (found := spec.differences(there)):
            return
        if there.bundle != spec.bundle:
            found = [f"its bundle is {there.bundle[:12]} and not {spec.bundle[:12]}"]
        raise UsageError(
            f"{self.path} holds another set: {', '.join(found)}; choose another --out, or ask for "
            "the same set"
        )

    def has(self, spec: SetSpec, shard: int) -> bool:
        """Whether a shard exists. Its content is not read, see `damaged`."""
        return bool(self._hash(spec, shard))

    def missing(self, spec: SetSpec, shards: Sequence[int]) -> list[int]:
        """Return those of `shards` that do not exist."""
        return [shard for shard in shards if not self.has(spec, shard)]

    def write(self, spec: SetSpec, shard: int, data: bytes) -> None:
        """Write a shard's file. Raises VarDeployError where the disk refuses."""
        path = self.path / spec.shard_file(shard)
        # the hash first: a file under the shard's name is then one that can be checked
        with keeping_shards(), whole_file(_hash_file(path), follow=False) as stream:
            stream.write(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
        with keeping_shards(), whole_file(path, follow=False) as stream:
            stream.write(data)

    def list_shards(self, spec: SetSpec) -> list[int]:
        """Update the list of shards in set.json; return the existing shards."""
        self._describe_data(spec)  # a set of an older version lacks it
        written = None
        # where two processes end together, the one that writes last sees all shards
        while (entries := self._entries(spec)) != written:
            with keeping_shards(), whole_file(self.path / SET_FILE, follow=False) as stream:
                stream.write(_text(spec, entries).encode())
            written = entries
        return [entry["shard"] for entry in entries]

    def damaged(self, spec: SetSpec) -> Iterator[tuple[int, bool]]:
        """Compare every existing shard with its hash; yield (number, whether it is damaged)."""
        data = self._read()
        listed = data[1] if data else {}
        for shard in range(spec.shards):
            if self.has(spec, shard):
                path = self.path / spec.shard_file(shard)
                found = file_sha256(path)
                yield shard, {found} != {_hash_of(path), listed.get(shard, found)}

    def whole_shard(self, spec: SetSpec, shard: int) -> Path:
        """Return a shard's file after comparing it with its hash. Raises VarDeployError."""
        path = self.path / spec.shard_file(shard)
        if not self.has(spec, shard):
            raise VarDeployError(f"{path} is missing; run the command that made the set again")
        if file_sha256(path) != _hash_of(path):
            raise VarDeployError(damage(path))
        return path

    def _describe_data(self, spec: SetSpec) -> None:
        """Write the file that tells Hugging Face `datasets` which files are data.

        An existing file stays as it is.
        """
        path = self.path / DATASETS_FILE
        if not path.exists():
            with keeping_shards(), whole_file(path) as stream:
                text = f'configs:\n- config_name: default\n  data_files: "*.{spec.format}"\n'
                stream.write(text.encode())

    def _create(self, spec: SetSpec) -> None:
        """Write set.json, unless another process has written it first."""
        with new_file(self.path / SET_FILE) as stream:
            stream.write(_text(spec, []).encode())

    def _read(self) -> tuple[SetSpec, dict[int, str]] | None:
        """Read the settings, and the hashes of the shards that set.json lists."""
        path = self.path / SET_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise VarDeployError(f"{path} cannot be read ({error}); {LOST}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise VarDeployError(
                f"{path} has schema version {version}, this var-deploy reads up to "
                f"{SCHEMA_VERSION}; upgrade var-deploy"
            )
        try:
            listed = {entry["shard"]: entry["sha256"] for entry in data["shards"]}
            return SetSpec.from_json(data["settings"]), listed
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VarDeployError(f"{path} is damaged ({error!r}); {LOST}") from None

    def _entries(self, spec: SetSpec) -> list[dict[str, Any]]:
        return [
            {
                "shard": shard,
                "file": spec.shard_file(shard),
                "images": len(spec.numbers(shard)),
                "sha256": digest,
            }
            for shard in range(spec.shards)
            if (digest := self._hash(spec, shard))
        ]

    def _hash(self, spec: SetSpec, shard: int) -> str:
        """Return the hash that was written with a shard; "" where the shard or its hash is
        missing."""
        path = self.path / spec.shard_file(shard)
        return _hash_of(path) if path.is_file() else ""


@contextlib.contextmanager
def keeping_shards() -> Iterator[None]:
    """Add to errors of a full disk that finished shards are kept."""
    try:
        yield
    except UsageError:
        raise
    except VarDeployError as error:
        raise VarDeployError(
            f"{error}; whole shards are kept: make room and run the same command again"
        ) from error


def damage(path: Path) -> str:
    """Return the message about a damaged shard."""
    return (
        f"{path} does not match its hash: it is damaged or was changed; remove it and run the "
        "command that made the set again, which makes this shard alone"
    )


def _text(spec: SetSpec, shards: Sequence[dict[str, Any]]) -> str:
    data = {
        "schema_version": SCHEMA_VERSION if spec.prompts else 1,
        "software": f"var-deploy {__version__}",
        "images": spec.images,
        "complete": len(shards) == spec.shards,
        "settings": spec.to_json(),
        "shards": shards,
    }
    return json.dumps(data, indent=1) + "\n"


def _hash_file(shard: Path) -> Path:
    """Return the path of a shard's hash, in the form of `sha256sum --check`.

    The name is hidden from programs that take all files of a folder for data.
    """
    return shard.with_name(f".{shard.name}.sha256")


def _old_hash_file(shard: Path) -> Path:
    """Return the path of the hash in sets of older versions."""
    return shard.with_name(f"{shard.name}.sha256")


def _hash_of(shard: Path) -> str:
    """Return the hash in a hash file; "" where there is none."""
    for path in (_hash_file(shard), _old_hash_file(shard)):
        try:
            words = path.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError):
            continue
        if words and len(words[0]) == 64:
            return words[0]
    return ""

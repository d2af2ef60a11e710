"""Describes checkpoint files without loading their weights: names, hashes, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_deploy.export.checkpoint.assemble import assemble
from var_deploy.export.checkpoint.files import Part, WeightSource, open_checkpoint, parts_of
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.checkpoint.recognise import recognise
from var_deploy.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """A transformer or a tokenizer that was found in a file.

    Attributes:
        file, sha256, size: name, hash and bytes of the file.
        key: where it lies in it, "" for the top level.
        tensors, parameters: how many, and of how many values, buffers included.
    """

    part: Part
    file: str
    sha256: str
    size: int
    key: str
    tensors: int
    parameters: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self)}


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """The model parts that one or two files hold; `spec` is None unless both parts are there."""

    parts: tuple[PartFacts, ...]
    spec: ModelSpec | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        parts = {facts.part: facts.to_json() for facts in self.parts}
        return {"parts": parts, "model": self.spec.to_json() if self.spec else None}


def describe_checkpoints(
    file: Path | None = None,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    hints: Hints = NO_HINTS,
) -> CheckpointFacts:
    """Find the transformer and the tokenizer in files, and the sizes of the model where both are.

    Args:
        file: may hold either or both parts; `checkpoint` and `tokenizer` say which a file holds.

    Raises CheckpointError and UsageError as `load_model` does.
    """
    paths: dict[Part, Path] = {}
    if file is not None:
        paths = dict.fromkeys(parts_of(file), file)
    given: dict[Part, Path | None] = {"transformer": checkpoint, "tokenizer": tokenizer}
    paths |= {part: path for part, path in given.items() if path is not None}
    keys = {"transformer": hints.key, "tokenizer": hints.tokenizer_key}
    sources = {part: open_checkpoint(path, part, keys[part]) for part, path in paths.items()}
    spec = None
    if len(sources) == 2:
        both = sources["tokenizer"], sources["transformer"]
        spec = recognise(*both, hints)
        assemble(spec, *both)  # every key and shape is looked at
    return CheckpointFacts(
        parts=tuple(_facts(part, paths[part], source) for part, source in sources.items()),
        spec=spec,
    )


def _facts(part: Part, path: Path, source: WeightSource) -> PartFacts:
    keys = source.keys()
    return PartFacts(
        part=part,
        file=source.description["file"],
        sha256=source.description["sha256"],
        size=path.stat().st_size,
        key=source.description.get("key", ""),
        tensors=len(keys),
        parameters=sum(math.prod(source.shape(key)) for key in keys),
    )

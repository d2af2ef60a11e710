"""Describes checkpoint files without loading their weights: names, hashes, sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from var_deploy.errors import UsageError
from var_deploy.export.checkpoint.assemble import assemble
from var_deploy.export.checkpoint.files import (
    INFINITY_STATE,
    Part,
    WeightSource,
    form_of,
    open_checkpoint,
    parts_of,
)
from var_deploy.export.checkpoint.hints import NO_HINTS, Hints
from var_deploy.export.checkpoint.model_folder import CONFIG, FolderWeights, read_folder_json
from var_deploy.export.checkpoint.presets import TEXT_ENCODERS, TEXT_PRESETS
from var_deploy.export.checkpoint.recognise import recognise
from var_deploy.export.checkpoint.recognise_text import (
    recognise_text,
    tokenizer_sizes,
    transformer_sizes,
)
from var_deploy.export.checkpoint.shard_index import stored_size
from var_deploy.export.checkpoint.text_encoder import DECODER, encoder_weights, read_config
from var_deploy.export.checkpoint.text_model import assemble_text
from var_deploy.scale_lists import scale_list
from var_deploy.spec import ModelSpec

LARGEST = scale_list("1M")  # a list to recognise a text-to-image model by: files tell none


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """A transformer or a tokenizer that was found in a file.

    Attributes:
        file, sha256, size: name, hash and bytes of the file.
        key: where it lies in it, "" for the top level.
        tensors, parameters: how many, and of how many values, buffers included.
    """

    part: Part | Literal["text encoder"]
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
    """The model parts that one or two files hold, or the text encoder of a folder.

    Attributes:
        spec: of a model of codes; None unless both parts are there.
        sizes: of text-to-image parts and of a text encoder: part → name → size.
        presets: presets that have these sizes.
    """

    parts: tuple[PartFacts, ...]
    spec: ModelSpec | None = None
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    presets: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        parts = {facts.part: facts.to_json() for facts in self.parts}
        told = {"sizes": self.sizes, "presets": list(self.presets)} if self.sizes else {}
        return {"parts": parts, "model": self.spec.to_json() if self.spec else None, **told}


def describe_checkpoints(
    file: Path | None = None,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    hints: Hints = NO_HINTS,
) -> CheckpointFacts:
    """Find the transformer and the tokenizer in files, and the sizes of the model where both are;
    or a text encoder in its folder.

    Args:
        file: may hold either or both parts, and be a folder of shards or of a text encoder;
            `checkpoint` and `tokenizer` say which part a file holds.

    Raises CheckpointError and UsageError as `load_model` does.
    """
    if file is not None and _is_text_encoder(file):
        if checkpoint is not None or tokenizer is not None:
            raise UsageError(f"{file} is a text encoder: look at it without other files")
        return _describe_text_encoder(file)
    paths: dict[Part, Path] = {}
    first = next(path for path in (file, checkpoint, tokenizer) if path is not None)
    form = form_of(first if checkpoint is None else checkpoint)
    if file is not None:
        paths = dict.fromkeys(parts_of(file, form), file)
    given: dict[Part, Path | None] = {"transformer": checkpoint, "tokenizer": tokenizer}
    paths |= {part: path for part, path in given.items() if path is not None}
    keys = {"transformer": hints.key, "tokenizer": hints.tokenizer_key}
    sources = {
        part: open_checkpoint(path, part, keys[part], form=form) for part, path in paths.items()
    }
    parts = tuple(_facts(part, paths[part], source) for part, source in sources.items())
    if form is INFINITY_STATE:
        return _describe_text_model(sources, parts)
    spec = None
    if len(sources) == 2:
        both = sources["tokenizer"], sources["transformer"]
        spec = recognise(*both, hints)
        assemble(spec, *both)  # every key and shape is looked at
    return CheckpointFacts(parts=parts, spec=spec)


def _describe_text_model(
    sources: Mapping[Part, WeightSource], parts: tuple[PartFacts, ...]
) -> CheckpointFacts:
    """Describe the parts of a text-to-image model; where both are there, every key is checked."""
    tell = {"transformer": transformer_sizes, "tokenizer": tokenizer_sizes}
    sizes: dict[str, dict[str, Any]] = {}
    for part, source in sources.items():
        sizes[part] = tell[part](source)
    if len(sources) == 2:
        both = sources["tokenizer"], sources["transformer"]
        assemble_text(recognise_text(*both, LARGEST, 1), *both, scales=LARGEST)
    presets = []
    for name, preset in TEXT_PRESETS.items():
        t, tok = preset.spec.transformer, preset.spec.tokenizer
        known: dict[str, dict[str, Any]] = {
            "transformer": {**dataclasses.asdict(t), "token_bits": tok.token_bits},
            "tokenizer": dataclasses.asdict(tok),
        }
        # a file may know longer or shorter texts than the released one
        free = ("unconditional_length",)
        if all(
            known[part][size] == value
            for part, found in sizes.items()
            for size, value in found.items()
            if size not in free
        ):
            presets.append(name)
    return CheckpointFacts(parts=parts, sizes=sizes, presets=tuple(presets))


def _is_text_encoder(path: Path) -> bool:
    """Whether a path is the folder of a T5, by its config.json."""
    if not (path / CONFIG).is_file():
        return False
    return "d_model" in read_folder_json(path, CONFIG).members()


def _describe_text_encoder(folder: Path) -> CheckpointFacts:
    spec = read_config(folder, 1)
    weights = encoder_weights(FolderWeights(folder, DECODER), spec)
    files: Mapping[str, str] = weights.description["files"]
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    one = next(iter(files.values())) if len(files) == 1 else None
    keys = weights.keys()
    facts = PartFacts(
        part="text encoder",
        file=folder.name,
        sha256=one or hashlib.sha256(lines.encode()).hexdigest(),
        size=sum((folder / name).stat().st_size for name in files),
        key="",
        tensors=len(keys),
        parameters=sum(math.prod(weights.shape(key)) for key in keys),
    )
    sizes = dataclasses.asdict(spec)
    del sizes["length"]  # is chosen at export
    known = (
        name
        for name, found in TEXT_ENCODERS.items()
        if dataclasses.replace(found, length=spec.length) == spec
    )
    return CheckpointFacts(parts=(facts,), sizes={"text encoder": sizes}, presets=tuple(known))


def _facts(part: Part, path: Path, source: WeightSource) -> PartFacts:
    keys = source.keys()
    return PartFacts(
        part=part,
        file=source.description["file"],
        sha256=source.description["sha256"],
        size=stored_size(path),
        key=source.description.get("key", ""),
        tensors=len(keys),
        parameters=sum(math.prod(source.shape(key)) for key in keys),
    )

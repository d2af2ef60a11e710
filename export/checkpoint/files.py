"""Reads checkpoint files (`.pth` and `.safetensors`) as named tensors, one at a time.

A file is never trusted: pickles are read as data, sizes are bounded before anything is made of
them, and every way in which a file can be wrong ends in one CheckpointError line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.formats import Contents, check_names, shown
from var_deploy.export.checkpoint.infinity_keys import tokenizer_names, transformer_names
from var_deploy.export.checkpoint.mapped_file import StoredTensor
from var_deploy.export.checkpoint.pickled_names import MAX_DIMENSIONS
from var_deploy.export.checkpoint.shard_index import stored_sha256
from var_deploy.export.checkpoint.shards import open_stored
from var_deploy.export.families import EXPORT_FAMILIES

Part = Literal["transformer", "tokenizer"]
OTHER: Mapping[Part, Part] = {"transformer": "tokenizer", "tokenizer": "transformer"}

Names = Callable[[Collection[str]], Mapping[str, str]]


def _unchanged(keys: Collection[str]) -> Mapping[str, str]:
    return {key: key for key in keys}


@dataclass(frozen=True, kw_only=True)
class StateForm:
    """How the state dicts of one kind of model are told, and named.

    Attributes:
        title: the kind, for messages.
        marks: keys that only this part has. Two of them make a mapping this part, so that a
            checkpoint which lacks one is still recognised, and the one is reported as missing.
        names: maps a part's stored names to ours; names that are left out are not used.
        usual_key: where the part is taken from where a file holds it several times.
    """

    title: str
    marks: Mapping[Part, tuple[str, ...]]
    names: Mapping[Part, Names]
    usual_key: Mapping[Part, str]


VAR_STATE = StateForm(
    title="VAR",
    marks={
        "transformer": tuple(mark for family in EXPORT_FAMILIES.values() for mark in family.marks),
        "tokenizer": (
            "post_quant_conv.weight",
            "quant_conv.weight",
            "quantize.embedding.weight",
            "quantize.embedding.0.weight",
            "encoder.conv_in.weight",
            "decoder.conv_out.weight",
        ),
    },
    names={"transformer": _unchanged, "tokenizer": _unchanged},
    usual_key={},
)
# of which a tokenizer of codes has at least one
CODES = frozenset(VAR_STATE.marks["tokenizer"][:4])
INFINITY_STATE = StateForm(
    title="Infinity",
    marks={
        "transformer": (
            *("cfg_uncond", "text_norm.weight", "text_proj_for_sos.ca.mat_q"),
            *("text_proj_for_ca.0.weight", "text_proj_for_ca.2.weight"),
        ),
        "tokenizer": (
            *("encoder.conv_in.conv.weight", "decoder.conv_out.conv.weight"),
            *("encoder.conv_in.weight", "decoder.conv_out.weight"),
        ),
    },
    names={"transformer": transformer_names, "tokenizer": tokenizer_names},
    # what the published loader reads, beside what the training needs to go on
    usual_key={"tokenizer": "vae"},
)
# prefixes that torch.compile and the parallel wrappers put before the names of wrapped modules
WRAPPERS = re.compile(r"(?<=\.)(?:_orig_mod|module|_fsdp_wrapped_module)\.")
KEY_OPTION: Mapping[Part, str] = {"transformer": "--key", "tokenizer": "--tokenizer-key"}
TOP = "."  # name of a file's top level in --key

# Buffers that follow from the sizes. Checkpoints may hold none of them, or (the statistic
# ema_vocab_hit_SV) that of another number of scales: they are computed and never read.
DERIVED_BUFFERS = frozenset(
    {"lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV", "heads_1H"}
)
LEVELS = "lvl_1L"  # but for this one, which tells the side lengths of the scales
# every one of their values is a value of fp32, but for float64, which is rounded
FLOATS = frozenset(
    ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz",
     "float8_e5m2", "float8_e5m2fnuz"]
)  # fmt: skip
INTEGERS = frozenset(["int64", "int32", "int16", "int8", "uint8"])

MAX_NESTING = 8
MAX_NAME = 200  # characters, as it is shown
MAX_CANDIDATES = 16
MAX_LISTED = 600  # characters of a list in a message
MAX_EXCESS = 16 << 20  # bytes beyond those of the file, of tensors that repeat their values


class WeightSource(Protocol):
    """Named tensors that are read one at a time, so that a model never lies twice in memory."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Say where the weights come from, for the manifest: names and hashes, never paths."""
        ...

    def keys(self) -> Collection[str]:
        """Return the state-dict keys."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises KeyError for a key that the source lacks."""
        ...

    def read(self, key: str) -> NDArray[Any]:
        """Read a tensor: fp32 for any stored floating type, int64 for integers.

        The array may be a view of the mapped file; writing to it never reaches the file. Raises
        KeyError for a key that the source lacks.
        """
        ...


class StoredWeights:
    """Tensors of checkpoint files by key, each read when it is asked for, in fp32 or int64."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def read(self, key: str) -> NDArray[Any]:
        tensor = self._tensors[key].read().detach()
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
        array: NDArray[Any] = tensor.contiguous().numpy()
        return array


class _CheckpointFile(StoredWeights):
    """The transformer or the tokenizer of one file, under the keys of the released state dicts."""

    def __init__(self, path: Path, location: str, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__(tensors)
        self._path, self._location = path, location

    @cached_property
    def description(self) -> Mapping[str, Any]:
        nested = {"key": self._location} if self._location else {}
        return {"file": self._path.name, **nested, "sha256": stored_sha256(self._path)}

    def __str__(self) -> str:
        return str(self._path)


def open_checkpoint(
    path: Path,
    part: Part,
    key: str | None = None,
    default_key: str | None = None,
    form: StateForm = VAR_STATE,
) -> WeightSource:
    """Open a released or a training checkpoint and find the weights of `part` in it.

    Weights may lie under any keys (`{"trainer": {"var_wo_ddp": …}}`) and any prefix (`module.`).
    The file, or the folder of shards with their index, is mapped, not read.

    Args:
        key: where they lie, "." for the top level; the beginning of a place is enough where it is
            the only one that begins so.
        default_key: which one to take where the file holds several and `key` is not given.
        form: of which kind of model.

    Raises CheckpointError for a file that is missing, damaged, wants to run code on loading, is no
    checkpoint, holds `part` not at all, more than once, or not at `key`, or holds it in tensors
    that are not dense and real.
    """
    contents = open_stored(path)
    entries = _Entries(path, contents, form)
    found = dict(entries.find(part))
    if not found:
        if dict(entries.find(OTHER[part])):
            raise CheckpointError(
                f"{path} holds a {OTHER[part]}, expected a {part}: "
                "were --checkpoint and --tokenizer swapped?"
            )
        marks = " and ".join(form.marks[part][:2])
        raise CheckpointError(f"{path} holds no {form.title} {part}: no keys like {marks} in it")
    usual = default_key or form.usual_key.get(part)
    location = _choose(path, part, sorted(found), key, usual)
    said = _renamed(path, found[location], form.names[part])
    tensors = {ours: contents.tensor(stored, leaf) for ours, (stored, leaf) in said.items()}
    check_tensors(path, tensors)
    return _CheckpointFile(path, location, tensors)


def _renamed(path: Path, tensors: Mapping[str, Any], names: Names) -> Mapping[str, tuple[str, Any]]:
    """Return (stored name, tensor) by our names. Raises CheckpointError where two become one."""
    try:
        found = names(tensors.keys())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    renamed: dict[str, tuple[str, Any]] = {}
    for stored, ours in found.items():
        if ours in renamed:
            raise CheckpointError(
                f"{path} holds {ours} twice, as {renamed[ours][0]} and as {stored}"
            )
        renamed[ours] = (stored, tensors[stored])
    return renamed


def parts_of(path: Path, form: StateForm = VAR_STATE) -> list[Part]:
    """Return which parts (transformer, tokenizer) a file holds, the transformer first.

    Raises CheckpointError for a file that is missing, damaged, no checkpoint, or holds neither.
    """
    found = _parts(path, open_stored(path), form)
    if not found:
        marks = " or ".join(form.marks[part][0] for part in OTHER)
        raise CheckpointError(
            f"{path} holds neither a {form.title} transformer nor a tokenizer: no keys like "
            f"{marks} in it"
        )
    return found


def holds_text_model(path: Path) -> bool:
    """Return whether a file, or a folder of shards, holds the transformer of a text-to-image model.

    Raises CheckpointError for a file that is missing, damaged or no checkpoint.
    """
    return "transformer" in _parts(path, open_stored(path), INFINITY_STATE)


def form_of(path: Path) -> StateForm:
    """Return the form of what a file, or a folder of shards, holds: a tokenizer under the older
    names of Infinity's has no codebook, by which a VAR's is known.

    Raises CheckpointError for a file that is missing, damaged or no checkpoint.
    """
    contents = open_stored(path)
    if "transformer" in _parts(path, contents, INFINITY_STATE):
        return INFINITY_STATE
    codes = _Entries(path, contents, VAR_STATE)
    if "transformer" in _parts(path, contents, VAR_STATE):
        return VAR_STATE
    if any(CODES & tensors.keys() for _, tensors in codes.find("tokenizer")):
        return VAR_STATE
    return INFINITY_STATE if _parts(path, contents, INFINITY_STATE) else VAR_STATE


def _parts(path: Path, contents: Contents, form: StateForm) -> list[Part]:
    entries = _Entries(path, contents, form)
    return [part for part in OTHER if next(entries.find(part), None) is not None]


def _choose(
    path: Path, part: Part, places: list[str], key: str | None, default_key: str | None
) -> str:
    """Choose one of the places in the file at which the part was found."""
    listed = shown(", ".join(place or TOP for place in places), MAX_LISTED)
    if key is not None:
        wanted = "" if key == TOP else key
        matching = [place for place in places if place == wanted] or [
            place for place in places if wanted and place.startswith(wanted + ".")
        ]
        if len(matching) == 1:
            return matching[0]
        holds = f"{len(matching)} {part}s" if matching else f"no {part}"
        raise CheckpointError(
            f"{path} holds {holds} under {KEY_OPTION[part]} {shown(key, MAX_NAME)}, "
            f"expected one of {listed}"
        )
    if len(places) == 1:
        return places[0]
    default = "" if default_key == TOP else default_key
    if default in places:
        assert default is not None
        return default
    raise CheckpointError(
        f"{path} holds {len(places)} {part}s ({listed}); choose one with {KEY_OPTION[part]} NAME"
    )


def check_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors that cannot become fp32, and those that would not fit into memory then."""
    excess = 0
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if last in DERIVED_BUFFERS and last != LEVELS:
            continue
        accepted, expected = (
            (INTEGERS, "int64") if last == LEVELS else (FLOATS, "a float type such as float32")
        )
        if tensor.kind:
            raise CheckpointError(f"{path}: {name} is a {tensor.kind} tensor, expected a dense one")
        if len(tensor.shape) > MAX_DIMENSIONS:
            raise CheckpointError(
                f"{path}: {name} has {len(tensor.shape)} dimensions, expected at most "
                f"{MAX_DIMENSIONS}"
            )
        if tensor.dtype not in accepted:
            raise CheckpointError(
                f"{path}: {name} is {shown(tensor.dtype, MAX_NAME)}, expected {expected}"
            )
        excess += tensor.excess
        if excess > MAX_EXCESS:
            raise CheckpointError(
                f"{path}: {name} {list(tensor.shape)} repeats the values of {tensor.stored} bytes, "
                f"expected all of its values in the file; save it with .contiguous()"
            )


class _Entries:
    """The entries of a file's nested dicts, at most MAX_NAMES of them.

    The bound also ends the walk through a dict that holds itself, or the same dict many times.
    """

    def __init__(self, path: Path, contents: Contents, form: StateForm = VAR_STATE) -> None:
        self._path, self._contents, self._marks = path, contents, form.marks
        self._seen = 0

    def find(self, part: Part) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (where, tensors) of every dict, at any depth, that holds the part."""
        self._seen = 0
        for count, candidate in enumerate(self._find(self._contents.tree, part, "", ()), 1):
            if count > MAX_CANDIDATES:
                raise CheckpointError(
                    f"{self._path} holds more than {MAX_CANDIDATES} {part}s; save the one to use "
                    "to its own file"
                )
            yield candidate

    def _find(
        self, node: object, part: Part, path: str, parents: tuple[int, ...]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not isinstance(node, dict) or len(parents) > MAX_NESTING or id(node) in parents:
            return
        self._seen += len(node)
        check_names(self._path, self._seen)
        is_tensor = self._contents.is_tensor
        tensors = {self._name(key): value for key, value in node.items() if is_tensor(value)}
        prefixes = _prefixes(tensors, self._marks[part])
        foreign = [p for p in (*prefixes, *_prefixes(tensors, self._marks[OTHER[part]])) if p]
        for prefix in prefixes:
            others = tuple(p for p in foreign if p != prefix and p.startswith(prefix))
            yield (
                (path + prefix).rstrip("."),
                self._without_wrappers(
                    {
                        key[len(prefix) :]: stored
                        for key, stored in tensors.items()
                        if key.startswith(prefix) and not key.startswith(others)
                    }
                ),
            )
        for key, value in node.items():
            if isinstance(value, dict):
                below = f"{path}{self._name(key)}."
                yield from self._find(value, part, below, (*parents, id(node)))

    def _name(self, key: str) -> str:
        """Return a name of the file with its control characters escaped, so that it can be
        printed."""
        name = shown(key, MAX_NAME + 1)
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{self._path} has a name of {len(key)} characters ({shown(name, 40)}), expected "
                f"at most {MAX_NAME}"
            )
        return name

    def _without_wrappers(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        plain: dict[str, Any] = {}
        for key, stored in tensors.items():
            name = WRAPPERS.sub("", "." + key)[1:]
            if name in plain:
                raise CheckpointError(f"{self._path} holds {name} twice, once as {key}")
            plain[name] = stored
        return plain


def _prefixes(keys: Collection[str], marks: tuple[str, ...]) -> list[str]:
    """Return the prefixes under which at least two marks of a part appear."""
    hits: Counter[str] = Counter()
    for mark in marks:
        dotted = "." + mark
        hits.update(
            key[: len(key) - len(mark)] for key in keys if key.endswith(dotted) or key == mark
        )
    prefixes = sorted(prefix for prefix, count in hits.items() if count > 1)
    return prefixes[: MAX_CANDIDATES + 1]  # more are refused

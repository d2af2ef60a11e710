"""Validates manifest.json: types, bounds, and agreement between values.

Sizes decide the inputs and outputs of every graph, and these decide the buffers of a generation. So
sizes are bounded first; then the listed tensors are compared with those that follow from the sizes,
so that later binding cannot fail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from var_deploy import names
from var_deploy.bundle.interfaces import Interfaces, Tensor, interfaces_of
from var_deploy.bundle.json_values import DamagedError, Value, shown
from var_deploy.manifest import (
    FileInfo,
    GraphInfo,
    LeavesError,
    Manifest,
    TensorInfo,
    TextEncoderRef,
)
from var_deploy.sampling import BitSampling, Sampling
from var_deploy.spec import (
    BitTokenizerSpec,
    Grid,
    ModelSpec,
    TextModelSpec,
    TextTransformerSpec,
    TokenizerSpec,
    TransformerSpec,
)

PRECISIONS = ("fp32", "fp16", "int8")
# Far above every released model, and small enough that nothing below takes long or overflows.
MAX_SCALES, MAX_SIDE, MAX_LEVELS = 64, 512, 10
MAX_BATCH, MAX_CLASSES, MAX_FILES = 4096, 1_000_000, 10_000
MAX_FILE_BYTES = MAX_BUFFER_BYTES = 1 << 40  # 1 TiB
TOKENIZER_SIZES = {
    "vocab_size": (1, 1 << 20),
    "code_width": (1, 1 << 14),
    "base_width": (1, 1 << 14),
    "res_blocks": (1, 64),
    "shared_phi": (0, MAX_SCALES),
    "image_channels": (1, 64),
}
TRANSFORMER_SIZES = {
    "depth": (1, 512),
    "width": (1, 1 << 16),
    "heads": (1, 1 << 12),
    "classes": (0, MAX_CLASSES),
    "ffn_width": (1, 1 << 18),
}
BIT_TOKENIZER_SIZES = {
    "bits": (1, 64),
    "patch": (1, 2),
    **{name: TOKENIZER_SIZES[name] for name in ("base_width", "res_blocks", "image_channels")},
}
TEXT_TRANSFORMER_SIZES = {
    **{name: TRANSFORMER_SIZES[name] for name in ("depth", "width", "heads", "ffn_width")},
    "text_width": (1, 1 << 16),
    "text_length": (1, 1 << 12),
    "pool_heads": (1, 1 << 12),
    "levels": (1, MAX_SCALES),
    "unconditional_length": (1, 1 << 12),
}
SHA256 = "[0-9a-f]{64}"
# a part of a path: no separator or drive of any system, nothing that a terminal would act on
_PART = re.compile(r"[^\\/:\x00-\x1f\x7f]{1,255}")
NAME_LENGTH = 1000


def parse_manifest(data: Value) -> Manifest:
    """Parse the manifest in `data`, whose schema version is known to be supported.

    Raises DamagedError or UsageError for what the format does not allow, and LeavesError for a
    path that leads out of the bundle.
    """
    model = _model(data.member("model"))
    batch = data.member("batch").whole(1, MAX_BATCH)
    guidance = data.member("guidance").flag()
    members = data.members()
    more_smooth = "more_smooth" in members and members["more_smooth"].flag()
    if guidance and not model.transformer.guidable:
        raise DamagedError("guidance is true, expected false of a model without classes")
    batches = _batches(members["batches"], batch) if "batches" in members else {}
    files = files_of(data.member("files"))
    graphs = {}
    for precision, listed in data.member("graphs").members().items():
        if precision not in PRECISIONS:
            raise DamagedError(
                f"graphs.{shown(precision)} is unknown, expected {', '.join(PRECISIONS)}"
            )
        interfaces = interfaces_of(
            model,
            precision=precision,
            batch=batches.get(precision, batch),
            guidance=guidance,
            more_smooth=more_smooth,
        )
        if interfaces.buffer_bytes() > MAX_BUFFER_BYTES:
            raise DamagedError(
                f"the sizes of the model and batch {batch} ask for {interfaces.buffer_bytes():.3g} "
                f"bytes of buffers, at most {MAX_BUFFER_BYTES} are expected"
            )
        graphs[precision] = _graphs(listed, interfaces, files)
    if not graphs:
        raise DamagedError("graphs is empty, expected those of one precision or more")
    settings = BitSampling if isinstance(model, TextModelSpec) else Sampling
    defaults = settings(**_settings(data.member("defaults")))
    defaults.check(model.scales)
    labels = tuple(label.text() for label in data.member("labels").items(MAX_CLASSES))
    if len(labels) not in (0, model.transformer.classes):
        classes = model.transformer.classes
        raise DamagedError(f"labels has {len(labels)} names, expected none or {classes}")
    return Manifest(
        model=model,
        preset=data.member("preset").text(),
        batch=batch,
        guidance=guidance,
        graphs=graphs,
        files=files,
        checkpoint=_checkpoint(data.member("checkpoint")),
        tools={name: tool.text() for name, tool in data.member("tools").members(100).items()},
        defaults=defaults,
        labels=labels,
        parity=_parity(data.member("parity")),
        text_encoder=_text_encoder(members["text_encoder"]) if "text_encoder" in members else None,
        more_smooth=more_smooth,
        batches=batches,
        schema_version=data.member("schema_version").raw,
    )


def _batches(data: Value, batch: int) -> dict[str, int]:
    return {name: n.whole(1, batch) for name, n in data.only(*PRECISIONS).members().items()}


def _model(data: Value) -> ModelSpec | TextModelSpec:
    """Parse the sizes. Raises UsageError as well, as the spec classes do."""
    family = data.only("tokenizer", "transformer").member("transformer").member("family")
    if family.one_of("var", "gpt2", "infinity") == "infinity":
        return _text_model(data)
    return _code_model(data)


def _text_model(data: Value) -> TextModelSpec:
    given, other = data.member("tokenizer"), data.member("transformer")
    tokenizer: dict[str, Any] = _sizes(given, BIT_TOKENIZER_SIZES)
    grids = tuple(_grid(grid) for grid in given.member("grids").items(MAX_SCALES))
    multipliers = _multipliers(given)
    given.only(*BIT_TOKENIZER_SIZES, "grids", "width_multipliers")
    transformer: dict[str, Any] = _sizes(other, TEXT_TRANSFORMER_SIZES)
    rope_grid = _grid(other.member("rope_grid"))
    eps = other.member("norm_eps").number(0, 1)
    other.only(*TEXT_TRANSFORMER_SIZES, "family", "rope_grid", "norm_eps")
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(**tokenizer, grids=grids, width_multipliers=multipliers),
        transformer=TextTransformerSpec(**transformer, rope_grid=rope_grid, norm_eps=eps),
    )


def _sizes(given: Value, bounds: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    return {name: given.member(name).whole(low, high) for name, (low, high) in bounds.items()}


def _grid(given: Value) -> Grid:
    sizes = [size.whole(1, MAX_SIDE) for size in given.items(2)]
    if len(sizes) != 2:
        raise given.refuse("rows and columns")
    return (sizes[0], sizes[1])


def _multipliers(given: Value) -> tuple[int, ...]:
    levels = [n.whole(1, 64) for n in given.member("width_multipliers").items(MAX_LEVELS)]
    if not levels:
        raise DamagedError("model.tokenizer.width_multipliers is empty")
    return tuple(levels)


def _text_encoder(given: Value) -> TextEncoderRef:
    folder = given.only("digest", "folder").member("folder").text()
    if not _PART.fullmatch(folder) or folder in (".", ".."):
        raise LeavesError(f"names the text encoder {shown(folder)}, expected a plain folder name")
    return TextEncoderRef(
        digest=given.member("digest").text(SHA256, "64 hexadecimal digits"), folder=folder
    )


def _code_model(data: Value) -> ModelSpec:
    given = data.member("tokenizer")
    tokenizer: dict[str, Any] = _sizes(given, TOKENIZER_SIZES)
    sides = [n.whole(1, MAX_SIDE) for n in given.member("patch_nums").items(MAX_SCALES)]
    multipliers = _multipliers(given)
    flags = {"codebook_per_scale": given.member("codebook_per_scale").flag()}
    ratio = given.member("phi_ratio").number(-1e3, 1e3)
    given.only(*TOKENIZER_SIZES, *flags, "patch_nums", "width_multipliers", "phi_ratio")
    other = data.member("transformer")
    transformer: dict[str, Any] = _sizes(other, TRANSFORMER_SIZES)
    kinds = {name: other.member(name).flag() for name in ("shared_adaln", "qk_l2_norm")}
    family = other.member("family").one_of("var", "gpt2")
    eps = other.member("norm_eps").number(0, 1)
    other.only(*TRANSFORMER_SIZES, *kinds, "family", "norm_eps")
    return ModelSpec(
        tokenizer=TokenizerSpec(
            **tokenizer,
            **flags,
            patch_nums=tuple(sides),
            width_multipliers=multipliers,
            phi_ratio=ratio,
        ),
        transformer=TransformerSpec(
            **transformer,
            **kinds,
            family="gpt2" if family == "gpt2" else "var",
            norm_eps=eps,
        ),
    )


def _checkpoint(data: Value) -> Mapping[str, Any]:
    """Parse the origin of the weights, which only people read, except for the seed of random
    ones."""
    for part in ("tokenizer", "transformer"):
        members = data.member(part).members()
        if "random_weights" in members and members["random_weights"].raw is not None:
            members["random_weights"].whole(0, 2**64 - 1)
    return data.plain()


def _parity(data: Value) -> Mapping[str, Any] | None:
    """Parse the report of `verify`, as far as it is used again."""
    if data.raw is None:
        return None
    report = data.members()
    data.member("passed").flag()
    if "failure" in report and report["failure"].raw is not None:
        report["failure"].words()
    for line in report["verdict"].items() if "verdict" in report else ():
        line.words()
    for check in report["checks"].items() if "checks" in report else ():
        check.member("passed").flag()
        for name in ("precision", "graph", "tensor", "tokens"):
            check.member(name).words()
        for name in ("relative", "bound"):
            if check.member(name).raw is not None:
                check.member(name).number(-1e300, 1e300)
    return data.plain()


def _settings(data: Value) -> dict[str, Any]:
    """Parse sampling settings; `Sampling` checks their values."""
    data.only("cfg", "top_k", "top_p", "temperature")
    return {name: value.raw for name, value in data.members().items()}


def _graphs(
    data: Value, interfaces: Interfaces, files: Mapping[str, FileInfo]
) -> dict[str, GraphInfo]:
    precision, known = interfaces.precision, set(interfaces.graphs())
    weights = f"{precision}/{names.WEIGHTS}"
    graphs = {}
    for name, given in data.members().items():
        if name not in known:
            raise DamagedError(f"{given.place} is not a graph of this model")
        given.only("file", "inputs", "outputs", "weight_bytes")
        file, expected = given.member("file"), f"{precision}/{names.graph_file(name)}"
        if _normal(file.text()) != expected:
            raise file.refuse(expected)
        for needed in (expected, weights):
            if needed not in files:
                raise DamagedError(f"it has no hash of {needed}")
        graphs[name] = GraphInfo(
            file=expected,
            inputs=tensors_of(given.member("inputs"), interfaces.inputs(name)),
            outputs=tensors_of(given.member("outputs"), interfaces.outputs(name)),
            weight_bytes=given.member("weight_bytes").whole(0, files[weights].size),
        )
    return graphs


def files_of(data: Value) -> dict[str, FileInfo]:
    """Parse path → size and hash. Raises LeavesError for a path that leads out of the bundle."""
    return {
        _normal(name): FileInfo(
            size=info.member("size").whole(0, MAX_FILE_BYTES),
            sha256=info.member("sha256").text(SHA256, "64 hexadecimal digits"),
        )
        for name, info in data.members(MAX_FILES).items()
    }


def tensors_of(data: Value, expected: list[Tensor]) -> tuple[TensorInfo, ...]:
    """Parse the listed tensors, in any order, which must be the expected ones."""
    usual = [{"name": name, "dtype": kind, "shape": list(shape)} for name, kind, shape in expected]
    if data.raw == usual:  # as the exporter writes it: nothing to tell
        return tuple(TensorInfo(name=n, dtype=kind, shape=shape) for n, kind, shape in expected)
    wanted, found = {tensor[0]: tensor for tensor in expected}, list[TensorInfo]()
    for given in data.items(len(expected)):
        given.only("name", "dtype", "shape")
        name = given.member("name").text()
        if name not in wanted:
            raise given.member("name").refuse(
                f"one of {', '.join(wanted)}" if len(wanted) < 8 else "a tensor of this graph"
            )
        _, dtype, shape = wanted.pop(name)
        if given.member("dtype").text() != dtype:
            raise given.member("dtype").refuse(dtype)
        sizes = given.member("shape")
        listed = [size.raw for size in sizes.items(len(shape))]
        if [(type(n), n) for n in listed] != [(type(n), n) for n in shape]:
            raise sizes.refuse(f"{list(shape)}, which follows from the sizes of the model")
        found.append(TensorInfo(name=name, dtype=dtype, shape=shape))
    if wanted:
        raise DamagedError(f"{data.place} lacks {next(iter(wanted))}")
    return tuple(found)


def _normal(name: str) -> str:
    """Check a path in the bundle: plain names with slashes between them."""
    parts = name.split("/")
    good = len(name) <= NAME_LENGTH and all(_PART.fullmatch(part) for part in parts)
    if not good or "." in parts or ".." in parts:
        raise LeavesError(
            f"names {shown(name)}, which leaves the bundle or is not a plain path such as "
            f"fp32/{names.WEIGHTS}"
        )
    return name

"""manifest.json of a text encoder: a bundle of its own that several image bundles can share.

    flan-t5-xl/
      manifest.json     kind, schema, sizes, the graph of each precision, files with their sha256
      tokenizer.json    as it was released
      fp32/  fp16/  int8/    text_encoder.onnx and weights.bin

Like an image bundle it may come from an untrusted source: reading bounds every size, compares the
graph's inputs and outputs with those that follow from the sizes, and accepts plain paths only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef
from var_deploy.bundle.interfaces import BOOL, FLOAT, INT, Tensor
from var_deploy.bundle.json_values import DamagedError, Value, shown
from var_deploy.bundle.manifest_format import PRECISIONS, files_of, tensors_of
from var_deploy.errors import BundleError, UsageError
from var_deploy.files import whole_file
from var_deploy.manifest import (
    LONGEST_COMPLAINT,
    FileInfo,
    GraphInfo,
    LeavesError,
    digest_of,
    graph_of,
    hold_file,
    read_manifest_json,
)
from var_deploy.spec import TextEncoderSpec
from var_deploy.text.prompt_tokenizer import MAX_LENGTH
from var_deploy.text.tokenizer_json import MAX_BYTES

KIND = "text-encoder"
SCHEMA_VERSION = 1
# far above T5-XXL (width 4096, 24 blocks, 64 heads of 64, inner width 10240, 32128 tokens)
SIZES = {
    "width": (1, 1 << 14),
    "depth": (1, 256),
    "heads": (1, 1 << 10),
    "head_width": (1, 1 << 10),
    "ffn_width": (1, 1 << 17),
    "vocab_size": (1, 1 << 20),
    "length": (1, MAX_LENGTH),
    "buckets": (4, 1 << 10),
    "max_distance": (2, 1 << 16),
}
EXPORT_AGAIN = "export the text encoder again"


@dataclass(frozen=True, kw_only=True)
class TextEncoderManifest:
    """The contents of a text encoder's manifest.json.

    Attributes:
        model: sizes of the encoder.
        graphs: precision → graph name → graph; each precision has the one graph `text_encoder`.
        files: path in the bundle → size and hash, for every file but the manifest.
        checkpoint: where the weights came from (names and hashes, no machine paths).
        tools: versions of what wrote it.
    """

    model: TextEncoderSpec
    graphs: Mapping[str, Mapping[str, GraphInfo]]
    files: Mapping[str, FileInfo]
    checkpoint: Mapping[str, Any]
    tools: Mapping[str, str]
    kind: str = KIND
    schema_version: int = SCHEMA_VERSION

    def graph(self, precision: str, name: str) -> GraphInfo:
        """Return the entry of a graph. Raises BundleError where the bundle lacks it."""
        return graph_of(self.graphs, precision, name, "the text encoder")

    def graph_ref(self, precision: str, name: str) -> GraphRef:
        """Return which graph `name` is, for an inference library."""
        return GraphRef(name=name, kind="text_encoder", precision=precision)

    def digest(self) -> str:
        """Return a hash of what the bundle computes: any graph, weight or token changes it."""
        return digest_of(self.files)

    def check_digest(self, folder: Path, expected: str | None) -> None:
        """Raise BundleError where the digest of this manifest, read from `folder`, is not
        `expected`; None takes any."""
        if expected not in (None, self.digest()):
            raise BundleError(
                f"the text encoder at {folder} has the digest {self.digest()[:16]}, expected "
                f"{str(expected)[:16]}: give the one that the image bundle was exported with"
            )

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically. Raises BundleError where the disk refuses."""
        with whole_file(folder / names.MANIFEST, error=BundleError, follow=False) as stream:
            stream.write(self.to_json().encode())


def text_encoder_inputs(spec: TextEncoderSpec) -> list[Tensor]:
    """Return the inputs of the graph `text_encoder`."""
    shape = (1, spec.length)
    return [(names.TEXT_IDS, INT, shape), (names.TEXT_MASK, BOOL, shape)]


def text_encoder_outputs(spec: TextEncoderSpec) -> list[Tensor]:
    """Return the outputs of the graph `text_encoder`."""
    return [(names.TEXT_FEATURES, FLOAT, (1, spec.length, spec.width))]


def read_text_encoder(bundle: Path, *, folder: int | None = None) -> TextEncoderManifest:
    """Read and check the manifest of a text encoder (not the files that it lists).

    Args:
        folder: descriptor of the bundle's folder where it is held open, else None.

    Raises BundleError where the folder is not a text encoder, or the manifest is damaged, from a
    newer schema, out of bounds, or names a path outside the folder.
    """
    path = bundle / names.MANIFEST
    data = read_manifest_json(bundle, folder=folder)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind != KIND:
        if isinstance(data, dict) and "model" in data and kind is None:
            raise BundleError(
                f"{bundle} is an image bundle, expected a text encoder; give the folder that "
                "var-deploy wrote for the text encoder"
            )
        raise BundleError(f"{path} is not the manifest of a text encoder")
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{path} is not the manifest of a text encoder")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {shown(version)}, this var-deploy reads up to "
            f"{SCHEMA_VERSION}; upgrade var-deploy or {EXPORT_AGAIN}"
        )
    try:
        return _parse(Value(data))
    except LeavesError as error:
        raise BundleError(f"{path} {error}") from None
    except (DamagedError, UsageError) as error:
        words = str(error)[:LONGEST_COMPLAINT]
        raise BundleError(f"{path} is damaged ({words}); {EXPORT_AGAIN}") from None


def read_tokenizer_json(folder: Path, manifest: TextEncoderManifest) -> bytes:
    """Return the bytes of tokenizer.json, which are those of the manifest's hash.

    Raises BundleError where the file is missing or another one.
    """
    info = manifest.files[names.TOKENIZER_JSON]
    file = hold_file(folder, manifest, names.TOKENIZER_JSON, hashes=False)
    try:
        data = file.read()
    except OSError as error:
        words = error.strerror or error
        raise BundleError(f"{file.path} cannot be read ({words}); {EXPORT_AGAIN}") from None
    finally:
        file.close()
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise BundleError(
            f"{file.path} does not match its hash in {names.MANIFEST}: it is damaged or was "
            f"changed; {EXPORT_AGAIN}"
        )
    return data


def _parse(data: Value) -> TextEncoderManifest:
    data.only(*(field.name for field in dataclasses.fields(TextEncoderManifest)))
    spec = _spec(data.member("model"))
    files = files_of(data.member("files"))
    tokenizer = files.get(names.TOKENIZER_JSON)
    if tokenizer is None:
        raise DamagedError(f"it has no hash of {names.TOKENIZER_JSON}")
    if tokenizer.size > MAX_BYTES:
        raise DamagedError(
            f"{names.TOKENIZER_JSON} has {tokenizer.size} bytes, at most {MAX_BYTES} are expected"
        )
    graphs = {}
    for precision, listed in data.member("graphs").members().items():
        if precision not in PRECISIONS:
            raise DamagedError(
                f"graphs.{shown(precision)} is unknown, expected {', '.join(PRECISIONS)}"
            )
        listed.only(names.TEXT_ENCODER)
        graphs[precision] = {
            names.TEXT_ENCODER: _graph(listed.member(names.TEXT_ENCODER), spec, precision, files)
        }
    if not graphs:
        raise DamagedError("graphs is empty, expected that of one precision or more")
    return TextEncoderManifest(
        model=spec,
        graphs=graphs,
        files=files,
        checkpoint=data.member("checkpoint").plain(),
        tools={name: tool.text() for name, tool in data.member("tools").members(100).items()},
    )


def _spec(data: Value) -> TextEncoderSpec:
    sizes = {name: data.member(name).whole(low, high) for name, (low, high) in SIZES.items()}
    eps = data.member("norm_eps").number(0, 1)
    data.only(*SIZES, "norm_eps")
    if sizes["max_distance"] <= sizes["buckets"] // 4 or sizes["buckets"] % 4:
        raise DamagedError(
            f"{data.place} has {sizes['buckets']} buckets up to distance {sizes['max_distance']}, "
            "expected a multiple of 4, and a distance above a quarter of them"
        )
    return TextEncoderSpec(**sizes, norm_eps=eps)


def _graph(
    data: Value, spec: TextEncoderSpec, precision: str, files: Mapping[str, FileInfo]
) -> GraphInfo:
    data.only("file", "inputs", "outputs", "weight_bytes")
    expected = f"{precision}/{names.graph_file(names.TEXT_ENCODER)}"
    weights = f"{precision}/{names.WEIGHTS}"
    data.member("file").one_of(expected)
    for needed in (expected, weights):
        if needed not in files:
            raise DamagedError(f"it has no hash of {needed}")
    return GraphInfo(
        file=expected,
        inputs=tensors_of(data.member("inputs"), text_encoder_inputs(spec)),
        outputs=tensors_of(data.member("outputs"), text_encoder_outputs(spec)),
        weight_bytes=data.member("weight_bytes").whole(0, files[weights].size),
    )

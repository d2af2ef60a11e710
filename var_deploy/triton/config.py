"""Writes config.pbtxt of a model in protobuf text format (`model_config.proto` of triton common).

An image is one row of a Triton batch, with its own settings. Settings are FP64, like the floats of
`Pipeline.generate`, so that both give the same images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy import __version__
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest

LABEL, SEED, NUMBER, IMAGE = "LABEL", "SEED", "NUMBER", "IMAGE"
PROMPT, NEGATIVE = "PROMPT", "NEGATIVE"
SETTINGS = {"CFG": "cfg", "TOP_K": "top_k", "TOP_P": "top_p", "TEMPERATURE": "temperature"}
TOP_K = "TOP_K"  # of codes; a bit has two values
NO_CLASS = -1

TYPES = {
    **{LABEL: "INT64", PROMPT: "STRING", NEGATIVE: "STRING", SEED: "UINT64", NUMBER: "INT64"},
    **{"CFG": "FP64", TOP_K: "INT64", "TOP_P": "FP64", "TEMPERATURE": "FP64"},
}
TEXT_ENCODER = "text_encoder"  # the parameter with its digest, and its folder beside the bundle
LONGEST_WAIT = 3_600_000_000  # microseconds; a request's own timeout may be shorter
# digits of the digest that form the version: 52 bits, exact in every JSON reader
VERSION_DIGITS = 13


# fields of `RuntimeConfig` that are passed to the server, which resolves "auto"
HANDED_OVER = ("precision", "layout", "backend", "threads", "cuda_graph")


def handed_over(config: RuntimeConfig) -> dict[str, Any]:
    """The fields of a config that are passed to the server, by name."""
    return {name: getattr(config, name) for name in HANDED_OVER}


def parameters_of(config: RuntimeConfig) -> dict[str, str]:
    """The fields of `handed_over` as strings, without those that are None."""
    told = handed_over(config).items()
    return {name: str(value).lower() for name, value in told if value is not None}


def read_config(parameters: Mapping[str, str]) -> RuntimeConfig:
    """Parse the parameters of `parameters_of`. Raises UsageError for invalid values."""
    given: dict[str, Any] = {name: parameters[name] for name in HANDED_OVER if name in parameters}
    for name, pattern in (("threads", r"[1-9][0-9]{0,5}"), ("cuda_graph", "true|false")):
        if name in given:
            if not re.fullmatch(pattern, given[name]):
                raise UsageError(f"the parameter {name} of the model cannot be {given[name]!r}")
            given[name] = json.loads(given[name])
    return RuntimeConfig(**given)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Settings of a model on a Triton server.

    Attributes:
        name: name of the model and of its folder.
        instances: number of processes, each with its own copy of the weights.
        queue: most requests that may wait, None for any number. Server 2.51 takes only one batch
            per half second from a bounded queue, unless new requests arrive.
        queue_delay: microseconds that a request waits for a batch to fill.
        on_gpu: whether instances run on GPU 0, the one that the runtime uses.
    """

    name: str
    instances: int = 1
    queue: int | None = None
    queue_delay: int = 0
    on_gpu: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UsageError(
                f"{self.name!r} is not a name for a model: it takes letters, digits, '.', '_' and "
                "'-', and starts with a letter or digit; give one with --name"
            )


def needed_inputs(manifest: Manifest) -> tuple[str, ...]:
    """Names of the inputs that every request has."""
    return (PROMPT if manifest.takes_text else LABEL, SEED)


def optional_inputs(manifest: Manifest) -> tuple[str, ...]:
    """Names of the inputs that a request may leave out."""
    if manifest.takes_text:
        return (NUMBER, NEGATIVE, *(name for name in SETTINGS if name != TOP_K))
    return (NUMBER, *SETTINGS)


def version_of(digest: str) -> int:
    """Triton's version of the bundle with this digest: its first 13 hexadecimal digits."""
    return int(digest[:VERSION_DIGITS], 16)


def config_text(
    manifest: Manifest, serving: Serving, config: RuntimeConfig, text_encoder: str = ""
) -> str:
    """The text of config.pbtxt; `text_encoder` is the digest of that of a bundle that takes
    prompts."""
    tokenizer, batch = manifest.model.tokenizer, manifest.batch
    digest, needed = manifest.digest(), needed_inputs(manifest)
    parameters = {"digest": digest, "var_deploy": __version__, **parameters_of(config)}
    parameters |= {TEXT_ENCODER: text_encoder} if text_encoder else {}
    instances = f"count: {serving.instances} kind: "
    instances += "KIND_GPU gpus: [ 0 ]" if serving.on_gpu else "KIND_CPU"
    lines = [
        f'name: "{serving.name}"',
        'backend: "python"',
        f"max_batch_size: {batch}",
        f"version_policy {{ specific {{ versions: [ {version_of(digest)} ] }} }}",
        "input [",
        *_listed([_tensor(name) for name in needed] + _optional(manifest)),
        "]",
        "output [",
        f"  {_tensor(IMAGE, *tokenizer.image_size, tokenizer.image_channels, kind='UINT8')}",
        "]",
        f"instance_group [ {{ {instances} }} ]",
        "dynamic_batching {",
        f"  preferred_batch_size: [ {batch} ]",
        f"  max_queue_delay_microseconds: {serving.queue_delay}",
        *_queue_policy(serving.queue),
        "}",
        "model_warmup [ {",
        '  name: "a batch"',
        f"  batch_size: {batch}",
        *(
            f'  inputs {{ key: "{name}" value {{ data_type: TYPE_{TYPES[name]} dims: [ 1 ] '
            "zero_data: true } }"
            for name in needed
        ),
        "} ]",
        *(
            f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
            for name, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _queue_policy(queue: int | None) -> list[str]:
    if queue is None:
        return []
    return [
        "  default_queue_policy {",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {LONGEST_WAIT}",
        "    allow_timeout_override: true",
        f"    max_queue_size: {queue}",
        "  }",
    ]


def _optional(manifest: Manifest) -> list[str]:
    """The optional inputs; a setting is one number or one per scale, so its size is -1."""
    return [
        _tensor(name, -1 if name in SETTINGS else 1, more=" optional: true")
        for name in optional_inputs(manifest)
    ]


def _tensor(name: str, *dims: int, kind: str = "", more: str = "") -> str:
    """The declaration of a tensor, for one row; Triton adds the batch dimension."""
    sizes = ", ".join(map(str, dims or (1,)))
    return f'{{ name: "{name}" data_type: TYPE_{kind or TYPES[name]} dims: [ {sizes} ]{more} }}'


def _listed(items: Sequence[str]) -> list[str]:
    return [f"  {item}," for item in items[:-1]] + [f"  {items[-1]}"]

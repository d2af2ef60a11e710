"""config.pbtxt of a model: Triton's protobuf text (`model_config.proto` of triton common).

An image is one row of a Triton batch. Each row has settings of its own; doubles, so that a number
is the number that `Pipeline.generate` takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_deploy import __version__
from var_deploy.errors import UsageError
from var_deploy.machine import check_threads
from var_deploy.manifest import Manifest

LABEL, SEED, NUMBER, IMAGE = "LABEL", "SEED", "NUMBER", "IMAGE"
SETTINGS = {"CFG": "cfg", "TOP_K": "top_k", "TOP_P": "top_p", "TEMPERATURE": "temperature"}
NO_CLASS = -1

INPUTS = {LABEL: "INT64", SEED: "UINT64"}
OPTIONAL = {NUMBER: "INT64", "CFG": "FP64", "TOP_K": "INT64", "TOP_P": "FP64"}
OPTIONAL |= {"TEMPERATURE": "FP64"}
LONGEST_WAIT = 3_600_000_000  # microseconds; a request's own timeout counts where it is shorter
# digits of the digest that make a version: 52 bits, which every reader of JSON holds exactly
VERSION_DIGITS = 13


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What the server hands to `Pipeline.load`; "auto" is decided where it runs."""

    precision: str = "auto"
    layout: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        check_threads(self.threads)  # the server may be another machine, which looks again

    def parameters(self) -> dict[str, str]:
        """As texts; what is None is left out."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {name: str(value).lower() for name, value in given.items()}

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> Runtime:
        """From the texts of `parameters`. Raises UsageError where one was changed to nonsense."""
        known = [field.name for field in dataclasses.fields(cls)]
        given: dict[str, Any] = {name: parameters[name] for name in known if name in parameters}
        for name, value in given.items():
            if name not in ("threads", "cuda_graph"):
                continue  # words, which `Pipeline.load` looks at
            pattern = r"[1-9][0-9]{0,5}" if name == "threads" else "true|false"
            if not re.fullmatch(pattern, value):
                raise UsageError(f"the parameter {name} of the model cannot be {value!r}")
            given[name] = json.loads(value)
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How Triton serves a model.

    Attributes:
        name: of the model, and of its folder.
        instances: processes, each with weights of its own.
        queue: requests that may wait, None for any number. Server 2.51 empties a queue with a bound
            by one batch a half second, unless new requests wake it.
        queue_delay: microseconds that a request waits for a batch to fill.
        on_gpu: whether instances belong to GPU 0, the one that the runtime takes.
    """

    name: str
    instances: int = 1
    queue: int | None = None
    queue_delay: int = 0
    on_gpu: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UsageError(
                f"{self.name!r} is no name for a model: it takes letters, digits, '.', '_' and "
                "'-', and starts with a letter or digit; give one with --name"
            )


def version_of(digest: str) -> int:
    """Triton's version of the bundle with this digest: its first 13 hexadecimal digits."""
    return int(digest[:VERSION_DIGITS], 16)


def config_text(manifest: Manifest, serving: Serving, runtime: Runtime) -> str:
    """config.pbtxt of the model."""
    tokenizer, batch = manifest.model.tokenizer, manifest.batch
    side, digest = tokenizer.image_side, manifest.digest()
    parameters = {"digest": digest, "var_deploy": __version__, **runtime.parameters()}
    instances = f"count: {serving.instances} kind: "
    instances += "KIND_GPU gpus: [ 0 ]" if serving.on_gpu else "KIND_CPU"
    lines = [
        f'name: "{serving.name}"',
        'backend: "python"',
        f"max_batch_size: {batch}",
        f"version_policy {{ specific {{ versions: [ {version_of(digest)} ] }} }}",
        "input [",
        *_listed([_tensor(name, kind) for name, kind in INPUTS.items()] + _optional()),
        "]",
        "output [",
        f"  {_tensor(IMAGE, 'UINT8', side, side, tokenizer.image_channels)}",
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
            f'  inputs {{ key: "{name}" value {{ data_type: TYPE_{kind} dims: [ 1 ] '
            "zero_data: true } }"
            for name, kind in INPUTS.items()
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


def _optional() -> list[str]:
    """A setting is one number, or one a scale: its length is open."""
    return [
        _tensor(name, kind, -1 if name in SETTINGS else 1, more=" optional: true")
        for name, kind in OPTIONAL.items()
    ]


def _tensor(name: str, kind: str, *dims: int, more: str = "") -> str:
    """One of a row; the dimension of the batch is Triton's."""
    sizes = ", ".join(map(str, dims or (1,)))
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: [ {sizes} ]{more} }}'


def _listed(items: Sequence[str]) -> list[str]:
    return [f"  {item}," for item in items[:-1]] + [f"  {items[-1]}"]

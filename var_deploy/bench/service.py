"""HTTP clients for services that generate images: `var-deploy serve`, and a model of NVIDIA Triton.

A `Service` composes the request for an image; `Connection` sends it and waits for the response.
Requests to Triton follow the KServe v2 protocol with its binary data extension, without NVIDIA's
client library.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from var_deploy.bench.conditions import bench_texts
from var_deploy.errors import BackendError, UsageError, one_line

SCHEME = "http://"
TIMEOUT = 600.0  # seconds for one response
LABEL = 0  # of every image: the time does not depend on it


@dataclass(frozen=True, kw_only=True)
class Address:
    """Address of a service; `path` has no slash at its end, and is "" for the root."""

    host: str
    port: int
    path: str

    @classmethod
    def read(cls, url: str) -> Address:
        """Parse a URL. Raises UsageError where it is not an http:// address."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or not url.startswith(SCHEME) or parts.query or parts.fragment:
            raise UsageError(f"{url!r} is not an address; write {SCHEME}host:port")
        return cls(host=host, port=port or 80, path=parts.path.rstrip("/"))


@dataclass(frozen=True, kw_only=True)
class Question:
    """The request for an image: a POST to `path`."""

    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Service(ABC):
    """A service that was found at an address; `about` has its settings."""

    kind: ClassVar[str]
    url: str
    address: Address
    about: Mapping[str, str]

    @abstractmethod
    def question(self, seed: int) -> Question:
        """The request for one image with this seed."""


@dataclass(frozen=True, kw_only=True)
class OurService(Service):
    """The service of `var-deploy serve`.

    Attributes:
        takes_prompts: whether it makes images of prompts; else of labels.
    """

    kind = "var-deploy"
    takes_prompts: bool = False

    def question(self, seed: int) -> Question:
        """The request for one image; its prompt is one that was not encoded before."""
        what = {"prompts": bench_texts(seed, 1)} if self.takes_prompts else {"labels": [LABEL]}
        body = json.dumps({**what, "seed": seed, "format": "png"}).encode()
        headers = {"Content-Type": "application/json"}
        return Question(path=f"{self.address.path}/v1/images", body=body, headers=headers)


@dataclass(frozen=True, kw_only=True)
class TritonModel(Service):
    """A model on Triton, from a repository that `var-deploy triton` wrote.

    Attributes:
        takes_prompts: as of `OurService`.
    """

    kind = "triton"
    takes_prompts: bool = False

    def question(self, seed: int) -> Question:
        """The request for one image; a prompt is one that was not encoded before."""
        if self.takes_prompts:
            (prompt,) = bench_texts(seed, 1)
            text = prompt.encode()  # a text has its length in front
            what = ("PROMPT", "BYTES", struct.pack("<I", len(text)) + text)
        else:
            what = ("LABEL", "INT64", struct.pack("<q", LABEL))
        inputs = (what, ("SEED", "UINT64", struct.pack("<Q", seed)))
        asked = {
            "inputs": [
                {
                    **{"name": name, "datatype": datatype, "shape": [1, 1]},
                    "parameters": {"binary_data_size": len(data)},
                }
                for name, datatype, data in inputs
            ],
            "outputs": [{"name": "IMAGE", "parameters": {"binary_data": True}}],
        }
        head = json.dumps(asked).encode()
        return Question(
            path=f"{self.address.path}/infer",
            body=head + b"".join(data for _, _, data in inputs),
            headers={"Inference-Header-Content-Length": str(len(head))},
        )


class Connection:
    """An HTTP connection that is kept open between requests; for one thread."""

    def __init__(self, address: Address) -> None:
        self._where = f"{SCHEME}{address.host}:{address.port}"
        self._http = http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT)

    def open(self) -> None:
        """Connect now, so that the first request does not include it."""
        with self._told():
            self._http.connect()

    def get(self, path: str) -> tuple[int, bytes]:
        return self._exchange("GET", path, None, {})

    def ask(self, question: Question) -> bytes:
        """Send a request; returns the image. Raises BackendError for any other response."""
        status, data = self._exchange("POST", question.path, question.body, question.headers)
        if status != 200:
            raise BackendError(f"{self._where}{question.path} answered {status}: {_error(data)}")
        return data

    def close(self) -> None:
        self._http.close()

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        with self._told():
            self._http.request(method, path, body, headers)
            reply = self._http.getresponse()
            return reply.status, reply.read()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(f"{self._where} does not answer: {one_line(error)}") from None


def find_service(url: str) -> Service:
    """Find out which kind of service runs at a URL.

    Raises UsageError where it is not an address, BackendError where no service answers, or one of
    another kind.
    """
    address = Address.read(url)
    with contextlib.closing(Connection(address)) as connection:
        if "/v2/models/" in address.path:
            return _triton(url, connection, address)
        found = _json(connection, f"{address.path}/v1/model")
    if "digest" not in found:
        raise BackendError(
            f"{url} is not a service of var-deploy; the address of a Triton model is "
            f"{SCHEME}host:port/v2/models/NAME"
        )
    told = ("digest", "precision", "backend", "batch")
    about = {name: str(found.get(name, "unknown")) for name in told}
    prompts = found.get("takes") == "prompts"
    return OurService(url=url, address=address, about=about, takes_prompts=prompts)


def _triton(url: str, connection: Connection, address: Address) -> TritonModel:
    where = f"{SCHEME}{address.host}:{address.port}{address.path}"
    config = _json(connection, f"{address.path}/config")
    parameters = config.get("parameters") or {}
    if "digest" not in parameters:
        raise BackendError(f"{where} is not a model of var-deploy triton, or it is not loaded")
    told = {name: str(value.get("string_value")) for name, value in parameters.items()}
    instances = sum(group.get("count", 1) for group in config.get("instance_group", []))
    about = {**told, "batch": str(config.get("max_batch_size")), "instances": str(instances)}
    prompts = any(each.get("name") == "PROMPT" for each in config.get("input") or ())
    return TritonModel(url=url, address=address, about=about, takes_prompts=prompts)


def _json(connection: Connection, path: str) -> dict[str, Any]:
    """GET a JSON object; {} where the response is something else."""
    status, data = connection.get(path)
    try:
        found = json.loads(data) if status == 200 else None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _error(data: bytes) -> str:
    """The error message of a response: {"error": …} in both kinds of service."""
    try:
        return " ".join(str(json.loads(data)["error"]).split())
    except (ValueError, KeyError, TypeError):
        return "without saying why"

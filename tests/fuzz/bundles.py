"""Damages manifests and graphs of a bundle, and reads what comes of it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from var_deploy.manifest import check_files, read_manifest
from var_deploy.pipeline import Pipeline

Case = tuple[str, bytes]  # a file of the bundle and what it holds instead

WRONG: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e308, float("nan"), float("inf"), 10**5, 10**7),
    *(2**31, 2**63, 2**64, 10**30, [], [1], [[]], [1, 2, 4], {}, {"name": 1}, list(range(3000))),
    *("", "x", "0", "../x", "/etc/passwd", "a\0b", "\x1b[31m", "\ud800", "x" * 5000, "step", "L"),
    *("float64", "int8", "bool", "fp32/weights.bin"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys to every value within."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, (dict, list)):
        for key, item in inner:
            yield from places(item, (*path, key))


def damaged_manifest(text: str, seed: int) -> bytes:
    """One change or several: a value of another type, a member that is missing, twice or unknown,
    a value moved elsewhere, or bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.15:
        return damaged_bytes(text.encode(), chance)
    data = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        # not by number of values: most of them are in the lists of tensors
        node: Any = data
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = chance.choice(keys)
            inner = node[key]
            if isinstance(inner, (dict, list)) and inner and chance.random() < 0.8:
                node = inner
                continue
            kind = chance.random()
            if kind < 0.15:
                del node[key]
            elif kind < 0.25 and isinstance(node, dict):
                node[chance.choice(("x", "step", "fp64", "a/../b", "weights.bin"))] = inner
            elif kind < 0.35 and isinstance(inner, int) and not isinstance(inner, bool):
                node[key] = inner + chance.choice((-1, 1, 10**6, -(10**6)))
            elif kind < 0.45 and isinstance(node, list):
                node.append(inner)
            else:
                node[key] = chance.choice(WRONG)
            break
    try:
        return json.dumps(data).encode()
    except ValueError:
        return b""


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bits turned, pieces cut out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not changed:
            break
        start = chance.randrange(len(changed))
        stop = min(start + chance.choice((1, 2, 8, 100)), len(changed))
        kind = chance.randrange(5)
        if kind == 0:
            changed[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[start] = chance.randrange(256)
        elif kind == 2:
            del changed[start:stop]
        elif kind == 3:
            changed[start:start] = changed[start:stop]
        else:
            del changed[start:]
    return bytes(changed)


def damaged_graph(data: bytes, seed: int) -> bytes:
    """Bytes at random, or a change that onnx itself can express: an operator, an attribute, a
    type, a name, a place of weights."""
    import onnx

    chance = random.Random(seed)
    if chance.random() < 0.5:
        return damaged_bytes(data, chance)
    model = onnx.ModelProto.FromString(data)
    node, tensor = chance.choice(model.graph.node), chance.choice(model.graph.initializer)
    value = chance.choice([*model.graph.input, *model.graph.output])
    inner = onnx.GraphProto(name="inner", node=[node])

    def attribute(**fields: Any) -> None:
        node.attribute.add(name=chance.choice(("axis", "body", "to", "perm")), **fields)

    changes: list[Callable[[], object]] = [
        lambda: setattr(node, "op_type", chance.choice(("Loop", "If", "Scan", "Add", ""))),
        lambda: setattr(node, "domain", chance.choice(("com.microsoft", "ai.onnx", "x"))),
        lambda: attribute(i=chance.choice((-1, 99, 2**62)), type=2),
        lambda: attribute(g=inner, type=5),
        lambda: attribute(ints=[10**12] * 4, type=7),
        lambda: node.input.__setitem__(0, chance.choice(("", "nothing"))) if node.input else None,
        lambda: model.functions.add(name="f", domain="x"),
        lambda: model.opset_import.add(domain="com.microsoft", version=1),
        lambda: setattr(model.opset_import[0], "version", chance.choice((0, 7, 21, 99))),
        lambda: tensor.dims.append(chance.choice((0, -1, 2, 2**40))),
        lambda: setattr(tensor, "data_type", chance.choice((0, 1, 6, 7, 8, 11, 16, 99))),
        lambda: tensor.external_data.add(
            key=chance.choice(("location", "offset", "length", "checksum")),
            value=chance.choice(("0", "-1", "/etc/passwd", "../weights.bin", str(2**62))),
        ),
        lambda: setattr(tensor, "raw_data", b"1234"),
        lambda: setattr(value, "name", chance.choice(("x", ""))),
        lambda: value.type.tensor_type.shape.dim.add(dim_value=chance.choice((1, -1, 2**50))),
        lambda: model.graph.input.add(name="more"),
        lambda: model.graph.sparse_initializer.add(),
        lambda: model.graph.node.add(op_type="Identity", input=["f_hat"], output=["f_hat"]),
        lambda: model.graph.node.remove(node),
        lambda: setattr(tensor, "name", node.output[0]),
    ]
    for change in chance.sample(changes, chance.choice((1, 1, 2))):
        try:
            change()
        except (TypeError, ValueError, IndexError):
            continue
    return bytes(model.SerializeToString())


def with_file(bundle: Path, case: Case) -> Path:
    """A folder beside `bundle` whose files are links to its files, but for one."""
    file, data = case
    folder = bundle.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    for source in (path for path in bundle.rglob("*") if path.is_file()):
        target = folder / source.relative_to(bundle)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.relative_to(folder).as_posix() != file:
            target.symlink_to(source)
    (folder / file).write_bytes(data)
    if file != "manifest.json":  # the manifest knows it: nothing but its content is against it
        manifest = json.loads((bundle / "manifest.json").read_text())
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][file] = {"size": len(data), "sha256": digest}
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def read_case(bundle: Path, case: Case) -> None:
    """Read, check, load and use all graphs; an image and its tokens come out, or a refusal."""
    folder = with_file(bundle, case)
    manifest = read_manifest(folder)
    assert manifest.to_json()
    check_files(folder, manifest)
    with Pipeline.load(folder, "onnxruntime-cpu", threads=1) as pipe:
        images = pipe.generate([0], seed=1)
        side = manifest.model.tokenizer.image_side
        assert images.shape == (1, side, side, manifest.model.tokenizer.image_channels)
        assert pipe.manifest.digest() == manifest.digest()
        pipe.decode(pipe.encode(images[0]))



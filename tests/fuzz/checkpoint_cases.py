"""Damaged and dishonest checkpoint files, each made from a number, and the attempt to load one."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import pickletools
import random
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fuzz.raw_zip import DEFLATED, Record, pack, unpack, zeros
from var_deploy.export.checkpoint.assemble import build_modules, empty_modules, load_model
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Transformer
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

State = dict[str, Any]
FORMATS = ("zip", "legacy", "safetensors")
SPEC = ModelSpec(
    tokenizer=TokenizerSpec(
        patch_nums=(1, 2, 3), vocab_size=16, code_width=4, base_width=32, width_multipliers=(1,),
        res_blocks=1,
    ),
    transformer=TransformerSpec(depth=2, width=16, heads=2, classes=3, ffn_width=32),
)  # fmt: skip
HUGE = (0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32, 2**48, 2**62, 2**63 - 1, 2**64 - 1)


@cache
def tokenizer_state() -> State:
    torch.manual_seed(0)
    return dict(Tokenizer(SPEC.tokenizer).state_dict())


def transformer_state() -> State:
    return {key: tensor.clone() for key, tensor in _transformer().items()}


@cache
def _transformer() -> State:
    torch.manual_seed(0)
    return dict(Transformer(SPEC).state_dict())


def packed(content: Any, kind: str) -> bytes:
    """A file of one of the FORMATS."""
    if kind == "safetensors":
        return save({k: v.contiguous() for k, v in content.items()})
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


@cache
def valid(kind: str) -> bytes:
    return packed(_transformer(), kind)


def load(case: tuple[str, int]) -> None:
    """Make the case, load it as `export` does, and read every tensor of a file that is accepted."""
    name, seed = case
    chance = random.Random(f"{name} {seed}")
    content = valid("zip") if name == "valid" else MUTATIONS[name](chance)
    suffix = chance.choice([".pth", ".PTH", ".safetensors", ".ckpt", ""])
    with tempfile.TemporaryDirectory() as folder:
        file, tokenizer = Path(folder, f"var{suffix}"), Path(folder, "vae.pth")
        file.write_bytes(content)
        tokenizer.write_bytes(_tokenizer_file())
        model = load_model(None, checkpoint=file, tokenizer=tokenizer)
        for module in build_modules(model):
            for parameter in module.parameters():
                parameter.sum()  # touches every page


@cache
def _tokenizer_file() -> bytes:
    return packed(tokenizer_state(), "zip")


# bytes


def truncated(chance: random.Random) -> bytes:
    whole = valid(chance.choice(FORMATS))
    return whole[: chance.randrange(len(whole))]


def flipped(chance: random.Random) -> bytes:
    """Bits turned over, most of them where the structure is and not the weights."""
    kind = chance.choice(FORMATS)
    content = bytearray(valid(kind))
    size = len(content)
    places = {
        "zip": [(0, size), (size - 4000, size), (0, 6000)],
        "legacy": [(0, size), (0, 6000)],
        "safetensors": [(0, size), (0, 4000), (0, 8)],
    }
    low, high = chance.choice(places[kind])
    for _ in range(chance.choice([1, 1, 2, 8, 100])):
        content[chance.randrange(max(low, 0), min(high, size))] ^= 1 << chance.randrange(8)
    return bytes(content)


def spliced(chance: random.Random) -> bytes:
    """A piece of one file in another."""
    first, second = (valid(chance.choice(FORMATS)) for _ in range(2))
    at, start = chance.randrange(len(first)), chance.randrange(len(second))
    piece = second[start : start + chance.choice([1, 8, 100, 10_000])]
    return first[:at] + piece + first[at + chance.choice([0, len(piece)]) :]


# records of a zip file


@cache
def records() -> tuple[Record, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "var.pth")
        path.write_bytes(valid("zip"))
        return tuple(unpack(path))


def other_records(chance: random.Random) -> bytes:
    changed = list(records())
    at = chance.randrange(len(changed))
    record = changed[at]
    change = chance.randrange(8)
    if change == 0:
        del changed[at]
    elif change == 1:
        changed.append(record)
    elif change == 2:
        changed[at] = Record(record.name, zeros(600), 600 << 20, DEFLATED)
    elif change == 3:
        changed[at] = Record(record.name, zeros(600), len(record.content), DEFLATED)
    elif change == 4:
        changed[at] = Record(record.name, record.content, min(chance.choice(HUGE), 2**32 - 1))
    elif change == 5:
        changed[at] = Record(record.name, record.content[: chance.randrange(200)])
    elif change == 6:
        name = chance.choice(["", "/", "../" * 9, "x" * 300, "a/data.pkl", "archive/constants.pkl"])
        changed[at] = Record(name, record.content)
    else:
        changed = [
            Record(r.name, r.content, method=chance.choice([8, 12, 14, 99])) for r in changed
        ]
    return pack(changed)


# pickles


def with_pickle(data: bytes) -> bytes:
    """The valid file with another data.pkl."""
    return pack([Record(r.name, data) if r.name.endswith("data.pkl") else r for r in records()])


def _pickle() -> bytes:
    [found] = [r.content for r in records() if r.name.endswith("data.pkl")]
    return found


@cache
def _opcodes() -> tuple[bytes, ...]:
    data = _pickle()
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    return tuple(data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True))


def odd_opcodes(chance: random.Random) -> bytes:
    """Opcodes left out, doubled, exchanged, and some that torch.save never writes."""
    codes = list(_opcodes())
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        at = chance.randrange(len(codes))
        change = chance.randrange(5)
        if change == 0:
            del codes[at]
        elif change == 1:
            codes.insert(at, codes[chance.randrange(len(codes))])
        elif change == 2:
            codes[at] = bytes([chance.randrange(256)]) + codes[at][1:]
        elif change == 3:
            number = chance.choice(HUGE)
            codes[at] = b"\x8a\x0a" + number.to_bytes(10, "little")
        else:
            codes.insert(at, chance.choice(STRANGE))
    return with_pickle(b"".join(codes))


STRANGE = (
    b"(", b"0", b"1", b"2", b"}", b"]", b")", b"\x8f", b"t", b"l", b"a", b"e", b"s", b"u", b"\x90",
    b"\x91", b"R", b"\x81", b"b", b"Q", b"N", b"\x94", b"h\x00", b"h\xff", b"q\x00", b".",
    b"\x80\x04", b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"ctorch\nfloat32\n",
    b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n", b"\x8a\xff" + b"\x7f" * 255, b"X\xff\xff\xff\xff", b"I9\n",
    b"\x8e" + b"\xff" * 8, b"ctorch._utils\n_rebuild_tensor_v2\n", b"i", b"\x82\x01", b"\x97",
)  # fmt: skip


def random_pickle(chance: random.Random) -> bytes:
    codes = [*STRANGE, *_opcodes()[:60]]
    stream = b"\x80\x02" + b"".join(
        chance.choice(codes) for _ in range(chance.choice([5, 50, 500]))
    )
    return chance.choice([with_pickle, bytes])(stream + b".")


# tensors, keys and values


def _name(chance: random.Random, state: State) -> str:
    return chance.choice(
        [chance.choice(list(state)), "lvl_1L", "pos_1LC", "blocks.0.attn.proj.weight"]
    )


def odd_tensors(chance: random.Random) -> bytes:
    state = transformer_state()
    name = _name(chance, state)
    tensor = state[name].float()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are about to leave PyTorch
        state[name] = chance.choice(ODD_TENSORS)(tensor)
        return packed(state, chance.choice(["zip", "legacy"]))


def _quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


ODD_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.to(torch.complex64),
    lambda t: t.to_sparse(),
    _quantized,
    lambda t: t.to("meta"),
    lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()]),
    lambda t: t.bool(),
    lambda t: t.half(),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.double().mul(1e300),
    lambda t: t.to(torch.int32),
    lambda t: torch.zeros(1).expand(4 * 10**8),
    lambda t: torch.zeros(1).expand(t.shape),
    lambda t: torch.zeros(0, 10**9),
    lambda t: torch.zeros(()),
    lambda t: t.flatten().repeat(2)[::2].view(t.shape),
    lambda t: t.unsqueeze(0),
    lambda t: torch.zeros(64).as_strided((10**6, 8), (0, 8)),
    lambda t: torch.zeros(t.shape, dtype=torch.complex64).conj().imag,
    lambda t: t.numpy().tolist(),
    lambda t: None,
    lambda t: torch.nn.Parameter(t),
    lambda t: t.to(torch.bfloat16).t() if t.dim() == 2 else t,
)


def odd_keys(chance: random.Random) -> bytes:
    state: Any = transformer_state()
    kind = chance.choice(FORMATS)
    for _ in range(chance.choice([1, 1, 3])):
        name = _name(chance, state) if "pos_1LC" in state else next(iter(state))
        change = chance.randrange(9)
        if change == 0:
            state.pop(name, None)
        elif change == 1:
            state[chance.choice(STRANGE_NAMES)] = state.pop(name, torch.zeros(1))
        elif change == 2:
            state[chance.choice(STRANGE_NAMES)] = torch.zeros(3)
        elif change == 3:
            state |= {
                f"blocks.{n}.{chance.choice(STRANGE_NAMES)}": torch.zeros(1) for n in range(400)
            }
        elif change == 4:
            state = {f"module.{key}": value for key, value in state.items()}
        elif change == 5:
            state |= {f"ema.{key}": value.clone() for key, value in state.items()}
        elif change == 6:
            state |= {f"x{n}.pos_1LC": torch.zeros(1) for n in range(40)}
            state |= {f"x{n}.pos_start": torch.zeros(1) for n in range(40)}
        elif change == 7 and kind != "safetensors":
            state = {"a": state, 3: [state], "model": state, None: 1}
            break
        elif change == 8 and kind != "safetensors":
            for _ in range(chance.choice([2, 8, 9, 60])):
                state = {"inner": state}
            break
    return packed(state, kind)


STRANGE_NAMES = (
    "", ".", "..", "\x1b[31mred", "a\nb", "x" * 150, "y" * 5000, "blocks." + "9" * 5000 + ".x",
    "blocks.٣.attn", "lvl_1L.lvl_1L", "_orig_mod.pos_1LC", "\u202egnp", "é",
    "quantize.embedding.weight",
)  # fmt: skip


def odd_values(chance: random.Random) -> bytes:
    state = transformer_state()
    levels = state["lvl_1L"]
    change = chance.randrange(8)
    if change < 4:
        at = chance.randrange(levels.numel())
        levels.view(-1)[at] = chance.choice([-1, 3, 63, 64, 3 * 10**8, 2**62, -(2**63)])
    elif change == 4:
        state["lvl_1L"] = levels.float()
    elif change == 5:
        state["lvl_1L"] = torch.arange(chance.choice([1, 14, 100_000]))[None]
    else:
        name = _name(chance, state)
        value = chance.choice([float("nan"), float("inf"), -float("inf"), 3e38])
        state[name] = state[name].float().fill_(value)
    return packed(state, chance.choice(FORMATS))


def odd_sizes(chance: random.Random) -> bytes:
    """Sizes of tensors that the architecture is read from."""
    state = transformer_state()
    name = chance.choice(
        ["pos_1LC", "pos_start", "lvl_embed.weight", "word_embed.weight", "class_emb.weight",
         "head.weight", "blocks.0.ffn.fc1.weight", "blocks.0.attn.scale_mul_1H11"]
    )  # fmt: skip
    shape = list(state[name].shape)
    shape[chance.randrange(len(shape))] = chance.choice([0, 1, 2, 7, 15, 1000, 20_000])
    state[name] = torch.zeros(shape)
    return packed(state, chance.choice(FORMATS))


# safetensors headers


def lying_header(chance: random.Random) -> bytes:
    content = valid("safetensors")
    size = int.from_bytes(content[:8], "little")
    header: Any = json.loads(content[8 : 8 + size])
    entry = header[chance.choice([key for key in header if key != "__metadata__"])]
    change = chance.randrange(10)
    if change == 0:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(HUGE)
    elif change == 1:
        entry["shape"] = [chance.choice(HUGE) for _ in range(chance.choice([0, 1, 3, 500]))]
    elif change == 2:
        entry["dtype"] = chance.choice(
            ["F64", "C64", "BOOL", "U16", "F8_E8M0", "F4", "\x1b[31m", 3]
        )
    elif change == 3:
        entry["data_offsets"] = [0, 4]
    elif change == 4:
        entry.pop(chance.choice(list(entry)))
    elif change == 5:
        header["__metadata__"] = {"x": "y" * chance.choice([1, 1 << 20, 9 << 20])}
    elif change == 6:
        header = [header]
    text = json.dumps(header).encode()
    if change == 7:
        text = b'{"a":' * 100_000 + text
    length = len(text)
    if change == 8:
        length = chance.choice(HUGE)
    if change == 9:
        text = text.replace(b"shape", chance.choice([b"\xff\xfe", b"sh\\ud800", b"dtype"]), 1)
        length = len(text)
    return struct.pack("<Q", length) + text + content[8 + size :]


MUTATIONS: Mapping[str, Callable[[random.Random], bytes]] = {
    "truncated": truncated,
    "flipped": flipped,
    "spliced": spliced,
    "other_records": other_records,
    "odd_opcodes": odd_opcodes,
    "random_pickle": random_pickle,
    "odd_tensors": odd_tensors,
    "odd_keys": odd_keys,
    "odd_values": odd_values,
    "odd_sizes": odd_sizes,
    "lying_header": lying_header,
}


# Whole attacks, written as files because they are made at leisure


def write_attacks(folder: Path) -> list[Path]:
    """Small files that ask for endless time or memory."""
    plain = {r.name.partition("/")[2]: r.content for r in records()}

    def zipped(name: str, content: Any) -> None:
        torch.save(content, folder / name)

    def repacked(name: str, record: str, change: Record) -> None:
        kept = [Record(f"a/{key}", value) for key, value in plain.items() if key != record]
        (folder / name).write_bytes(pack([*kept, change]))

    itself: dict[str, Any] = {}
    itself |= {"a": itself, "b": itself, "c": [itself]}
    zipped("itself.pth", itself)
    (folder / "itself.pkl").write_bytes(pickle.dumps(itself, 2))
    laughs: Any = {"pos_1LC": 1}
    for _ in range(8):
        laughs = {str(n): laughs for n in range(100)}
    zipped("laughs.pth", laughs)
    levels = transformer_state()
    levels["lvl_1L"][0, -1] = 3 * 10**8
    zipped("levels.pth", levels)
    bomb, size = zeros(3000), 3000 << 20
    for record in ("version", "data.pkl", "byteorder", "data/0"):
        name = record.replace("/", "_")
        repacked(f"bomb_{name}.pth", record, Record(f"a/{record}", bomb, size, DEFLATED))
        repacked(f"quiet_{name}.pth", record, Record(f"a/{record}", bomb, 100, DEFLATED))
    for kind, legacy in (("zip", False), ("legacy", True)):
        for key in ("blocks.0.attn.proj.weight", "lvl_1L"):
            state = transformer_state()
            state[key] = torch.zeros(1, dtype=state[key].dtype).expand(4 * 10**8)
            file = folder / f"stride_{kind}_{key}.pth"
            torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    state = transformer_state()
    state["pos_1LC"] = torch.zeros(1 << 20).as_strided((10_000, 1 << 20), (0, 1))
    zipped("overlapping.pth", state)
    one = torch.zeros(1)
    wide = dataclasses.replace(SPEC.transformer, width=8192, depth=4, ffn_width=32768)
    _, module = empty_modules(ModelSpec(tokenizer=SPEC.tokenizer, transformer=wide))
    everything = {key: one.expand(tensor.shape) for key, tensor in module.state_dict().items()}
    zipped("one_value.pth", everything | {"lvl_1L": _transformer()["lvl_1L"]})
    many = {f"blocks.{n}.attn.q_bias": one for n in range(200_000)}
    zipped("blocks.pth", transformer_state() | many)
    some = {f"blocks.{n}.attn.q_bias": one for n in range(5_000)}
    zipped("fewer_blocks.pth", transformer_state() | some)
    content = valid("safetensors")
    size = int.from_bytes(content[:8], "little")
    listed, end = json.loads(content[8 : 8 + size]), len(content) - 8 - size
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    listed |= {f"blocks.{n}.attn.q_bias": empty for n in range(2, 80_000)}
    header = json.dumps(listed, separators=(",", ":")).encode()
    (folder / "blocks.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + content[8 + size :]
    )
    header = json.dumps({"__metadata__": {"x": "y" * (20 << 20)}}).encode()
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "directory.pth").write_bytes(pack([Record(f"a/{n:060}", b"") for n in range(60_000)]))
    text = b"X" + struct.pack("<I", 4 << 20) + b"y" * (4 << 20)
    grown = (
        b"\x80\x02"
        + text
        + b"q\x00"
        + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00utf-32\x86R" * 9000
    )
    (folder / "encoded.pth").write_bytes(with_pickle(grown + b"."))
    asked = b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 1 << 40) + b"\x85R."
    (folder / "asked.pth").write_bytes(with_pickle(asked))
    nested = b"\x80\x02}" + b")" + b"\x85" * 400_000 + b"K\x01s."
    (folder / "hashed.pth").write_bytes(with_pickle(nested))
    keys = (n * (2**61 - 1) for n in range(150_000))  # all with the hash 0
    same = b"".join(b"\x8a\x0a" + key.to_bytes(10, "little") + b"N" for key in keys)
    (folder / "collisions.pth").write_bytes(with_pickle(b"\x80\x02}(" + same + b"u."))
    pairs = b"\x80\x02](" + b"NN\x86" * 100_000 + b"eq\x00"
    again = b"ccollections\nOrderedDict\nh\x00\x85R0" * 50_000
    (folder / "pairs.pth").write_bytes(with_pickle(pairs + again + b"}."))
    (folder / "endless.pth").write_bytes(with_pickle(b"\x80\x02" + b"N0" * (7 << 20) + b"}."))
    with (folder / "sparse.pth").open("wb") as stream:
        stream.write(b"\x80\x02")
        stream.truncate(1 << 40)
    return sorted(folder.iterdir())


def load_file(path: str, tokenizer: str = "") -> None:
    """Load a file as `export` does, by default with a sound tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder, "vae.pth")
        sound.write_bytes(_tokenizer_file())
        build_modules(load_model(None, checkpoint=Path(path), tokenizer=Path(tokenizer or sound)))

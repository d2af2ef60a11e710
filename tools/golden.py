"""Runs golden cases through export and ONNX Runtime, and compares them with what they store.

    python tools/golden.py FOLDER [FOLDER …]

A case is a folder with config.json, golden.npz and weights, of Infinity (infinity.safetensors and
vae.safetensors, or weights by the rule of a seed in config.json) or of VAR (var.safetensors and
vae.safetensors). What the published implementation computed is in golden.npz; text features are in
it too, so no text encoder is needed.

Every graph of both layouts runs. Bits and tokens must be equal, floats within 1e-4 (2e-4 for
VAR), images within 1e-3. Prints the worst difference of each kind for each case, and ends with 1
where one is off.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.bundle.graph_refs import scale_graphs
from var_deploy.config import LAYOUTS, Layout
from var_deploy.errors import VarDeployError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, assemble, open_checkpoint
from var_deploy.export.checkpoint.infinity_keys import tokenizer_names, transformer_names
from var_deploy.export.checkpoint.text_model import (
    LoadedTextModel,
    assemble_text,
    build_text_modules,
    empty_text_modules,
)
from var_deploy.export.graphs.text_scale import paired_halves
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.infinity import InfinityTransformer
from var_deploy.export.verify.graph_runner import GraphRunner, complete_step
from var_deploy.manifest import Manifest
from var_deploy.scale_lists import ScaleList
from var_deploy.spec import (
    BitTokenizerSpec,
    ModelSpec,
    TextModelSpec,
    TextTransformerSpec,
    TokenizerSpec,
    TransformerSpec,
)

FLOATS, VAR_FLOATS, IMAGE = 1e-4, 2e-4, 1e-3
GREEDY = 0.1  # top_p up to 0.5 takes the likelier value of every bit
BLOCK = "blocks."

Arrays = dict[str, NDArray[Any]]


# cases of Infinity


@dataclass(frozen=True)
class Weights:
    """A weight source of arrays in memory."""

    arrays: Mapping[str, NDArray[Any]]
    description: Mapping[str, Any]

    def keys(self) -> Collection[str]:
        return self.arrays.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.arrays[key].shape

    def read(self, key: str) -> NDArray[Any]:
        return self.arrays[key]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and weights, under our names and in fp32, and the published implementation's arrays."""

    name: str
    config: Mapping[str, Any]
    spec: TextModelSpec
    transformer: Weights
    tokenizer: Weights
    golden: Mapping[str, NDArray[Any]]

    def scales(self, prefix: str) -> list[NDArray[Any]]:
        """Arrays `prefix.0` … of all scales."""
        return [self.golden[f"{prefix}.{k}"] for k in range(self.spec.scales)]

    def model(self) -> LoadedTextModel:
        """The case as a model that can be exported."""
        scales = ScaleList(
            resolution="",
            aspect="",
            grids=self.spec.grids,
            rope_grid=self.spec.transformer.rope_grid,
        )
        return assemble_text(self.spec, self.tokenizer, self.transformer, scales=scales)

    def modules(self) -> tuple[BitTokenizer, InfinityTransformer]:
        """The reference modules with the weights of the case."""
        return build_text_modules(self.model())


def spec_of(config: Mapping[str, Any]) -> TextModelSpec:
    """The sizes that a case's config.json tells."""
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=tuple((rows, columns) for rows, columns in config["scale_schedule"]),
            bits=config["bits"],
            patch=2 if config["patchify"] else 1,
            base_width=config["vae_ch"],
            width_multipliers=tuple(config["vae_ch_mult"]),
        ),
        transformer=TextTransformerSpec(
            depth=config["depth"],
            width=config["width"],
            heads=config["heads"],
            ffn_width=config["ffn"],
            text_width=config["text_width"],
            text_length=config["text_maxlen"],
            pool_heads=config["pool_heads"],
            rope_grid=tuple(config["rope_schedule"][-1]),
            unconditional_length=config["text_maxlen"],
            norm_eps=config["norm_eps"],
        ),
    )


@cache
def load_case(folder: Path) -> Case:
    """Read a golden case, with the weights of its files, or else by the rule."""
    config = json.loads((folder / "config.json").read_text())
    spec = spec_of(config)
    if (folder / "infinity.safetensors").is_file():
        transformer, tokenizer = (
            {name: tensor for name, tensor in load_file(folder / file).items()}
            for file in ("infinity.safetensors", "vae.safetensors")
        )
        description = {"file": folder.name}
        read = {
            ours: transformer[theirs].float().numpy()
            for theirs, ours in transformer_names(transformer).items()
        }
        read_tokenizer = {
            ours: tokenizer[theirs].float().numpy()
            for theirs, ours in tokenizer_names(tokenizer).items()
        }
        spec = dataclasses.replace(
            spec,
            transformer=dataclasses.replace(
                spec.transformer,
                levels=len(read["lvl_embed.weight"]),
                unconditional_length=len(read["cfg_uncond"]),
            ),
        )
    else:
        description = {"golden_seed": config["seed"]}
        read_tokenizer, read = (seeded(module, config) for module in empty_text_modules(spec))
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    return Case(
        name=folder.name,
        config=config,
        spec=spec,
        transformer=Weights(read, description),
        tokenizer=Weights(read_tokenizer, description),
        golden=golden,
    )


# the rule of weights


def seeded(module: nn.Module, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of a module under the published names of its tensors."""
    weights = {}
    for key, tensor in module.state_dict().items():
        if key.endswith("zero_k_bias"):
            weights[key] = np.zeros(tuple(tensor.shape), np.float32)
        else:
            name = published(key, config["depth"] // config["block_chunks"])
            weights[key] = drawn(name, tuple(tensor.shape), config["seed"])
    return weights


def published(key: str, chunk: int) -> str:
    """The released name of one of our tensors, for chunks of so many blocks."""
    if key.startswith(BLOCK):
        number, rest = key.removeprefix(BLOCK).split(".", 1)
        return f"block_chunks.{int(number) // chunk}.module.{int(number) % chunk}.{rest}"
    if not key.startswith(("encoder.", "decoder.")):
        return key
    layer, _, kind = key.rpartition(".")
    return f"{layer}.{'norm' if 'norm' in layer.rsplit('.', 1)[-1] else 'conv'}.{kind}"


def drawn(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The rule of the golden cases: a tensor depends on its published name, shape and the seed."""
    stream = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = stream.standard_normal(shape).astype(np.float32)
    if "scale_mul" in name:
        z = np.float32(2.5) + np.float32(1.5) * z
    elif "norm" in name and name.endswith("weight"):
        z = 1 + np.float32(0.1) * z
    elif "ada_gss" in name:
        z = np.float32(0.4) * z
    elif len(shape) >= 2:
        z = np.float32(_factor(name, shape)) * z
    else:
        z = np.float32(0.1) * z
    rounded: NDArray[np.float32] = z.astype(np.float16).astype(np.float32)
    return rounded


def _factor(name: str, shape: tuple[int, ...]) -> float:
    fixed = {
        "word_embed.weight": 1.0,
        "pos_start": 0.6,
        "lvl_embed.weight": 0.6,
        "cfg_uncond": 0.6,
        "text_proj_for_sos.ca.mat_q": 1.5,
    }
    if name in fixed:
        return fixed[name]
    gain = {"head.weight": 0.45, "shared_ada_lin.1.weight": 0.5}.get(name, 1.0)
    if "encoder.conv_out" in name:
        gain = 1.6
    if "decoder.conv_out" in name:
        gain = 0.6
    return float(gain * np.prod(shape[1:]) ** -0.5)


# comparison


@dataclass
class Comparison:
    """The worst difference of each kind of value, and what is off.

    Attributes:
        floats: largest difference that floats may have.
        equal, total: bits (or tokens) that are equal, and all that were compared.
    """

    floats: float = FLOATS
    worst: dict[str, float] = field(default_factory=dict)
    equal: int = 0
    total: int = 0
    off: list[str] = field(default_factory=list)

    def near(
        self, what: str, found: NDArray[Any], expected: NDArray[Any], kind: str = "floats"
    ) -> None:
        """Compare floats, or pixels where `kind` is "image"."""
        bound = IMAGE if kind == "image" else self.floats
        if found.shape != expected.shape:
            self.off.append(f"{what} is {list(found.shape)}, expected {list(expected.shape)}")
            return
        difference = np.abs(found.astype(np.float64) - expected).max(initial=0.0)
        error = float(difference) if np.isfinite(difference) else float("inf")
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        if not error <= bound:
            self.off.append(f"{what} is off by {error:.2e}")

    def same(self, what: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
        """Compare bits or tokens."""
        if found.shape != expected.shape:
            self.off.append(f"{what} is {list(found.shape)}, expected {list(expected.shape)}")
            return
        equal = int((found == expected).sum())
        self.equal, self.total = self.equal + equal, self.total + expected.size
        if equal < expected.size:
            self.off.append(f"{what} differs in {expected.size - equal} of {expected.size}")

    def line(self, name: str) -> str:
        """Return the result in one line, and the first differences."""
        parts = [f"{self.equal} of {self.total} bits or tokens equal"]
        parts += [f"{kind} within {error:.1e}" for kind, error in self.worst.items()]
        more = f" (and {len(self.off) - 3} more)" if len(self.off) > 3 else ""
        verdict = f"OFF: {'; '.join(self.off[:3])}{more}" if self.off else "ok"
        return f"{name}: {', '.join(parts)}: {verdict}"


class Graphs:
    """The graphs of an exported case, each opened once, with the logits inside as an output."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self.manifest, self._files = manifest, BundleFiles(bundle, manifest, "fp32")
        self._open: dict[str, GraphRunner] = {}

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if name not in self._open:
            interior: tuple[str, ...] = ()
            if name.startswith(names.STEP) or name.startswith("scale_"):
                interior = (names.LOGITS,)
            if name == names.ENCODER:
                interior = (names.LATENT,)
            info = self.manifest.graph("fp32", name)
            self._open[name] = GraphRunner(self._files.graph(name), info, interior)
        return self._open[name].run(inputs)

    def close(self) -> None:
        self._files.close()


def scales_of(
    graphs: Graphs,
    layout: Layout,
    shared: Mapping[str, NDArray[Any]],
    settings: Callable[[int], Mapping[str, Any]],
    see: Callable[[int, Arrays], None],
) -> NDArray[Any]:
    """Run all scales, with a cache of their own, and return f_hat after the last.

    `shared` are inputs of every scale, `settings` those of one; `see` is given its outputs.
    """
    manifest, spec = graphs.manifest, graphs.manifest.model
    t = spec.tokenizer
    f_hat = np.zeros((manifest.batch, t.code_width, *t.latent_grid), np.float32)
    past: Arrays = {}
    following: Arrays = {}
    for k, ref in enumerate(scale_graphs(spec, layout)):
        inputs: dict[str, Any] = {
            **shared,
            **past,
            **following,
            **settings(k),
            names.F_HAT: f_hat,
        }
        if ref.kind == "step":
            inputs = complete_step(manifest, "fp32", k, inputs)
        found = graphs(ref.name, inputs)
        f_hat = found[names.NEW_F_HAT]
        see(k, found)
        if k + 1 == spec.scales:
            break
        following = {names.INPUT: found[names.NEXT_INPUT]}
        for layer in range(spec.transformer.depth):
            for before, new in (
                (names.past_key(layer), names.new_key(layer)),
                (names.past_value(layer), names.new_value(layer)),
            ):
                past[before] = np.concatenate([*([past[before]] if k else []), found[new]])
    return f_hat


def compare_infinity(case: Case, graphs: Graphs) -> Comparison:
    """Compare a case of Infinity in both layouts."""
    found, golden, config = Comparison(), case.golden, case.config
    features, lengths = golden["text.features"], golden["text.lengths"]
    mask = np.arange(features.shape[1]) < lengths[:, None]
    first = graphs(
        names.CONDITION, {names.TEXT_FEATURES: features, names.TEXT_MASK: mask}
    )
    plain = graphs(names.UNCONDITIONAL, {names.TEXT_MASK: mask})
    _compare_condition(case, first, plain, found)
    runs: list[tuple[str, Arrays, NDArray[np.bool_], int]] = [
        ("greedy", plain, mask, 0),
        ("sampled", plain, mask, 0),
        ("forced", plain, mask, config.get("forced_scales", 0)),
    ]
    if config.get("negative"):
        other = golden["negative.text.features"]
        negative = np.arange(other.shape[1]) < golden["negative.text.lengths"][:, None]
        rows = {names.TEXT_FEATURES: other, names.TEXT_MASK: negative}
        runs.append(("negative", graphs(names.CONDITION, rows), negative, 0))
    for layout in LAYOUTS:
        for kind, second, masks, forced in runs:
            if f"{kind}.logits.0" not in golden:
                continue
            rows = {name: np.concatenate([first[name], second[name]]) for name in first}
            rows[names.TEXT_MASK] = np.concatenate([mask, masks])
            _compare_run(case, graphs, layout, kind, rows, forced, found)
    _compare_encoder(case, graphs, found)
    return found


def _compare_condition(case: Case, first: Arrays, second: Arrays, found: Comparison) -> None:
    expected = case.golden.get("greedy.text.cond")
    if expected is None:
        return
    start = case.transformer.read("pos_start").reshape(-1)
    start = start + case.transformer.read("lvl_embed.weight")[0]
    both = np.concatenate([first[names.FIRST_INPUT], second[names.FIRST_INPUT]])
    found.near("text.cond", both[:, 0] - start, expected)


def _compare_run(
    case: Case,
    graphs: Graphs,
    layout: Layout,
    kind: str,
    rows: Mapping[str, NDArray[Any]],
    forced: int,
    found: Comparison,
) -> None:
    """Compare one generation with the arrays `KIND.*`."""
    golden, config, spec = case.golden, case.config, case.spec
    batch, bits = len(golden["text.lengths"]), spec.tokenizer.token_bits
    order = paired_halves(1, spec.transformer.head_width)
    where = f"{kind} ({layout})"

    def settings(k: int) -> Mapping[str, Any]:
        shape = (batch, spec.scale_lengths[k], bits)
        uniforms = golden.get(f"sampled.uniforms.{k}") if kind == "sampled" else None
        given = token_bits(case, k, "encode.bits") if k < forced else np.zeros(shape, np.int64)
        return {
            names.UNIFORMS: np.full(shape, 0.5, np.float32) if uniforms is None else uniforms,
            names.CFG: np.float32(config["cfg"][k]),
            names.TEMPERATURE: np.float32(config["tau"][k]),
            names.TOP_P: np.float32(config["top_p"] if kind == "sampled" else GREEDY),
            names.KEEP_MASK: np.full(shape[:2], k < forced),
            names.KEEP_TOKENS: given,
        }

    def see(k: int, outputs: Arrays) -> None:
        logits = golden[f"{kind}.logits.{k}"]
        ours = outputs[names.LOGITS] / np.float32(config["tau"][k])
        found.near(f"{where} logits {k}", ours, logits[..., 1::2] - logits[..., ::2])
        for name, tensor in (("summed", names.NEW_F_HAT), ("next", names.NEXT_INPUT)):
            if f"{kind}.{name}.{k}" in golden:
                found.near(f"{where} {name} {k}", outputs[tensor], golden[f"{kind}.{name}.{k}"])
        if f"{kind}.bits.{k}" in golden:
            found.same(f"{where} bits {k}", outputs[names.TOKENS], golden[f"{kind}.bits.{k}"])
        elif f"{kind}.map_bits.{k}" in golden:
            expected = token_bits(case, k, f"{kind}.map_bits")
            found.same(f"{where} bits {k}", outputs[names.TOKENS], expected)
        for layer in config.get("kv_blocks", ()):
            for part, tensor in (
                ("key", names.new_key(layer)),
                ("value", names.new_value(layer)),
            ):
                stored = golden.get(f"{kind}.{part}.{layer}.{k}")
                if stored is not None and tensor in outputs:
                    rows_first = stored.transpose(2, 0, 1, 3)
                    if part == "key":
                        rows_first = rows_first[..., order]
                    found.near(f"{where} {part} {layer}.{k}", outputs[tensor], rows_first)

    f_hat = scales_of(graphs, layout, rows, settings, see)
    if f"{kind}.summed" in golden:
        found.near(f"{where} summed", f_hat, golden[f"{kind}.summed"])
    _compare_image(f"{kind}", where, graphs, f_hat, golden, found)


def _compare_image(
    kind: str,
    where: str,
    graphs: Graphs,
    f_hat: NDArray[Any],
    golden: Mapping[str, NDArray[Any]],
    found: Comparison,
) -> None:
    image = graphs(names.DECODER, {names.F_HAT: f_hat})[names.IMAGE]
    if f"{kind}.image" in golden:
        expected = golden[f"{kind}.image"].transpose(0, 2, 3, 1)
        found.near(f"{where} image", image, expected, "image")
    if f"{kind}.uint8" in golden:
        # published images are cut off, not rounded, so that rounding may tip a value over
        off = np.abs(np.floor(image * 255) - golden[f"{kind}.uint8"]).max()
        if off > 1:
            found.off.append(f"{where} uint8 is off by {off:.0f}")


def _compare_encoder(case: Case, graphs: Graphs, found: Comparison) -> None:
    golden, spec = case.golden, case.spec
    if "encode.image_u8" not in golden:
        return
    image = golden["encode.image_u8"].astype(np.float32).transpose(0, 2, 3, 1) / 255
    encoded = graphs(names.ENCODER, {names.IMAGE: image})
    if "encode.features" in golden:
        found.near("encode.features", encoded[names.LATENT], golden["encode.features"])
    for k in range(spec.scales):
        expected = token_bits(case, k, "encode.bits")
        found.same(f"encode.bits {k}", encoded[names.encoder_tokens(k)], expected)
    sums = graphs(names.ACCUMULATE, encoded)[names.F_HATS]
    if "encode.z" in golden:
        found.near("encode.z", sums[-1], golden["encode.z"])
    if "encode.reconstruction" in golden:
        image = graphs(names.DECODER, {names.F_HAT: sums[-1]})[names.IMAGE][:1]
        expected = golden["encode.reconstruction"].transpose(0, 2, 3, 1)
        found.near("encode.reconstruction", image, expected, "image")


def token_bits(case: Case, scale: int, name: str) -> NDArray[np.int64]:
    """Bits of latent positions [B, h, w, d], the array NAME.SCALE, as those of tokens [B, L, e]."""
    bits, patch = case.golden[f"{name}.{scale}"].astype(np.int64), case.spec.tokenizer.patch
    count, height, width, depth = bits.shape
    parts = bits.reshape(count, height // patch, patch, width // patch, patch, depth)
    rows: NDArray[np.int64] = parts.transpose(0, 1, 3, 5, 2, 4)
    return rows.reshape(count, -1, depth * patch * patch)


# cases of VAR


def var_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The sizes that the config.json of a case of VAR tells."""
    return ModelSpec(
        tokenizer=TokenizerSpec(
            patch_nums=tuple(config["patch_nums"]),
            vocab_size=config["vocab_size"],
            code_width=config["z_channels"],
            base_width=config["ch"],
            shared_phi=config["share_quant_resi"],
        ),
        transformer=TransformerSpec(
            depth=config["depth"],
            width=config["embed_dim"],
            heads=config["num_heads"],
            classes=config["num_classes"],
            ffn_width=4 * config["embed_dim"],
            shared_adaln=config["shared_aln"],
            qk_l2_norm=config["attn_l2_norm"],
        ),
    )


def var_model(folder: Path, config: Mapping[str, Any]) -> LoadedModel:
    """Read a case of VAR, whose weights lie in files."""
    return assemble(
        var_spec(config),
        open_checkpoint(folder / "vae.safetensors", "tokenizer"),
        open_checkpoint(folder / "var.safetensors", "transformer"),
    )


def compare_var(golden: Mapping[str, NDArray[Any]], graphs: Graphs) -> Comparison:
    """Compare a case of VAR in both layouts: greedy generation, and the encoder."""
    found, spec = Comparison(floats=VAR_FLOATS), graphs.manifest.model
    labels = golden["labels"]
    rows = np.concatenate([labels, np.full_like(labels, spec.transformer.classes)])
    shared = graphs(names.CONDITION, {names.LABELS: rows})
    cfg = float(golden["greedy.cfg"])

    def settings(k: int) -> Mapping[str, Any]:
        shape = (len(labels), spec.scale_lengths[k])
        return {
            names.UNIFORMS: np.full(shape, 0.5, np.float32),
            names.CFG: np.float32(cfg * k / max(spec.scales - 1, 1)),
            names.TEMPERATURE: np.float32(1),
            names.TOP_K: np.int64(1),
            names.TOP_P: np.float32(0),
            names.KEEP_MASK: np.zeros(shape, np.bool_),
            names.KEEP_TOKENS: np.zeros(shape, np.int64),
        }

    for layout in LAYOUTS:

        def see(k: int, outputs: Arrays, layout: Layout = layout) -> None:
            logits = golden[f"greedy.guided_logits.{k}"]
            found.near(f"logits {k} ({layout})", outputs[names.LOGITS], logits)
            tokens = golden[f"greedy.tokens.{k}"]
            found.same(f"tokens {k} ({layout})", outputs[names.TOKENS], tokens)

        f_hat = scales_of(graphs, layout, shared, settings, see)
        found.near(f"f_hat ({layout})", f_hat, golden["greedy.f_hat"])
        _compare_image("greedy", f"greedy ({layout})", graphs, f_hat, golden, found)
    image = (golden["image"].transpose(0, 2, 3, 1) + 1) / 2
    encoded = graphs(names.ENCODER, {names.IMAGE: image})
    for k in range(spec.scales):
        expected = golden[f"encode.tokens.{k}"]
        found.same(f"encode.tokens {k}", encoded[names.encoder_tokens(k)], expected)
    return found


# command


def compare(folder: Path) -> Comparison:
    """Export a case in fp32 to a folder that is deleted again, run it and compare.

    Raises VarDeployError where the folder holds no case.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        infinity = "scale_schedule" in config
        if infinity:
            case = load_case(folder)
            model: LoadedModel | LoadedTextModel = case.model()
            golden = case.golden
        else:
            model = var_model(folder, config)
            with np.load(folder / "golden.npz") as arrays:
                golden = dict(arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VarDeployError(f"{folder} holds no golden case: {error!r}") from error
    batch = len(golden["text.lengths" if infinity else "labels"])
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bundle"
        graphs = Graphs(out, export_bundle(model, out, ExportOptions(batch=batch, guidance=True)))
        try:
            return compare_infinity(case, graphs) if infinity else compare_var(golden, graphs)
        finally:
            graphs.close()


@click.command(help=(__doc__ or "").split("\n\n", 2)[2])
@click.argument(
    "folders",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
def main(folders: Sequence[Path]) -> None:
    off = False
    for folder in folders:
        try:
            found = compare(folder)
        except VarDeployError as error:
            click.echo(f"{folder.name}: OFF: {error}")
            off = True
            continue
        click.echo(found.line(folder.name))
        off = off or bool(found.off)
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()

"""Generates with the PyTorch modules and records the inputs and outputs of every graph.

The loop over the scales is written here a second time on purpose. `verify` compares the graphs and
`runtime.loop` with it, so it shares neither buffers nor bindings nor cache views with them: a fault
in those shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from var_deploy import names
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.export.families import export_family_of
from var_deploy.export.models.sampler import draw, filter_logits, guide, mix_weights
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Cache, Modulation
from var_deploy.export.verify.difference import top_1_agreement
from var_deploy.export.verify.held_modules import OwnForward
from var_deploy.export.verify.own_trace import as_picture, own_trace
from var_deploy.labels import class_stride
from var_deploy.manifest import Manifest
from var_deploy.runtime.buffers import Conditions
from var_deploy.sampling import Sampling, call_keys, gumbel, stack_uniforms

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ScaleTrace:
    """Recorded inputs and outputs of one scale graph, by tensor name, and the margin of each token.

    `margins` [B, L_k] is the distance of a token's uniform from the nearest end of its interval.
    """

    inputs: Arrays
    outputs: Arrays
    margins: NDArray[Any]

    def compared(self, found: Collection[str]) -> Arrays:
        """Return the outputs that are compared by value: all in `found` except the tokens."""
        return {k: v for k, v in self.outputs.items() if k in found and k != names.TOKENS}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Recorded values of a whole generation. `image` is [B, side, side, channels] in [0, 1]."""

    condition: Arrays
    scales: list[ScaleTrace]
    f_hat: NDArray[Any]
    image: NDArray[Any]


class GenerationInputs(NamedTuple):
    """Inputs of a generation of B images: labels, uniforms [B, T] and, where the bundle has
    `more_smooth`, the noise [T, V] of each image."""

    labels: list[int]
    uniforms: NDArray[np.float32]
    noise: list[NDArray[np.float32]]

    @property
    def conditions(self) -> list[int]:
        """The labels, as `ScaleLoop.run` takes them."""
        return self.labels


class Inputs(Protocol):
    """Inputs of a generation of B images, by labels or by prompts."""

    @property
    def labels(self) -> list[int]: ...

    @property
    def conditions(self) -> Conditions: ...

    @property
    def uniforms(self) -> NDArray[np.float32]: ...

    @property
    def noise(self) -> list[NDArray[np.float32]]: ...


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A recorded generation of the PyTorch model, and its encoder's output for the image.

    Attributes:
        inputs: labels, uniforms and noise of the generation.
        encoded: the encoder's latent and tokens by tensor name.
        sums: f_hat after each of the first scales' tokens, [K, B, Cv, p_K, p_K].
        decode: f_hat [B, Cv, p_K, p_K] → images [B, side, side, channels] in [0, 1].
        follow: (scale, logits, mass after the filters), both [B, L_k, V] → outputs of a mix of
            codes by tensor name, computed with the f_hat and the noise of the reference.
    """

    inputs: Inputs
    seed: int
    trace: Trace
    encoded: Arrays
    sums: NDArray[Any]
    decode: Callable[[NDArray[Any]], NDArray[Any]]
    follow: Callable[[int, NDArray[Any], NDArray[Any]], Arrays]

    @property
    def labels(self) -> list[int]:
        """One label per image."""
        return self.inputs.labels

    def condition_of(self, graph: str) -> Arrays:
        """Return the outputs of a condition graph."""
        return self.trace.condition

    def top_1(self, expected: NDArray[Any], found: NDArray[Any]) -> str:
        """How many tokens have the likeliest code that the model gives them, "a/b"."""
        return top_1_agreement(expected, found)

    def settings(self, manifest: Manifest, scale: int) -> Arrays:
        """Return the sampling settings of a scale, at which no token is forced."""
        settings = manifest.defaults.at(scale, manifest.model.scales)
        tokens = self.trace.scales[scale].outputs[names.TOKENS]
        return {
            names.CFG: np.array(settings.guidance),
            names.TEMPERATURE: np.array(settings.temperature),
            names.TOP_K: np.array(settings.top_k),
            names.TOP_P: np.array(settings.top_p),
            names.KEEP_MASK: np.zeros(tokens.shape, np.bool_),
            names.KEEP_TOKENS: tokens,
        }

    def graph_inputs(self, manifest: Manifest, graph: str, scale: int = 0) -> Arrays:
        """Return the inputs of a graph; for `step`, those of the static graph of `scale`."""
        if graph == names.CONDITION:
            rows = np.full(manifest.rows, manifest.model.transformer.classes)
            rows[: len(self.labels)] = self.labels
            return {names.LABELS: rows}
        if graph == names.DECODER:
            return {names.F_HAT: self.trace.f_hat}
        if graph == names.ENCODER:
            return {names.IMAGE: self.trace.image}
        if graph == names.ACCUMULATE:
            drawn = enumerate(self.trace.scales)
            return {names.encoder_tokens(k): s.outputs[names.TOKENS] for k, s in drawn}
        return {**self.trace.scales[scale].inputs, **self.settings(manifest, scale)}


def trace_reference(
    model: LoadedModel,
    manifest: Manifest,
    seed: int,
    *,
    inputs: GenerationInputs | None = None,
    own: OwnForward | None = None,
) -> Reference:
    """Generate B images with the PyTorch model, encode them, and record everything.

    Args:
        inputs: labels, uniforms and noise; None: those of the first B images of a request.
        own: modules whose own logits, tokens of pictures and images take the place of those that
            the modules of `model` compute.
    """
    inputs, sampling = inputs or generation_inputs(manifest, seed, 0), manifest.defaults
    tokenizer, transformer = build_modules(model)
    noise = inputs.noise if manifest.more_smooth else None

    def generate(forced: Sequence[Tensor] = ()) -> Trace:
        return trace_generation(
            *(tokenizer, transformer, inputs.labels, inputs.uniforms, sampling, manifest.guidance),
            noise=noise,
            forced=forced,
        )

    trace = generate() if own is None else own_trace(own, manifest, inputs, generate)
    quantize = tokenizer.quantize
    with torch.no_grad():
        image = torch.from_numpy(trace.image).permute(0, 3, 1, 2) * 2 - 1
        latent = tokenizer.features(image)
        encoded = {names.LATENT: latent.numpy()}
        if own is None:
            found = [tokens for _, _, tokens, _ in quantize.encode(latent)]
        else:
            found = own.encode(image)
        encoded |= {names.encoder_tokens(k): tokens.numpy() for k, tokens in enumerate(found)}
        drawn = [torch.from_numpy(scale.outputs[names.TOKENS]) for scale in trace.scales]
        maps = [quantize.contribution(k, quantize.lookup(k, t)) for k, t in enumerate(drawn)]

    @torch.no_grad()
    def decode(f_hat: NDArray[Any]) -> NDArray[Any]:
        return _image(own or tokenizer, torch.from_numpy(f_hat))

    @torch.no_grad()
    def follow(scale: int, logits: NDArray[Any], mass: NDArray[Any]) -> Arrays:
        scales, scale_inputs = model.spec.scales, trace.scales[scale].inputs
        x = torch.from_numpy(logits) / sampling.at(scale, scales).temperature
        x = x.masked_fill(torch.from_numpy(mass) <= 0, -torch.inf)
        weights = mix_weights(x, torch.from_numpy(scale_inputs[names.NOISE]), scale, scales)
        f_hat = torch.from_numpy(scale_inputs[names.F_HAT])
        f_hat = f_hat + quantize.contribution(scale, quantize.blend(scale, weights))
        outputs: Arrays = {names.NEW_F_HAT: f_hat.numpy()}
        if scale + 1 < scales:
            outputs[names.NEXT_INPUT] = quantize.next_input(scale, f_hat).numpy()
        return outputs

    return Reference(
        inputs=inputs,
        seed=seed,
        trace=trace,
        encoded=encoded,
        sums=torch.stack(maps).cumsum(0).numpy(),
        decode=decode,
        follow=follow,
    )


def generation_inputs(
    manifest: Manifest,
    seed: int,
    first: int,
    keys: Sequence[tuple[int, int]] | None = None,
) -> GenerationInputs:
    """Return labels, uniforms and noise of the images `first` … of a call with this seed."""
    spec = manifest.code_model("verify")
    rng_keys = keys or call_keys(seed + first, manifest.batch)
    classes, total = max(spec.transformer.classes, 1), spec.total_tokens
    noise = []
    if manifest.more_smooth:
        noise = [gumbel(*key, total, spec.tokenizer.vocab_size) for key in rng_keys]
    return GenerationInputs(
        labels=[
            (class_stride(classes) * n + seed) % classes
            for n in range(first, first + len(rng_keys))
        ],
        uniforms=stack_uniforms(rng_keys, total),
        noise=noise,
    )


def modulation_table(mod: Modulation) -> Tensor:
    """Return the rows of the `modulation` tensor, [6N + 2, G, C], with the ones already added."""
    blocks = torch.cat([m.squeeze(2) for m in mod.blocks])
    ones = torch.tensor([0.0, 0, 1, 1, 0, 0] * len(mod.blocks) + [1, 0]).view(-1, 1, 1)
    return torch.cat((blocks, mod.head.squeeze(2))) + ones


@torch.no_grad()
def trace_generation(
    tokenizer: Tokenizer,
    transformer: Any,
    labels: Sequence[int],
    uniforms: NDArray[Any],
    sampling: Sampling,
    guidance: bool,
    *,
    noise: Sequence[NDArray[Any]] | None = None,
    forced: Sequence[Tensor] = (),
) -> Trace:
    """Generate B images from labels and uniforms [B, T] with the published algorithm.

    `transformer` is a Transformer or a Gpt2Transformer. `noise`, [T, V] of each image, selects
    `more_smooth` sampling. `forced` are tokens [B, L_k] of the first scales that replace the
    sampled ones.
    """
    spec = transformer.spec
    t, batch = spec.transformer, len(labels)
    family = export_family_of(t)
    rows = [*labels, *[t.classes] * batch] if guidance else list(labels)
    mod = transformer.modulation(torch.tensor(rows))
    condition: Arrays = {}
    if t.conditional:
        condition = {
            names.FIRST_INPUT: mod.first.numpy(),
            names.MODULATION: modulation_table(mod).numpy(),
        }
    cache, scales = Cache(t.depth), []
    side = spec.tokenizer.latent_side
    f_hat = torch.zeros(batch, spec.tokenizer.code_width, side, side)
    draws = torch.from_numpy(uniforms).split(list(spec.scale_lengths), dim=1)
    following: Tensor | None = None
    for k in range(spec.scales):
        inputs: Arrays = {
            **condition,
            names.F_HAT: f_hat.numpy(),
            names.UNIFORMS: draws[k].numpy(),
        }
        if following is not None:
            inputs[names.INPUT] = following.numpy()
            inputs |= _cache_arrays(cache, names.past_key, names.past_value)
        chosen = sampling.at(k, spec.scales)
        logits = guide(transformer.step(k, following, mod, cache), chosen.guidance, batch)
        kept = filter_logits(logits / chosen.temperature, chosen.top_k, chosen.top_p)
        tokens, margins = draw(kept, draws[k])
        tokens = forced[k] if k < len(forced) else tokens
        start, stop = spec.prefix_lengths[k : k + 2]
        codes = tokenizer.quantize.lookup(k, tokens)
        if noise is not None:
            inputs[names.NOISE] = np.stack([numbers[start:stop] for numbers in noise])
            gumbels = torch.from_numpy(inputs[names.NOISE])
            codes = tokenizer.quantize.blend(k, mix_weights(kept, gumbels, k, spec.scales))
        f_hat = f_hat + tokenizer.quantize.contribution(k, codes)
        outputs = _cache_arrays(cache, names.new_key, names.new_value, start)
        outputs |= {
            names.LOGITS: logits.numpy(),
            names.TOKENS: tokens.numpy(),
            names.NEW_F_HAT: f_hat.numpy(),
        }
        if k + 1 < spec.scales:
            following = family.next_input(transformer, tokenizer, k, tokens, f_hat)
            outputs[names.NEXT_INPUT] = following.numpy()
        scales.append(ScaleTrace(inputs=inputs, outputs=outputs, margins=margins.numpy()))
    return Trace(
        condition=condition,
        scales=scales,
        f_hat=f_hat.numpy(),
        image=_image(tokenizer, f_hat),
    )


def _image(tokenizer: Tokenizer | OwnForward, f_hat: Tensor) -> NDArray[Any]:
    """Decode f_hat to images [B, side, side, channels] in [0, 1]."""
    return as_picture(tokenizer.decode(f_hat))


def _cache_arrays(cache: Cache, key: Any, value: Any, start: int = 0) -> Arrays:
    arrays: Arrays = {}
    for layer, pair in enumerate(cache.pairs):
        assert pair is not None  # the caller asks after the first step
        arrays[key(layer)] = pair[0][start:].contiguous().numpy()
        arrays[value(layer)] = pair[1][start:].contiguous().numpy()
    return arrays

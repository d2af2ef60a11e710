"""The reference of `verify` for text-to-image models: generates with the PyTorch modules and
records the inputs and outputs of every graph.

As in `verify/reference.py` the loop over the scales is written once more, and shares nothing with
the graphs and the runtime. Channels of queries and keys are permuted in the graphs (see
`graphs/text_scale.py`): keys are recorded in that order. Only the difference of a bit's two logits
is in the graphs, so that is what is recorded as its logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from var_deploy import names
from var_deploy.export.checkpoint.drawn_prompts import drawn_prompts
from var_deploy.export.checkpoint.text_model import LoadedTextModel, build_text_modules
from var_deploy.export.graphs.text_scale import paired_halves
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.bits import draw_bits, guide, probability_of_one
from var_deploy.export.models.infinity import InfinityTransformer, TextCondition
from var_deploy.export.models.transformer import Cache
from var_deploy.export.verify.own_trace import as_picture
from var_deploy.export.verify.reference import Arrays, Reference, ScaleTrace, Trace
from var_deploy.manifest import Manifest
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import call_keys, stack_uniforms
from var_deploy.spec import TextModelSpec


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """Inputs of a generation of B images: prompts and uniforms [B, `NextScaleSpec.draws`]."""

    conditions: PromptRows
    uniforms: NDArray[np.float32]

    @property
    def labels(self) -> list[int]:
        """No class numbers: a report names none."""
        return []

    @property
    def noise(self) -> list[NDArray[np.float32]]:
        return []

    @property
    def count(self) -> int:
        return len(self.conditions)


@dataclass(frozen=True, kw_only=True)
class TextTrace(Trace):
    """Recorded values of a generation.

    Attributes:
        unconditional: outputs of the graph `unconditional`; empty without guidance.
    """

    unconditional: Arrays


@dataclass(frozen=True, kw_only=True)
class TextReference(Reference):
    """A recorded generation of a text-to-image model."""

    inputs: TextInputs
    trace: TextTrace

    def condition_of(self, graph: str) -> Arrays:
        return self.trace.unconditional if graph == names.UNCONDITIONAL else self.trace.condition

    def graph_inputs(self, manifest: Manifest, graph: str, scale: int = 0) -> Arrays:
        rows = self.inputs.conditions
        if graph == names.CONDITION:
            return {names.TEXT_FEATURES: rows.features, names.TEXT_MASK: rows.mask}
        if graph == names.UNCONDITIONAL:
            return {names.TEXT_MASK: rows.mask}
        return super().graph_inputs(manifest, graph, scale)

    def settings(self, manifest: Manifest, scale: int) -> Arrays:
        tokens = self.trace.scales[scale].outputs[names.TOKENS]
        settings = manifest.defaults.at(scale, manifest.model.scales)
        return {
            names.CFG: np.array(settings.guidance),
            names.TEMPERATURE: np.array(settings.temperature),
            names.TOP_P: np.array(settings.top_p),
            names.KEEP_MASK: np.zeros(tokens.shape[:2], np.bool_),
            names.KEEP_TOKENS: tokens,
        }

    def top_1(self, expected: NDArray[Any], found: NDArray[Any]) -> str:
        """How many bits have the likelier value that the model gives them."""
        same = (expected > 0) == (found > 0)
        return f"{int(same.sum())}/{same.size}"


def text_inputs(
    manifest: Manifest,
    seed: int,
    first: int,
    keys: Sequence[tuple[int, int]] | None = None,
) -> TextInputs:
    """Return prompts and uniforms of the images `first` … of a call with this seed.

    The features are drawn, not encoded: what a text encoder gives is normalised before it is used,
    and any features show whether graphs and model agree. Prompts have different lengths.
    """
    spec = manifest.model
    assert isinstance(spec, TextModelSpec)
    keys = keys or call_keys(seed + first, manifest.batch)
    return TextInputs(
        conditions=drawn_prompts(spec.transformer, keys), uniforms=stack_uniforms(keys, spec.draws)
    )


@torch.no_grad()
def trace_text_reference(
    model: LoadedTextModel, manifest: Manifest, seed: int, inputs: TextInputs | None = None
) -> TextReference:
    """Generate B images with the PyTorch model, encode them, and record everything."""
    inputs = inputs or text_inputs(manifest, seed, 0)
    tokenizer, transformer = build_text_modules(model)
    trace = trace_text_generation(tokenizer, transformer, inputs, manifest)
    image = torch.from_numpy(trace.image).permute(0, 3, 1, 2) * 2 - 1
    latent = tokenizer.features(image)
    encoded = {names.LATENT: latent.numpy()}
    for k, (bits, _) in enumerate(tokenizer.quantize(latent)):
        encoded[names.encoder_tokens(k)] = bits.long().numpy()
    drawn = [torch.from_numpy(scale.outputs[names.TOKENS]) for scale in trace.scales]
    sums = torch.stack([tokenizer.contribution(k, bits) for k, bits in enumerate(drawn)])

    @torch.no_grad()
    def decode(f_hat: NDArray[Any]) -> NDArray[Any]:
        return as_picture(tokenizer.decode(torch.from_numpy(f_hat)))

    def follow(scale: int, logits: NDArray[Any], mass: NDArray[Any]) -> Arrays:
        raise AssertionError("bits are not mixed")

    return TextReference(
        inputs=inputs,
        seed=seed,
        trace=trace,
        encoded=encoded,
        sums=sums.cumsum(0).numpy(),
        decode=decode,
        follow=follow,
    )


@torch.no_grad()
def trace_text_generation(
    tokenizer: BitTokenizer,
    transformer: InfinityTransformer,
    inputs: TextInputs,
    manifest: Manifest,
    forced: Sequence[Tensor] = (),
) -> TextTrace:
    """Generate B images from prompts and uniforms with the published algorithm.

    `forced` are bits [B, L_k, e] of the first scales that replace the drawn ones.
    """
    spec, batch, rows = transformer.spec, inputs.count, inputs.conditions
    t, guided = spec.transformer, manifest.guidance
    features, lengths = torch.from_numpy(rows.features), torch.from_numpy(rows.lengths)
    masks = np.concatenate([rows.mask, rows.mask]) if guided else rows.mask
    if guided:
        features, lengths = transformer.guided_rows(features, lengths)
    condition = transformer.condition(features, lengths)
    shared = _condition_arrays(transformer, condition)
    cache, scales, order = Cache(t.depth), [], paired_halves(1, t.head_width)
    f_hat = torch.zeros(batch, spec.tokenizer.bits, *spec.tokenizer.latent_grid)
    draws = torch.from_numpy(inputs.uniforms).view(batch, spec.total_tokens, *spec.token_shape)
    following: Tensor | None = None
    for k, uniforms in enumerate(draws.split(list(spec.scale_lengths), dim=1)):
        given: Arrays = {
            **shared,
            names.TEXT_MASK: masks,
            names.F_HAT: f_hat.numpy(),
            names.UNIFORMS: uniforms.numpy(),
        }
        if following is not None:
            given[names.INPUT] = following.numpy()
            given |= _cache_arrays(cache, names.past_key, names.past_value, order)
        chosen = manifest.defaults.at(k, spec.scales)
        raw = transformer.step(k, following, condition, cache).logits
        logits = guide(raw, chosen.guidance, 1.0, batch)
        p1 = probability_of_one(logits / chosen.temperature, top_p=chosen.top_p)
        bits, margins = draw_bits(p1, uniforms)
        bits = forced[k] if k < len(forced) else bits.long()
        start = spec.prefix_lengths[k]
        f_hat = f_hat + tokenizer.contribution(k, bits)
        outputs = _cache_arrays(cache, names.new_key, names.new_value, order, start)
        outputs |= {
            names.LOGITS: (logits[..., 1::2] - logits[..., ::2]).numpy(),
            names.TOKENS: bits.numpy(),
            names.NEW_F_HAT: f_hat.numpy(),
        }
        if k + 1 < spec.scales:
            following = tokenizer.next_input(k, f_hat)
            outputs[names.NEXT_INPUT] = following.numpy()
        scales.append(ScaleTrace(inputs=given, outputs=outputs, margins=margins.numpy()))
    return TextTrace(
        condition={name: rows[:batch] for name, rows in shared.items()},
        unconditional={name: rows[batch:] for name, rows in shared.items()} if guided else {},
        scales=scales,
        f_hat=f_hat.numpy(),
        image=as_picture(tokenizer.decode(f_hat)),
    )


def _condition_arrays(transformer: InfinityTransformer, condition: TextCondition) -> Arrays:
    """Return the outputs of the condition graphs for all rows: first input, modulation
    [G, 6N + 2, C] with the ones already added, keys and values of the text."""
    blocks = torch.cat([m.squeeze(2) for m in condition.blocks])
    ones = torch.tensor([0.0, 0, 1, 1, 0, 0] * len(condition.blocks) + [1, 0]).view(-1, 1, 1)
    table = torch.cat((blocks, condition.head.squeeze(2))) + ones
    first = condition.first + transformer.lvl_embed.weight[0]
    arrays: Arrays = {
        names.FIRST_INPUT: first.numpy(),
        names.MODULATION: table.transpose(0, 1).contiguous().numpy(),
    }
    for layer, (key, value) in enumerate(condition.cross):
        arrays[names.text_key(layer)] = key.transpose(2, 3).contiguous().numpy()
        arrays[names.text_value(layer)] = value.contiguous().numpy()
    return arrays


def _cache_arrays(
    cache: Cache, key: Any, value: Any, order: NDArray[np.int64], start: int = 0
) -> Arrays:
    arrays: Arrays = {}
    for layer, pair in enumerate(cache.pairs):
        assert pair is not None  # the caller asks after the first step
        arrays[key(layer)] = pair[0][start:].numpy()[..., order]
        arrays[value(layer)] = pair[1][start:].contiguous().numpy()
    return arrays

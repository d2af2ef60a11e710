"""The baselines for text to image: generation as the Infinity authors publish it, and our modules
in a loop whose scales can be compiled.

After `autoregressive_infer_cfg` of github.com/FoundationVision/Infinity (models/infinity.py,
basic.py), with exact softmax attention in the place of flash-attn. Against the graphs that means:
keys and values of the text are projected in every block at every scale, text is not padded, the
head makes both logits of a bit, these are filtered by topk and sort, and the cache is batch major
and concatenated. One step differs: theirs draws with torch.multinomial, ours by inverse CDF from
given uniforms, which is no slower.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_deploy.export.baselines.published_path import (
    BatchMajorCache,
    Generation,
    Mark,
    decode_in_place,
)
from var_deploy.export.baselines.torch_peers import (
    Compiler,
    compiled,
    fill_randomly,
    without_initialisation,
)
from var_deploy.export.checkpoint.random_weights import infinity_spreads
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.bits import draw_bits, guide, probability_of_one
from var_deploy.export.models.infinity import InfinityTransformer, TextCondition, rotate
from var_deploy.export.models.rope import rope_tables
from var_deploy.export.models.transformer import Cache
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import BitSampling, ScaleSampling
from var_deploy.spec import TextModelSpec


def random_text_modules(spec: TextModelSpec) -> tuple[BitTokenizer, InfinityTransformer]:
    """Build the modules of a generation (no encoder) with random fp32 weights on the CPU."""
    with without_initialisation():
        tokenizer = BitTokenizer(spec.tokenizer).eval()
        transformer = InfinityTransformer(spec).eval()
    del tokenizer.encoder
    for module in (tokenizer, transformer):
        fill_randomly(module, infinity_spreads(spec))
    return tokenizer, transformer


@torch.no_grad()
def generate_text_as_published(
    tokenizer: BitTokenizer,
    transformer: InfinityTransformer,
    prompts: PromptRows,
    uniforms_BD: Tensor,
    sampling: BitSampling,
    *,
    guidance: bool,
    mark: Mark = lambda: None,
) -> Generation:
    """Generate images from features of B prompts and uniforms [B, `NextScaleSpec.draws`].

    `mark` is called at the start, before the first scale, after each scale and after the decoder.
    """
    spec, batch = transformer.spec, len(prompts)
    mark()
    features, lengths = _rows(transformer, prompts, guidance)
    text, valid, cond = _text(transformer, features, lengths)
    shared = transformer.shared_ada_lin(cond).unflatten(-1, (6, -1)).unsqueeze(1)  # [G, 1, 6, C]
    x = cond.unsqueeze(1) + transformer.pos_start
    f_hat = cond.new_zeros(
        batch, spec.tokenizer.bits, *spec.tokenizer.latent_grid, dtype=torch.float32
    )
    cache, drawn = BatchMajorCache(spec.transformer.depth), list[Tensor]()
    tables = [tuple(map(torch.from_numpy, pair)) for pair in rope_tables(spec)]
    uniforms = uniforms_BD.view(batch, spec.total_tokens, *spec.token_shape)
    mark()
    for k, draws in enumerate(uniforms.split(list(spec.scale_lengths), dim=1)):
        chosen = sampling.at(k, spec.scales)
        x = x + transformer.lvl_embed.weight[k]
        turn = partial(rotate, cos_LD=tables[k][0], sin_LD=tables[k][1])
        for layer, block in enumerate(transformer.blocks):
            x = _block(block, x, shared, text, valid, cache, layer, turn)
        logits = _logits(transformer, x, cond, chosen, batch)
        drawn.append(_sample(logits, draws, chosen))
        f_hat.add_(tokenizer.contribution(k, drawn[-1]))
        if k + 1 < spec.scales:
            x = transformer.word_embed(tokenizer.next_input(k, f_hat))
            x = x.repeat(len(features) // batch, 1, 1)
        mark()
    image = decode_in_place(tokenizer.decoder, f_hat).add_(1).mul_(0.5)
    mark()
    return Generation(image=image, tokens=drawn)


def _rows(
    transformer: InfinityTransformer, prompts: PromptRows, guidance: bool
) -> tuple[Tensor, Tensor]:
    """Return features [G, S, Ct], no longer than the longest text, and lengths [G]."""
    longest = int(prompts.lengths.max())
    negative = None
    if prompts.negative is not None:
        longest = max(longest, int(prompts.negative.lengths.max()))
        negative = (
            torch.from_numpy(prompts.negative.features[:, :longest]),
            torch.from_numpy(prompts.negative.lengths),
        )
    features = torch.from_numpy(prompts.features[:, :longest])
    lengths = torch.from_numpy(prompts.lengths)
    if guidance:
        features, lengths = transformer.guided_rows(features, lengths, negative)
    return features, lengths


def _text(
    transformer: InfinityTransformer, features: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return text tokens [G, S, C], which of them count (None: all), and the pooled text [G, C]."""
    longest = features.shape[1]
    valid = torch.arange(longest) < lengths.unsqueeze(1)
    normed = transformer.text_norm(features)
    cond = transformer.text_proj_for_sos.ca(normed, valid[:, None, None])
    mask = None if bool(valid.all()) else valid[:, None, None]
    return transformer.text_proj_for_ca(normed), mask, cond


def _block(
    block: Any,
    x: Tensor,
    shared: Tensor,
    text: Tensor,
    valid: Tensor | None,
    cache: Cache,
    layer: int,
    turn: Any,
) -> Tensor:
    width = x.shape[-1]
    table = block.ada_gss + shared
    gamma1, gamma2, scale1, scale2, shift1, shift2 = table.unbind(2)  # each [G, 1, C]
    h = F.layer_norm(x, (width,), eps=block.eps).mul(scale1.add(1)).add_(shift1)
    x = x + block.sa(h, None, cache, layer, turn).mul_(gamma1)
    x = x + block.ca(block.ca_norm(x), block.ca.keys_values(text), valid)
    h = F.layer_norm(x, (width,), eps=block.eps).mul(scale2.add(1)).add_(shift2)
    out: Tensor = x + block.ffn(h).mul(gamma2)
    return out


def _logits(
    transformer: InfinityTransformer,
    x: Tensor,
    cond: Tensor,
    chosen: ScaleSampling,
    batch: int,
) -> Tensor:
    """Both logits of every bit [B, L, 2e], in fp32: temperature, then guidance."""
    with torch.autocast("cpu", enabled=False):
        h = transformer.head_nm(x.float(), transformer.head_nm.modulation(cond.float()))
        raw: Tensor = transformer.head(h).mul(1 / chosen.temperature)
    if len(raw) > batch:
        raw = chosen.guidance * raw[:batch] + (1 - chosen.guidance) * raw[batch:]
    return raw


def _sample(logits_BLV: Tensor, uniforms_BLe: Tensor, sampling: ScaleSampling) -> Tensor:
    """Draw bits [B, L, e]; overwrites the logits. top_k is at most the two values of a bit."""
    pairs: Tensor = logits_BLV.unflatten(-1, (-1, 2))
    kept = pairs.topk(2, sorted=False).values
    pairs.masked_fill_(pairs < kept.amin(dim=-1, keepdim=True), -torch.inf)
    if sampling.top_p > 0:
        ascending, order = pairs.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - sampling.top_p
        drop[..., -1:] = False
        pairs.masked_fill_(drop.scatter(-1, order, drop), -torch.inf)
    zero: Tensor = pairs.softmax(dim=-1)[..., 0]
    return (uniforms_BLe >= zero).to(torch.uint8)


class TextPeer:
    """A generation with our modules, which compute all that depends on the text alone once per
    image; each scale is one function that can be compiled.

    Args:
        compiler: a backend of torch.compile, such as "inductor".
    """

    def __init__(
        self,
        spec: TextModelSpec,
        prompts: PromptRows,
        sampling: BitSampling,
        *,
        guidance: bool,
        compiler: Compiler,
    ) -> None:
        self.spec, self.guidance, self.prompts = spec, guidance, prompts
        self._sampling = [sampling.at(k, spec.scales) for k in range(spec.scales)]
        self.tokenizer, self.transformer = random_text_modules(spec)
        self._scale = compiled(self._eager_scale, compiler)
        self._decode = compiled(self.tokenizer.decode, compiler)

    @torch.no_grad()  # the compiler trips over NumPy tables of angles in inference mode
    def __call__(self, uniforms_BD: Tensor, mark: Mark = lambda: None) -> Tensor:
        """Uniforms [B, draws] → images [B, 3, H, W] in [-1, 1]; `mark` as in
        `generate_text_as_published`."""
        spec, batch = self.spec, len(self.prompts)
        mark()
        features, lengths = _rows(self.transformer, self.prompts, self.guidance)
        condition = self.transformer.condition(features, lengths)
        cache = Cache(spec.transformer.depth)
        f_hat = torch.zeros(batch, spec.tokenizer.bits, *spec.tokenizer.latent_grid)
        uniforms = uniforms_BD.view(batch, spec.total_tokens, *spec.token_shape)
        following: Tensor | None = None
        mark()
        for k, draws in enumerate(uniforms.split(list(spec.scale_lengths), dim=1)):
            f_hat, following = self._scale(k, following, condition, cache, f_hat, draws)
            mark()
        image: Tensor = self._decode(f_hat)
        mark()
        return image

    def _eager_scale(
        self,
        scale: int,
        following: Tensor | None,
        condition: TextCondition,
        cache: Cache,
        f_hat: Tensor,
        draws_BLe: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        chosen = self._sampling[scale]
        raw = self.transformer.step(scale, following, condition, cache).logits
        logits = guide(raw, chosen.guidance, chosen.temperature, len(draws_BLe))
        bits, _ = draw_bits(probability_of_one(logits, top_p=chosen.top_p), draws_BLe)
        f_hat = f_hat + self.tokenizer.contribution(scale, bits)
        if scale + 1 == self.spec.scales:
            return f_hat, None
        return f_hat, self.tokenizer.next_input(scale, f_hat)

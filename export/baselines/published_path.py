"""The baseline: generation as the VAR authors publish it, over our modules' parameters.

After `autoregressive_infer_cfg` of github.com/FoundationVision/VAR (models/var.py, basic_var.py,
helpers.py, basic_vae.py), where neither flash-attn nor xformers is installed. Against our own
modules that means: the AdaLN projections run in every block at every scale, the cache is batch
major and concatenated along the sequence, the logits are filtered by topk and sort, and additions
and activations work in place where theirs do. One step differs: theirs draws with
torch.multinomial, ours by inverse CDF from given uniforms, which is no slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from var_deploy.export.models.autoencoder import Upsample
from var_deploy.export.models.sampler import guide
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Cache, HeadNorm, Transformer
from var_deploy.sampling import Sampling, ScaleSampling

Mark = Callable[[], None]


class Generation(NamedTuple):
    """Result of the published path: images and tokens."""
    image: Tensor  # [B, channels, S, S] in [0, 1]
    tokens: list[Tensor]  # [B, L_k] a scale


class BatchMajorCache(Cache):
    """Keys and values kept as [G, H, P, D], the layout that attention reads."""

    def extend(self, layer: int, k_LGHD: Tensor, v_LGHD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = k_LGHD.permute(1, 2, 0, 3), v_LGHD.permute(1, 2, 0, 3)
        past = self.pairs[layer]
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        self.pairs[layer] = (k, v)
        return k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)


@torch.no_grad()
def generate_as_published(
    tokenizer: Tokenizer,
    transformer: Transformer,
    labels_B: Tensor,
    uniforms_BT: Tensor,
    sampling: Sampling,
    *,
    guidance: bool,
    mark: Mark = lambda: None,
) -> Generation:
    """Generate images from labels [B] and uniforms [B, T].

    Without guidance there are B rows instead of 2B, which the published code does not offer.
    `mark` is called at the start, before the first scale, after each scale and after the decoder.
    """
    spec, quantize = transformer.spec, tokenizer.quantize
    t, batch = spec.transformer, len(labels_B)
    mark()
    rows = labels_B
    if guidance:
        rows = torch.cat((labels_B, torch.full_like(labels_B, t.classes)))
    cond = transformer.class_emb(rows)
    shared: Tensor | None = None
    if t.shared_adaln:
        shared = transformer.shared_ada_lin(cond).view(-1, 1, 6, t.width)
    places = transformer.lvl_embed(transformer.lvl_1L) + transformer.pos_1LC
    x = cond.unsqueeze(1) + transformer.pos_start + places[:, :1]
    f_hat = cond.new_zeros(batch, spec.tokenizer.code_width, *[spec.tokenizer.latent_side] * 2)
    cache, drawn = BatchMajorCache(t.depth), list[Tensor]()
    ends = spec.prefix_lengths[1:]
    mark()
    for k, draws in enumerate(uniforms_BT.split(list(spec.scale_lengths), dim=1)):
        chosen = sampling.at(k, spec.scales)
        for layer, block in enumerate(transformer.blocks):
            x = _block(block, x, cond, shared, cache, layer)
        h = _head_norm(transformer.head_nm, x.float(), cond).float()
        logits = guide(transformer.head(h).float(), chosen.guidance, batch)
        drawn.append(_sample(logits, draws, chosen))
        f_hat.add_(quantize.contribution(k, quantize.lookup(k, drawn[-1])))
        if k + 1 < spec.scales:
            x = transformer.word_embed(quantize.next_input(k, f_hat))
            x = (x + places[:, ends[k] : ends[k + 1]]).repeat(len(rows) // batch, 1, 1)
        mark()
    image = decode_in_place(tokenizer.decoder, tokenizer.post_quant_conv(f_hat))
    image.add_(1).mul_(0.5)
    mark()
    return Generation(image=image, tokens=drawn)


def _block(
    block: Any, x: Tensor, cond_GC: Tensor, shared: Tensor | None, cache: Cache, layer: int
) -> Tensor:
    width = x.shape[-1]
    if shared is not None:
        table = block.ada_gss + shared
    else:
        table = block.ada_lin(cond_GC).view(-1, 1, 6, width)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = table.unbind(2)  # each [G, 1, C]
    h = F.layer_norm(x, (width,), eps=block.eps).mul(scale1.add(1)).add_(shift1)
    x = x + block.attn(h, None, cache, layer).mul_(gamma1)
    h = F.layer_norm(x, (width,), eps=block.eps).mul(scale2.add(1)).add_(shift2)
    out: Tensor = x + block.ffn(h).mul(gamma2)
    return out


def _head_norm(norm: HeadNorm, x: Tensor, cond_GC: Tensor) -> Tensor:
    width = x.shape[-1]
    scale, shift = norm.ada_lin(cond_GC).view(-1, 1, 2, width).unbind(2)
    return F.layer_norm(x, (width,), eps=norm.eps).mul(scale.add(1)).add_(shift)


def _sample(logits_BLV: Tensor, uniforms_BL: Tensor, sampling: ScaleSampling) -> Tensor:
    """Sample tokens [B, L]; overwrites the logits. The temperature is our addition."""
    logits = logits_BLV if sampling.temperature == 1 else logits_BLV.div_(sampling.temperature)
    if sampling.top_k > 0:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]), sorted=False).values
        logits.masked_fill_(logits < kept.amin(dim=-1, keepdim=True), -torch.inf)
    if sampling.top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - sampling.top_p
        drop[..., -1:] = False
        logits.masked_fill_(drop.scatter(-1, order, drop), -torch.inf)
    cdf = logits.softmax(dim=-1).cumsum_(dim=-1)
    # a uniform is at most 1 - 2^-24, so its product with the sum rounds to something smaller
    return torch.searchsorted(cdf, uniforms_BL.unsqueeze(-1) * cdf[..., -1:], right=True)[..., 0]


def decode_in_place(decoder: Any, x: Tensor) -> Tensor:
    """Decode latents [B, Cv, h, w] to an image in [-1, 1].

    In place, SiLU of a map that is too large for malloc to keep takes half the time (107 → 64 ms at
    160 × 256²): without it the baseline would look slower than it is.
    """
    x = decoder.conv_in(x)
    x = _residual(decoder.mid.block_1, x)
    x = _residual(decoder.mid.block_2, decoder.mid.attn_1(x))
    for level in reversed(decoder.up):
        for i, block in enumerate(level.block):
            x = _residual(block, x)
            if len(level.attn):
                x = level.attn[i](x)
        if hasattr(level, Upsample.key):
            x = getattr(level, Upsample.key)(x)
    image: Tensor = decoder.conv_out(F.silu(decoder.norm_out(x), inplace=True))
    return image.clamp_(-1, 1)


def _residual(block: Any, x: Tensor) -> Tensor:
    h = block.conv1(F.silu(block.norm1(x), inplace=True))
    h = block.conv2(F.silu(block.norm2(h), inplace=True))
    out: Tensor = (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x) + h
    return out

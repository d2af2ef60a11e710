"""VAR and its tokenizer once more, as another project would hold them: the interface of the
published code, written from the formulas alone, with nothing of `var_deploy.export.models`.

Each module keeps its parameters under the keys of the released state dicts and computes with plain
functions. `twist` names a deliberate difference that leaves every key and shape as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Keyed(nn.Module):
    """Parameters and buffers under the dotted names of a state dict."""

    def __init__(self, weights: Mapping[str, Any], buffers: Sequence[str]) -> None:
        super().__init__()
        for key, array in weights.items():
            *folders, name = key.split(".")
            owner: nn.Module = self
            for folder in folders:
                if folder not in owner._modules:
                    owner.add_module(folder, nn.Module())
                owner = owner.get_submodule(folder)
            tensor = torch.from_numpy(np.array(array))
            if name in buffers:
                owner.register_buffer(name, tensor)
            else:
                owner.register_parameter(name, nn.Parameter(tensor))

    def w(self, key: str) -> Tensor:
        return self.get_parameter(key)

    def has(self, key: str) -> bool:
        return key in self.state_dict()

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x @ self.w(f"{key}.weight").T + self.w(f"{key}.bias")

    def conv(self, x: Tensor, key: str, **how: Any) -> Tensor:
        return F.conv2d(x, self.w(f"{key}.weight"), self.w(f"{key}.bias"), **how)


class ForeignVar(Keyed):
    """label_B, x_BLCv → logits; drops labels and activations as training code does."""

    def __init__(
        self,
        weights: Mapping[str, Any],
        patch_nums: Sequence[int],
        num_heads: int,
        twist: str = "",
    ) -> None:
        super().__init__(weights, ("lvl_1L", "attn_bias_for_masking", "zero_k_bias"))
        self.patch_nums, self.num_heads, self.twist = list(patch_nums), num_heads, twist
        self.cond_drop_rate = 0.9
        self.num_classes = len(self.w("class_emb.weight")) - 1
        self.depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))

    def forward(self, label_B: Tensor, x_BLCv: Tensor) -> Tensor:
        dropped = torch.rand(len(label_B)) < self.cond_drop_rate
        cond = self.w("class_emb.weight")[torch.where(dropped, self.num_classes, label_B)]
        level = torch.tensor([k for k, side in enumerate(self.patch_nums) for _ in range(side**2)])
        first = cond[:, None] + self.w("pos_start")
        x = torch.cat([first, self.linear(x_BLCv, "word_embed")], dim=1)
        x = x + self.w("lvl_embed.weight")[level] + self.w("pos_1LC")
        x = F.dropout(x, 0.5, self.training)
        reach = 1 if self.twist == "sees a scale ahead" else 0
        hidden = level[:, None] + reach < level[None, :]
        swish = F.silu(cond)
        for n in range(self.depth):
            x = self.block(x, f"blocks.{n}", swish, hidden)
        scale, shift = self.linear(swish, "head_nm.ada_lin.1")[:, None].chunk(2, dim=-1)
        return self.linear(norm(x) * (1 + scale) + shift, "head")

    def block(self, x: Tensor, key: str, swish: Tensor, hidden: Tensor) -> Tensor:
        if self.has("shared_ada_lin.1.weight"):
            six = self.linear(swish, "shared_ada_lin.1").unflatten(-1, (6, -1))
            six = six + self.w(f"{key}.ada_gss")[0]
        else:
            six = self.linear(swish, f"{key}.ada_lin.1").unflatten(-1, (6, -1))
        gain1, gain2, scale1, scale2, shift1, shift2 = (six[:, None, i] for i in range(6))
        if self.twist == "scales the other way round":
            scale1, scale2 = scale2, scale1
        x = x + gain1 * self.attention(norm(x) * (1 + scale1) + shift1, f"{key}.attn", hidden)
        h = self.linear(norm(x) * (1 + scale2) + shift2, f"{key}.ffn.fc1")
        h = F.relu(h) if self.twist == "relu" else F.gelu(h, approximate="tanh")
        return x + gain2 * self.linear(h, f"{key}.ffn.fc2")

    def attention(self, x: Tensor, key: str, hidden: Tensor) -> Tensor:
        q, k, v = (x @ self.w(f"{key}.mat_qkv.weight").T).chunk(3, dim=-1)
        q, v = q + self.w(f"{key}.q_bias"), v + self.w(f"{key}.v_bias")
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # [B, L, H, D]
        factor: Any = 0.25 / math.sqrt(q.shape[-1])
        if self.has(f"{key}.scale_mul_1H11"):
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            factor = self.w(f"{key}.scale_mul_1H11").clamp(max=math.log(100)).exp()
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * factor
        shares = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        h = torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2)
        return self.linear(h, f"{key}.proj")


def norm(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


class ForeignVqvae(Keyed):
    """img_to_idxBl, idxBl_to_img, fhat_to_img, and idxBl_to_var_input of its quantizer."""

    def __init__(
        self, weights: Mapping[str, Any], patch_nums: Sequence[int], twist: str = ""
    ) -> None:
        super().__init__(weights, ("ema_vocab_hit_SV",))
        self.sides, self.twist = list(patch_nums), twist
        self.quantize.idxBl_to_var_input = self.var_input  # type: ignore[union-attr]

    def img_to_idxBl(self, image: Tensor) -> list[Tensor]:  # noqa: N802
        rest = self.conv(self.encoder_net(image), "quant_conv", padding=1)
        codes = self.w("quantize.embedding.weight")
        found = []
        for k, side in enumerate(self.sides):
            z = F.adaptive_avg_pool2d(rest, side).flatten(2).transpose(1, 2)
            far = torch.cdist(z, codes, p=1.0 if self.twist == "nearest by L1" else 2.0)
            found.append(far.argmin(dim=-1))
            rest = rest - self.part(k, found[-1])
        return found

    def idxBl_to_img(  # noqa: N802
        self, tokens: list[Tensor], same_shape: bool, last_one: bool
    ) -> Tensor:
        assert same_shape and last_one
        parts = [self.part(k, t) for k, t in enumerate(tokens)]
        return self.fhat_to_img(torch.stack(parts).sum(0))

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        image = self.decoder_net(self.conv(f_hat, "post_quant_conv", padding=1))
        return image.tanh() if self.twist == "tanh for the clamp" else image.clamp(-1, 1)

    def var_input(self, tokens: list[Tensor]) -> Tensor:
        f_hat: Any = 0
        rows = []
        for k, side in enumerate(self.sides[1:]):
            f_hat = f_hat + self.part(k, tokens[k])
            rows.append(F.adaptive_avg_pool2d(f_hat, side).flatten(2).transpose(1, 2))
        return torch.cat(rows, dim=1)

    def part(self, scale: int, tokens: Tensor) -> Tensor:
        """What the tokens of a scale add to f_hat."""
        side, last = self.sides[scale], self.sides[-1]
        h = self.w("quantize.embedding.weight")[tokens].transpose(1, 2).unflatten(2, (side, side))
        if side != last:
            mode = "bilinear" if self.twist == "bilinear codes" else "bicubic"
            h = F.interpolate(h, size=(last, last), mode=mode)
        ticks = np.linspace(1 / 12, 11 / 12, 4)
        nearest = int(np.argmin(np.abs(ticks - scale / (len(self.sides) - 1))))
        phi = self.conv(h, f"quantize.quant_resi.qresi_ls.{nearest}", padding=1)
        return 0.5 * h + 0.5 * phi

    def encoder_net(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in", padding=1)
        for i in range(self.levels("encoder.down")):
            x = self.level(x, f"encoder.down.{i}")
            if self.has(f"encoder.down.{i}.downsample.conv.weight"):
                padded = F.pad(x, (0, 1, 0, 1))
                x = self.conv(padded, f"encoder.down.{i}.downsample.conv", stride=2)
        return self.out(self.middle(x, "encoder.mid"), "encoder")

    def decoder_net(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv(x, "decoder.conv_in", padding=1), "decoder.mid")
        for i in reversed(range(self.levels("decoder.up"))):
            x = self.level(x, f"decoder.up.{i}")
            if self.has(f"decoder.up.{i}.upsample.conv.weight"):
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(x, f"decoder.up.{i}.upsample.conv", padding=1)
        return self.out(x, "decoder")

    def levels(self, key: str) -> int:
        return len(list(self.get_submodule(key).children()))

    def level(self, x: Tensor, key: str) -> Tensor:
        for j in range(self.levels(f"{key}.block")):
            x = self.residual(x, f"{key}.block.{j}")
            if self.has(f"{key}.attn.{j}.qkv.weight"):
                x = self.attend(x, f"{key}.attn.{j}")
        return x

    def middle(self, x: Tensor, key: str) -> Tensor:
        x = self.attend(self.residual(x, f"{key}.block_1"), f"{key}.attn_1")
        return self.residual(x, f"{key}.block_2")

    def out(self, x: Tensor, key: str) -> Tensor:
        return self.conv(F.silu(self.groups(x, f"{key}.norm_out")), f"{key}.conv_out", padding=1)

    def groups(self, x: Tensor, key: str) -> Tensor:
        return F.group_norm(x, 32, self.w(f"{key}.weight"), self.w(f"{key}.bias"), 1e-6)

    def residual(self, x: Tensor, key: str) -> Tensor:
        h = self.conv(F.silu(self.groups(x, f"{key}.norm1")), f"{key}.conv1", padding=1)
        h = self.conv(F.silu(self.groups(h, f"{key}.norm2")), f"{key}.conv2", padding=1)
        short = f"{key}.nin_shortcut"
        return h + (self.conv(x, short) if self.has(f"{short}.weight") else x)

    def attend(self, x: Tensor, key: str) -> Tensor:
        q, k, v = self.conv(self.groups(x, f"{key}.norm"), f"{key}.qkv").flatten(2).chunk(3, dim=1)
        shares = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])).softmax(dim=-1)
        h = torch.einsum("bij,bcj->bci", shares, v).view_as(x)
        return x + self.conv(h, f"{key}.proj_out")

"""The reference of `verify` when the user's own modules compute it.

One teacher-forced pass gives the logits of all scales from the tokens of the scales before. Where
these logits sample the same tokens that were put in, the generation is the user's own, scale by
scale; where they do not, generation starts again with the user's tokens up to that scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from var_deploy import names
from var_deploy.export.models.sampler import draw, filter_logits, guide
from var_deploy.export.verify.held_modules import OwnForward
from var_deploy.manifest import Manifest

if TYPE_CHECKING:
    from var_deploy.export.verify.reference import GenerationInputs, Trace

Generate = Callable[[Sequence[Tensor]], "Trace"]


def own_trace(
    own: OwnForward, manifest: Manifest, inputs: GenerationInputs, generate: Generate
) -> Trace:
    """Return the trace of a generation whose logits, tokens and image are the user's modules'.

    Keys, values and f_hat, which the interface of those modules does not show, come from
    `generate`, which takes the tokens of the first scales and samples the rest.
    """
    trace = generate(())
    left = len(trace.scales)  # each turn settles a scale at least
    while True:
        teacher, logits, tokens, margins = _draws(own, manifest, inputs, trace)
        found = [torch.from_numpy(scale.outputs[names.TOKENS]) for scale in trace.scales]
        same = [torch.equal(a, b) for a, b in zip(found, tokens, strict=True)]
        if all(same) or not left:
            break
        left -= 1
        trace = generate(tokens[: same.index(False) + 1])
    scales = []
    for k, scale in enumerate(trace.scales):
        outputs = {**scale.outputs, names.LOGITS: logits[k].numpy()}
        if k < len(teacher):
            outputs[names.NEXT_INPUT] = teacher[k].numpy()
        changed = dataclasses.replace(scale, outputs=outputs, margins=margins[k].numpy())
        scales.append(changed)
    image = None if manifest.more_smooth else own.decode_tokens(found)
    if image is None:
        image = own.decode(torch.from_numpy(trace.f_hat))
    return dataclasses.replace(trace, scales=scales, image=as_picture(image))


def _draws(
    own: OwnForward, manifest: Manifest, inputs: GenerationInputs, trace: Trace
) -> tuple[Sequence[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return inputs of scales 1..K-1, then guided logits, tokens and margins of every scale, from
    the tokens of the trace."""
    spec, batch = manifest.model, len(inputs.labels)
    tokens = [torch.from_numpy(scale.outputs[names.TOKENS]) for scale in trace.scales]
    next_inputs = [torch.from_numpy(s.outputs[names.NEXT_INPUT]) for s in trace.scales[:-1]]
    # where codes are mixed, tokens do not tell the next input
    teacher = None if manifest.more_smooth else own.teacher_input(tokens)
    if teacher is None:
        teacher = torch.cat(next_inputs, dim=1)
    rows = [*inputs.labels, *[spec.transformer.classes] * (manifest.rows - batch)]
    all_logits = own.logits(torch.tensor(rows), teacher.repeat(manifest.rows // batch, 1, 1))
    lengths = list(spec.scale_lengths)
    uniforms = torch.from_numpy(inputs.uniforms).split(lengths, dim=1)
    guided, drawn, margins = [], [], []
    for k, of_scale in enumerate(all_logits.split(lengths, dim=1)):
        chosen = manifest.defaults.at(k, spec.scales)
        logits = guide(of_scale, chosen.guidance, batch)
        kept = filter_logits(logits / chosen.temperature, chosen.top_k, chosen.top_p)
        found, margin = draw(kept, uniforms[k])
        guided.append(logits)
        drawn.append(found)
        margins.append(margin)
    return teacher.split(lengths[1:], dim=1), guided, drawn, margins


def as_picture(image: Tensor) -> NDArray[Any]:
    """Images [B, channels, side, side] in [-1, 1] → [B, side, side, channels] in [0, 1]."""
    picture: NDArray[Any] = ((image + 1) / 2).permute(0, 2, 3, 1).numpy()
    return picture

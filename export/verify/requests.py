"""The generations that `verify` compares, for both kinds of model."""

from __future__ import annotations

from collections.abc import Sequence

from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.checkpoint.text_model import LoadedTextModel
from var_deploy.export.verify.held_modules import OwnForward
from var_deploy.export.verify.reference import (
    Inputs,
    Reference,
    generation_inputs,
    trace_reference,
)
from var_deploy.export.verify.text_reference import (
    TextInputs,
    text_inputs,
    trace_text_reference,
)
from var_deploy.manifest import Manifest


def inputs_of(
    manifest: Manifest,
    seed: int,
    first: int,
    keys: Sequence[tuple[int, int]] | None = None,
) -> Inputs:
    """Return the inputs of the images `first` … of a call with this seed: a batch."""
    if manifest.takes_text:
        return text_inputs(manifest, seed, first, keys)
    return generation_inputs(manifest, seed, first, keys)


def reference_of(
    model: LoadedModel | LoadedTextModel,
    manifest: Manifest,
    seed: int,
    inputs: Inputs,
    own: OwnForward | None = None,
) -> Reference:
    """Return the generation of the PyTorch model, see `trace_reference`."""
    if isinstance(model, LoadedTextModel):
        assert isinstance(inputs, TextInputs)
        return trace_text_reference(model, manifest, seed, inputs)
    assert not isinstance(inputs, TextInputs)
    return trace_reference(model, manifest, seed, inputs=inputs, own=own)  # type: ignore[arg-type]

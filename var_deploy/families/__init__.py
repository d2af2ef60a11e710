"""Model families: the sizes, inputs and costs of each, one object per family.

A family is a way to build a next-scale transformer. Everything that the runtime, the planner and
the manifest need to know of one stands in its `Family`; graphs, reference modules and checkpoint
keys stand in its counterpart in `var_deploy.export.families`. docs/DESIGN.md tells how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from var_deploy.families.base import Family
from var_deploy.families.gpt2 import GPT2
from var_deploy.families.var import VAR

if TYPE_CHECKING:
    from var_deploy.spec import TransformerSpec

FAMILIES: Mapping[str, Family] = {family.name: family for family in (VAR, GPT2)}


def family_of(transformer: TransformerSpec) -> Family:
    """Return the family of a transformer."""
    return FAMILIES[transformer.family]


__all__ = ["FAMILIES", "Family", "family_of"]

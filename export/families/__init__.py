"""Model families on the build machine: graphs, reference modules and checkpoint keys.

Each `ExportFamily` is the counterpart of the `var_deploy.families.Family` of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

from var_deploy.export.families.base import BlockContext, ExportFamily
from var_deploy.export.families.gpt2 import GPT2
from var_deploy.export.families.var import VAR
from var_deploy.spec import TransformerSpec

EXPORT_FAMILIES: Mapping[str, ExportFamily] = {family.name: family for family in (VAR, GPT2)}


def export_family_of(transformer: TransformerSpec) -> ExportFamily:
    """Return the export family of a transformer."""
    return EXPORT_FAMILIES[transformer.family]


__all__ = ["EXPORT_FAMILIES", "BlockContext", "ExportFamily", "export_family_of"]

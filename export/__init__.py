"""The build machine's half of var-deploy: models, graphs, bundle writer, verification.

    from var_deploy.export import export_modules, verify_bundle
    from var_deploy.export import var as VAR
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_deploy.export.modules import export_modules
    from var_deploy.export.verify.bundle import verify_bundle

__all__ = ["export_modules", "verify_bundle"]


def __getattr__(name: str) -> Any:
    # imported on first use: both need torch, and listing the presets does not
    if name == "export_modules":
        from var_deploy.export.modules import export_modules

        return export_modules
    if name == "verify_bundle":
        from var_deploy.export.verify.bundle import verify_bundle

        return verify_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

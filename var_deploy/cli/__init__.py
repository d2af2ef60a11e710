"""The command line, whose commands `var_deploy.cli.program` puts together.

They are imported when `main` is first asked for, so that `python -m var_deploy.cli` can prepare for
Ctrl-C before (see `var_deploy.__main__`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_deploy.cli.program import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    if name == "main":
        from var_deploy.cli.program import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

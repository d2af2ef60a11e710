"""The command line. A command is imported when it is named, or when all are listed, and
imports what it needs when it runs: `--help` is quick."""

from __future__ import annotations

import click

from var_deploy import __version__
from var_deploy.cli.console import Commands, Program

__all__ = ["main"]


CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "auto_envvar_prefix": "VAR_DEPLOY",
}


# the help lists them in this order
COMMANDS = (
    *("demo", "export", "verify", "inspect", "labels", "generate", "encode", "reconstruct", "edit"),
    *("sample", "serve", "triton", "build", "plan", "doctor", "bench"),
)


@click.group(cls=Program, commands=Commands("var_deploy.cli", COMMANDS), context_settings=CONTEXT)
@click.version_option(
    __version__, "--version", "-V", prog_name="var-deploy", allow_from_autoenv=False
)
def main() -> None:
    """Deploy VAR image generators: export a checkpoint once, run it without PyTorch.

    \b
    Example:
      var-deploy demo
      var-deploy export pocket --out build/pocket
      var-deploy verify build/pocket
      var-deploy generate build/pocket --labels star,3 --count 16 --out grid.png

    Exit codes: 0 done, 1 the work failed or a check did not hold, 2 bad usage, 130 Ctrl-C.

    \b
    Environment:
      VAR_DEPLOY_COMMAND_OPTION  an option that is not typed, as in VAR_DEPLOY_GENERATE_SEED=7
      VAR_DEPLOY_TRACEBACK=1     shows where an error came from
      NO_COLOR=1                 no colours; there are none where the output is not a terminal
      COLUMNS=80                 width of tables; that of the terminal, and any in a pipe or file

    \b
    Completion, for bash, zsh or fish:
      eval "$(_VAR_DEPLOY_COMPLETE=bash_source var-deploy)"
    """

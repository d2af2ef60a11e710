"""The command line. Each command imports what it needs when it runs: `--help` is quick."""

from __future__ import annotations

import click

from var_deploy import __version__
from var_deploy.cli.bench import bench
from var_deploy.cli.build import build
from var_deploy.cli.console import Program
from var_deploy.cli.demo import demo
from var_deploy.cli.doctor import doctor
from var_deploy.cli.edit import edit
from var_deploy.cli.encode import encode
from var_deploy.cli.export import export
from var_deploy.cli.generate import generate
from var_deploy.cli.inspect import inspect
from var_deploy.cli.labels import labels
from var_deploy.cli.plan import plan
from var_deploy.cli.reconstruct import reconstruct
from var_deploy.cli.sample import sample
from var_deploy.cli.serve import serve
from var_deploy.cli.triton import triton
from var_deploy.cli.verify import verify

__all__ = ["main"]


CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "auto_envvar_prefix": "VAR_DEPLOY",
}


@click.group(cls=Program, context_settings=CONTEXT)
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


# the help lists them in this order
main.add_command(demo)
main.add_command(export)
main.add_command(verify)
main.add_command(inspect)
main.add_command(labels)
main.add_command(generate)
main.add_command(encode)
main.add_command(reconstruct)
main.add_command(edit)
main.add_command(sample)
main.add_command(serve)
main.add_command(triton)
main.add_command(build)
main.add_command(plan)
main.add_command(doctor)
main.add_command(bench)

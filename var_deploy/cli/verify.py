"""`var-deploy verify`: does the bundle compute what the PyTorch model computes?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from var_deploy.cli.console import Progress, needs_extra
from var_deploy.errors import VerificationError

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--checkpoint", type=FILE, help="Transformer weights the bundle was made from.")
@click.option("--tokenizer", type=FILE, help="Tokenizer weights the bundle was made from.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), help="Only these graphs (default: all)."
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def verify(
    bundle: Path,
    checkpoint: Path | None,
    tokenizer: Path | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Compare BUNDLE with the PyTorch model, graph by graph and then the whole loop.

    The report is stored in the bundle's manifest. Ends with 1 where a tolerance does not hold.

    \b
    Example:
      var-deploy verify build/pocket
      var-deploy verify build/d16 --checkpoint var_d16.pth --tokenizer vae_ch160v4096z32.pth
    """
    with needs_extra("export", "verify"):
        from var_deploy.export.verify import verify_bundle

        with Progress() as progress:
            report = verify_bundle(
                bundle,
                checkpoint=checkpoint,
                tokenizer=tokenizer,
                precision=precision,
                progress=progress.update,
            )
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else report.table())
    if not report.passed:
        raise VerificationError(report.failure or f"{bundle} does not compute what the model does")

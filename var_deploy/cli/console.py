"""What all commands share: errors in one line, progress on a terminal, tables."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import click

from var_deploy.errors import VarDeployError

INTERRUPTED = 130  # what shells report for Ctrl-C


class Program(click.Group):
    """A group whose every failure ends in one line on stderr and an exit code, not a traceback.

    VAR_DEPLOY_TRACEBACK=1 lets exceptions through.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            _fail("interrupted", INTERRUPTED, prefix="")
        except VarDeployError as error:
            if _traceback_wanted():
                raise
            _fail(str(error), error.exit_code)
        except OSError as error:  # of a file that no command looked at by itself
            if _traceback_wanted():
                raise
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        except Exception as error:
            if _traceback_wanted():
                raise
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            _fail(f"{what} (unexpected; VAR_DEPLOY_TRACEBACK=1 shows where)", 1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort() from None


def _traceback_wanted() -> bool:
    return os.environ.get("VAR_DEPLOY_TRACEBACK", "0") not in ("", "0")


def _fail(message: str, code: int, prefix: str = "error: ") -> None:
    click.echo(prefix + " ".join(message.split()), err=True)
    sys.exit(code)


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Turn a missing third-party module into one line that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "var_deploy"):
            raise
        raise VarDeployError(
            f'{what} needs {module}, which is not installed; run: pip install "var-deploy[{extra}]"'
        ) from error


class Progress:
    """A one-line bar on stderr, shown only on a terminal and wiped at the end.

    `update(message, fraction)` may be called as often as one likes: it draws ten times a second.
    """

    WIDTH = 24

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._drawn_at = 0.0
        self._message = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._drawn_at:
            click.echo("\r\x1b[K", nl=False, err=True)

    def update(self, message: str, fraction: float) -> None:
        now = time.monotonic()
        fresh = message != self._message or fraction >= 1
        if not self._shown or (now - self._drawn_at < 0.1 and not fresh):
            return
        self._drawn_at, self._message = now, message
        done = round(min(max(fraction, 0.0), 1.0) * self.WIDTH)
        bar = "█" * done + "·" * (self.WIDTH - done)
        click.echo(f"\r\x1b[K{bar} {fraction:4.0%} {message[:60]}", nl=False, err=True)


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns aligned by two spaces; those in `right` are flush right. The first row is a head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def human_bytes(size: int) -> str:
    """12345678 → "12.3 MB" (powers of 1000)."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"

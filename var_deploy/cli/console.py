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
from var_deploy.installation import shadowed

INTERRUPTED = 130  # what shells report for Ctrl-C
WHOLE = 1000  # characters of a purpose, which click would else cut off at the end of a line


class Program(click.Group):
    """A group whose every failure ends in one line on stderr and an exit code, not a traceback.

    VAR_DEPLOY_TRACEBACK=1 lets exceptions through. Commands are listed in the order in which they
    were added, their purpose in full.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, self.commands[name].get_short_help_str(WHOLE)) for name in self.commands]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
        except click.UsageError as error:
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            _fail(error.format_message().rstrip(".") + where, error.exit_code)
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
            if isinstance(error, ModuleNotFoundError) and (reason := shadowed(error)):
                _fail(reason, 1)
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
    click.echo(paint(prefix, "red") + " ".join(message.split()), err=True)
    sys.exit(code)


def paint(text: str, colour: str) -> str:
    """The text in a colour, which `click.echo` takes off again where it writes to no terminal.

    NO_COLOR, not empty, takes it off everywhere (https://no-color.org).
    """
    return text if os.environ.get("NO_COLOR") or not text else click.style(text, fg=colour)


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

    def step(self, done: int, steps: int) -> None:
        """For `on_progress` of a pipeline."""
        self.update(f"step {done} of {steps}", done / max(steps, 1))

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
    columns = zip(*rows, strict=True)
    widths = [max(len(click.unstyle(cell)) for cell in column) for column in columns]
    lines = [
        "  ".join(
            _padding(cell, width) + cell if n in right else cell + _padding(cell, width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _padding(cell: str, width: int) -> str:
    return " " * (width - len(click.unstyle(cell)))


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A line each: a name, and what there is to say, all of it from one column on."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def human_bytes(size: int) -> str:
    """12345678 → "12.3 MB" (powers of 1000)."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"

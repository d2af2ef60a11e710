"""Terminal output of all commands: text, one-line errors, progress bars and tables.

Commands print with `say`, `echo` and `echo_json` alone. Texts may come from a bundle that a
stranger made, from a file name or a picture: no character of them reaches a terminal that would
steer it. Colours are ours, and are written as a mark that no such text can contain.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import FrameType, TracebackType
from typing import Any, TextIO

import click

from var_deploy.errors import VarDeployError
from var_deploy.host.installation import pip_install, shadowed
from var_deploy.host.terminal import (
    INTERRUPTED,
    is_terminal,
    open_standard_streams,
    visible,
    visible_json,
)
from var_deploy.progress import span, speed

SIGNALLED = 128  # plus its number: what shells report for a program that a signal ended
MARK = secrets.token_hex(8)  # stands for the escape character of our own colours
COLOUR = re.compile(rf"<{MARK}:([a-z]*)>")
LONGEST = 4000  # characters of an error
TRUE = ("1", "true", "t", "yes", "y", "on")  # what click takes a flag's variable to mean
WHOLE = 1000  # characters of a purpose, which click would else cut off at the end of a line
VERBOSE = "var_deploy.verbose"  # in `Context.meta`: --verbose was given
PROSE = 96  # columns of running text, where there is room
NARROWEST = 40  # columns that a layout needs, whatever a terminal says of itself
LEAST_CELL = 16  # columns of a cell that is broken into lines


class Terminated(BaseException):
    """Raised for a signal that ends the program, which cleans up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raises Terminated in the main thread for SIGTERM (a service manager, a container that is
    stopped) and SIGHUP (a terminal that is closed), which otherwise end a program at once.

    The second of a kind does. A signal that is ignored or handled already stays as it is.
    """
    changed = []

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


class Commands(MutableMapping[str, click.Command]):
    """Commands by name, each imported when it is first looked up, so that none pays for the others.

    Args:
        package: whose module NAME holds the command NAME.
        names: of the commands, in the order in which they are listed.
    """

    def __init__(self, package: str, names: Sequence[str]) -> None:
        self._package = package
        self._commands: dict[str, click.Command | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> click.Command:
        command = self._commands[name]
        if command is None:
            command = getattr(importlib.import_module(f"{self._package}.{name}"), name)
            self._commands[name] = command
        return command

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __contains__(self, name: object) -> bool:  # without importing it
        return name in self._commands

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)


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
        open_standard_streams()
        in_json = self._asks_for_json(sys.argv[1:] if args is None else args)
        fail = _fail_as_json if in_json else _fail
        try:
            with raising_on_signals():
                code = super().main(args, prog_name, complete_var, False, **extra)
        except Terminated as end:
            fail(f"ended by {end.signal.name}", SIGNALLED + end.signal, prefix="")
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            fail(error.format_message().rstrip(".") + where, error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted", INTERRUPTED, prefix="")
        except VarDeployError as error:
            if _traceback_wanted():
                raise
            fail(str(error), error.exit_code)
        except OSError as error:  # of a file that no command looked at by itself
            if _traceback_wanted():
                raise
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        except Exception as error:
            if _traceback_wanted():
                raise
            if isinstance(error, ModuleNotFoundError) and (reason := shadowed(error)):
                fail(reason, 1)
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            fail(f"{what} (unexpected; VAR_DEPLOY_TRACEBACK=1 shows where)", 1)
        sys.exit(code if isinstance(code, int) else 0)

    def named(self, words: Sequence[str]) -> click.Command | None:
        """The command that a command line names, imported; None where it names none."""
        return next((self.commands[word] for word in words if word in self.commands), None)

    def prepare(self, words: Sequence[str]) -> None:
        """Import what a command line will need: its command, or all of them to list them."""
        if self.named(words) is None:
            list(self.commands.values())

    def _asks_for_json(self, words: Sequence[str]) -> bool:
        """Whether a command line, which may be wrong in other ways, asks for JSON on stdout."""
        words = list(itertools.takewhile(lambda word: word != "--", words))
        command = self.named(words)
        if command is None:
            return "--json" in words
        option = next((p for p in command.params if "--json" in p.opts), None)
        if not isinstance(option, click.Option):
            return False
        if not option.is_flag:  # of bench, which names a file
            return "--json=-" in words or ("--json", "-") in itertools.pairwise(words)
        variable = f"var_deploy_{command.name}_{option.name}".upper()
        return "--json" in words or os.environ.get(variable, "").lower() in TRUE

    def invoke(self, ctx: click.Context) -> Any:
        with _noted_interrupts() as interrupted:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise click.Abort() from None
            except Exception:
                # what is imported when Ctrl-C comes may turn it into an error of its own
                if interrupted():
                    raise click.Abort() from None
                raise


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block, the function that is given says whether Ctrl-C was pressed."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    usual = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _traceback_wanted() -> bool:
    return os.environ.get("VAR_DEPLOY_TRACEBACK", "0") not in ("", "0")


def _fail(message: str, code: int, prefix: str = "error: ") -> None:
    """End with one line on stderr."""
    # the reader of the output may be gone; the exit code still tells
    with contextlib.suppress(OSError, VarDeployError):
        echo(paint(prefix, "red") + visible(_bounded(message)), err=True)
    sys.exit(code)


def _fail_as_json(message: str, code: int, prefix: str = "") -> None:
    """End with one JSON object on stderr, in one line."""
    with contextlib.suppress(OSError, VarDeployError):
        echo(json.dumps({"error": _bounded(message), "exit_code": code}), err=True)
    sys.exit(code)


def _bounded(message: str) -> str:
    """A message on one line, without the middle of one that goes on and on."""
    message = " ".join(message.split())
    if len(message) > LONGEST:  # of an argument or a name
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    return message


def say(line: str, *, err: bool = False) -> None:
    """Print one line: newlines in it are made visible as well."""
    echo(visible(line), err=err)


def echo(text: str, *, err: bool = False) -> None:
    """Print lines of text. What steers a terminal is made visible, all but the colours of `paint`,
    which are left out where no terminal is written to."""
    _write(COLOUR.sub(_escape_sequence, visible(text, lines=True)), err)


def _write(text: str, err: bool = False) -> None:
    try:
        # the stream by name: by itself click writes UTF-8 where it finds ASCII
        click.echo(text, file=sys.stderr if err else sys.stdout)
    except BrokenPipeError:  # `| head`: click ends the process without a word
        raise
    except OSError as error:
        what = "standard error" if err else "standard output"
        raise VarDeployError(f"{what} cannot be written: {error.strerror or error}") from None


def echo_json(data: Any) -> None:
    """Print JSON whose texts are to be read: in characters of their own where stdout has them."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    if (sys.stdout.encoding or "").lower().startswith("utf"):
        _write(visible_json(text))
    else:
        _write(json.dumps(data, indent=1))


def paint(text: str, colour: str) -> str:
    """The text in a colour, for `echo`.

    NO_COLOR, not empty, takes it off everywhere (https://no-color.org).
    """
    if os.environ.get("NO_COLOR") or not text:
        return text
    return f"<{MARK}:{colour}>{text}<{MARK}:>"


def unpainted(text: str) -> str:
    return COLOUR.sub("", text)


def _escape_sequence(found: re.Match[str]) -> str:
    return click.style("", fg=found[1], reset=False) if found[1] else click.style("", reset=True)


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
            f"{what} needs {module}, which is not installed; run "
            f"{pip_install(extra, missing=module)}"
        ) from error


class ProgressBar:
    """A one-line bar on stderr, shown only on a terminal and wiped at the end.

    `update(message, fraction)` may be called as often as one likes: it draws ten times a second.
    """

    WIDTH = 24

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = not quiet and is_terminal(sys.stderr)
        self._drawn_at = 0.0
        self._message = ""

    def __enter__(self) -> ProgressBar:
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

    def images(self, count: int) -> Callable[[int, int], None]:
        """For `on_progress` of a pipeline that generates `count` images: which image it is at, the
        rate and the time left. The clock starts with this call."""
        started = time.monotonic()

        def step(done: int, steps: int) -> None:
            fraction = done / max(steps, 1)
            self.update(image_pace(fraction, count, time.monotonic() - started), fraction)

        return step

    def update(self, message: str, fraction: float) -> None:
        now = time.monotonic()
        fresh = message.partition(",")[0] != self._message or fraction >= 1
        if not self._shown or (now - self._drawn_at < 0.1 and not fresh):
            return
        self._drawn_at, self._message = now, message.partition(",")[0]
        done = round(min(max(fraction, 0.0), 1.0) * self.WIDTH)
        bar = "█" * done + "·" * (self.WIDTH - done)
        room = max((_columns(sys.stderr) or PROSE) - self.WIDTH - 7, 0)  # in one line, to wipe it
        click.echo(f"\r\x1b[K{bar} {fraction:4.0%} {visible(message)[:room]}", nl=False, err=True)


def image_pace(fraction: float, count: int, seconds: float) -> str:
    """How far `count` images are: "image 12 of 64, 3.1/s, 17 s left"."""
    where = f"image {min(int(fraction * count) + 1, count)} of {count}"
    if fraction <= 0 or seconds <= 0:
        return where
    left = span(seconds * (1 - fraction) / fraction)
    return f"{where}, {speed(fraction * count / seconds)}, {left} left"


# text that fits


def fitted_width() -> int | None:
    """Columns that a table may take: those of the terminal, or of the variable COLUMNS; None, which
    is no limit, in a pipe or a file, whose readers search it, and with --verbose."""
    context = click.get_current_context(silent=True)
    return None if context and context.meta.get(VERBOSE) else _columns(sys.stdout)


def wrapped(text: str, head: str = "", indent: str = "  ") -> str:
    """Running text behind `head`, in lines of at most PROSE columns that fit the terminal; all but
    the first start with `indent`."""
    width = min(PROSE, _columns(sys.stdout) or PROSE)
    return textwrap.fill(head + text, width, subsequent_indent=indent, break_on_hyphens=False)


def fitted(text: str) -> str:
    """A line, whole in a pipe or a file, where it may be searched for, and wrapped on a
    terminal."""
    width = fitted_width()
    return text if width is None else textwrap.fill(
        text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _columns(stream: TextIO | None) -> int | None:
    """Of the terminal behind a stream; COLUMNS goes first, as for other programs."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and 0 < len(given) < 6:
        return max(int(given), NARROWEST)
    if stream is None or not is_terminal(stream):
        return None
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0  # as of some terminals in editors
    return max(columns or shutil.get_terminal_size().columns, NARROWEST)


def table(
    rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), optional: Sequence[int] = ()
) -> str:
    """Columns aligned by two spaces; those in `right` are flush right. The first row is a head.

    Where the lines are wider than `fitted_width`, the columns in `optional` are left out, the first
    of them first, and a last line says which; then the widest column of words is broken into lines.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    columns = list(zip(*rows, strict=True))
    widths = [max(len(unpainted(cell)) for cell in column) for column in columns]
    limit, shown = fitted_width() or sys.maxsize, list(range(len(columns)))

    def total() -> int:
        return sum(widths[n] for n in shown) + 2 * (len(shown) - 1)

    for column in optional:
        if total() > limit:
            shown.remove(column)
    words = max((n for n in shown if n not in right), key=lambda n: widths[n], default=None)
    if words is not None and total() > limit:
        widths[words] = max(widths[words] - (total() - limit), min(LEAST_CELL, widths[words]))
    lines = []
    for row in rows:
        cells = [_broken(row[n], widths[n]) if n == words else [row[n]] for n in shown]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            aligned = (
                _padding(part, widths[n]) + part if n in right else part + _padding(part, widths[n])
                for n, part in zip(shown, parts, strict=True)
            )
            lines.append("  ".join(aligned).rstrip())
        if row is rows[0]:
            lines.append("  ".join("-" * widths[n] for n in shown))
    if left_out := [rows[0][n] or "notes" for n in range(len(columns)) if n not in shown]:
        lines.append(f"(not shown: {', '.join(left_out)}; -v shows them)")
    return "\n".join(lines)


def _broken(cell: str, width: int) -> list[str]:
    """The lines of a cell, whose words may be painted. A longer word, such as a path, stays whole,
    so that it can be copied."""
    if len(unpainted(cell)) <= width:
        return [cell]
    lines = [""]
    for word in cell.split(" "):
        if lines[-1] and len(unpainted(f"{lines[-1]} {word}")) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _padding(cell: str, width: int) -> str:
    return " " * (width - len(unpainted(cell)))


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A line each: a name, and what there is to say, all of it from one column on."""
    width = max(len(name) for name, _ in rows)
    room = (fitted_width() or sys.maxsize) - width - 2
    lines = []
    for name, value in rows:
        first, *others = _broken(visible(value), max(room, LEAST_CELL))
        lines.append(f"{name.ljust(width)}  {first}")
        lines += [f"{'':{width}}  {line}" for line in others]
    return "\n".join(lines)


def human_bytes(size: int) -> str:
    """12345678 → "12.3 MB" (powers of 1000)."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"

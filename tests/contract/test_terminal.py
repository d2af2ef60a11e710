"""What reaches a terminal: streams that are not there, encodings, and texts from strangers."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_steps import done, edit, refused
from var_deploy.cli import main
from var_deploy.cli.console import ProgressBar, facts, image_pace, table
from var_deploy.host.terminal import PLAIN_FORMS, is_terminal, visible, visible_json

COMMANDS = list(main.commands)
HOSTILE = "\x1b[31mred\x1b[0m\x9b2J\u202eevil\u2028\udcff"
SHOWN = r"\x1b[31mred\x1b[0m\x9b2J\u202eevil\u2028\xff"
CLOSED = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-", "all": "<&- >&- 2>&-"}


def program(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "var_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


# streams


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize("closed", CLOSED)
def test_a_closed_stream_changes_no_file(pocket_bundle: Path, tmp_path: Path, closed: str) -> None:
    """Its descriptor is the first that the next file would get."""
    whole, out = tmp_path / "whole.png", tmp_path / "out.png"
    arguments = ("generate", pocket_bundle, "--labels", "3", "--threads", "1", "--out")
    done(*arguments, whole)
    words = [sys.executable, "-m", "var_deploy", *map(str, arguments), str(out)]
    shell = ["sh", "-c", f'exec "$@" {CLOSED[closed]}', "sh", *words]
    assert subprocess.run(shell, timeout=120).returncode == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
def test_what_a_library_writes_to_a_closed_descriptor_is_in_no_file(tmp_path: Path) -> None:
    code = """
import os, sys
from var_deploy.host.terminal import open_standard_streams
open_standard_streams()
with open(sys.argv[1], "wb") as file:
    for descriptor in (1, 2):
        os.write(descriptor, b"a word of a library")
"""
    for closing in CLOSED.values():
        shell = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", code]
        ended = subprocess.run([*shell, str(tmp_path / "f")], capture_output=True, timeout=60)
        assert (ended.returncode, (tmp_path / "f").read_bytes()) == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize("words", ["plan pocket --device thor", "inspect none", "--help"])
def test_exit_codes_do_not_need_streams(words: str) -> None:
    expected = program(*words.split()).returncode
    for closing in CLOSED.values():
        shell = ["sh", "-c", f"exec {sys.executable} -m var_deploy {words} {closing}"]
        assert subprocess.run(shell, timeout=60).returncode == expected


def test_no_streams_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with pythonw, where they are None."""
    assert not is_terminal(None)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "pocket", "--device", "thor"])
    assert ended.value.code == 0
    with ProgressBar() as progress:
        progress.update("unseen", 0.5)
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "var_deploy", "plan", "pocket", "--device", "thor"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr == b"error: standard output cannot be written: No space left on device\n"


# encodings


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp437", "ascii", "utf-8"])
def test_every_help_and_message_prints(encoding: str) -> None:
    """In one process, whose streams take nothing that the encoding lacks."""
    code = """
import sys
from var_deploy.cli import main
for words in (["--help"], *([name, "--help"] for name in main.commands), ["inspect", "n\\u00f6⁶"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == (1 if words[0] == "inspect" and words[1] != "--help" else 0), words
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert found.returncode == 0, found.stderr
    assert b"Traceback" not in found.stderr
    said = found.stderr.decode(encoding)
    shown = {"utf-8": "nö⁶", "ascii": "n?^6"}.get(encoding, "nö^6")
    assert said.startswith(f"error: {shown} ")


def test_plain_forms() -> None:
    text = "2⁶⁴-1 … a × b → █░"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=PLAIN_FORMS)
    stream.write(text)
    stream.flush()
    assert stream.buffer.getvalue() == b"2^64-1 ... a x b -> #?"  # type: ignore[attr-defined]


def hostile(bundle: Path) -> None:
    def name(data: dict[str, Any]) -> None:
        data["labels"] = ["\x1b]0;owned\x07", "étoile ⁶", "a\u202eb", *data["labels"][3:]]
        data["preset"] = "\x1b[2J"

    edit(bundle, name)


@pytest.mark.parametrize("encoding", ["cp437", "utf-8"])
def test_json_stays_json(pocket_bundle: Path, tmp_path: Path, encoding: str) -> None:
    bundle = copied(pocket_bundle, tmp_path)
    hostile(bundle)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    found = program("inspect", bundle, "--json", env=environment)
    data = json.loads(found.stdout.decode(encoding))
    assert data["labels"][:3] == ["\x1b]0;owned\x07", "étoile ⁶", "a\u202eb"]
    assert ("étoile".encode() in found.stdout) == (encoding == "utf-8")
    assert not any(char in found.stdout.decode(encoding) for char in "\x1b\x07\u202e")


# texts from strangers


def copied(bundle: Path, folder: Path) -> Path:
    """The bundle's manifest alone, which is all that inspect reads of it besides sizes."""
    (folder / "bundle").mkdir()
    for path in bundle.rglob("*"):
        target = folder / "bundle" / path.relative_to(bundle)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(path.read_bytes())
    return folder / "bundle"


def test_nothing_steers_a_terminal() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("a\nb\tc\r\x7f") == r"a\nb\tc\r\x7f"
    assert visible("a\nb\x00", lines=True) == "a\nb\\x00"
    assert visible("क्\u200dष étoile 星") == "क्\u200dष étoile 星"
    assert visible("\U000e0041") == "\\U000e0041"


def test_json_keeps_what_it_escapes() -> None:
    data = {"name": HOSTILE + "\U000e0041"}
    text = visible_json(json.dumps(data, indent=1, ensure_ascii=False))
    assert json.loads(text) == data
    assert visible(text, lines=True) == text


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "BUNDLE", "--labels", "\x1b[31mred", "--out", "x.png"),
        ("generate", "BUNDLE", "--out", "\x1b[31ma\u202e.gif"),
        ("inspect", "\x1b[2J\u202e"),
        ("inspect", "BUNDLE", "--graph", "\x1b[31m"),
        ("encode", "BUNDLE", "\x1b[31m.png", "--out", "t.npz"),
        ("reconstruct", "BUNDLE", "\x1b[31m.npz", "--out", "s.png"),
        ("plan", "\x1b[31m"),
        ("export", "\x1b[31m", "--out", "b"),
        ("\x1b[31m",),
        ("bench", "BUNDLE", "--against", "\x1b[31m"),
    ],
)
def test_arguments_are_not_printed_raw(
    pocket_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(pocket_bundle) if word == "BUNDLE" else word for word in arguments]
    code = 1 if arguments[:2] == ("inspect", "\x1b[2J\u202e") else 2
    said = refused(code, *words)
    assert "\\x1b" in said
    assert visible(said, lines=True) == said


def test_class_names_are_not_printed_raw(pocket_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(pocket_bundle, tmp_path)
    hostile(bundle)
    shown = done("inspect", bundle).stdout
    assert visible(shown, lines=True) == shown
    assert r"\x1b]0;owned\x07, étoile ⁶, a\u202eb" in shown and r"\x1b[2J" in shown
    out = ("--out", tmp_path / "x.png")
    said = refused(2, "generate", bundle, "--labels", "nothing", *out)
    assert r"\x1b]0;owned\x07" in said and visible(said, lines=True) == said


def test_written_names_are_not_printed_raw(pocket_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a\x1b[31m\nb.png"
    arguments = ("generate", pocket_bundle, "--labels", "1", "--threads", "1")
    said = done(*arguments, "--out", out).stdout
    assert said.count("\n") == 1 and r"/a\x1b[31m\nb.png (" in said
    assert json.loads(done(*arguments, "--out", out, "--json").stdout)["out"] == str(out)


def test_cells_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHOWN in table([("a", "b"), (HOSTILE, "x\ny")])
    assert table([("a", "b"), (HOSTILE, "x\ny")]).count("\n") == 2
    assert facts([("name", "a\nb")]) == r"name  a\nb"
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar() as progress:
        progress.update(HOSTILE, 0.5)
    assert SHOWN in terminal.getvalue()
    assert terminal.getvalue().count("\x1b") == 2  # both of the bar's own


def test_progress_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_pace(12 / 64, 64, 4.0) == "image 13 of 64, 3.0/s, 17 s left"
    assert image_pace(0.25, 1, 5.0) == "image 1 of 1, 20.0 s each, 15 s left"
    assert image_pace(0.0, 64, 0.0) == "image 1 of 64"
    assert image_pace(1.0, 64, 32.0) == "image 64 of 64, 2.0/s, 0 s left"
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar() as progress:
        progress.images(4)(1, 8)
    assert not terminal.getvalue(), "not in a pipe"
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "50")
    with ProgressBar() as progress:
        told = progress.images(4)
        told(1, 8)
        told(8, 8)
    shown = terminal.getvalue().replace("\x1b[K", "").split("\r")
    assert re.search(r"12% image 1 of 4, \d", shown[1])
    assert "100% image 4 of 4, " in shown[2]
    assert max(map(len, shown)) < 50, "one line, which the next one replaces"


def test_commands_print_through_the_console() -> None:
    """Everything that a command prints goes through `console`, which makes it safe."""
    folder = Path(__file__).parents[2] / "var_deploy" / "cli"
    raw = ("click.echo(", "click.secho(", "print(", "sys.stdout.write", "sys.stderr.write")
    for path in folder.glob("*.py"):
        if path.name != "console.py":
            text = path.read_text(encoding="utf-8")
            assert not [name for name in raw if name in text], path.name


# Ctrl-C


@pytest.mark.parametrize("module", ["click", "numpy", "PIL.Image", "var_deploy.cli.sample"])
@pytest.mark.parametrize("start", ["var_deploy", "var_deploy.cli"])
def test_ctrl_c_while_commands_are_imported(module: str, start: str) -> None:
    code = f"""
import os, runpy, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
runpy.run_module({start!r}, run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", code, "--help"]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"interrupted\n")


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("invoke", "KeyboardInterrupt"),
        ("invoke", "ImportError('multiarray')"),
        ("complete", "KeyboardInterrupt"),
    ],
)
def test_ctrl_c_that_a_library_turns_into_an_error(where: str, kind: str) -> None:
    """In a command, and in completion, where click itself does not expect it."""
    code = f"""
import os, signal, sys
from var_deploy.cli import main
def press(*arguments, **options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)
    except KeyboardInterrupt:
        raise {kind} from None
if {where!r} == "invoke":
    main.commands["plan"].callback = press
    main(["plan", "pocket"])
else:
    main._main_shell_completion = press
    main([])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, b"interrupted\n")

"""What holds of every command: a purpose, an example that parses, each option told of."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli_steps import done, refused, run
from var_deploy.cli import main
from var_deploy.cli.console import facts, paint, table, unpainted

ORDER = ("demo", "export", "verify", "inspect", "labels", "generate")  # the way of a newcomer
REPORTING = ("bench", "build", "demo", "doctor", "edit", "encode", "generate", "inspect", "plan")
REPORTING += ("reconstruct", "sample", "verify", "export")


def examples(text: str) -> Iterator[list[str]]:
    """The var-deploy commands below "Example:" of a help text, in words."""
    block = cleandoc(text).partition("Example:\n")[2].partition("\n\n")[0]
    for line in block.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part)
            if words[0] == "var-deploy":
                yield words[1:]


@pytest.fixture(params=list(main.commands))
def command(request: pytest.FixtureRequest) -> click.Command:
    return main.commands[request.param]


@pytest.fixture
def parent() -> click.Context:
    return click.Context(main, info_name="var-deploy", **main.context_settings)


def test_a_purpose_in_one_line(command: click.Command) -> None:
    first = cleandoc(command.help or "").split("\n\n")[0]
    assert re.fullmatch(r"[A-Z].*", first), "one line, that starts like a sentence"
    assert first.endswith(".")
    # a blank line that click may have put into the list of commands joins what it wrapped
    listed = " ".join(done("--help").stdout.split())
    assert f" {command.name} {first.partition('. ')[0].rstrip('.')}" in listed, "in full"


def test_examples_parse(command: click.Command, parent: click.Context) -> None:
    found = list(examples(command.help or ""))
    assert any(words[0] == command.name for words in found)
    for name, *words in found:
        example = main.commands[name]
        context = example.make_context(name, words, parent=parent)
        assert not context.args


def test_an_example_that_does_not_parse_is_seen(parent: click.Context) -> None:
    (words,) = examples("Purpose.\n\nExample:\n  var-deploy plan var-d16 \\\n      --fast")
    with pytest.raises(click.NoSuchOption):
        main.commands[words[0]].make_context(words[0], words[1:], parent=parent)


def test_each_option_says_what_it_does(command: click.Command, parent: click.Context) -> None:
    context = click.Context(command, info_name=command.name, parent=parent)
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert option.help and option.help.endswith((".", "…")), option.name
        record = option.get_help_record(context)
        assert record is not None, f"{option.name} is hidden"
        default = option.get_default(context)
        plain_flag = option.is_flag and not option.secondary_opts
        has_one = isinstance(default, str | int | float | tuple) and default not in ("", ())
        if has_one and not (option.required or plain_flag):
            assert "[default: " in record[1], option.name


def test_common_options_mean_the_same(command: click.Command) -> None:
    options = {name: p for p in command.params for name in p.opts if name.startswith("--")}
    assert ("--json" in options) >= (command.name in REPORTING)
    for name in ("--quiet", "--force"):
        assert name not in options or options[name].is_flag
    if "--threads" in options:
        assert isinstance(options["--threads"].type, click.IntRange)
        assert options["--threads"].type.min == 1


LETTERS = {"--out": "-o", "--count": "-n", "--quiet": "-q", "--verbose": "-v", "--version": "-V"}


def test_letters_go_with_their_long_forms(command: click.Command) -> None:
    for option in (*command.params, *main.params):
        for long, letter in LETTERS.items():
            assert (long in option.opts) == (letter in option.opts), (option.name, letter)


# bounded where their values meet: with the bundle's sizes, or with other options
BOUNDED_LATER = {
    ("edit", "count"): "outputs.check_at_once",
    ("generate", "count"): "outputs.check_at_once and check_files",
    ("sample", "per_class"): "SetSpec",
    ("sample", "per_prompt"): "SetSpec",
    ("sample", "shard_size"): "no shard is larger than the set, see _check_shard_size",
    ("sample", "seed"): "SetSpec",
    ("sample", "workers"): "no more than there are devices",
    ("serve", "queue"): "a bound itself",
    ("serve", "max_count"): "a bound itself",
    ("serve", "max_pixels"): "a bound itself",
    ("serve", "max_body"): "a bound itself",
}


def test_numbers_are_bounded(command: click.Command) -> None:
    for option in command.params:
        kind = option.type
        if not isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
            continue
        if option.name in ("threads", "deadline"):
            continue  # bounded by the machine, and harmless
        if (command.name, option.name) not in BOUNDED_LATER:
            assert isinstance(kind, click.IntRange | click.FloatRange), option.name
            assert kind.min is not None and kind.max is not None, option.name


@pytest.mark.parametrize(
    "words",
    [
        "export pocket --batch N --out b",
        "export pocket --random-weights N --out b",
        "verify b --samples N",
        "plan pocket --batch N",
        "bench b --repeat N",
        "bench b --batch 1,N",
        "bench http://127.0.0.1:9 --concurrency N",
        "triton b --instances N --out t",
        "generate b --seed N --out x.png",
        "sample b --seed N --per-class 1 --out s",
        "generate b --labels N --out x.png",
    ],
)
@pytest.mark.parametrize("number", ["1" + 25 * "0", 6000 * "9"])
def test_enormous_numbers_end_in_one_line(
    pocket_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, number: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [pocket_bundle if w == "b" else w.replace("N", number) for w in words.split()]
    assert len(refused(2, *given)) < 5000
    assert not list(tmp_path.iterdir())


def test_commands_come_in_the_order_of_use() -> None:
    assert list(main.commands)[: len(ORDER)] == list(ORDER)
    listed = done("--help").stdout.partition("Commands:\n")[2]
    assert re.findall(r"^  (\w+)", listed, re.M) == list(main.commands)


def test_bad_usage_names_the_help() -> None:
    line = refused(2, "generate", "--sed", "1", parts=("--sed",))
    assert line.endswith("(see main generate --help)\n")
    assert "did you mean" in line.lower()


# lists


def test_precisions_of_export_are_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = main.commands["export"]

    def chosen(*words: str) -> tuple[str, ...]:
        context = export.make_context("export", ["pocket", "--out", "b", *words])
        found: tuple[str, ...] = context.params["precision"]
        return found

    assert chosen() == ("fp32",)
    assert chosen("--precision", "fp16,int8") == ("fp16", "int8")
    assert chosen("--precision", "fp16, fp32", "--precision", "fp16") == ("fp16", "fp32")
    monkeypatch.chdir(tmp_path)
    for wrong in ("fp16,fp8", "", "fp16,"):
        words = ("export", "pocket", "--out", "b", "--precision", wrong)
        refused(2, *words, parts=("expected fp32, fp16 and int8", repr(wrong.split(",")[-1])))


# errors as JSON


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("inspect none --json", 1, "none does not exist"),
        ("generate none -o x.gif --json", 2, "found x.gif"),
        ("generate none --json --sed 1", 2, "--sed"),
        ("plan pocket --device abacus --json", 2, "unknown device 'abacus'"),
        ("plan --json", 2, "give a preset"),
        ("bench none --json -", 1, "none"),
        ("bench none --json=-", 1, "none"),
        ("nothing --json", 2, "No such command 'nothing'"),
    ],
)
def test_with_json_an_error_is_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words.split())
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1
    data = json.loads(result.stderr)
    assert set(data) == {"error", "exit_code"} and data["exit_code"] == code
    assert said in data["error"]


@pytest.mark.parametrize(
    "words", ["bench none --json report.json", "plan -- --json", "serve none --json", "--json"]
)
def test_without_json_on_stdout_an_error_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stderr = run(*words.split()).stderr
    assert stderr.startswith("error: ") == (words != "--json")
    assert stderr.startswith("{") == (words == "--json")


def test_json_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAR_DEPLOY_PLAN_AS_JSON", "1")
    assert json.loads(done("plan", "pocket", "--device", "thor").stdout)["fits"] is True
    assert json.loads(run("plan", "pocket", "--device", "abacus").stderr)["exit_code"] == 2


# the environment


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAR_DEPLOY_PLAN_DEVICE", "orin-nano-8gb")
    assert "Jetson Orin Nano 8GB" in done("plan", "pocket").stdout
    assert "Jetson Thor" in done("plan", "pocket", "--device", "thor").stdout
    monkeypatch.setenv("VAR_DEPLOY_PLAN_DEVICE", "abacus")
    refused(2, "plan", "pocket", parts=("unknown device 'abacus'",))


def test_a_version_in_the_environment_is_nobodys_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAR_DEPLOY_VERSION", "0.1.0")
    assert "latest" not in done("plan", "pocket", "--device", "thor").stdout


def test_no_option_takes_the_name_of_the_traceback() -> None:
    assert "traceback" not in {p.name for p in main.params}
    assert "traceback" not in main.commands


# completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    environment = {"_VAR_DEPLOY_COMPLETE": f"{shell}_source"}
    result = CliRunner().invoke(main, env=environment, prog_name="var-deploy")
    assert result.exit_code == 0, result.output
    assert "_VAR_DEPLOY_COMPLETE" in result.stdout and f"{shell}_complete" in result.stdout


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("var-deploy ins", "plain,inspect"),
        ("var-deploy plan var-d16 --dev", "plain,--device"),
        ("var-deploy plan var-d16 --device thor", "plain,thor"),
        ("var-deploy plan var-d16 --layout sh", "plain,shared"),
        ("var-deploy export pocket --precision fp16,i", "plain,fp16,int8"),
        ("var-deploy generate build/p", "dir,build/p"),
        ("var-deploy inspect build/p", "file,build/p"),
    ],
)
def test_what_a_shell_completes(line: str, found: str) -> None:
    environment = {
        "_VAR_DEPLOY_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    result = CliRunner().invoke(main, env=environment, prog_name="var-deploy")
    assert found in result.stdout.splitlines()


# colours


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["plan", "pocket", "--device", "abacus"]
    piped = CliRunner().invoke(main, arguments)
    terminal = CliRunner().invoke(main, arguments, color=True)
    assert piped.stderr.startswith("error: unknown")
    assert terminal.stderr.startswith("\x1b[31merror: \x1b[0munknown")
    monkeypatch.setenv("NO_COLOR", "1")
    assert CliRunner().invoke(main, arguments, color=True).stderr == piped.stderr


def test_colours_do_not_move_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", "b"), ("red", "1"), ("x", "22")]
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = [tuple(paint(cell, "red") for cell in row) for row in rows]
    assert table(painted) != table(rows)
    assert unpainted(table(painted, right=(1,))) == table(rows, right=(1,))


# widths

WIDE = [
    ("name", "number", "words", "why"),
    ("a", "1", "one two three four five six seven eight nine ten", "because of it"),
    ("b", "22", "short", "because of a longer reason"),
]


def test_a_table_gives_up_columns_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = table(WIDE, right=(1,), optional=(3, 1))
    assert max(map(len, whole.splitlines())) > 80, "in a pipe it has all of them"
    monkeypatch.setenv("COLUMNS", "80")
    first = table(WIDE, right=(1,), optional=(3, 1))
    assert max(map(len, first.splitlines())) <= 80
    assert "why" not in first.splitlines()[0] and "number" in first
    assert first.endswith("\n(not shown: why; -v shows them)")
    monkeypatch.setenv("COLUMNS", "60")
    assert "(not shown: number, why; -v" in table(WIDE, right=(1,), optional=(3, 1))


def test_words_are_broken_where_no_column_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = [row[:3] for row in WIDE]
    painted = [(paint(a, "red"), b, paint("one", "red") + c[3:]) for a, b, c in plain]
    painted[0], painted[2] = plain[0], plain[2]
    for rows in (plain, painted):
        lines = unpainted(table(rows, right=(1,))).splitlines()
        assert max(map(len, lines)) <= 40
        assert " ".join(line[14:].strip() for line in lines[2:5]).startswith("one two three four")
    path = "/" + "x" * 60
    assert path in table([("name", "file"), ("a", path)]), "can be copied"
    assert facts([("name", path), ("more", "word " * 20)]).splitlines()[0] == f"name  {path}"
    assert max(map(len, facts([("more", "word " * 20)]).splitlines())) <= 40


@pytest.mark.parametrize(
    "words",
    ["doctor", "plan var-d16 --device thor", "inspect BUNDLE", "inspect BUNDLE --graph step"],
)
def test_reports_fit_80_columns(
    pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(pocket_bundle.parent)
    arguments = words.replace("BUNDLE", pocket_bundle.name).split()
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run(*arguments).stdout.partition("\nWhat would change it")[0]
    assert max(map(len, narrow.splitlines())) <= 80
    monkeypatch.delenv("COLUMNS")
    assert max(map(len, run(*arguments).stdout.splitlines())) > 80, "whole in a pipe"
    monkeypatch.setenv("COLUMNS", "80")
    assert "not shown" not in run(*arguments, "-v").stdout


def test_nothing_is_painted_into_a_pipe(tmp_path: Path) -> None:
    """As a program, whose output goes to no terminal."""
    command = [sys.executable, "-m", "var_deploy.cli", "inspect", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert result.returncode == 1
    assert b"\x1b" not in result.stderr + result.stdout


def test_help_without_a_command_is_bad_usage() -> None:
    assert run().exit_code == 2

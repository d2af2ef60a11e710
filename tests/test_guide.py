"""README and the pages for users: every block of commands and of Python is run, in order, with
pocket.

The README is followed as by somebody who has nothing yet: in a copy of the checkout, where its own
lines install var-deploy, without PyTorch. Other pages find it installed.

A block that needs what a test cannot have is marked with its reason, and only looked up: its
commands and options must exist, as must the rules of make and the extras of pip that it names.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from fresh_checkout import copy_checkout, fresh_environment, index_problem
from PIL import Image

from var_deploy import __version__
from var_deploy.cli import main
from var_deploy.image.images import read_settings

ROOT = Path(__file__).parents[1]
README, INSTALL, GUIDE = "README.md", "docs/INSTALL.md", "docs/GUIDE.md"
DOCUMENTS = (
    *(README, INSTALL, GUIDE),
    *("docs/TEXT.md", "docs/CLUSTER.md", "docs/TRITON.md", "docs/CONTAINERS.md"),
)
ALL_PAGES = (*DOCUMENTS, "docs/JETSON.md", "CONTRIBUTING.md")
REASONS = (
    "needs a GPU",
    "needs a released checkpoint",
    "needs an installation",
    "needs a cluster",
    "needs a container engine",
    "needs Triton",
    "needs another machine",
    "installs PyTorch",
    "is run in README.md",
    "is run for the tests of the wheel",
)
MARKED = {
    README: {"needs another machine": 1, "needs a released checkpoint": 1, "needs a GPU": 1},
    INSTALL: {reason: 1 for reason in REASONS[-3:]},
    GUIDE: {reason: 1 for reason in REASONS[:3]},
    "docs/TEXT.md": {"installs PyTorch": 1, "needs a released checkpoint": 3},
    "docs/CLUSTER.md": {"needs an installation": 1},
    "docs/TRITON.md": {
        "needs an installation": 1,
        "needs a container engine": 1,
        "needs Triton": 5,
    },
    "docs/CONTAINERS.md": {"needs a container engine": 5, "needs a cluster": 1},
}
# other programs, at whose lines tests/deploy/test_doc.py looks; and options that are no command's
FOREIGN = ("docker", "kubectl")
OF_OTHERS = {f"--{name}" for name in ("build-arg", "gpus", "init", "rounds", "runtime", "target")}
OF_OTHERS |= {"--load-model", "--model-control-mode", "--force-reinstall", "--no-deps"}
# a virtual environment that is made, activated, or both
ENVIRONMENT = r"(python3 -m venv (\.?\w+) && )?\. (\.?\w+)/bin/activate"
# what makes it quick, by the same way as everybody sets options in the environment
QUICK = {
    "OMP_NUM_THREADS": "1",
    "VAR_DEPLOY_VERIFY_SAMPLES": "0",
    "VAR_DEPLOY_BENCH_REPEAT": "1",
    "VAR_DEPLOY_BENCH_THREADS": "1",
    "VAR_DEPLOY_GENERATE_THREADS": "1",
    "VAR_DEPLOY_SERVE_PORT": "0",
}


ADDRESS = "http://127.0.0.1:8000"  # of a service, in a document


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a document; `reason` says why it is not run, "" where it is."""

    document: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> Iterator[str]:
        """What stands behind each $, comments and continued lines included."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield line.removeprefix("$ ")

    @property
    def starts_service(self) -> bool:
        return self.text.startswith("$ var-deploy serve")

    def output(self) -> list[str]:
        """The lines that are shown as printed."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("$ ")]


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    pattern = r"(?:^<!-- not run: (?P<why>[^\n]*) -->\n)?^```(?P<lang>\w*)\n(?P<text>.*?)^```$"
    return [
        Block(
            document=document,
            line=text.count("\n", 0, match.start("text")),
            language=match["lang"],
            text=match["text"],
            reason=match["why"] or "",
        )
        for match in re.finditer(pattern, text, re.M | re.S)
    ]


ALL = [block for document in DOCUMENTS for block in blocks(document)]
RUN = [b for b in ALL if b.language in ("console", "python") and not b.reason]


@dataclass
class Walk:
    """A document that is followed from its start; every block is run once.

    A block that fails is told by its own test, and those behind it go on.
    """

    folder: Path
    from_nothing: bool = False
    service: subprocess.Popen[str] | None = None
    address: str = ADDRESS
    names: dict[str, Any] = field(default_factory=dict)
    found: dict[int, BaseException | None] = field(default_factory=dict)

    def up_to(self, block: Block) -> None:
        """Raises what the block itself raised."""
        for earlier in RUN:
            if earlier.document != block.document or earlier.line > block.line:
                continue
            if earlier.line not in self.found:
                self.found[earlier.line] = self._outcome(earlier)
        if (error := self.found[block.line]) is not None:
            raise error

    def _outcome(self, block: Block) -> BaseException | None:
        try:
            self._python(block) if block.language == "python" else self._shell(block)
        except (Exception, AssertionError) as error:
            return error
        return None

    def _python(self, block: Block) -> None:
        if self.from_nothing:
            ran = self._bash(f"python - <<'EOF'\n{block.text}EOF")
            _, complaints = ran.communicate(timeout=900)
            assert (ran.returncode, complaints) == (0, ""), f"{block}:\n{complaints}"
            return
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            exec(compile(block.text, str(block), "exec"), self.names)
        finally:
            os.chdir(here)

    def _shell(self, block: Block) -> None:
        script = "\n".join(block.commands())
        if block.starts_service:
            self.service = self._bash(f"exec {script}")
            assert self.service.stdout is not None
            printed = self.service.stdout.readline()
            self.address = re.findall(r"http://[\d.:]+", printed)[0]
        else:
            ran = self._bash(script.replace(ADDRESS, self.address))
            printed, complaints = ran.communicate(timeout=900)
            assert ran.returncode == 0, f"{block}:\n{complaints}"
            shown = [plain(line) for line in block.output()]
            unexpected = [line for line in complaints.splitlines() if plain(line) not in shown]
            # pip and the tools that build a wheel warn of what is theirs
            assert not unexpected or re.search(r"^(pip|make) ", script, re.M), complaints
            printed += complaints
        for line in block.output():
            assert plain(line) in plain(printed), f"{block}: {line!r} is not printed"

    def _bash(self, script: str) -> subprocess.Popen[str]:
        path = f"{self.folder / '.bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path}
        if self.from_nothing:
            environment = fresh_environment(self.folder)
            if (self.folder / ".venv" / "bin" / "activate").exists():  # an earlier block made it
                script = f". .venv/bin/activate\n{script}"
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={**environment, **QUICK},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> None:
        if self.service is not None:
            self.service.terminate()
            self.service.communicate(timeout=60)


def plain(text: str) -> str:
    """Without what differs from one machine to the next: numbers, and the width of columns."""
    return re.sub(r"[\s\d.-]+", " ", text).strip()


@pytest.fixture(scope="module")
def walks(
    pocket_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Walk]]:
    """A folder a document, in which build/pocket is what `make demo` leaves there."""
    found = {}
    for document in DOCUMENTS:
        folder = tmp_path_factory.mktemp(Path(document).stem)
        if document == README:
            checkout = copy_checkout(folder / "var-deploy")
            found[document] = Walk(folder=checkout, from_nothing=True)
            continue
        script = folder / ".bin" / "var-deploy"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m var_deploy.cli "$@"\n')
        script.chmod(0o755)
        if document != GUIDE:
            shutil.copytree(pocket_bundle, folder / "build" / "pocket")
        found[document] = Walk(folder=folder)
    yield found
    for walk in found.values():
        walk.stop()


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs(block: Block, walks: dict[str, Walk]) -> None:
    if block.starts_service or ADDRESS in block.text:
        pytest.importorskip("fastapi", reason="the extra serve is not installed")
        pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    if block.document == README and (problem := index_problem()):
        pytest.skip(problem)
    walks[block.document].up_to(block)


def test_readme_needs_no_torch(walks: dict[str, Walk]) -> None:
    """Nothing that its lines installed brought PyTorch along, so all of them do without."""
    if problem := index_problem():
        pytest.skip(problem)
    walks[README].up_to([b for b in RUN if b.document == README][-1])
    (packages,) = (walks[README].folder / ".venv" / "lib").glob("python*/site-packages")
    installed = {path.name.partition("-")[0] for path in packages.glob("*.dist-info")}
    assert {"var_deploy", "onnxruntime", "fastapi"} <= installed
    assert not {"torch", "onnx", "safetensors"} & installed
    with Image.open(walks[README].folder / "build" / "demo.png") as picture:
        assert picture.size == (10 * 64 + 9 * 2, 4 * 64 + 3 * 2)


def test_readme_is_short() -> None:
    assert len((ROOT / README).read_text(encoding="utf-8").split()) <= 900


def test_nothing_else_is_left_out() -> None:
    for document in DOCUMENTS:
        of_it = [block for block in ALL if block.document == document]
        assert Counter(b.reason for b in of_it if b.reason) == Counter(MARKED[document])
        text = (ROOT / document).read_text(encoding="utf-8")
        assert len(of_it) == text.count("\n```") / 2, "a fence that is not understood"
        drawings = [b for b in of_it if not b.language]
        assert not any("$ " in b.text or "import " in b.text for b in drawings)
        assert all(list(b.commands()) for b in of_it if b.language == "console")
        assert {b.language for b in of_it if not b.reason} <= {"", "console", "python", "json"}


# what is not run is looked up


def unknown(line: str) -> str:
    """What of a command does not exist; "" where all of it does."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return " ".join(set(words[1:]) - set(rules))
    if words[:2] == ["pip", "install"]:
        return unknown_to_pip(words[2:])
    if words[0] in (*FOREIGN, "scp") or re.fullmatch(ENVIRONMENT, line):
        return ""
    if words[:1] == ["eval"]:
        return "" if "_VAR_DEPLOY_COMPLETE=bash_source var-deploy" in line else line
    if words[:1] != ["var-deploy"] or words[1] not in main.commands:
        return line
    parent = click.Context(main, info_name="var-deploy", **main.context_settings)
    try:
        main.commands[words[1]].make_context(words[1], words[2:], parent=parent)
    except click.UsageError as error:
        return error.format_message()
    return ""


def unknown_to_pip(words: list[str]) -> str:
    """What of the packages in a `pip install` is no extra of ours, no wheel of `make wheel` and on
    no index."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    wrong = []
    for word in words:
        what, _, asked = word.rstrip("]").partition("[")
        ours = what == "." or what.endswith(f"/var_deploy-{__version__}-py3-none-any.whl")
        if ours:
            wrong += [extra for extra in asked.split(",") if extra not in extras]
        elif re.search("var.?deploy", what):
            wrong.append(word)
    return " ".join(wrong)


def test_nothing_is_installed_from_an_index_that_lacks_it() -> None:
    for page in ALL_PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = re.findall(r"(?<!`)pip install ([^\n`]*)", text.replace("\\\n", " "))
        for line in lines:
            wanted = line.split("' && ")[0].split(" && ")[0].partition("#")[0]
            assert not unknown_to_pip([word.strip("\"'") for word in wanted.split()]), (page, line)


def test_what_installs_is_run_elsewhere() -> None:
    """`make demo` by tests/test_make.py, the rest by the README and by tests/test_wheel.py."""
    blocks_of = {b.reason: list(b.commands()) for b in ALL if b.document == INSTALL}
    assert blocks_of["installs PyTorch"] == ["make demo", ". .venv/bin/activate"]
    readme = [line for b in RUN if b.document == README for line in b.commands()]
    assert set(blocks_of["is run in README.md"]) <= set(readme)


@pytest.mark.parametrize("block", [b for b in ALL if b.reason], ids=str)
def test_what_is_not_run_exists(block: Block) -> None:
    assert block.reason in REASONS
    assert {line: wrong for line in block.commands() if (wrong := unknown(line))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "var-deploy paint d16",
        "var-deploy build d16 --fast",
        "var-deploy build d16 --layout quick",
        "make board",
        'pip install ".[magic]"',
        'pip install "var-deploy[cpu]"',
        'pip install "./var_deploy-0.0.9-py3-none-any.whl[cpu]"',
        "rm -rf /",
    ],
)
def test_what_does_not_exist_is_seen(line: str) -> None:
    assert unknown(line)


def test_options_in_the_text_belong_to_some_command() -> None:
    parameters = [p for command in main.commands.values() for p in command.params]
    known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    for document in DOCUMENTS:
        prose = re.sub(r"```.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.S)
        named = set(re.findall(r"`[^`]*?(--[a-z][a-z0-9-]*)", prose))
        assert named and named <= known | OF_OTHERS, document


def test_every_command_is_shown() -> None:
    guide = "\n".join(line for b in blocks(GUIDE) for line in b.commands())
    assert set(re.findall(r"^var-deploy (\w+)", guide, re.M)) == set(main.commands)


# pictures


def links(document: str) -> list[tuple[str, str]]:
    """(file, anchor) of every link and picture that leads to a place in the repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text)
    return [(file, anchor) for file, anchor in found if "://" not in file]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for file, anchor in links(document):
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.is_file(), file
        heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", head).replace(" ", "-").lower() for head in heads]
        assert not anchor or anchor in slugs, anchor


PICTURES = sorted((ROOT / "docs" / "guide").glob("*"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_are_what_the_commands_make(picture: Path, walks: dict[str, Walk]) -> None:
    """Of the same size and settings; pixels may differ in their last digit by machine."""
    assert f"guide/{picture.name}" in [file for file, _ in links(GUIDE)], "it is shown"
    assert picture.stat().st_size < 150_000
    last = [b for b in RUN if b.document == GUIDE and picture.name in b.text][-1]
    walks[GUIDE].up_to(last)
    made = walks[GUIDE].folder / picture.name
    with Image.open(picture) as shown, Image.open(made) as again:
        assert shown.size == again.size
    settings = [read_settings(path) for path in (picture, made)]
    for text in settings:
        text.pop("Software", None), text.pop("bundle", None)
    assert settings[0] == settings[1]

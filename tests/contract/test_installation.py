"""Children run what this process runs, whatever the current folder holds."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from var_deploy.bench.process import WorkerProcess
from var_deploy.host import installation
from var_deploy.host.installation import (
    ROOT,
    activation,
    code_command,
    module_command,
    pip_command,
    pip_install,
    program,
    search_path,
    shadowed,
)
from var_deploy.host.machine import Machine

SOURCES = Path(__file__).parents[2]
DECOYS = ("click", "json", "numpy", "onnxruntime", "random", "runpy", "subprocess", "typing")


@pytest.fixture
def decoys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, whose files shadow this package and others."""
    (tmp_path / "var_deploy").mkdir()
    (tmp_path / "var_deploy" / "__init__.py").touch()
    for name in DECOYS:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('the wrong {name}')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_decoys_work(decoys: Path) -> None:
    command = (sys.executable, "-m", "var_deploy.host.cuda_driver")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "the wrong" in done.stderr


def test_modules_and_code_run_beside_decoys(decoys: Path) -> None:
    assert "problem" in json.loads(output(*module_command("var_deploy.host.cuda_driver")))
    code = "import sys, numpy, random, var_deploy; print(var_deploy.__file__, *sys.argv[1:])"
    package, *given = output(*code_command(code, "a b", 3)).rstrip().split(" ", 1)
    assert Path(package).parent.samefile(Path(installation.__file__).parents[1])
    assert given == ["a b 3"]


def test_a_module_sees_its_arguments_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("import sys\nprint(__name__, sys.argv)\n")
    code = (
        "import subprocess, sys; from var_deploy.host.installation import module_command\n"
        "sys.path.append(sys.argv[1])\n"
        "subprocess.run(module_command('shown', '--x', 3), check=True)"
    )
    path = str(tmp_path / "shown.py")
    shown = output(*code_command(code, tmp_path))
    assert shown == f"__main__ [{path!r}, '--x', '3']\n"


def test_the_machine_is_asked_beside_decoys(decoys: Path) -> None:
    here = Machine()
    assert here.import_module("numpy").problem == ""
    assert "the wrong" not in here.driver().problem


def test_bench_beside_decoys(decoys: Path, pocket_bundle: Path) -> None:
    """The whole command, in a process of its own; it starts two more."""
    code = "from var_deploy.cli import main; main(prog_name='var-deploy')"
    words = ("bench", pocket_bundle, "--repeat", 1, "--warm-up", 0, "--threads", 1)
    told = json.loads(output(*code_command(code, *words, "--quiet", "--json", "-")))
    (run,) = told["runs"]
    assert [each["problem"] for each in run["contenders"]] == [""]
    assert run["rates_problem"] == ""


def test_a_worker_beside_decoys(decoys: Path, pocket_bundle: Path) -> None:
    command = module_command("var_deploy.bench.ours", pocket_bundle, "--threads", 1)
    with WorkerProcess(command) as worker:
        assert worker.ready().threads == 1


def test_options_of_the_interpreter_are_handed_on() -> None:
    code = (
        "import subprocess, sys; from var_deploy.host.installation import code_command\n"
        "show = 'import sys; f = sys.flags; print(f.ignore_environment, f.no_user_site, '\\\n"
        "    'f.dont_write_bytecode, f.optimize, f.utf8_mode, sys.warnoptions)'\n"
        "subprocess.run(code_command(show), check=True)"
    )
    options = ("-E", "-s", "-B", "-OO", "-X", "utf8=1", "-W", "error::UserWarning")
    shown = output(sys.executable, *options, "-c", code, folder=SOURCES)
    assert shown == "1 1 1 2 1 ['error::UserWarning']\n"


def test_the_search_path_holds_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "zipped.pyz", "/somewhere"])
    assert search_path() == [str(tmp_path / "zipped.pyz"), "/somewhere", ROOT]
    monkeypatch.setattr(installation, "ROOT", str(tmp_path))
    assert search_path() == [str(tmp_path), str(tmp_path / "zipped.pyz"), "/somewhere"]


def test_a_deleted_folder_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["", "lost", "/somewhere"])
    assert search_path() == ["/somewhere", ROOT]


def test_a_zipped_package_starts_its_children(tmp_path: Path) -> None:
    archive = tmp_path / "app.pyz"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in (SOURCES / "var_deploy").rglob("*.py"):
            packed.write(path, path.relative_to(SOURCES))
        packed.writestr(
            "__main__.py",
            "import subprocess; from var_deploy.host.installation import code_command\n"
            "show = 'import var_deploy.host.machine as m; print(m.__file__)'\n"
            "subprocess.run(code_command(show), cwd='/', check=True)\n",
        )
    shown = output(sys.executable, archive.name, folder=tmp_path)
    assert Path(shown.strip()) == archive / "var_deploy" / "host" / "machine.py"


# half a package: what a checkout is to `python -m`

WITHOUT_HALVES = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, sys.argv.pop(1))
"""


GENERATE = "['generate', sys.argv[1], '--labels', '0', '--out', 'x.png']"


@pytest.mark.parametrize(
    "code",
    [f"from var_deploy.cli import main; main({GENERATE})", "from var_deploy import Pipeline"],
)
def test_a_checkout_that_hides_the_package_is_named(
    tmp_path: Path, code: str, pocket_bundle: Path
) -> None:
    (tmp_path / "var_deploy").symlink_to(SOURCES / "var_deploy", target_is_directory=True)
    command = (sys.executable, "-c", WITHOUT_HALVES + code, str(tmp_path), str(pocket_bundle))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"var_deploy.runtime was not found: {tmp_path / 'var_deploy'} is a checkout's" in last
    assert "pip install -e" in last


def test_other_missing_modules_are_none_of_its_business() -> None:
    assert shadowed(ModuleNotFoundError("no", name="onnxruntime")) == ""
    assert shadowed(ModuleNotFoundError("no", name="var_deploy.runtime.x")) == ""
    assert "var_deploy.export was not found" in shadowed(
        ModuleNotFoundError("no", name="var_deploy.export")
    )


# a rule: nothing else in the package makes a command of this interpreter


def makes_commands(source: str) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
        for node in ast.walk(ast.parse(source))
    )


def test_one_module_makes_commands_of_this_interpreter() -> None:
    found = {
        path.name
        for top in ("var_deploy", "export", "runtime")
        for path in (SOURCES / top).rglob("*.py")
        if makes_commands(path.read_text(encoding="utf-8"))
    }
    assert found == {"installation.py"}


# what a shell is told


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment .venv in the current folder, whose programs no shell finds."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "pip", "var-deploy", "activate"):
        (programs / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    return programs


def test_programs_that_no_shell_finds_are_named_by_their_path(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program() == ".venv/bin/var-deploy"
    assert activation() == ". .venv/bin/activate"
    assert pip_command("numpy") == ".venv/bin/python -m pip install numpy"
    (tmp_path / "below it").mkdir()
    monkeypatch.chdir(tmp_path / "below it")
    assert program() == str(environment / "var-deploy")
    (environment / "var-deploy").unlink()
    assert program() == f"{environment / 'python'} -m var_deploy"


def test_programs_of_an_activated_environment_go_by_their_names(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(environment))
    assert (program(), activation()) == ("var-deploy", "")
    assert pip_command("numpy", "ray[serve]>=2") == 'pip install numpy "ray[serve]>=2"'
    other = tmp_path / "other"
    other.mkdir()
    for name in ("pip", "var-deploy"):
        (other / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{other}:{environment}")
    assert program() == ".venv/bin/var-deploy", "not the one of another environment"
    assert pip_command("numpy") == ".venv/bin/python -m pip install numpy"


def test_a_folder_with_a_space_is_quoted(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "my venv"
    (tmp_path / ".venv").rename(spaced)
    monkeypatch.setattr(sys, "executable", str(spaced / "bin" / "python"))
    assert program() == '"my venv/bin/var-deploy"'


def test_an_extra_is_named_by_the_packages_that_are_missing(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"numpy", "torch", "onnx"}

    def version(name: str) -> str:
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setenv("PATH", str(environment))
    monkeypatch.setattr(importlib.metadata, "version", version)
    cpu = pip_install("cpu")
    assert cpu.startswith('pip install "onnxruntime>=') and cpu.count(">=") == 1
    export = pip_install("export")
    assert "onnxruntime>=" in export and "safetensors>=" in export and "torch" not in export
    assert '"torch>=' in pip_install("export", missing="torch"), "it is there, and broken"
    assert pip_install("export", "torch").startswith('pip install "torch>=')
    here |= {"onnxruntime"}
    assert pip_install("cpu") == cpu, "all of them, where none is missing"
    assert "prometheus-client>=" in pip_install("serve", missing="prometheus_client")


def test_every_hint_names_what_an_index_has() -> None:
    """var-deploy itself is on no index: no message says `pip install var-deploy…`."""
    telling = [
        path.name
        for top in ("var_deploy", "export", "runtime")
        for path in (SOURCES / top).rglob("*.py")
        if re.search(r"pip install ..?var-deploy", path.read_text(encoding="utf-8"))
    ]
    assert telling == []

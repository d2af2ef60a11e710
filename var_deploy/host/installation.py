"""Commands that run this package in child processes, and shell commands that run or install it.

`python -m` and `python -c` look for modules in the current folder first. Started inside a checkout
of this repository, or beside a file with the name of a module, a child process would import these
files instead of the installed ones. The commands made here use the search path of this process.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])  # the folder that holds this package
HALVES = ("var_deploy.export", "var_deploy.runtime")
PROGRAM, DISTRIBUTION = "var-deploy", "var-deploy"  # names of the script, and of the package

# code that runs first in a child process; only `sys`, which is built in, can be imported before the
# path is set
PREPARE = "import sys; sys.path[:] = {path}\n"
RUN_MODULE = "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def module_command(module: str, *arguments: object) -> list[str]:
    """The command that runs `module` as a program, as `python -m` does, in a child process.

    The child has the interpreter, flags and search path of this process; the current folder does
    not matter.
    """
    return code_command(RUN_MODULE, module, *arguments)


def code_command(code: str, *arguments: object) -> list[str]:
    """The command that runs Python code, as `python -c` does, in a child process.

    The child has the interpreter, flags and search path of this process; the arguments are its
    `sys.argv[1:]`.
    """
    prepare = PREPARE.format(path=ascii(search_path()))
    return [sys.executable, *_flags(), "-c", prepare + code, *map(str, arguments)]


def search_path() -> list[str]:
    """`sys.path` with absolute folders, so that it does not depend on the current folder.

    It contains this package's folder; for an editable install, which an import hook finds, that
    folder comes last.
    """
    found: list[str] = []
    for entry in sys.path:
        if os.path.isabs(entry):
            found.append(entry)
        else:
            # "" is the current folder, kept only where it contains this package
            with contextlib.suppress(FileNotFoundError):  # a current folder that was deleted
                path = os.path.abspath(entry)
                found += [path] if entry or path == ROOT else []
    return found if ROOT in found else [*found, ROOT]


def _flags() -> list[str]:
    """Command-line flags of this interpreter that change how code runs."""
    flags = sys.flags
    letters = {
        "I": flags.isolated,
        "E": flags.ignore_environment,
        "s": flags.no_user_site,
        "S": flags.no_site,
        "B": flags.dont_write_bytecode,
        "O": flags.optimize,
    }
    given = [f"-{letter * count}" for letter, count in letters.items() if count]
    given += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        given.append(f"-X{name}" if value is True else f"-X{name}={value}")
    return given


def shadowed(error: ModuleNotFoundError) -> str:
    """The error message for an import that failed because a checkout hides the package; else "".

    In a checkout `export/` and `runtime/` lie beside `var_deploy/`, which alone is half a package.
    """
    if error.name not in HALVES:
        return ""
    package = Path(ROOT, "var_deploy")
    return (
        f"{error.name} was not found: {package} is a checkout's folder and hides the installed "
        "package; run `var-deploy` instead of `python -m var_deploy`, start Python in another "
        f"folder, or install the checkout: pip install -e {ROOT}"
    )


# commands for a shell; the package is not on an index, so an extra is named by its packages


def program() -> str:
    """The command that runs `var-deploy` of this environment in the current folder."""
    script = _beside_python(PROGRAM)
    if _on_path(PROGRAM, script):
        return PROGRAM
    return _shell_path(script) if script.is_file() else f"{_python()} -m var_deploy"


def activation() -> str:
    """The command that activates the virtual environment; "" where it is active or missing."""
    script = _beside_python("activate")
    return "" if program() == PROGRAM or not script.is_file() else f". {_shell_path(script)}"


def pip_install(extra: str, *names: str, missing: str = "") -> str:
    """The command that installs an extra's packages in this environment.

    It lists the packages of the extra that are not installed, or all of them where none is missing;
    with `names`, only these packages. `missing` is a package that could not be imported.
    """
    needed = {_distribution(requirement): requirement for requirement in _requirements(extra)}
    absent = [name for name in needed if name == _distribution(missing) or not _installed(name)]
    chosen = [needed.get(name, name) for name in map(_distribution, names)]
    chosen = chosen or [needed[name] for name in absent] or list(needed.values())
    # a package on an added path has no metadata: use the extra's name
    return pip_command(*chosen) if chosen else pip_command(f"{DISTRIBUTION}[{extra}]")


def pip_command(*requirements: str) -> str:
    """The `pip install` command for this environment, also where the shell's pip is another."""
    quoted = (f'"{r}"' if re.search(r"[^\w.-]", r) else r for r in requirements)
    return " ".join([pip(), "install", *quoted])


def pip() -> str:
    """The command that runs the pip of this environment in the current folder."""
    return "pip" if _on_path("pip", _beside_python("pip")) else f"{_python()} -m pip"


def _requirements(extra: str) -> list[str]:
    """Requirements of an extra from the package's metadata, as "onnxruntime>=1.20"."""
    import importlib.metadata  # lazily: it loads the package email

    try:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a zipped package, a path that was added
        return []
    pairs = (line.partition(";")[::2] for line in listed)
    return [
        requirement.strip()
        for requirement, marker in pairs
        if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker)
    ]


def _distribution(requirement: str) -> str:
    """Normalised name of a requirement's package: "ray[serve]>=2.60" → "ray"."""
    name = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name[0] if name else requirement).lower()


def _installed(distribution: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _beside_python(name: str) -> Path:
    return Path(sys.executable).parent / name


def _on_path(name: str, script: Path) -> bool:
    """Whether the command `name` in a shell runs this script."""
    found = shutil.which(name)
    return found is not None and script.is_file() and os.path.samefile(found, script)


def _python() -> str:
    return _shell_path(Path(sys.executable))


def _shell_path(path: Path) -> str:
    """A path for a shell: relative where it is below the current folder, quoted if needed."""
    with contextlib.suppress(ValueError, FileNotFoundError):  # elsewhere; a deleted folder
        path = path.relative_to(Path.cwd())
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text

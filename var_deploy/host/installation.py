"""Where this package is installed, commands that run it in child processes, and what a shell here
would have to be told to run it or to install what it lacks.

`python -m` and `python -c` look for modules in the current folder first. Started inside a checkout
of this repository, or beside a file that is called like a module, a child would load that instead
of what this process runs. The commands made here search the folders that this process searches.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])  # the folder that holds this package
HALVES = ("var_deploy.export", "var_deploy.runtime")
PROGRAM, DISTRIBUTION = "var-deploy", "var-deploy"  # of the script, and of the metadata

# the two lines before a child's own code; nothing but `sys`, which is built in, can be imported
# before the path is set
PREPARE = "import sys; sys.path[:] = {path}\n"
RUN_MODULE = "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def module_command(module: str, *arguments: object) -> list[str]:
    """The command that runs `module` as a program, as `python -m` does, in a child process.

    The child is a Python like this one: the same interpreter, flags and search path, whatever the
    current folder holds.
    """
    return code_command(RUN_MODULE, module, *arguments)


def code_command(code: str, *arguments: object) -> list[str]:
    """The command that runs Python code, as `python -c` does, in a child process like this one.

    The arguments are `sys.argv[1:]` there.
    """
    prepare = PREPARE.format(path=ascii(search_path()))
    return [sys.executable, *_flags(), "-c", prepare + code, *map(str, arguments)]


def search_path() -> list[str]:
    """`sys.path` as it holds in any folder: absolute, and with this package on it.

    An editable install is found by an import hook; its folder goes last.
    """
    found: list[str] = []
    for entry in sys.path:
        if os.path.isabs(entry):
            found.append(entry)
        else:
            # of the moment: "" is the current folder, dropped unless this package lies there
            with contextlib.suppress(FileNotFoundError):  # a current folder that was deleted
                path = os.path.abspath(entry)
                found += [path] if entry or path == ROOT else []
    return found if ROOT in found else [*found, ROOT]


def _flags() -> list[str]:
    """The options of this interpreter that change what code means."""
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
    """One line for an import that failed because a checkout hides the installed package; else "".

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


# what a shell is told; the package is on no index, so an extra is named by its packages


def program() -> str:
    """How a shell in the current folder calls the program `var-deploy` of this environment."""
    script = _beside_python(PROGRAM)
    if _on_path(PROGRAM, script):
        return PROGRAM
    return _shell_path(script) if script.is_file() else f"{_python()} -m var_deploy"


def activation() -> str:
    """The command after which `var-deploy` alone is enough; "" where it is already, or where
    there is none."""
    script = _beside_python("activate")
    return "" if program() == PROGRAM or not script.is_file() else f". {_shell_path(script)}"


def pip_install(extra: str, *names: str, missing: str = "") -> str:
    """The command that installs an extra's packages where this program runs.

    It holds those packages of the extra that are not installed, or all of them where none is
    missing; with `names` those of these names alone. `missing` is one that could not be imported.
    """
    needed = {_distribution(requirement): requirement for requirement in _requirements(extra)}
    absent = [name for name in needed if name == _distribution(missing) or not _installed(name)]
    chosen = [needed.get(name, name) for name in map(_distribution, names)]
    chosen = chosen or [needed[name] for name in absent] or list(needed.values())
    # without metadata, which a package on an added path has not, the extra's name must do
    return pip_command(*chosen) if chosen else pip_command(f"{DISTRIBUTION}[{extra}]")


def pip_command(*requirements: str) -> str:
    """`pip install …` for this environment, whatever environment the `pip` of the shell is of."""
    quoted = (f'"{r}"' if re.search(r"[^\w.-]", r) else r for r in requirements)
    return " ".join([pip(), "install", *quoted])


def pip() -> str:
    """How a shell in the current folder calls the pip of this environment."""
    return "pip" if _on_path("pip", _beside_python("pip")) else f"{_python()} -m pip"


def _requirements(extra: str) -> list[str]:
    """What the metadata of this package list for an extra, as in "onnxruntime>=1.20"."""
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
    """ "ray[serve]>=2.60" → "ray", in the one spelling that pip takes all others for."""
    name = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name[0] if name else requirement).lower()


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _beside_python(name: str) -> Path:
    return Path(sys.executable).parent / name


def _on_path(name: str, script: Path) -> bool:
    """Whether a shell that is told `name` runs this script."""
    found = shutil.which(name)
    return found is not None and script.is_file() and os.path.samefile(found, script)


def _python() -> str:
    return _shell_path(Path(sys.executable))


def _shell_path(path: Path) -> str:
    """A path as one types it: relative where it lies below the current folder."""
    with contextlib.suppress(ValueError, FileNotFoundError):  # elsewhere; a deleted folder
        path = path.relative_to(Path.cwd())
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text

"""Where this package is installed, and commands that run it in child processes.

`python -m` and `python -c` look for modules in the current folder first. Started inside a checkout
of this repository, or beside a file that is called like a module, a child would load that instead
of what this process runs. The commands made here search the folders that this process searches.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[1])  # the folder that holds this package
HALVES = ("var_deploy.export", "var_deploy.runtime")

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

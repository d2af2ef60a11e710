"""The rules of the house: what is packaged, who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from slow_files import FILES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HALVES = {"var_deploy.export": "export", "var_deploy.runtime": "runtime"}
USERS = "pipeline bench cluster datasets demo device_check serving triton"  # of the runtime
ABOVE = tuple(f"var_deploy.{name}" for name in USERS.split())
BUILD_ONLY = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")
RUNTIME_MODULES = "var_deploy, var_deploy.pipeline, var_deploy.runtime, var_deploy.cli.program"
EVERY_COMMAND = "list(var_deploy.cli.program.main.commands.values())"


def package_of(folder: Path) -> str:
    """export/graphs → var_deploy.export.graphs, var_deploy/cli → var_deploy.cli."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "var_deploy" else ("var_deploy", *parts))


def modules() -> list[Path]:
    return sorted(p for top in ("var_deploy", *HALVES.values()) for p in (ROOT / top).rglob("*.py"))


def project() -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return data


def test_every_folder_with_code_is_packaged() -> None:
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({package_of(path.parent) for path in modules()})
    for package in listed:
        top, *rest = package.split(".")[1:] or ["."]
        base = top if f"var_deploy.{top}" in HALVES else f"var_deploy/{top}"
        assert (ROOT / base).joinpath(*rest, "__init__.py").is_file(), package


def test_every_data_file_is_packaged() -> None:
    patterns = project()["tool"]["setuptools"]["package-data"]
    for top in ("var_deploy", *HALVES.values()):
        for path in (ROOT / top).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            package = next(p for p in path.parents if (p / "__init__.py").is_file())
            name = path.relative_to(package).as_posix()
            # setuptools' * takes no slash
            found = [
                pattern
                for pattern in patterns.get(package_of(package), [])
                if pattern.count("/") == name.count("/") and fnmatch(name, pattern)
            ]
            assert found, f"{path} is not packaged"


# imports run one way: cli → export, cluster, triton, serving, datasets, bench, device_check →
# pipeline → runtime → contract


def imports(tree: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a module imports; TYPE_CHECKING blocks do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, inside_functions=inside_functions)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def broken_rules(path: Path, source: str) -> list[str]:
    """What the module `path` (relative to the root) imports and may not."""
    tree = ast.parse(source)
    everywhere = set(imports(tree, inside_functions=True))
    at_import = set(imports(tree, inside_functions=False))
    top = path.parts[0]
    if top == "export":
        return sorted(n for n in everywhere if within(n, "var_deploy.cli"))
    if top == "runtime":
        wrong = {n for n in everywhere if within(n, "var_deploy.export", "var_deploy.cli", *ABOVE)}
    elif path.parts[1] in ("cli", "__init__.py", "__main__.py"):
        wrong = {n for n in at_import if within(n, *HALVES, "var_deploy.pipeline")}
    elif f"var_deploy.{path.parts[1].removesuffix('.py')}" in ABOVE:
        wrong = {n for n in everywhere if within(n, "var_deploy.export", "var_deploy.cli")}
    else:
        wrong = {n for n in everywhere if within(n, *HALVES, "var_deploy.cli")}
    # torch and its kin stay in export/, not even lazily elsewhere
    return sorted(wrong | {n for n in everywhere if within(n, *BUILD_ONLY)})


def test_imports_run_one_way() -> None:
    broken = {
        str(path.relative_to(ROOT)): wrong
        for path in modules()
        if (wrong := broken_rules(path.relative_to(ROOT), path.read_text(encoding="utf-8")))
    }
    assert not broken


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("runtime/a.py", "def f():\n    from var_deploy.export import b", ["var_deploy.export.b"]),
        ("runtime/a.py", "import onnx.checker", ["onnx.checker"]),
        ("runtime/a.py", "import onnxruntime", []),
        ("runtime/a.py", "import var_deploy.pipeline", ["var_deploy.pipeline"]),
        ("var_deploy/bench/a.py", "import var_deploy.pipeline", []),
        ("var_deploy/spec.py", "from var_deploy import runtime", ["var_deploy.runtime"]),
        ("var_deploy/cli/a.py", "import var_deploy.export.b", ["var_deploy.export.b"]),
        ("var_deploy/cli/a.py", "def f():\n    import var_deploy.export.b", []),
        ("var_deploy/cli/a.py", "def f():\n    import torch", ["torch"]),
        ("export/a.py", "import torch, var_deploy.runtime", []),
    ],
)
def test_a_broken_rule_is_seen(path: str, source: str, wrong: list[str]) -> None:
    assert broken_rules(Path(path), source) == wrong


def test_modules_are_short_and_named_for_what_they_do() -> None:
    long = {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 600}
    assert not long
    assert not [p for p in modules() if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_slow_files_are_there() -> None:
    assert FILES
    assert not [name for name in FILES if not (ROOT / "tests" / name).is_file()]


# aliases of types are for annotations: from NumPy 2.5 on Python 3.12 on, NDArray is no class


def run_time_aliases(source: str) -> list[str]:
    """Uses of what numpy.typing offers where a class must stand: as a base, or in isinstance."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "numpy.typing"
        for alias in node.names
    }
    places: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            places += node.bases
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            places += node.args[1:]
    names = (name for place in places for name in ast.walk(place) if isinstance(name, ast.Name))
    return sorted({name.id for name in names} & aliases)


def test_no_alias_of_a_type_stands_where_a_class_must() -> None:
    assert run_time_aliases("from numpy.typing import NDArray\nclass A(NDArray[int]): ...")
    assert run_time_aliases("from numpy.typing import NDArray as N\nisinstance(1, (int, N))")
    found = {p.name: used for p in modules() if (used := run_time_aliases(p.read_text("utf-8")))}
    assert not found


def test_a_family_is_registered_on_both_sides() -> None:
    pytest.importorskip("torch")
    from var_deploy.export.families import EXPORT_FAMILIES
    from var_deploy.families import FAMILIES

    assert list(FAMILIES) == list(EXPORT_FAMILIES)
    for families in (FAMILIES, EXPORT_FAMILIES):
        assert all(name == family.name for name, family in families.items())


def test_only_a_family_asks_which_family_it_is() -> None:
    """Elsewhere a comparison with a name would have to be found and extended for the next one."""
    own = {"models/gpt2.py"}  # refuses sizes of another family
    for path in modules():
        if "families" in path.parts or any(path.as_posix().endswith(name) for name in own):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or not isinstance(node.left, ast.Attribute):
                continue
            by_name = isinstance(node.ops[0], ast.Eq | ast.NotEq)
            assert not (by_name and node.left.attr == "family"), f"{path}:{node.lineno}"


def test_the_product_never_imports_tools() -> None:
    """tools/ is not packaged: training, drawings and studies stay out of the wheel."""
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [n for n in imports(tree, inside_functions=True) if within(n, "tools")], path


# lightness: what a device without PyTorch has to load


def probe(statement: str) -> set[str]:
    """Build-only packages that are loaded once a fresh interpreter has run `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & set(BUILD_ONLY)


def test_the_runtime_is_light() -> None:
    assert probe(f"import {RUNTIME_MODULES}; {EVERY_COMMAND}") == set()


def test_the_probe_sees_a_heavy_import() -> None:
    pytest.importorskip("onnx")
    assert "onnx" in probe("import var_deploy, onnx")

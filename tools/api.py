"""Writes docs/API.md, a quick reference made from the public docstrings.

    python -m tools.api

The source is read, not imported: the page needs neither PyTorch nor an inference library. A name is
looked up wherever in the package it is defined.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from tools.architecture import FOLDERS, ROOT

PAGE = ROOT / "docs" / "API.md"
WIDTH = 100
Definition = ast.ClassDef | ast.FunctionDef

HEAD = """\
# Python: quick reference

Made from the docstrings by `python -m tools.api`; examples are in
[GUIDE.md](GUIDE.md#from-python). Arrays are NumPy's; N is a number of images, K the number of
scales, L_k the tokens of scale k.
"""
METHODS = (
    *("load", "generate", "__call__", "edit", "vary", "encode", "decode"),
    *("labels", "sizes", "describe", "cancel", "close"),
)
# (heading, what is imported, name, methods and properties that are shown)
RUNTIME: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("from var_deploy import Pipeline", "Pipeline", METHODS),
    ("", "GenerationOptions", ()),
    ("", "Images", ("save", "pil")),
    ("", "Sizes", ()),
    ("", "ScaleEvent", ()),
    ("from var_deploy.sampling import Sampling", "Sampling", ("replace",)),
    ("from var_deploy.image.images import grid", "grid", ()),
    ("from var_deploy.image.images import read_settings", "read_settings", ()),
)
EXPORT: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("from var_deploy.export import export_modules", "export_modules", ()),
    ("from var_deploy.export import verify_bundle", "verify_bundle", ()),
)
OWN_MODEL = "var_deploy.export.var"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name → parsed source, of the whole package."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def find(name: str) -> Definition:
    """The one class or function of that name at the top of a module."""
    found = [
        node
        for tree in modules().values()
        for node in tree.body
        if isinstance(node, Definition) and node.name == name
    ]
    if len(found) != 1:
        raise LookupError(f"{name} is defined {len(found)} times in the package, expected once")
    return found[0]


def member(owner: Definition, name: str) -> ast.FunctionDef:
    found = [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name]
    if len(found) != 1:
        raise LookupError(f"{owner.name} has no {name}")
    return found[0]


def decorated(node: Definition, name: str) -> bool:
    return any(ast.unparse(decorator) == name for decorator in node.decorator_list)


def signature(node: ast.FunctionDef, owner: str = "") -> str:
    """The call as Python, in lines of at most `WIDTH`; a property as owner.name: type."""
    returns = ast.unparse(node.returns) if node.returns else ""
    called = f"{owner}.{node.name}" if owner else node.name
    if decorated(node, "property"):
        return f"{called}: {returns}"
    arguments = list(_arguments(node.args))
    line = f"{called}({', '.join(arguments)}) -> {returns}"
    if len(line) <= WIDTH:
        return line
    listed = "".join(f"    {argument},\n" for argument in arguments)
    return f"{called}(\n{listed}) -> {returns}"


def _arguments(given: ast.arguments) -> Iterator[str]:
    """Each argument but `self` and `cls`, with its type and default."""
    ordinary: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
    for argument, default in zip(given.args, [*ordinary, *given.defaults], strict=True):
        if argument.arg not in ("self", "cls"):
            yield _argument(argument, default)
    if given.kwonlyargs:
        yield "*"
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield _argument(argument, default)
    if given.kwarg:
        yield f"**{given.kwarg.arg}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = ast.unparse(argument.annotation) if argument.annotation else "Any"
    text = f"{argument.arg}: {kind}"
    return (text if default is None else f"{text} = {ast.unparse(default)}").replace("'", '"')


def markdown(docstring: str) -> Iterator[str]:
    """Paragraphs of a docstring: lists of arguments and attributes as lists, indented lines as
    code."""
    for block in re.split(r"\n\n+", docstring):
        head, _, rest = block.partition("\n")
        if re.fullmatch(r"(Args|Attributes|Keys):", head):
            entries = re.split(r"\n(?=\S)", re.sub(r"(?m)^    ", "", rest))
            lines = []
            for entry in entries:
                names, _, text = " ".join(entry.split()).partition(": ")
                shown = ", ".join(f"`{name}`" for name in names.split(", "))
                lines.append(f"- {shown}: {text}")
            yield "\n".join(lines)
        elif all(line.startswith("    ") for line in block.splitlines()):
            code = re.sub(r"(?m)^    ", "", block)
            yield f"```python\n{code}\n```"
        else:
            yield block


def entry(heading: str, node: Definition, shown: Sequence[str]) -> Iterator[str]:
    """A class with some of its members, or a function."""
    yield f"## {node.name}"
    if heading:
        yield f"```python\n{heading}\n```"
    if isinstance(node, ast.FunctionDef):
        yield f"```python\n{signature(node)}\n```"
    elif fields := _fields(node):
        yield f"```python\n{node.name}({fields})\n```"
    yield from markdown(ast.get_docstring(node) or "")
    for name in shown:
        function = member(node, name)
        yield f"### {node.name}.{name}"
        yield f"```python\n{signature(function, node.name)}\n```"
        yield from markdown(ast.get_docstring(function) or "")


def _fields(node: ast.ClassDef) -> str:
    """The fields of a dataclass with a default, which is what one makes by hand."""
    return ", ".join(
        f"{field.target.id}={ast.unparse(field.value)}"
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and field.value is not None
        and node.name == "Sampling"
    )


def public(module: ast.Module) -> list[str]:
    """What a module's __all__ lists."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise LookupError("the module has no __all__")


def page() -> str:
    """The text of docs/API.md, the same for the same docstrings."""
    parts = [HEAD.strip()]
    for heading, name, shown in RUNTIME:
        parts += entry(heading, find(name), shown)
    imported = "from var_deploy import VarDeployError  # and the others"
    parts += ["## Errors", f"```python\n{imported}\n```"]
    parts += markdown(ast.get_docstring(modules()["var_deploy.errors"]) or "")
    parts += ["## With PyTorch", "What follows needs the extra `export`."]
    for heading, name, shown in EXPORT:
        parts += entry(heading, find(name), shown)
    own = modules()[OWN_MODEL]
    parts += ["## var", *markdown(ast.get_docstring(own) or "")]
    for name in public(own):
        node = next(n for n in own.body if isinstance(n, ast.FunctionDef) and n.name == name)
        parts += [f"### var.{name}", f"```python\n{signature(node, 'var')}\n```"]
        parts += markdown(ast.get_docstring(node) or "")
    return "\n\n".join(parts) + "\n"


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    click.echo(f"wrote {Path(PAGE).relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""Draws which package of var-deploy imports which, as docs/architecture.svg.

    python -m tools.architecture

Packages lie in rows: each imports only from rows below its own. An arrow is left out where it
follows from two others, so that the picture shows the order and not every import. Imports inside
functions count; blocks under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
FOLDERS = {
    "var_deploy": "var_deploy",
    "export": "var_deploy.export",
    "runtime": "var_deploy.runtime",
}
# the two files of var_deploy/ that stand above the runtime
PIPELINE = {"__init__.py", "pipeline.py"}
COLOURS = {"var_deploy.export": "#fde8d0", "var_deploy.runtime": "#d8eefd"}
OTHERS = "#eeeeee"

BOX, HEIGHT, GAP, ROW, MARGIN = 172, 34, 22, 92, 24
STYLE = (
    "text{font:13px ui-monospace,monospace;fill:#222;text-anchor:middle}"
    "rect{stroke:#555;rx:5}path{stroke:#777;fill:none}"
)


def package_of(path: Path) -> str:
    """Return the package of a file: export/graphs/scale.py → var_deploy.export.graphs."""
    top, *rest = path.relative_to(ROOT).parent.parts
    if top == "var_deploy" and not rest and path.name in PIPELINE:
        return "var_deploy.pipeline"
    return ".".join([FOLDERS[top], *rest])


def imported(tree: ast.AST) -> Iterator[str]:
    """Return the dotted names that a module imports, deferred imports included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield from imported(node)


def package_imports() -> dict[str, set[str]]:
    """Return package → packages that its modules import, without itself."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    packages = {package_of(path) for path in paths if "page" not in path.parts}
    found: dict[str, set[str]] = {package: set() for package in sorted(packages)}
    for path in paths:
        if package_of(path) not in packages:
            continue  # assets
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name == "var_deploy.Pipeline":
                name = "var_deploy.pipeline"
            while name and name not in packages:
                name = name.rpartition(".")[0]
            if name and name != package_of(path):
                found[package_of(path)].add(name)
    return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Return everything that `start` imports, directly or not."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for following in graph[waiting.pop()] - seen:
            seen.add(following)
            waiting.append(following)
    return seen


def rows(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the row of each package, 0 at the bottom; packages that import each other share
    one."""
    below = {package: reachable(graph, package) for package in graph}
    found: dict[str, int] = {}

    def row(package: str) -> int:
        if package not in found:
            deeper = [p for p in graph[package] if package not in below[p]]
            found[package] = 1 + max(map(row, deeper), default=-1)
        return found[package]

    for package in graph:
        same = {p for p in below[package] if package in below[p]} | {package}
        level = max(map(row, sorted(same)))
        found.update(dict.fromkeys(same, level))
    return found


def reduced(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the arrows that do not follow from others."""
    below = {package: reachable(graph, package) for package in graph}
    return [
        (package, target)
        for package, targets in graph.items()
        for target in sorted(targets)
        if not any(
            target in below[other] and package not in below[other]
            for other in targets - {target}
            if other not in below[target]
        )
    ]


def picture(graph: Mapping[str, set[str]]) -> str:
    """Return the SVG; equal imports give equal bytes."""
    level = rows(graph)
    levels = [
        sorted(p for p in graph if level[p] == n) for n in range(max(level.values()), -1, -1)
    ]
    width = 2 * MARGIN + max(len(line) for line in levels) * (BOX + GAP) - GAP
    height = 2 * MARGIN + (len(levels) - 1) * ROW + HEIGHT
    place = {}
    for number, line in enumerate(levels):
        left = (width - len(line) * (BOX + GAP) + GAP) / 2
        for column, package in enumerate(line):
            place[package] = (left + column * (BOX + GAP), MARGIN + number * ROW)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f"<title>Packages of var-deploy and their imports</title><style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff" stroke="none"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" style="fill:#777"/></marker>'
        "</defs>",
    ]
    for package, target in reduced(graph):
        (x1, y1), (x2, y2) = place[package], place[target]
        start, end = (x1 + BOX / 2, y1 + HEIGHT), (x2 + BOX / 2, y2)
        if level[package] == level[target]:  # they import each other
            start, end = (x1 + BOX / 2, y1), (x2 + BOX / 2, y2)
        bend = ROW / 3
        parts.append(
            f'<path d="M{start[0]:g} {start[1]:g}C{start[0]:g} {start[1] + bend:g} '
            f'{end[0]:g} {end[1] - bend:g} {end[0]:g} {end[1]:g}" marker-end="url(#tip)"/>'
        )
    for package, (x, y) in place.items():
        colour = next((c for p, c in COLOURS.items() if package.startswith(p)), OTHERS)
        short = package.removeprefix("var_deploy.") if "." in package else "var_deploy (contract)"
        parts.append(
            f'<rect x="{x:g}" y="{y}" width="{BOX}" height="{HEIGHT}" fill="{colour}"/>'
            f'<text x="{x + BOX / 2:g}" y="{y + 22}">{escape(short)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where it is not current.")
def main(check: bool) -> None:
    """Draw docs/architecture.svg from the imports of today."""
    text = picture(package_imports())
    if not check:
        PICTURE.write_text(text, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != text:
        raise click.ClickException("docs/architecture.svg is old: run python -m tools.architecture")


if __name__ == "__main__":
    main()

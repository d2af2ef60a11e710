"""docs/API.md shows the docstrings of today."""

from __future__ import annotations

import ast

import pytest

from tools.api import PAGE, find, markdown, page, signature
from var_deploy import errors


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.api"


def test_what_users_call_is_there() -> None:
    text = page()
    for name in ("Pipeline.generate", "Images.save", "Sampling", "export_modules", "verify_bundle"):
        assert f"# {name}\n" in text
    for name in ("build", "build_tokenizer", "next_scale_prediction", "recommended_defaults"):
        assert f"### var.{name}\n" in text
    public = [name for name in dir(errors) if name.endswith("Error")]
    assert len(public) > 10 and all(name in text for name in public)


def test_a_signature_in_one_line_and_in_several() -> None:
    def parsed(source: str) -> ast.FunctionDef:
        node = ast.parse(source).body[0]
        assert isinstance(node, ast.FunctionDef)
        return node

    short = parsed("def f(self, a: int, b: str = 'x', *, c: int | None = None, **d: D) -> int: ...")
    assert signature(short, "P") == 'P.f(a: int, b: str = "x", *, c: int | None = None, **d) -> int'
    long = parsed(f"def f({', '.join(f'argument{n}: int' for n in range(6))}) -> None: ...")
    assert signature(long).splitlines()[:2] == ["f(", "    argument0: int,"]


def test_sections_of_a_docstring() -> None:
    listed = "Args:\n    a, b: two\n        of them.\n    c: three."
    text = f"One\nline.\n\n{listed}\n\n    code()\n\nEnd"
    assert list(markdown(text)) == [
        "One\nline.",
        "- `a`, `b`: two of them.\n- `c`: three.",
        "```python\ncode()\n```",
        "End",
    ]


def test_a_name_must_be_defined_once() -> None:
    with pytest.raises(LookupError, match="nothing_of_the_kind is defined 0 times"):
        find("nothing_of_the_kind")

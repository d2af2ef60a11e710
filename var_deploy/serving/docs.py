"""The page /docs: the OpenAPI description as HTML without scripts or external resources."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

EXAMPLES = """\
curl http://HOST/v1/images -H 'Content-Type: application/json' -H 'Accept: image/png' \\
     -d '{"labels": [3], "count": 4, "seed": 7}' -o images.png

curl -N http://HOST/v1/images/stream -H 'Content-Type: application/json' -d '{"labels": [3]}'

curl http://HOST/v1/edit -H 'Content-Type: application/json' -H 'Accept: image/png' -o edited.png \\
     -d '{"image": "'$(base64 -w0 photo.png)'", "box": [0, 0, 32, 32], "label": 3}'

curl http://HOST/v1/vary -H 'Content-Type: application/json' -H 'Accept: image/png' -o more.png \\
     -d '{"image": "'$(base64 -w0 images.png)'", "from_scale": 5, "label": 3, "count": 4}'
"""
STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td { padding: .2rem 1rem .2rem 0; vertical-align: top }
code, pre { font: 14px/1.4 ui-monospace, monospace } pre { overflow: auto }
h3 { margin: 1.5rem 0 .3rem }
:root { color-scheme: light dark }
"""


def docs_page(openapi: dict[str, Any], root_path: str) -> str:
    """Return HTML that describes all routes and schemas; `root_path`: the path on a proxy."""
    info = openapi["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{escape(info.get('description', ''))} As OpenAPI: "
        "<a href=openapi.json>openapi.json</a>.</p>",
        f"<h2>Examples</h2><pre>{escape(EXAMPLES.replace('HOST', f'HOST{root_path}'))}</pre>",
        "<h2>Routes</h2>",
    ]
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts += _route(path, method, route)
    parts.append("<h2>Schemas</h2>")
    for name, schema in openapi.get("components", {}).get("schemas", {}).items():
        parts += _schema(name, schema)
    return "\n".join([*parts, "</html>"])


def _route(path: str, method: str, route: dict[str, Any]) -> Iterator[str]:
    yield f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
    yield f"<p>{escape(route.get('summary', ''))}.</p><table>"
    body = route.get("requestBody", {}).get("content", {})
    for kind, content in body.items():
        yield _row("body", f"{escape(kind)}: {_type(content.get('schema', {}))}")
    for status, answer in route.get("responses", {}).items():
        kinds = ", ".join(
            f"{escape(kind)} {_type(content.get('schema', {}))}".strip()
            for kind, content in answer.get("content", {}).items()
        )
        yield _row(escape(status), f"{kinds}<br>{escape(answer.get('description', ''))}")
    yield "</table>"


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"<h3 id={escape(name)}><code>{escape(name)}</code></h3>"
    yield f"<p>{escape(schema.get('description', ''))}</p><table>"
    required = schema.get("required", ())
    for field, about in schema.get("properties", {}).items():
        note = "required" if field in required else f"default {_value(about.get('default'))}"
        text = escape(about.get("description", ""))
        yield _row(f"<code>{escape(field)}</code>", _type(about), note, text)
    yield "</table>"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, other schemas as links."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href=#{name}>{name}</a>"
    if "anyOf" in schema:
        return " | ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(_value(one) for one in schema["enum"])
    if schema.get("type") == "array":
        return f"[{_type(schema.get('items', {}))}, …]"
    return escape(str(schema.get("type", "")))


def _value(value: Any) -> str:
    return escape("null" if value is None else str(value))


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

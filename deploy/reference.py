"""Write docs/reference/: every route of the HTTP API from its OpenAPI document, every verb of the command line from its
own help. `make docs` calls it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from deploy.tables import ROOT, cli_commands, openapi, table
from server.api.rules import rule_of
from store.access import Role

Schema = Mapping[str, Any]

_HEAD = "<!-- written by make docs -->\n\n# {title}\n\n{text}\n\n"
_BODIES = {"multipart/form-data": "a form", "application/json": "JSON", "application/offset+octet-stream": "bytes"}


def http_reference() -> str:
    """docs/reference/http.md."""
    document = openapi()
    parts = [
        _HEAD.format(
            title="HTTP reference",
            text="Every route with its parameters, bodies and answers, from the server's own `/openapi.json`. With "
            "words and examples: [HTTP API](../api.md). What fails is an [ErrorAnswer](#erroranswer), with the "
            "[codes](../api.md#errors) of that page.",
        )
    ]
    parts += ["## Routes\n"]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(_route(method.upper(), path, route))
    parts += ["## Objects\n"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append(_object(name, schema))
    return "\n".join(parts).rstrip("\n") + "\n"


def cli_reference() -> str:
    """docs/reference/cli.md."""
    parts = [
        _HEAD.format(
            title="Command line",
            text="`switchyard VERB --help` says the same. Verbs that talk to a server take its address from `--server` "
            "or `SWITCHYARD_SERVER`, and the API key from `--api-key` or `SWITCHYARD_API_KEY`. They end with 0, or "
            "with 1 and one line that says what was wrong.",
        )
    ]
    for name, command in cli_commands().items():
        parts += _verb(f"switchyard {name}", command)
    return "\n".join(parts).rstrip("\n") + "\n"


PAGES = {"docs/reference/http.md": http_reference, "docs/reference/cli.md": cli_reference}


def write() -> None:
    """Write the pages that are not as the code has them."""
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{name} is up to date now\n")


def _route(method: str, path: str, route: Schema) -> str:
    rule = rule_of(method, path.replace("{model}", "{model:path}"))
    role = Role.ADMIN if rule is None else rule.role
    lines = [f"### {method} {path}\n", f"{_words(route['description'])}\n"]
    lines += ["Needs no key.\n" if role is None else f"Role: `{role.value}`.\n"]
    parameters = [
        (f"`{p['name']}`", p["in"], _type(p["schema"]), _default(p["schema"], p.get("required", False)), _cell(p))
        for p in route.get("parameters", ())
    ]
    if parameters:
        lines += [table(("parameter", "in", "type", "default", "what"), parameters)]
    for kind, content in route.get("requestBody", {}).get("content", {}).items():
        lines += [f"Body, {_BODIES.get(kind, kind)}: {_type(content['schema'])}\n"]
        if "properties" in content["schema"]:
            lines += [_fields(content["schema"])]
    answers = []
    for status, answer in route["responses"].items():
        if status not in ("4XX", "5XX"):
            for kind, content in answer.get("content", {"": {}}).items():
                what = "" if answer["description"] == "Successful Response" else answer["description"]
                shown = _type(content["schema"]) if content.get("schema") else "text" if kind else "nothing"
                answers.append((status, f"{shown} `{kind}`" if kind else shown, what))
    return "\n".join([*lines, table(("status", "answer", "when"), answers)])


def _object(name: str, schema: Schema) -> str:
    lines = [f"### {_shown(name)}\n", f"{_words(schema.get('description', ''))}\n"]
    if "enum" in schema:
        lines += [f"One of {', '.join(f'`{value}`' for value in schema['enum'])}.\n"]
    if schema.get("properties"):
        lines += [_fields(schema)]
    return "\n".join(lines)


def _fields(schema: Schema) -> str:
    required = schema.get("required", ())
    rows = [
        (f"`{name}`", _type(field), _default(field, name in required), _cell(field))
        for name, field in schema["properties"].items()
    ]
    return table(("field", "type", "default", "what"), rows)


def _type(schema: Schema) -> str:
    """A type in a few words, with links to objects."""
    if "$ref" in schema:
        name = _shown(schema["$ref"].rsplit("/", 1)[-1])
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    return f"{kind} {', '.join(bounds)}".strip()


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _default(schema: Schema, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "" if default is None or default == "" else f"`{default}`"


def _cell(schema: Schema) -> str:
    return _words(schema.get("description", ""))


def _words(text: str) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(text.strip().split("\n\n")[0].split())


def _shown(name: str) -> str:
    """The name of an object; FastAPI puts the module before names that there are two of."""
    module = re.fullmatch(r"server__api__(\w+)__(\w+)", name)
    return f"{module[2]}_{module[1]}" if module else name


def _verb(name: str, command: click.Command) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{_help(command.help or command.short_help or '')}\n"
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    below: Mapping[str, click.Command] = getattr(command, "commands", {})
    if not below:
        words = [name, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)]
        yield f"```text\n{' '.join(words)}\n```\n"
    if arguments:
        rows = [(f"`{_argument(argument)}`", _help(getattr(argument, "help", ""))) for argument in arguments]
        yield table(("argument", "what"), rows)
    if name == "switchyard serve":
        yield "Every [setting](../operations.md#settings) is an option; besides:\n"
        options = [option for option in options if option.name == "experts"]
    if options:
        yield table(("option", "variable", "default", "what"), map(_option, options))
    for verb, one in below.items():
        yield from _verb(f"{name} {verb}", one)


def _argument(argument: Any) -> str:
    name = f"{argument.name}{'...' if argument.nargs == -1 else ''}".upper()
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> tuple[str, str, str, str]:
    default = option.default if not callable(option.default) else None
    if option.required:
        shown = "required"
    else:
        shown = "" if default in (None, False, "", ()) else f"`{getattr(default, 'value', default)}`"
    variable = f"`{option.envvar}`" if isinstance(option.envvar, str) else ""
    return " ".join(f"`{name}`" for name in option.opts), variable, shown, _help(option.help or "")


def _help(text: str | None) -> str:
    """Help without the marks of the terminal."""
    return re.sub(r"\[/?(?:bold|dim|green|red)?\]", "", " ".join((text or "").split()))

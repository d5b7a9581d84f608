"""Write the tables of docs/ that say what the code says: `make docs`.

A table stands between `<!-- NAME: written by make docs -->` and `<!-- /NAME -->`; a test compares it with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import click
import typer.main

from server.api.errors import describe
from server.api.rules import PUBLIC_PATHS
from server.app import create_app
from server.cli import app as cli
from server.engine.stats import EngineStats
from server.metrics import Metrics
from server.settings import Settings
from server.work_metrics import WorkCollector
from store.errors import SwitchyardError

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/architecture.md", "docs/operations.md", "docs/api.md")
ROOMS = (
    "server",
    "server/api",
    "server/console",
    "server/engine",
    "server/engine/kernels",
    "server/tools",
    "server/jobs",
    "store",
    "store/codecs",
    "store/backends",
    "router",
)

_BLOCK = re.compile(r"(<!-- ([\w/]+): written by make docs -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def rewritten(page: str) -> str:
    """The text of a page with every table as the code has it now.

    Raises:
        KeyError: the page asks for a table that there is not.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", page)


def settings_table() -> str:
    """Every setting: flag, variable, default, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        flag = f"`--{name.replace('_', '-')}`"
        rows.append((flag, f"`SWITCHYARD_{name.upper()}`", _default(name), field.description or ""))
    return table(("flag", "variable", "default", "what"), rows)


def metrics_table() -> str:
    """Every time series that /metrics shows."""
    zeros: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(EngineStats) if field.name != "tiers"}
    metrics = Metrics(lambda: EngineStats(**zeros), lambda: [])
    metrics.registry.register(WorkCollector(lambda: [], lambda: []))
    rows = []
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append((f"`{name}`", family.type, family.documentation))
    return table(("metric", "type", "what"), sorted(rows))


def errors_table() -> str:
    """Every error that the server raises on purpose."""
    rows = []
    for kind in sorted(_subclasses(SwitchyardError), key=lambda kind: kind.__name__):
        if not kind.__module__.startswith(("store.", "server.api.")):
            continue
        status, body = describe(kind("x"), {})
        meaning = (
            _first_paragraph(kind.__doc__) if kind is not SwitchyardError else "The server failed on this request."
        )
        rows.append((str(status), f"`{body['error']['code']}`", re.sub(r" \(\d+\)\.$", ".", meaning)))
    return table(("status", "code", "what"), sorted(rows))


def routes_table() -> str:
    """Every route of the HTTP API."""
    rows = []
    for method, path, what in routes():
        rows.append((f"`{method} {path}`", what, "no" if path in PUBLIC_PATHS else "yes"))
    return table(("route", "what", "needs a key"), rows)


def verbs_table() -> str:
    """Every verb of the command line."""
    rows = [(f"`switchyard {name}`", command.get_short_help_str(limit=200)) for name, command in cli_commands().items()]
    return table(("verb", "what"), rows)


def modules_table(room: str) -> str:
    """Every module of a folder, in its own words."""
    rows = []
    for path in sorted((ROOT / room).glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if path.name != "__init__.py":
            rows.append((f"`{room}/{path.name}`", _first_paragraph(doc)))
        elif doc and room == "store/backends":  # holds the protocol
            rows.append((f"`{room}/`", _first_paragraph(doc)))
    return table(("module", "what"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings_table,
    "metrics": metrics_table,
    "errors": errors_table,
    "routes": routes_table,
    "verbs": verbs_table,
    **{room: partial(modules_table, room) for room in ROOMS},
}


def openapi() -> dict[str, Any]:
    """The document that a server answers /openapi.json with."""
    settings = Settings.model_validate({"base": "base", "host": "127.0.0.1"})
    app = create_app(
        settings,
        engine=Mock(**{"tokenizer.chat_template": ""}),
        registry=Mock(),
        ledger=Mock(),
        router=Mock(),
        quarantine=Path(),
        check=Mock(),
        base_folder=Path(),
    )
    document: dict[str, Any] = app.openapi()
    return document


def routes() -> list[tuple[str, str, str]]:
    """Every route of the HTTP API: method, path, meaning."""
    return [
        (method.upper(), path, _first_paragraph(route["description"]))
        for path, methods in openapi()["paths"].items()
        for method, route in methods.items()
    ]


def cli_commands() -> dict[str, click.Command]:
    """Every verb of the command line."""
    group = typer.main.get_command(cli)
    assert hasattr(group, "commands")
    commands: dict[str, click.Command] = group.commands
    return commands


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    if field.is_required():
        return "required"
    with patch.dict(os.environ):
        for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
            os.environ.pop(variable, None)
        value = field.get_default(call_default_factory=True)
    if value is None or value == frozenset():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = value.human_readable() if hasattr(value, "human_readable") else str(value)
    return f"`{text}`".replace(str(Path.home()), "~")


def _subclasses(kind: type[SwitchyardError]) -> set[type[SwitchyardError]]:
    return {kind}.union(*(_subclasses(below) for below in kind.__subclasses__()))


def _first_paragraph(doc: str | None) -> str:
    assert doc, "everything public says what it is"
    return " ".join(doc.strip().split("\n\n")[0].split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


COPIES = {"deploy/monitoring/alerts.yml": "deploy/helm/switchyard/files/alerts.yml"}
"""Files that must be the same in two places: a Helm chart reads nothing outside its folder."""


if __name__ == "__main__":
    from deploy import reference  # which makes its tables here

    reference.write()
    for original, copy in COPIES.items():
        (ROOT / copy).write_bytes((ROOT / original).read_bytes())
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{name} is up to date now\n")

"""The verbs of `switchyard` about routing: which prompts find which expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.client import Client, Json
from server.drawing import draw_map, print_matrix
from store.errors import SwitchyardError
from store.exemplars import parse_exemplars

out = Console()

Server = Annotated[str, typer.Option(envvar="SWITCHYARD_SERVER", help="Address of a running server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="SWITCHYARD_API_KEY", help="API key, if the server asks for one.")]
LOCAL = "http://127.0.0.1:8000"


def exemplars_verb(
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    file: Annotated[
        Path | None, typer.Argument(help="JSONL of prompts; without it, those there are are shown.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to those in the expert's own file.")] = False,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Replace the prompts that an expert of a running server is found by; its file stays as it is."""
    client = Client(server, api_key)
    if reset and file is not None:
        raise SwitchyardError("give a file or --reset, not both")
    if not reset and file is None:
        for text in client.exemplars(name):
            out.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    try:
        prompts = None if file is None else parse_exemplars(file.read_bytes())
    except OSError as error:
        raise SwitchyardError(f"cannot read {file}: {error.strerror}") from None
    record = client.set_exemplars(name, prompts)
    count = record["exemplar_count"]
    if not count:
        out.print(f"[bold]{escape(name)}[/] has no exemplars: it is reached by its name only")
        return
    learned = "found" if record["routing"] == "ready" else "soon found"
    out.print(f"[bold]{escape(name)}[/] is {learned} by {count} exemplars")


def route_verb(
    prompt: Annotated[str | None, typer.Argument(help="What a user might ask.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Instead: a confusion matrix of the experts, and a map of them as a PNG.")
    ] = False,
    picture: Annotated[Path, typer.Option("--out", help="Where the report's map goes.")] = Path("report.png"),
    most: Annotated[int, typer.Option("--experts", min=1, max=64, help="Most experts of the report.")] = 24,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Show which experts would answer a prompt, and why."""
    if report == (prompt is not None):
        raise SwitchyardError("give either a prompt or --report")
    if prompt is not None:
        _show(Client(server, api_key).route(prompt))
        return
    found = Client(server, api_key).route_report(most)
    print_matrix(found, out)
    draw_map(found, picture)
    out.print(f"the map is in [bold]{escape(str(picture))}[/]")


def _show(decision: Json) -> None:
    mix = ", ".join(f"{part['weight']:g} × {part['id']}" for part in decision["mix"]) or "the base"
    out.print(f"[bold]{escape(mix)}[/]: {escape(decision['reason'])}")
    table = Table("neighbour", "distance", "domain ends at", "exemplar")
    for column in table.columns[1:3]:
        column.justify = "right"
    for neighbour in decision["neighbours"]:
        name = "[dim]general text[/]" if neighbour["id"] is None else escape(neighbour["id"])
        end = "" if neighbour["threshold"] is None else f"{neighbour['threshold']:.3f}"
        table.add_row(name, f"{neighbour['distance']:.3f}", end, escape(neighbour["exemplar"]))
    if decision["neighbours"]:
        out.print(table)

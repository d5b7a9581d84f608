"""The verbs of `switchyard tenants`: who spends and keeps how much on a running server, and what they may."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.cli_keys import LOCAL, Bearer, Server
from server.client import Client, Json

out = Console()

tenant_verbs = typer.Typer(no_args_is_help=True, help="What tenants spend, keep and may.")

Limit = Annotated[int | None, typer.Option(min=0, help="Left out: no limit.")]


@tenant_verbs.command("usage")
def tenants_usage(
    month: Annotated[str | None, typer.Option(help="Such as 2026-11; default: this one.")] = None,
    server: Server = LOCAL,
    api_key: Bearer = None,
) -> None:
    """Show what every tenant spent in a month, and what it keeps."""
    table = Table("tenant", "requests", "prompt tokens", "answer tokens", "experts", "size", "limits")
    for column in table.columns[1:6]:
        column.justify = "right"
    for used in Client(server, api_key).usage(month):
        table.add_row(
            escape(used["tenant"] or "(operator)"), f"{used['requests']:,}", f"{used['prompt_tokens']:,}",
            f"{used['completion_tokens']:,}", str(used["experts"]), f"{used['expert_bytes'] / 1e6:.1f} MB",
            _limits(used["limits"]),
        )  # fmt: skip
    out.print(table if table.rows else "nobody has asked or published anything")


@tenant_verbs.command("limit")
def tenants_limit(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_experts: Limit = None,
    max_bytes: Limit = None,
    reset: Annotated[bool, typer.Option("--reset", help="Have the server's usual limits again.")] = False,
    server: Server = LOCAL,
    api_key: Bearer = None,
) -> None:
    """Give a tenant limits of its own, all of them; they count at once."""
    client = Client(server, api_key)
    limits: Json = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_experts": max_experts,
        "max_bytes": max_bytes,
    }
    given = client.reset_limits(tenant) if reset else client.set_limits(tenant, limits)
    out.print(f"[bold]{escape(tenant)}[/] may: {_limits(given)}")


def _limits(given: Json) -> str:
    words = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "max_experts": "experts",
        "max_bytes": "bytes",
    }
    return ", ".join(f"{given[name]:,} {word}" for name, word in words.items() if given[name] is not None) or "anything"

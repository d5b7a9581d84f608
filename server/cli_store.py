"""The verbs of `switchyard store`, which work on a store itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.settings import Settings

out = Console()

store_verbs = typer.Typer(no_args_is_help=True, help="Check a store, repair it, clear it, or copy it into another one.")
_ADDRESS = "A folder (a server's data_dir) or redis://HOST:PORT/DB."


@store_verbs.command("verify")
def store_verify(
    store: Annotated[str, typer.Argument(help=_ADDRESS)],
    repair: Annotated[bool, typer.Option("--repair", help="Heal damaged bytes from the cache.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="For a Redis: a server's CACHE_DIR/store, to heal damaged bytes from.")
    ] = None,
) -> None:
    """Read every byte of a store and say what is wrong. It may be in use. Exits with 1 if faults are left."""
    from server.storekeeping import verify_store

    verify_store(store, out, repair=repair, cache=cache)


@store_verbs.command("gc")
def store_gc(
    store: Annotated[str, typer.Argument(help=_ADDRESS)],
    grace: Annotated[
        float, typer.Option(min=0.0, envvar="SWITCHYARD_GC_GRACE", help="Seconds that bytes nobody needs are kept.")
    ] = Settings.model_fields["gc_grace"].default,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go, and what waits.")] = False,
) -> None:
    """Remove bytes that no expert has needed for the grace period, as servers do by themselves. It may be in use."""
    from server.storekeeping import collect_store

    collect_store(store, out, grace=grace, dry_run=dry_run)


@store_verbs.command("migrate")
def store_migrate(
    source: Annotated[str, typer.Argument(help=_ADDRESS)], target: Annotated[str, typer.Argument(help=_ADDRESS)]
) -> None:
    """Copy every expert of one store into another. May be interrupted, and run again."""
    from server.storekeeping import migrate_store

    migrate_store(source, target, out)

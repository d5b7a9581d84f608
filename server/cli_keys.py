"""The verbs of `switchyard keys`: API keys, in a running server or in a store itself."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.audit import AuditEntry, AuditLog
from server.client import Client, Json
from store.access import Role
from store.backends.opening import open_ledger
from store.errors import InvalidRequestError
from store.keys import LATEST_EXPIRY, ApiKey, Keys

out = Console()

key_verbs = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")

Server = Annotated[str, typer.Option(envvar="SWITCHYARD_SERVER", help="Address of a running server.")]
Bearer = Annotated[str | None, typer.Option(envvar="SWITCHYARD_API_KEY", help="An administrator's API key.")]
Store = Annotated[
    str | None,
    typer.Option(
        help="Work on this store instead, running servers or not: a folder (data_dir) or redis://HOST:PORT/DB."
    ),
]
LOCAL = "http://127.0.0.1:8000"

_PARTS = ("ledger", "records", "blobs")
"""What a folder is a store by."""
_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@key_verbs.command("create")
def keys_create(
    tenant: Annotated[str | None, typer.Option(help="Whom it belongs to; an administrator's needs none.")] = None,
    role: Annotated[list[Role] | None, typer.Option(help="May be repeated; default: infer.")] = None,
    label: Annotated[str, typer.Option(help="For people: where it is used.")] = "",
    expires: Annotated[str | None, typer.Option(help="After 90m, 12h, 30d or 8w; default: never.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Its own limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Its own limit.")] = None,
    store: Store = None,
    server: Server = LOCAL,
    api_key: Bearer = None,
) -> None:
    """Make an API key, and print it; it is shown this once. Running servers take it at once."""
    given: Json = {
        "tenant": tenant, "roles": frozenset(role or [Role.INFER]), "label": label, "expires": _moment(expires),
        "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
    }  # fmt: skip
    if store is None:
        made = Client(server, api_key).create_key(**given | {"roles": sorted(given["roles"])})
        key_id, token = made["id"], made["key"]
    else:
        with _opened(store) as keys:
            key, token = keys.create(**given, by=_user())
            key_id = key.id
            _write_down(store, "key.create", key)
    Console(stderr=True).print(f"the key [bold]{key_id}[/] works now; it is shown this once:")
    # Alone on its line and on stdout, so that it can be piped into a secret.
    out.print(token, markup=False, highlight=False, soft_wrap=True)


@key_verbs.command("list")
def keys_list(store: Store = None, server: Server = LOCAL, api_key: Bearer = None) -> None:
    """List all API keys, without their secrets."""
    if store is None:
        rows = Client(server, api_key).keys()
    else:
        with _opened(_existing(store)) as keys:
            rows = [_row(key) for key in keys.list()]
    table = Table("id", "tenant", "roles", "label", "created", "by", "state")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(
            row["id"], escape(row["tenant"] or ""), ", ".join(row["roles"]), escape(row["label"]),
            _date(row["created"]), escape(row["created_by"]), _state(row),
        )  # fmt: skip
    out.print(table if rows else "no keys yet: [bold]switchyard keys create[/] makes one")


@key_verbs.command("revoke")
def keys_revoke(
    id: Annotated[str, typer.Argument(help="The key's id: what follows sy_ in it.")],
    store: Store = None,
    server: Server = LOCAL,
    api_key: Bearer = None,
) -> None:
    """Revoke an API key: it opens nothing from now on, on any server of the store."""
    if store is None:
        Client(server, api_key).revoke_key(id)
    else:
        with _opened(_existing(store)) as keys:
            _write_down(store, "key.revoke", keys.revoke(id))
    out.print(f"the key [bold]{escape(id)}[/] is revoked")


@contextmanager
def _opened(address: str) -> Iterator[Keys]:
    ledger = open_ledger(address)
    try:
        yield Keys(ledger)
    finally:
        ledger.close()


def _existing(address: str) -> str:
    """The address of a store that is there: opening one makes what is not, and a mistyped one has no keys to show."""
    if "://" not in address and not any((Path(address) / part).is_dir() for part in _PARTS):
        raise InvalidRequestError(f"there is no store in {address}: give the data_dir of a server", param="store")
    return address


def _write_down(address: str, action: str, key: ApiKey) -> None:
    """In the audit log beside a folder's experts; a Redis has none, its servers' are theirs."""
    if "://" in address:
        return
    details = {"for": key.tenant or "", "roles": " ".join(sorted(key.roles)), "label": key.label}
    AuditLog(Path(address) / "audit.jsonl").write(AuditEntry(action, key.id, _user(), None, "done", details=details))


def _user() -> str:
    return f"cli:{getpass.getuser()}"


def _moment(after: str | None) -> int | None:
    if after is None:
        return None
    match = re.fullmatch(r"(\d{1,6})([mhdw])", after)
    if match is None:
        raise InvalidRequestError(f"--expires must be a time such as 90m, 12h, 30d or 8w, not {after}", param="expires")
    return int(time.time()) + int(match[1]) * _UNITS[match[2]]


def _row(key: ApiKey) -> dict[str, Any]:
    return vars(key) | {"roles": sorted(key.roles)}


def _state(row: dict[str, Any]) -> str:
    if row["revoked"] is not None:
        return f"[red]revoked {_date(row['revoked'])}[/]" if row["revoked"] else "[red]damaged[/]"
    if row["expires"] is None:
        return "[green]live[/]"
    until = _date(row["expires"])
    return f"[green]until {until}[/]" if time.time() < row["expires"] else f"[red]expired {until}[/]"


def _date(seconds: int) -> str:
    if seconds > LATEST_EXPIRY:  # of a key that was made before there was a latest one
        return "after 9999"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M") if seconds else ""

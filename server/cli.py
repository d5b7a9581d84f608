"""`switchyard`: serve a base and its experts, make expert files, and talk to a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server import __version__
from server.api.compress_options import CompressOptions
from server.cli_files import files, metadata_of
from server.cli_keys import key_verbs
from server.cli_options import bytes_of, with_compression, with_settings
from server.cli_plan import plan_verb
from server.cli_routing import exemplars_verb, route_verb
from server.cli_store import store_verbs
from server.cli_tenants import tenant_verbs
from server.client import Client
from server.settings import Settings
from store.errors import SwitchyardError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="One base LLM, many compressed fine-tunes of it, one OpenAI-compatible server.",
)
out = Console()
err = Console(stderr=True)

Server = Annotated[str, typer.Option(envvar="SWITCHYARD_SERVER", help="Address of a running server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="SWITCHYARD_API_KEY", help="API key, if the server asks for one.")]
LOCAL = "http://127.0.0.1:8000"


@app.command()
@with_settings
def serve(
    settings: Settings,
    experts: Annotated[
        Path | None, typer.Option(help="Folder of expert files to publish at start, if they are not there yet.")
    ] = None,
) -> None:
    """Load a base and serve it with its experts over HTTP.

    Every option is also an environment variable: --kv-bytes is SWITCHYARD_KV_BYTES.
    """
    from server.serving import serve as run  # torch takes seconds to import; the other verbs do without

    run(settings, out, preload=experts)


app.add_typer(files)


@app.command()
@with_compression("Of a folder")
def push(
    file: Annotated[Path, typer.Argument(help="An expert file; or the folder of a checkpoint or a PEFT adapter.")],
    name: Annotated[str | None, typer.Option(help="Name to serve it under; default: the name in the file.")] = None,
    exemplars: Annotated[Path | None, typer.Option(help="JSONL of prompts, instead of those in the file.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what the name points to; needs --name.")] = False,
    *,
    asked: CompressOptions,
    relative_to: Annotated[
        str | None, typer.Option(help="Of a folder: the server's expert that it started from, by name or digest.")
    ] = None,
    labelled: Annotated[Path | None, typer.Option(help="Of a folder, as with compress.")] = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Upload an expert to a running server; it is live when this returns. Run it again to resume a large one.

    A folder is a raw fine-tune: the server compresses it, and Ctrl-C cancels that.
    """
    from server.pushing import push_file
    from server.raw_pushing import outcome, push_folder

    if replace and not name:
        raise SwitchyardError("--replace needs --name: which expert is to be replaced")
    if file.is_dir():
        job = push_folder(
            Client(server, api_key), err, file, asked, exemplars=exemplars, labelled=labelled, relative_to=relative_to,
            name=name, replace=replace,
        )  # fmt: skip
        for line in outcome(job):
            out.print(line, highlight=False)
        return
    if not file.is_file():
        raise SwitchyardError(f"there is no file or folder {file}")
    if asked.model_fields_set or relative_to or labelled:
        raise SwitchyardError(f"{file.name} is compressed already: how to compress is asked of a folder only")
    record, created = push_file(Client(server, api_key), err, file, name=name, exemplars=exemplars, replace=replace)
    state = "is live" if created or replace else "was there already"
    out.print(f"[bold]{escape(record['id'])}[/] {state} ({record['bytes']:,} bytes, digest {record['digest'][:12]})")


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="An expert file, or where some lie: hf://org/repo, s3://bucket/experts.")],
    allow: Annotated[
        str, typer.Option(envvar="SWITCHYARD_HUB_ALLOW", help="Prefixes that may be read below, separated by commas.")
    ] = "",
    name: Annotated[str | None, typer.Option(help="Name to serve it under; default: the name in the file.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what the name points to.")] = False,
    max_size: Annotated[str, typer.Option(help="Where a download is broken off.")] = "2GiB",
    seconds: Annotated[float, typer.Option(min=1.0, help="After which it is given up.")] = 3600.0,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Download expert files from a bucket or a repository, check them, and push them to a running server."""
    from server.pulling import pull as run

    allowed = [prefix.strip() for prefix in allow.split(",") if prefix.strip()]
    client, most = Client(server, api_key), bytes_of(max_size)
    pushed = run(client, err, url, allowed, name=name, replace=replace, max_bytes=most, seconds=seconds)
    for record, _ in pushed:
        size, digest = record["bytes"], record["digest"][:12]
        out.print(f"[bold]{escape(record['id'])}[/] is live ({size:,} bytes, digest {digest})")


@app.command("list")
def list_(
    query: Annotated[str, typer.Option(help="Only those with these letters in what is said about them.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Only those with this tag; may be repeated.")] = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """List the experts of a running server."""
    experts = Client(server, api_key).experts(query=query, tags=tag or ())
    table = Table("name", "digest", "size", "bits/param", "codec", "exemplars", "tags", "description")
    for column in (2, 3, 5):
        table.columns[column].justify = "right"
    for expert in experts:
        table.add_row(
            escape(" = ".join([expert["id"], *expert["aliases"]])), expert["digest"][:12],
            f"{expert['bytes'] / 1e6:.2f} MB",
            f"{expert['bits_per_param']:.3f}", expert["codec"], str(expert["exemplar_count"]),
            escape(" ".join(expert["tags"])), escape(expert["description"]),
        )  # fmt: skip
    none = "no such experts" if query or tag else "no experts yet: [bold]switchyard push FILE[/] adds one"
    out.print(table if experts else none)


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    description: Annotated[str | None, typer.Option(help="One line for people.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Its tags, instead of those it has; may be repeated.")] = None,
    meta: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE to set, KEY= to take away; may be repeated.")
    ] = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Change what is said about an expert of a running server; its file stays as it is."""
    entries = {key: value or None for key, value in metadata_of(meta or []).items()}
    changes = {"description": description, "tags": tag, "metadata": entries or None}
    Client(server, api_key).describe(name, {key: value for key, value in changes.items() if value is not None})
    out.print(f"[bold]{escape(name)}[/] is described anew")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    to: Annotated[str | None, typer.Option(help="Digest of the version; default: the latest earlier one.")] = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Let an expert's name point to an earlier version again; running answers finish."""
    record = Client(server, api_key).roll_back(name, to)
    out.print(f"[bold]{escape(name)}[/] is {record['digest'][:12]} again")


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    force: Annotated[bool, typer.Option("--force", help="Its aliases too.")] = False,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Remove an expert from a running server; running answers finish."""
    Client(server, api_key).remove(name, force=force)
    out.print(f"removed [bold]{escape(name)}[/]")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The alias.")],
    target: Annotated[str, typer.Argument(help="The expert's own name.")],
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Give an expert another name, which follows it through replacements; an alias there is pointed elsewhere."""
    Client(server, api_key).put_alias(name, target)
    out.print(f"[bold]{escape(name)}[/] is {escape(target)}")


@app.command()
def unalias(
    name: Annotated[str, typer.Argument(help="The alias.")], server: Server = LOCAL, api_key: ApiKey = None
) -> None:
    """Take an alias away; its expert stays."""
    Client(server, api_key).remove_alias(name)
    out.print(f"removed the alias [bold]{escape(name)}[/]")


app.command("exemplars")(exemplars_verb)
app.command("route")(route_verb)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="An expert's name, the base's name, or auto.")] = "auto",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Talk to a running server; shows which experts answered. /new starts over, /model NAME changes the model."""
    from server.chatting import converse

    converse(Client(server, api_key), out, model, system, temperature=temperature, max_tokens=max_tokens)


app.command("plan")(plan_verb)
app.add_typer(store_verbs, name="store")
app.add_typer(key_verbs, name="keys")
app.add_typer(tenant_verbs, name="tenants")


def _version(show: bool) -> None:
    if show:
        out.print(f"switchyard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    del version


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: run a verb, and say what went wrong in one line."""
    try:
        app(arguments)
    except SwitchyardError as error:
        err.print(f"[bold red]error:[/] {escape(error.message)}")
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

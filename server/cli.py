"""`switchyard`: serve a base and its experts, make expert files, and talk to a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server import __version__
from server.cli_options import with_settings
from server.client import Client
from server.settings import Settings
from store.codecs.base import CodecName
from store.codecs.t_switch import Knob
from store.errors import SwitchyardError
from store.merge_methods import MergeSettings, Method

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


@app.command()
def compress(
    base: Annotated[str, typer.Option(help="The base model: a checkpoint folder, a GGUF file or a hub id.")],
    tuned: Annotated[Path, typer.Option(help="The fine-tuned checkpoint folder (safetensors).")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The expert file to write.")],
    codec: Annotated[CodecName, typer.Option(help="The method.")] = CodecName.T_SWITCH,
    density: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of the weights that t-switch and compeft keep.")
    ] = 0.05,
    bits_per_param: Annotated[
        float | None, typer.Option(help="What flex-switch may spend per parameter of the base; default: 0.04.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="The same as a file size: 500KB, 1MB.")] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Refuse an expert further from its fine-tune than that, in nats per answer token."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of low-rank.")] = 8,
    strength: Annotated[float, typer.Option(help="Scale of compeft, in standard deviations.")] = 1.0,
    tensor_density: Annotated[
        list[str] | None, typer.Option(help="Another density for some tensors: 'GLOB=DENSITY'; may be repeated.")
    ] = None,
    knob: Annotated[
        Knob | None, typer.Option(help="How magnitude is restored; default: calibrated with exemplars, else l1.")
    ] = None,
    exemplars: Annotated[
        Path | None, typer.Option(help="JSONL of prompts the expert is for; calibrates the knob, and routes.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the expert would like to be called.")] = None,
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    cache_dir: Annotated[
        Path | None, typer.Option(envvar="SWITCHYARD_CACHE_DIR", help="Where a converted base is kept.")
    ] = None,
) -> None:
    """Compress a full fine-tune of the base into an expert file, and report what it costs."""
    from server.compressing import compress_with_progress

    densities = _tensor_densities(tensor_density or [])
    compress_with_progress(
        out, base, tuned, output, cache_dir=cache_dir, exemplars=exemplars, codec=codec, density=density, knob=knob,
        max_kl=max_kl, bits_per_param=bits_per_param, max_size=_bytes(max_size) if max_size else None, rank=rank,
        strength=strength, tensor_density=densities, name=name, description=description,
    )  # fmt: skip


@app.command()
def merge(
    experts: Annotated[list[str], typer.Argument(help="Expert files of one base: FILE, or FILE=WEIGHT.")],
    base: Annotated[str, typer.Option(help="The base they were made for.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The expert file to write.")],
    method: Annotated[Method, typer.Option(help="How their deltas become one.")] = Method.TIES,
    strength: Annotated[
        float | None, typer.Option(help="Multiplier of the result; default: 0.3 for sums, else 1.")
    ] = None,
    drop: Annotated[float, typer.Option(help="Share of the entries that dare drops.")] = 0.5,
    name: Annotated[str | None, typer.Option(help="What the result would like to be called.")] = None,
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    cache_dir: Annotated[
        Path | None, typer.Option(envvar="SWITCHYARD_CACHE_DIR", help="Where a converted base is kept.")
    ] = None,
) -> None:
    """Merge experts into one, offline; a negative weight takes a skill away."""
    from server.merging import merge_files

    settings = MergeSettings(method=method, strength=strength, drop=drop)
    merge_files(out, base, experts, output, settings, name=name, description=description, cache_dir=cache_dir)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An expert file.")]) -> None:
    """Show what is in an expert file, without loading any model."""
    from server.inspecting import show_expert

    show_expert(file, out)


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="An expert file.")],
    name: Annotated[str | None, typer.Option(help="Name to serve it under; default: the name in the file.")] = None,
    exemplars: Annotated[Path | None, typer.Option(help="JSONL of prompts, instead of those in the file.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what the name points to; needs --name.")] = False,
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Upload an expert file to a running server; it is live when this returns."""
    if not file.is_file():
        raise SwitchyardError(f"there is no file {file}")
    if replace and not name:
        raise SwitchyardError("--replace needs --name: which expert is to be replaced")
    with err.status(f"uploading {file.name}"):
        record, created = Client(server, api_key).push(file, name=name, exemplars=exemplars, replace=replace)
    state = "is live" if created or replace else "was there already"
    out.print(f"[bold]{escape(record['id'])}[/] {state} ({record['bytes']:,} bytes, digest {record['digest'][:12]})")


@app.command("list")
def list_(server: Server = LOCAL, api_key: ApiKey = None) -> None:
    """List the experts of a running server."""
    experts = Client(server, api_key).experts()
    table = Table("name", "digest", "size", "bits/param", "codec", "exemplars", "description")
    for column in (2, 3, 5):
        table.columns[column].justify = "right"
    for expert in experts:
        table.add_row(
            escape(expert["id"]), expert["digest"][:12], f"{expert['bytes'] / 1e6:.2f} MB",
            f"{expert['bits_per_param']:.3f}", expert["codec"], str(expert["exemplar_count"]),
            escape(expert["description"]),
        )  # fmt: skip
    out.print(table if experts else "no experts yet: [bold]switchyard push FILE[/] adds one")


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
    name: Annotated[str, typer.Argument(help="The expert's name.")], server: Server = LOCAL, api_key: ApiKey = None
) -> None:
    """Remove an expert from a running server; running answers finish."""
    Client(server, api_key).remove(name)
    out.print(f"removed [bold]{escape(name)}[/]")


@app.command()
def route(
    prompt: Annotated[str, typer.Argument(help="What a user might ask.")],
    server: Server = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Show which experts would answer a prompt, and why."""
    decision = Client(server, api_key).route(prompt)
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


store_verbs = typer.Typer(no_args_is_help=True, help="Check a store, repair it, or copy it into another one.")
app.add_typer(store_verbs, name="store")
_ADDRESS = "A folder (a server's data_dir) or redis://HOST:PORT/DB."


@store_verbs.command("verify")
def store_verify(
    store: Annotated[str, typer.Argument(help=_ADDRESS)],
    repair: Annotated[
        bool, typer.Option("--repair", help="Heal damaged bytes from the cache, and remove what belongs to nobody.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="For a Redis: a server's CACHE_DIR/store, to heal damaged bytes from.")
    ] = None,
) -> None:
    """Read every byte of a store and say what is wrong. It may be in use. Exits with 1 if faults are left."""
    from server.storekeeping import verify_store

    verify_store(store, out, repair=repair, cache=cache)


@store_verbs.command("migrate")
def store_migrate(
    source: Annotated[str, typer.Argument(help=_ADDRESS)], target: Annotated[str, typer.Argument(help=_ADDRESS)]
) -> None:
    """Copy every expert of one store into another. May be interrupted, and run again."""
    from server.storekeeping import migrate_store

    migrate_store(source, target, out)


def _version(show: bool) -> None:
    if show:
        out.print(f"switchyard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    del version


def _tensor_densities(given: list[str]) -> dict[str, float]:
    densities: dict[str, float] = {}
    for text in given:
        pattern, separator, value = text.rpartition("=")
        try:
            densities[pattern] = float(value)
        except ValueError:
            separator = ""
        if not separator or not 0.0 <= densities[pattern] <= 1.0:
            raise SwitchyardError(f"--tensor-density must be GLOB=DENSITY with a density from 0 to 1, not {text}")
    return densities


def _bytes(text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise SwitchyardError(f"--max-size must be a size such as 500KB or 1MiB, not {text}") from None


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
